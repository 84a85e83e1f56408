"""How long jobs will take, from recorded seconds per iteration: runs finished here, else what others published."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from transfer.results.runs import Run, RunError, read_run
from transfer.suite.jobs import RESULTS, Job
from transfer.suite.plan import PUBLISHED_GPUS

SECONDS_FILE = Path(__file__).with_name("seconds.yaml")
SCHEMA = 1


@dataclass(frozen=True)
class Forecast:
    """The duration of one job.

    Attributes:
        hours: Wall-clock time on its GPUs (num_gpus 0: on the CPU); None if nobody recorded anything like it.
        gpu_hours: Times the number of GPUs, on the CPU once.
        source: Where the number comes from, for people.
        is_lower_bound: Whether the recorded model was a cheaper one.
    """

    hours: float | None
    gpu_hours: float | None
    source: str
    is_lower_bound: bool = False


@dataclass(frozen=True)
class Finished:
    """A job that is done, with what it took."""

    job: Job
    run: Run

    @property
    def num_gpus(self) -> int:
        """GPUs that it was trained on; the suite may be going on with others by now."""
        return int(self.run.schedule.get("num_gpus", self.job.num_gpus))


def finished_jobs(jobs: Iterable[Job]) -> list[Finished]:
    """The jobs with a usable results.json, in the order in which they finished."""
    found = []
    for job in jobs:
        try:
            found.append(Finished(job, read_run(job.run_folder / RESULTS)))
        except RunError:
            continue
    return sorted(found, key=lambda item: item.run.finished)


def forecast(job: Job, finished: Sequence[Finished]) -> Forecast:
    """The duration of a whole job.

    The best source that there is counts: runs of the same task on as many GPUs of the kind that was used last; the
    speed of the same detector under another schedule; what Detectron2's model zoo says of 8 V100.
    """
    alike = [item for item in finished if item.num_gpus == job.num_gpus and item.run.hours is not None]
    alike = [item for item in alike if item.run.hardware == alike[-1].run.hardware]
    gpus = max(job.num_gpus, 1)
    if hours := [item.run.hours for item in alike if item.job.task == job.task and item.run.hours is not None]:
        mean = fmean(hours)
        return Forecast(mean, mean * gpus, f"mean of {len(hours)} finished here on {alike[-1].run.hardware}")
    if job.iterations is None:
        return Forecast(None, None, "not known before the first of its task has finished")
    family = _family(job.protocol)
    speeds = [
        speed for item in alike if _family(item.job.protocol) == family and (speed := seconds_per_iteration(item.run))
    ]
    if job.protocol and speeds:
        mean = fmean(speeds) * job.iterations / 3600
        text = f"{fmean(speeds):.3f} s/iteration x {job.iterations}, measured here on {alike[-1].run.hardware}"
        return Forecast(mean, mean * gpus, text)
    return _from_zoo(job)


def seconds_per_iteration(run: Run) -> float | None:
    """Of a finished run, its evaluation included; None if it does not say."""
    iterations = run.schedule.get("iterations")
    return run.hours * 3600 / iterations if run.hours is not None and iterations else None


def summary(forecasts: Sequence[Forecast], *, num_gpus: int, num_slots: int) -> str:
    """The sum of forecasts in a line.

    Args:
        forecasts: Of the jobs.
        num_gpus: GPUs of each; 0 is the CPU.
        num_slots: Jobs that run side by side, at least 1.
    """
    known = [item for item in forecasts if item.hours is not None]
    unknown = len(forecasts) - len(known)
    parts = []
    if known:
        bound = "at least " if any(item.is_lower_bound for item in known) else "about "
        wall = duration(sum(item.hours or 0.0 for item in known) / num_slots * 3600)
        total = sum(item.gpu_hours or 0.0 for item in known)
        parts.append(bound + (f"{total:.1f} GPU-hours, {wall} on {num_gpus * num_slots} GPUs" if num_gpus else wall))
    if unknown:
        parts.append(f"{unknown} of unknown duration")
    return ", and ".join(parts) or "nothing left to do"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _from_zoo(job: Job) -> Forecast:
    recorded = _recorded(job.protocol)
    if not job.num_gpus or recorded is None or job.iterations is None:
        return Forecast(None, None, "nobody has recorded its speed" if job.num_gpus else "unknown on a CPU")
    is_scaled = "--auto-scale" in job.command
    # Both ways of using other than 8 GPUs show the network as many images in all as the 8 do.
    iterations = job.iterations * job.num_gpus / PUBLISHED_GPUS if is_scaled else job.iterations
    gpu_hours = recorded["seconds"] * iterations * _seconds()["gpus"] / 3600
    text = f"{recorded['seconds']:g} s/iteration x {iterations:g} on {_seconds()['gpus']} {_seconds()['hardware']}"
    text += f", Detectron2 zoo, {recorded['model']}" + (" (lower bound: FrozenBN)" if recorded["frozen"] else "")
    return Forecast(gpu_hours / job.num_gpus, gpu_hours, text, is_lower_bound=recorded["frozen"])


def _recorded(protocol: str) -> dict[str, Any] | None:
    entries: list[dict[str, Any]] = _seconds()["recorded"]
    return next((entry for entry in entries if fnmatchcase(protocol, entry["tasks"])), None)


def _family(protocol: str) -> str:
    """What protocols of one detector under different schedules share."""
    recorded = _recorded(protocol)
    return recorded["tasks"] if recorded else protocol


@lru_cache(maxsize=1)
def _seconds() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(SECONDS_FILE.read_text(encoding="utf-8"))
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{SECONDS_FILE.name} has schema {content.get('schema')!r}, this program reads {SCHEMA}")
    return content
