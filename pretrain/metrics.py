"""What a run says while it runs: a console line, `metrics.jsonl` and TensorBoard, once per interval.

Everything of a JSON line except "time" is a function of the config and the images, also after an interruption.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.tensorboard import SummaryWriter

from detco.artifact import open_atomically
from pretrain.launch import World, gather

logger = logging.getLogger(__name__)


class Window:
    """Sums of what this process measured since the last report. Part of a checkpoint, so sums survive a resume."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.sums: dict[str, float] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Add the values of one step; every step has the same names."""
        self.num_steps += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def averages(self, world: World) -> dict[str, float]:
        """Return the mean over steps and ranks, and start anew. Collective."""
        of_ranks = gather(self.sums, world)
        count = self.num_steps * world.size
        means = {name: sum(sums[name] for sums in of_ranks) / count for name in self.sums}
        self.num_steps, self.sums = 0, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {"num_steps": self.num_steps, "sums": dict(self.sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.num_steps, self.sums = int(state["num_steps"]), dict(state["sums"])


class Timing(NamedTuple):
    """How fast one interval was.

    Attributes:
        images_per_second: Over all processes.
        data_wait_share: Share of the time in which the device of this process had nothing to do but wait for its
            loader, in [0, 1].
        eta_seconds: To the last step, at the average pace since this process started.
    """

    images_per_second: float
    data_wait_share: float
    eta_seconds: float


class Pace:
    """Wall-clock times of the loop of this process."""

    def __init__(self, batch_size_total: int, device: torch.device) -> None:
        self._batch_size_total = batch_size_total
        self._device = device
        self._lap_started = time.perf_counter()
        self._waits: list[_Idle] = []
        self._steps = 0
        self._laps: list[float] = []  # seconds per step

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in which the device runs out of work inside this as waited for the loader."""
        idle = _Idle(self._device)
        try:
            yield
        finally:
            idle.end()
            self._waits.append(idle)

    def stepped(self) -> None:
        """Count one step."""
        self._steps += 1

    def lap(self, steps_left: int) -> Timing:
        """Return the times since the last lap. The first lap holds the start-up, so the ETA forgets it."""
        now = time.perf_counter()
        seconds = max(now - self._lap_started, 1e-9)
        self._laps.append(seconds / max(self._steps, 1))
        later_laps = self._laps[1:] or self._laps
        timing = Timing(
            images_per_second=self._steps * self._batch_size_total / seconds,
            data_wait_share=sum(idle.seconds() for idle in self._waits) / seconds,
            eta_seconds=steps_left * sum(later_laps) / len(later_laps),
        )
        self._lap_started, self._waits, self._steps = now, [], 0
        return timing


class _Idle:
    """How long a device has nothing to do between two moments of this process.

    The CPU does what it is told at once: all the time between them. A GPU works off a queue: from when it was through
    with what had been queued at the first moment until the second, and not at all if it was busy all along.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin."""
        self._device = device
        self._marks = [self._mark()]

    def end(self) -> None:
        """End, without waiting for the device."""
        self._marks.append(self._mark())

    def seconds(self) -> float:
        """Return the time; waits until the device has come to the end."""
        first, last = self._marks
        if isinstance(first, torch.cuda.Event):
            last.synchronize()
            return float(first.elapsed_time(last)) / 1000
        return float(last - first)

    def _mark(self) -> Any:
        """A moment: seconds, or an event in the queue of the device."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


class Reporter:
    """Writes the reports of a run into its directory and onto the console. Rank 0 alone has one."""

    def __init__(self, run_dir: Path, *, start_step: int, total_steps: int) -> None:
        """Continue the files at `start_step`: what an interrupted run wrote beyond it is removed."""
        self._file = run_dir / "metrics.jsonl"
        self._total_steps = total_steps
        _truncate(self._file, start_step)
        self._tensorboard = SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=start_step + 1 if start_step else None
        )

    def report(self, *, step: int, epoch: int, lr: float, averages: Mapping[str, float], timing: Timing) -> None:
        """Report one interval.

        Args:
            step: Steps done.
            epoch: Of the last of them, from 0.
            lr: Of the last of them.
            averages: "loss" and what else was measured.
            timing: Of the interval.
        """
        times = {"images_per_second": timing.images_per_second, "data_wait_share": timing.data_wait_share}
        if torch.cuda.is_available():
            times["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        record = {"step": step, "epoch": epoch, "lr": lr, **averages, "time": {"unix": time.time(), **times}}
        with self._file.open("a", encoding="ascii") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in {"lr": lr, **averages, **{f"time/{name}": value for name, value in times.items()}}.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()
        logger.info("%s", console_line(step, self._total_steps, epoch, lr, averages, timing, times))

    def close(self) -> None:
        """Close the TensorBoard file."""
        self._tensorboard.close()


def console_line(
    step: int,
    total_steps: int,
    epoch: int,
    lr: float,
    averages: Mapping[str, float],
    timing: Timing,
    times: Mapping[str, float],
) -> str:
    """One line; the terms of a loss family (`loss_gg/res2`, ...) share one column: "gg 6.31 6.33"."""
    columns = [f"epoch {epoch}", f"step {step}/{total_steps}", f"loss {averages['loss']:.4f}"]
    families: dict[str, list[str]] = {}
    for name, value in averages.items():
        family, slash, _ = name.partition("/")
        if slash and family.startswith("loss_"):
            families.setdefault(family.removeprefix("loss_"), []).append(f"{value:.2f}")
    columns += [" ".join([family, *values]) for family, values in families.items()]
    columns += [f"lr {lr:.3g}", f"{timing.images_per_second:.1f} img/s", f"wait {timing.data_wait_share:.0%}"]
    columns.append(f"ETA {timedelta(seconds=round(timing.eta_seconds))}")
    if "gpu_memory_gib" in times:
        columns.append(f"{times['gpu_memory_gib']:.1f} GiB")
    return "  ".join(columns)


def _truncate(file: Path, last_step: int) -> None:
    """Keep the whole lines up to `last_step`; a process killed while writing leaves half a line."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="ascii", errors="replace").splitlines(keepends=True):
        try:
            if not line.endswith("\n") or json.loads(line)["step"] > last_step:
                break
        except (json.JSONDecodeError, KeyError):
            break
        kept.append(line)
    with open_atomically(file) as stream:
        stream.write("".join(kept).encode())
