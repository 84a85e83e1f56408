"""E1, E2, E3 and R3 of benchmark_run.py: the rates of a whole run and of its parts, by turns."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

# Run as a file, Python looks for packages beside it; those of the suite lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from benchmarking import ratios, summarise
from fvcore.common.config import CfgNode
from measured_run import REFERENCE_BATCH, config_of, make_loader, make_reference_loader, make_trainer, photos_of
from torch.profiler import ProfilerActivity, profile

from pretrain.config import build_recipe
from pretrain.launch import StopRequest
from pretrain.prefetch import to_device

BATCHES_ON_DEVICE = 2
"""Different batches that E2 goes round."""

MIN_BATCHES = 3
"""The least that a rate is taken over."""

PROFILE_ROWS = 40

GPU_BARS = {"moco_v2": ">= 2400", "detco": ">= 1400", "soco_fpn": ">= 500"}
"""Images per second from files, one GPU of H200 class with 16 cores, batch 256."""

CONFIGS_WITH_BARS = {"moco_v2": [], "detco": [], "soco_fpn": ["METHOD.LEVEL_ROUTING", "own"]}
"""What is changed in the published config for the figure that has a bar."""


class Timed:
    """Hands batches on until time is up, and remembers when each was asked for.

    A step takes the time between two requests. A loop that works ahead of the device asks for the next batch while the
    last one is computed, but it cannot ask more often than the device gets done.
    """

    def __init__(self, batches: Iterator[Any], *, warm: int, seconds: float) -> None:
        """Take from endless `batches`: `warm` uncounted ones, then at least MIN_BATCHES in at least `seconds`."""
        self._batches = batches
        self._warm = warm
        self._seconds = seconds
        self._asked: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        while True:
            self._asked.append(time.perf_counter())
            if self.num_counted >= MIN_BATCHES and self._counted_s >= self._seconds:
                return
            yield next(self._batches)

    @property
    def num_handed_on(self) -> int:
        """Batches so far, uncounted ones included."""
        return len(self._asked) - 1

    @property
    def num_counted(self) -> int:
        """Batches between the first request that counts and the last."""
        return self.num_handed_on - self._warm

    @property
    def _counted_s(self) -> float:
        return self._asked[-1] - self._asked[self._warm]

    def rate(self, batch_size: int) -> float:
        """Images per second, `batch_size` in a batch."""
        return batch_size * self.num_counted / self._counted_s


def described(cfg: CfgNode, args: argparse.Namespace) -> str:
    """What a figure's name says of its config."""
    solver = cfg.SOLVER
    sizes = f"batch {solver.BATCH_SIZE_TOTAL}, {solver.PRECISION}, {cfg.DATA.NUM_WORKERS} workers"
    pairs = zip(args.overrides[::2], args.overrides[1::2], strict=False)
    return ", ".join([sizes, *(f"{key} {value}" for key, value in pairs)])


def measure_train(method: str, scratch: Path, args: argparse.Namespace) -> list[float]:
    """E1, E2 and E3 of a method by turns, and the most memory that its run took.

    Returns:
        E1, images per second in each round.
    """
    cfg = config_of(method, args)
    recipe = build_recipe(cfg)
    trainer = make_trainer(cfg, recipe, scratch, args.device)
    loader = iter(make_loader(cfg, recipe, photos_of(scratch), scratch))
    batch_size, in_store = cfg.SOLVER.BATCH_SIZE_TOTAL, 2 * cfg.DATA.NUM_WORKERS + 1
    kept = [next(loader) for _ in range(BATCHES_ON_DEVICE)]
    kept = [batch._replace(sample=to_device(batch.sample, args.device)) for batch in kept]
    steps_done = 0

    def train(batches: Iterator[Any], seconds: float, warm: int = 1) -> float:
        nonlocal steps_done
        timed = Timed(batches, warm=warm, seconds=seconds)
        trainer.run(timed, start_step=steps_done, save=lambda step: None, reporter=None, stop=StopRequest())
        steps_done += timed.num_handed_on
        return timed.rate(batch_size)

    def load() -> float:
        timed = Timed(loader, warm=in_store, seconds=args.seconds)
        for _ in timed:
            pass
        return timed.rate(batch_size)

    train(cycle(kept), seconds=0.0)  # compilation, first allocations
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rates: dict[str, list[float]] = {"E3": [], "E1": [], "E2": []}
    try:
        for _ in range(args.rounds):
            rates["E3"].append(load())
            rates["E1"].append(train(loader, args.seconds))
            rates["E2"].append(train(cycle(kept), args.seconds))
    finally:  # told to end early, it tells what it knows
        whole_rounds = len(rates["E2"])
        rates = {figure: values[:whole_rounds] for figure, values in rates.items()}
        if whole_rounds:
            report_train(method, rates, described(cfg, args), args)
    if args.profile:
        write_profile(args.profile, lambda: train(cycle(kept), seconds=0.0))
    return rates["E1"]


def write_profile(file: Path, work: Callable[[], object]) -> None:
    """Append to `file` what `work` spends its time with."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiler:
        work()
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    with file.open("a") as stream:
        stream.write(profiler.key_averages().table(sort_by=order, row_limit=PROFILE_ROWS, max_name_column_width=80))


def report_train(method: str, rates: dict[str, list[float]], what: str, args: argparse.Namespace) -> None:
    """Print the figures of `measure_train`: rates by figure, with the bars that this device has."""
    on_gpu = args.device.type == "cuda"
    has_bars = args.overrides == CONFIGS_WITH_BARS.get(method)
    bar = GPU_BARS.get(method) if on_gpu and has_bars and args.batch_size == 256 else None
    names = {"E1": "from JPEG files", "E2": "from the device", "E3": "loader alone"}

    def say(values: Sequence[float], figure: str, name: str, unit: str, bar: str | None = None) -> None:
        summarise(
            values, figure=figure, method=method, name=f"{name}; {what}", unit=unit, device=args.device, bar=bar
        ).print()

    for figure, name in names.items():
        say(rates[figure], figure, name, "images/s", bar if figure == "E1" else None)
    slower = [min(pair) for pair in zip(rates["E2"], rates["E3"], strict=True)]
    say(ratios(rates["E1"], slower), "E1", "E1 / min(E2, E3)", "x", ">= 0.95" if has_bars else None)
    if on_gpu:
        say(ratios(rates["E1"], rates["E2"]), "E1", "E1 / E2", "x", ">= 0.90" if has_bars else None)
        say([torch.cuda.max_memory_allocated() / 1e9], "E1", "peak memory on the device", "GB")


def measure_reference(method: str, scratch: Path, args: argparse.Namespace, end_to_end: Sequence[float]) -> None:
    """R3: the loader of the reference pipeline alone, and how much faster we are end to end.

    Args:
        method: Of the views.
        scratch: Holds the files.
        args: The command line.
        end_to_end: E1 of this method, images per second in each round; none if it was not measured.
    """
    on_gpu = args.device.type == "cuda"
    batches = iter(make_reference_loader(config_of(method, args), photos_of(scratch), pin_memory=on_gpu))
    rates = []
    for _ in range(args.rounds):
        timed = Timed(batches, warm=2 * args.workers + 1, seconds=args.seconds)
        for _ in timed:
            pass
        rates.append(timed.rate(REFERENCE_BATCH))
    what = f"{args.workers} workers"
    name = f"reference loader alone; {what}"
    summarise(rates, figure="R3", method=method, name=name, unit="images/s", device=args.device).print()
    if end_to_end:
        name = f"E1 / reference loader; {what}"
        ratio = ratios(end_to_end, rates)
        bar = ">= 3" if on_gpu else None
        summarise(ratio, figure="E1", method=method, name=name, unit="x", device=args.device, bar=bar).print()
