"""`detco-results`: our transfer results beside the published ones."""

import argparse
import difflib
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from transfer.results import markup, records, text
from transfer.results.cells import PLUS_MINUS
from transfer.results.listing import choose_tables, list_tables, list_tasks
from transfer.results.paper_layout import build_paper_table, measurements_in
from transfer.results.paper_tables import PaperTable, load_paper_tables
from transfer.results.reference import Reference, load_reference
from transfer.results.repeats import Measurement, group_repeats
from transfer.results.runs import LeftOut, Run, find_runs
from transfer.results.table import Table
from transfer.results.tables import NO_RECIPE, build_tables

Render = Callable[[Sequence[Table], Reference, Sequence[LeftOut], int], str]

FORMATS: dict[str, Render] = {
    "text": lambda tables, reference, left_out, width: text.render(tables, width),
    "md": lambda tables, reference, left_out, width: markup.render_markdown(tables),
    "latex": lambda tables, reference, left_out, width: markup.render_latex(tables),
    "csv": lambda tables, reference, left_out, width: records.render_csv(tables),
    "json": lambda tables, reference, left_out, width: records.render_json(tables, reference, left_out),
}
SUFFIXES = {".txt": "text", ".md": "md", ".tex": "latex", ".csv": "csv", ".json": "json"}
WIDTH = 120  # of text that does not go to a terminal

EPILOG = """examples:
  detco-results output/transfer                                    every finished run below a folder
  detco-results output/voc_* --task voc0712_fasterrcnn_c4_24k -o voc.tex
  detco-results --layout paper --table detco/3 output/transfer     a table of a paper with our rows below
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
    _add_what(parser.add_argument_group("what to show"))
    how = parser.add_argument_group("how to write it")
    how.add_argument(
        "--format", choices=sorted(FORMATS), help="output format (default: by the suffix of FILE, text on the console)"
    )
    how.add_argument(
        "--width",
        type=int,
        metavar="N",
        help=f"characters per line of text, at least {text.NARROWEST} (default: those of the terminal, else {WIDTH})",
    )
    how.add_argument("-o", "--output", type=Path, metavar="FILE", help="write to this file (default: standard output)")
    return parser


def _add_what(what: argparse._ArgumentGroup) -> None:
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
    what.add_argument(
        "--layout",
        choices=("task", "paper"),
        default="task",
        help="a table per task and recipe, or the papers' tables (default: task)",
    )
    what.add_argument(
        "--table",
        action="append",
        default=[],
        metavar="ID",
        help="with --layout paper: only this table, e.g. detco/3, soco/5 (5a to 5d) or soco/5a; may be repeated "
        "(default: those in which RUNS have a place)",
    )
    what.add_argument("--no-reference", action="store_true", help="leave the published rows out (default: show them)")
    what.add_argument(
        "--list-tasks", action="store_true", help="print task ids with their number of published rows, and stop"
    )
    what.add_argument(
        "--list-tables", action="store_true", help="print the ids of the papers' tables with their tasks, and stop"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Returns:
        0; 2 if the input is wrong or nothing in it is usable; 1 if the output cannot be written.
    """
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.list_tasks:
            content = list_tasks(load_reference())
        elif arguments.list_tables:
            content = list_tables(load_paper_tables())
        else:
            content = _report(arguments)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _write(content, arguments.output)


def _report(arguments: argparse.Namespace) -> str:
    """Return the tables in the chosen format; what is left out is named on standard error."""
    chosen = _format(arguments.format, arguments.output)
    width = _width(arguments.width, arguments.output)
    _check(arguments)
    reference = load_reference()
    runs, left_out = find_runs(arguments.runs)
    measurements, duplicates = group_repeats(runs)
    left_out += duplicates
    for item in left_out:
        print(f"left out: {item.path}: {item.reason}", file=sys.stderr)
    if arguments.runs and not runs:
        raise UsageError("none of the given paths holds a finished run; detco-transfer writes results.json at its end")
    report = _paper_report if arguments.layout == "paper" else _task_report
    return FORMATS[chosen](report(arguments, reference, runs, measurements), reference, left_out, width)


def _check(arguments: argparse.Namespace) -> None:
    """Raise UsageError if the arguments ask for nothing, or for things that do not go together."""
    if arguments.layout == "paper":
        if arguments.task or arguments.recipe:
            raise UsageError("--task and --recipe choose tables of one task; with --layout paper use --table ID")
        if not arguments.runs and (not arguments.table or arguments.no_reference):
            raise UsageError("name run directories, or a --table to see its published rows (--list-tables lists them)")
        return
    if arguments.table:
        raise UsageError("--table names a table of a paper; add --layout paper")
    if not arguments.runs and (not arguments.task or arguments.no_reference):
        raise UsageError("name run directories, or a --task to see its published rows alone (--list-tasks lists them)")


def _task_report(
    arguments: argparse.Namespace, reference: Reference, runs: Sequence[Run], measurements: Sequence[Measurement]
) -> list[Table]:
    """Return one table per task and recipe."""
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
    if not tables and not runs:
        raise UsageError(f"nothing is published for {', '.join(arguments.task)} as asked; name run directories")
    if not tables:
        raise UsageError(f"no results for this task and recipe; tasks (recipes) of the given runs: {_tasks_of(runs)}")
    return tables


def _paper_report(
    arguments: argparse.Namespace, reference: Reference, runs: Sequence[Run], measurements: Sequence[Measurement]
) -> list[Table]:
    """Return the papers' tables: those asked for, else those in which the runs have a place."""
    known = load_paper_tables()
    try:
        chosen = choose_tables(known, arguments.table)
    except ValueError as error:
        raise UsageError(str(error)) from error
    joined = [table for table in chosen if measurements_in(table, measurements)]
    if not arguments.table and not joined:
        raise UsageError(f"no table of the papers has columns for the given runs: {_tasks_of(runs)}; try --layout task")
    if arguments.table and runs:
        for table in chosen:
            if table not in joined:
                print(f"{table.id}: {_needed(table)}; of the given runs: {_tasks_of(runs)}", file=sys.stderr)
    return [
        build_paper_table(table, reference, measurements, with_published=not arguments.no_reference)
        for table in (chosen if arguments.table else joined)
    ]


def _needed(table: PaperTable) -> str:
    """Return which tasks and recipes a table takes."""
    taken = [f"{group.task} ({group.recipe or NO_RECIPE})" for group in table.groups if not group.nearest]
    return f"takes runs of {', '.join(taken)}" if taken else "takes no runs, its numbers are not Detectron2's"


def _tasks_of(runs: Sequence[Run]) -> str:
    return ", ".join(sorted({f"{run.task} ({run.recipe or NO_RECIPE})" for run in runs})) or "none"


def _width(chosen: int | None, output: Path | None) -> int:
    """Return the characters per line: as asked, else those of the terminal, if text goes to one."""
    if chosen is not None:
        if chosen < text.NARROWEST:
            raise UsageError(f"--width is {chosen}, at least {text.NARROWEST} are needed")
        return chosen
    if output is not None or not sys.stdout.isatty():
        return WIDTH
    return max(text.NARROWEST, shutil.get_terminal_size((WIDTH, 24)).columns)


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
