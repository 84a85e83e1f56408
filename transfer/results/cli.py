"""`detco-results`: our transfer results beside the published ones."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from transfer.results import markup, records, text
from transfer.results.cells import PLUS_MINUS
from transfer.results.reference import Reference, load_reference
from transfer.results.repeats import group_repeats
from transfer.results.runs import LeftOut, find_runs
from transfer.results.table import Table
from transfer.results.tables import NO_RECIPE, build_tables

Render = Callable[[Sequence[Table], Reference, Sequence[LeftOut]], str]

FORMATS: dict[str, Render] = {
    "text": lambda tables, reference, left_out: text.render(tables, reference),
    "md": lambda tables, reference, left_out: markup.render_markdown(tables, reference),
    "latex": lambda tables, reference, left_out: markup.render_latex(tables, reference),
    "csv": lambda tables, reference, left_out: records.render_csv(tables),
    "json": records.render_json,
}
SUFFIXES = {".txt": "text", ".md": "md", ".tex": "latex", ".csv": "csv", ".json": "json"}

EPILOG = """examples:
  detco-results output/transfer                                    every finished run below a folder
  detco-results output/voc_* --task voc0712_fasterrcnn_c4_24k -o voc.tex
"""


class UsageError(ValueError):
    """Wrong input; the message says what to do."""


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="detco-results",
        description="Put finished transfer runs beside the published results of the same task and recipe.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to show")
    what.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUNS",
        help="run directories, or folders searched for results.json at any depth; without any, only published rows",
    )
    what.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="ID",
        help="only this task; may be repeated (default: those of RUNS)",
    )
    what.add_argument(
        "--recipe",
        action="append",
        default=[],
        metavar="NAME",
        help=f"only this recipe, {NO_RECIPE!r} for results that state none; may be repeated (default: all)",
    )
    what.add_argument("--no-reference", action="store_true", help="leave the published rows out (default: show them)")
    what.add_argument(
        "--list-tasks", action="store_true", help="print task ids with their number of published rows, and stop"
    )
    how = parser.add_argument_group("how to write it")
    how.add_argument(
        "--format", choices=sorted(FORMATS), help="output format (default: by the suffix of FILE, text on the console)"
    )
    how.add_argument("-o", "--output", type=Path, metavar="FILE", help="write to this file (default: standard output)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Returns:
        0; 2 if the input is wrong or nothing in it is usable; 1 if the output cannot be written.
    """
    arguments = build_parser().parse_args(argv)
    try:
        content = list_tasks(load_reference()) if arguments.list_tasks else _report(arguments)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _write(content, arguments.output)


def list_tasks(reference: Reference) -> str:
    """Return one line per task: id, number of published rows, recipes, title."""
    width = max(map(len, reference.tasks))
    lines = [f"{'task'.ljust(width)}  rows  title (published rows per recipe)"]
    for task, title in reference.tasks.items():
        counts = {recipe: len(reference.rows(task, recipe)) for recipe in reference.recipes_of(task)}
        recipes = ", ".join(f"{recipe or 'not stated'} {count}" for recipe, count in counts.items())
        lines.append(f"{task.ljust(width)}  {sum(counts.values()):4d}  {title} ({recipes})")
    return "\n".join(lines) + "\n"


def _report(arguments: argparse.Namespace) -> str:
    """Return the tables in the chosen format; what is left out is named on standard error."""
    chosen = _format(arguments.format, arguments.output)
    if not arguments.runs and (not arguments.task or arguments.no_reference):
        raise UsageError("name run directories, or a --task to see its published rows alone (--list-tasks lists them)")
    reference = load_reference()
    runs, left_out = find_runs(arguments.runs)
    measurements, duplicates = group_repeats(runs)
    left_out += duplicates
    for item in left_out:
        print(f"left out: {item.path}: {item.reason}", file=sys.stderr)
    if arguments.runs and not runs:
        raise UsageError("none of the given paths holds a finished run; detco-transfer writes results.json at its end")
    known = dict.fromkeys([*reference.tasks, *(run.task for run in runs)])
    for task in arguments.task:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; --list-tasks lists them"
            raise UsageError(f"unknown task {task!r}{hint}")
    tables = build_tables(
        reference,
        measurements,
        tasks=arguments.task,
        recipes=arguments.recipe,
        with_published=not arguments.no_reference,
    )
    if not tables:
        found = ", ".join(sorted({f"{run.task} ({run.recipe or NO_RECIPE})" for run in runs})) or "none"
        raise UsageError(f"no results for this task and recipe; tasks (recipes) of the given runs: {found}")
    return FORMATS[chosen](tables, reference, left_out)


def _format(chosen: str | None, output: Path | None) -> str:
    """Return the format: as asked, else by the suffix of the file, else text."""
    if chosen is not None:
        return chosen
    if output is None:
        return "text"
    if output.suffix not in SUFFIXES:
        raise UsageError(f"cannot tell the format from {output.name!r}; add --format ({', '.join(sorted(FORMATS))})")
    return SUFFIXES[output.suffix]


def _write(content: str, output: Path | None) -> int:
    """Write to the file or to standard output; return the exit code."""
    if output is not None:
        try:
            output.write_text(content, encoding="utf-8")
        except OSError as error:
            print(f"error: cannot write {output}: {error}", file=sys.stderr)
            return 1
        print(f"wrote {output}", file=sys.stderr)
        return 0
    try:
        content.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:  # a console that cannot show the sign
        content = content.replace(PLUS_MINUS, "+-").encode("ascii", "replace").decode("ascii")
    try:
        print(content, end="", flush=True)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        sys.stderr.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
