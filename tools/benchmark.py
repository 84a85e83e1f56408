"""Everything that is measured about pretraining on this machine, and a table of what must come out.

Runs benchmark_views.py, benchmark_step.py and benchmark_run.py one after the other, each within its time, passes on
their JSON lines, and prints the table last: what was measured (median and range of the runs), what has to be reached,
and whether it is, or by how much not. What needs a GPU, and what was not measured, is said. It exits with 0 also if
something is not reached.

`--table FILE ...` measures nothing: it prints the table of figures that were measured before.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarking import ALL_METHODS, Figure, tell

TOOLS = Path(__file__).resolve().parent
EPILOG = """examples:
  python tools/benchmark.py                                  all of it, within 12 minutes
  python tools/benchmark.py --only views run --json bench.jsonl
  python tools/benchmark.py --table bench.jsonl other.jsonl  the table again
"""


class Script(NamedTuple):
    """One of the programs that measure.

    Attributes:
        name: Of the program, without benchmark_ and .py.
        limit_s: Seconds after which it is ended; what it has printed by then counts.
        on_cpu: Its arguments where there is no GPU.
        on_gpu: Those where there is one.
    """

    name: str
    limit_s: int
    on_cpu: tuple[str, ...]
    on_gpu: tuple[str, ...]


SCRIPTS = (
    Script("views", 130, ("--rounds", "3", "--min-seconds", "0.5"), ("--rounds", "3", "--min-seconds", "0.5")),
    Script("step", 260, ("--rounds", "3"), ()),
    Script("run", 300, ("--batch-size", "4", "--seconds", "4", "--samples", "20000"), ()),
)
"""Together within 12 minutes."""

SECONDS_TO_END = 10
"""Between being asked to end and being killed."""


class Goal(NamedTuple):
    """A row of the table: figures that have to reach something.

    Attributes:
        script: Who measures them.
        what: In words.
        bar: What has to be reached, as in `Figure.bar`.
        method: `Figure.method`; "" for any.
        figure: `Figure.figure`.
        word: What the figure's name contains.
        device: "cpu" or "gpu" if it holds for such a machine alone, "" for any.
    """

    script: str
    what: str
    bar: str
    method: str
    figure: str
    word: str = ""
    device: str = ""

    @property
    def part(self) -> str:
        """Which part of benchmark_gpu.sh measures it."""
        if self.script != "run":
            return self.script
        return "start" if self.figure in ("start", "memory") else self.method


GOALS = (
    Goal("views", "V2 host half per core / reference", ">= 6", "detco", "V2"),
    Goal("views", "V2 host half per core / reference", ">= 3", "moco_v2", "V2"),
    Goal("views", "V3 both halves / reference", ">= 1.5", "detco", "V3", device="cpu"),
    Goal("views", "V3 both halves / reference", ">= 1.5", "moco_v2", "V3", device="cpu"),
    Goal("step", "S1 step / its bound", "<= 1.10", "moco_v2", "S1", device="cpu"),
    Goal("step", "S1 step / its bound", "<= 1.10", "moco_v2", "S1", device="gpu"),
    Goal("step", "S1 step / its bound", "<= 1.15", "detco", "S1", device="cpu"),
    Goal("step", "S1 step / its bound", "<= 1.15", "detco", "S1", device="gpu"),
    Goal("step", "S3 ours / lightly", ">= 1.0", "moco_v2", "S3", device="cpu"),
    Goal("step", "S3 ours / lightly", ">= 1.2", "moco_v2", "S3", device="gpu"),
    Goal("step", "peak memory / its bound's", "<= 1.5", "detco", "M1"),
    Goal("run", "E1 / min(E2, E3)", ">= 0.95", "moco_v2", "E1", "min(E2, E3)"),
    Goal("run", "E1 / min(E2, E3)", ">= 0.95", "detco", "E1", "min(E2, E3)"),
    Goal("run", "E1 / E2 with 16 cores", ">= 0.90", "moco_v2", "E1", "E1 / E2", "gpu"),
    Goal("run", "E1 / E2 with 16 cores", ">= 0.90", "detco", "E1", "E1 / E2", "gpu"),
    Goal("run", "E1 images/s, H200 class, batch 256", ">= 1400", "detco", "E1", "from JPEG files", "gpu"),
    Goal("run", "E1 images/s, H200 class, batch 256", ">= 2400", "moco_v2", "E1", "from JPEG files", "gpu"),
    Goal("run", "E1 images/s, H200 class, batch 256", ">= 500", "soco_fpn", "E1", "from JPEG files", "gpu"),
    Goal("run", "E1 / reference pipeline", ">= 3", "detco", "E1", "reference", "gpu"),
    Goal("run", "E1 / reference pipeline", ">= 3", "moco_v2", "E1", "reference", "gpu"),
    Goal("run", "E1 / reference pipeline", ">= 3", "soco_fpn", "E1", "reference", "gpu"),
    Goal("run", "start to first step, 1.3 million paths", "<= 10", "", "start"),
    Goal("run", "growth of a loader worker", "<= 8", "", "memory"),
)
"""What must come out."""


def limit_of(bar: str) -> tuple[str, float]:
    """The relation and the number of a bar."""
    relation, number = bar.split()
    return relation, float(number)


def is_on_gpu(figure: Figure) -> bool:
    """Whether it was measured on a GPU: then the machine's name begins with the GPU's, and the processor's follows."""
    return ";" in figure.machine


def meets(figure: Figure, goal: Goal) -> bool:
    """Whether a figure is one that `goal` speaks of."""
    return (
        figure.bar is not None
        and limit_of(figure.bar) == limit_of(goal.bar)
        and figure.figure == goal.figure
        and goal.method in ("", figure.method)
        and goal.word in figure.name
        and goal.device in ("", "gpu" if is_on_gpu(figure) else "cpu")
    )


def measured(figure: Figure) -> str:
    """Median, range and runs."""
    span = f" ({_short(figure.min)} to {_short(figure.max)}, {figure.runs} runs)" if figure.runs > 1 else " (1 run)"
    return f"{_short(figure.value)} {figure.unit}{span}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def verdict(figure: Figure) -> str:
    """Whether the figure reaches its bar, or by how much it does not; and whether another run might say otherwise."""
    assert figure.bar is not None
    relation, limit = limit_of(figure.bar)
    crosses = figure.min < limit < figure.max
    doubt = ", but the range crosses the bar" if crosses else ""
    if figure.passes:
        return f"pass{doubt}"
    gap = 1 - figure.value / limit if relation == ">=" else figure.value / limit - 1
    return f"MISSED by {100 * gap:.1f} %{doubt}"


def table(figures: Sequence[Figure], troubles: Mapping[str, str]) -> str:
    """Markdown: one row per goal and figure of it.

    Args:
        figures: All that were measured.
        troubles: By name of a script, or of a part of benchmark_gpu.sh, what went wrong with it: told where its
            figures are missing.
    """
    heading = ("what", "method", "measured", "bar", "")
    rows = [heading, ("---",) * len(heading)]
    for goal in GOALS:
        what = f"{goal.what}, {goal.device.upper()}" if goal.device else goal.what
        found = [figure for figure in figures if meets(figure, goal)]
        rows += [
            (what, figure.method, f"{measured(figure)}: {figure.name}", goal.bar, verdict(figure)) for figure in found
        ]
        if not found:
            rows.append((what, goal.method or ALL_METHODS, "-", goal.bar, _why_not(goal, figures, troubles)))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _why_not(goal: Goal, figures: Sequence[Figure], troubles: Mapping[str, str]) -> str:
    devices = {"gpu" if is_on_gpu(figure) else "cpu" for figure in figures}
    if goal.device == "gpu" and devices == {"cpu"}:
        return "needs a GPU"
    for name in (goal.script, goal.part):
        if name in troubles:
            return f"not measured: {name} {troubles[name]}"
    if goal.device == "cpu" and "gpu" in devices:
        return "not measured: the device was a GPU"
    return f"not measured: benchmark_{goal.script}.py has no such figure"


def everything(figures: Sequence[Figure]) -> str:
    """Markdown: all figures, those without a bar as well."""
    heading = ("figure", "method", "what", "measured")
    rows = [heading, ("---",) * len(heading)]
    rows += [(figure.figure, figure.method, figure.name, measured(figure)) for figure in figures]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def run_script(script: Script, arguments: Sequence[str]) -> tuple[list[Figure], str]:
    """Run one of the programs, passing on its JSON lines as they come.

    Args:
        script: Which.
        arguments: Its command line.

    Returns:
        The figures that it printed, and what went wrong; "" if nothing did.
    """
    command = [sys.executable, "-u", str(TOOLS / f"benchmark_{script.name}.py"), *arguments]
    tell(f"$ {' '.join(command[2:])}   (at most {script.limit_s} s)")
    figures, started = [], time.monotonic()
    # A session of its own, so that its loader workers can be ended with it.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    timer = threading.Timer(script.limit_s, _end, [process])
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            for figure in figures_in([line]):
                figures.append(figure)
                figure.print()
        code = process.wait()
    finally:
        timer.cancel()
        _end(process)
    took_s = time.monotonic() - started
    tell(f"benchmark_{script.name}.py: {len(figures)} figures in {took_s:.0f} s, exit code {code}")
    if code == 0:
        return figures, ""
    return figures, f"was ended after {took_s:.0f} s" if took_s >= script.limit_s else f"failed with exit code {code}"


def _end(process: subprocess.Popen[str]) -> None:
    """End a program and all it has started, if it runs; it has some seconds to say what it knows."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_END)


def figures_in(lines: Iterable[str]) -> list[Figure]:
    """The figures among lines; one that begins like a figure and is none is named and passed over."""
    figures = []
    for line in lines:
        if not line.startswith("{"):
            continue
        try:
            figures.append(Figure.from_json(line))
        except ValueError as error:
            tell(str(error))
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or read what was measured, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = tuple(script.name for script in SCRIPTS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of the programs (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON lines of all figures there as well")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="JSON lines; measure nothing")
    parser.add_argument(
        "--trouble", nargs=2, action="append", default=[], metavar=("NAME", "TEXT"), help="of --table: what went wrong"
    )
    args = parser.parse_args(argv)
    troubles = dict(args.trouble)
    if args.table:
        try:
            figures = [figure for file in args.table for figure in figures_in(file.read_text().splitlines())]
        except FileNotFoundError as error:
            parser.error(f"there is no file {error.filename}")
    else:
        if args.json:
            try:
                args.json.open("a").close()
            except OSError as error:  # now, and not after minutes of measuring
                parser.error(f"cannot write --json {args.json}: {error.strerror}")
        figures = measure_all(args.only, troubles)
    if args.json:
        args.json.write_text("".join(f"{figure.to_json()}\n" for figure in figures))
    print(f"\nAll figures\n\n{everything(figures)}\n\nWhat must come out\n\n{table(figures, troubles)}")
    return 0


def measure_all(names: Sequence[str], troubles: dict[str, str]) -> list[Figure]:
    """Run the programs of these names; what goes wrong is told and put into `troubles`."""
    import torch

    figures: list[Figure] = []
    for script in SCRIPTS:
        if script.name not in names:
            troubles[script.name] = "was left out"
            continue
        found, trouble = run_script(script, script.on_gpu if torch.cuda.is_available() else script.on_cpu)
        figures += found
        if trouble:
            tell(f"benchmark_{script.name}.py {trouble}")
            troubles[script.name] = trouble
    return figures


if __name__ == "__main__":
    sys.exit(main())
