"""What all benchmarks share: a figure and its JSON line, side-by-side measurement, the machine's name.

One figure is one line of JSON on standard output; what is said to people goes to standard error. So the output of any
benchmark, or of several one after the other, is a JSON-lines file.

Contestants are measured by turns and not one after the other: whatever else the machine does then hits all of them,
and a ratio is taken round by round. The median of the rounds is the figure; the least and the greatest tell how far
to trust it.
"""

import dataclasses
import datetime
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import torch

ALL_METHODS = "all"
"""`Figure.method` of what depends on no method."""

BAR = re.compile(r"(>=|<=) (\d+(?:\.\d+)?)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number.

    Raises:
        ValueError: If there is no number, or the bar is not of the stated form.
    """

    figure: str
    """Which figure of `docs/benchmarks.md` it belongs to, as in "V2"."""

    method: str
    """A name of `detco.methods.METHODS`, or `ALL_METHODS`."""

    name: str
    """What was measured, as in "ours / reference, ImageNet-size photos"; unique within figure and method."""

    value: float
    """Median of the runs."""

    unit: str
    """As in "images/s"; "x" for ratios."""

    min: float
    max: float
    runs: int
    machine: str
    torch: str
    date: str
    """Day, YYYY-MM-DD."""

    bar: str | None = None
    """What is to be reached, as in ">= 6" or "<= 1.10"; None if nothing is."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or self.runs < 1:
            raise ValueError(f"{self.figure} {self.name} is {self.value} after {self.runs} runs: no figure")
        if self.bar is not None and not BAR.fullmatch(self.bar):
            raise ValueError(f'bar is {self.bar!r}; it must be like ">= 6" or "<= 1.10"')

    @property
    def passes(self) -> bool | None:
        """Whether the bar is reached; None if there is none."""
        if self.bar is None:
            return None
        relation, limit = self.bar.split()
        return self.value >= float(limit) if relation == ">=" else self.value <= float(limit)

    def to_json(self) -> str:
        """One line without its end; `bar` only if there is one."""
        fields = dataclasses.asdict(self)
        if self.bar is None:
            del fields["bar"]
        for key in ("value", "min", "max"):
            fields[key] = float(f"{fields[key]:.5g}")  # nothing behind is ever reproducible
        return json.dumps(fields)

    @classmethod
    def from_json(cls, line: str) -> "Figure":
        """Read a line that `to_json` made.

        Raises:
            ValueError: If it is no such line.
        """
        try:
            return cls(**json.loads(line))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not the JSON line of a figure: {line.strip()[:200]!r} ({error})") from error

    def print(self, file: TextIO | None = None) -> None:
        """Print the line at once, so that a run that is ended early has told what it knew."""
        print(self.to_json(), file=file or sys.stdout, flush=True)


def summarise(
    values: Sequence[float],
    *,
    figure: str,
    name: str,
    unit: str,
    device: torch.device,
    method: str = ALL_METHODS,
    bar: str | None = None,
) -> Figure:
    """The figure of several runs: their median and range, with this machine, torch and day.

    Args:
        values: One per run.
        figure: As `Figure.figure`; the others likewise.
        name: What was measured.
        unit: Of the values.
        device: Where it was measured.
        method: Which method.
        bar: What is to be reached.
    """
    return Figure(
        figure=figure,
        method=method,
        name=name,
        value=statistics.median(values),
        unit=unit,
        min=min(values),
        max=max(values),
        runs=len(values),
        machine=machine_name(device),
        torch=torch.__version__,
        date=datetime.date.today().isoformat(),
        bar=bar,
    )


def machine_name(device: torch.device) -> str:
    """What computes: the GPU if the device is one, the processor, and the cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    host = f"{_processor_name()}, {cores} cores"
    return f"{torch.cuda.get_device_name(device)}; {host}" if device.type == "cuda" else host


def _processor_name() -> str:
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        for line in cpu_info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def synchronizer(device: torch.device) -> Callable[[], None]:
    """A function that waits until the device has done all it was told."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def alternate(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    min_seconds: float,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Measure several pieces of work by turns.

    Every one runs once unmeasured (first allocations, compilation). Then, in each round, each is repeated until
    `min_seconds` have passed; every other round goes through them backwards.

    Args:
        contestants: Work by name.
        rounds: How often each is measured, at least 1.
        min_seconds: Least duration of one measurement; 0 measures single calls.
        device: What is waited for before the clock is read.
        clock: In seconds. `time.process_time` for work of one thread on a machine that is not at rest.

    Returns:
        By name, the seconds of one call in each round.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; at least one is needed")
    synchronize = synchronizer(device)
    for work in contestants.values():
        work()
    synchronize()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in list(contestants)[:: -1 if number % 2 else 1]:
            seconds[name].append(_seconds_per_call(contestants[name], min_seconds, synchronize, clock))
    return seconds


def _seconds_per_call(
    work: Callable[[], object], min_seconds: float, synchronize: Callable[[], None], clock: Callable[[], float]
) -> float:
    calls, start = 0, clock()
    while True:
        work()
        # Waiting after each call would charge short work on a GPU for every start; so calls are counted in bunches.
        calls += 1
        if calls & (calls - 1) == 0 or clock() - start >= min_seconds:
            synchronize()
            passed = clock() - start
            if passed >= min_seconds:
                return passed / calls


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Round by round, as `alternate` measured them."""
    return [above / below for above, below in zip(numerator, denominator, strict=True)]


def rates(items: float, seconds: Sequence[float]) -> list[float]:
    """Items per second, of calls that handle `items` each."""
    return [items / value for value in seconds]


def tell(text: str) -> None:
    """Say something to people: on standard error, at once."""
    print(text, file=sys.stderr, flush=True)
