"""What is done, running, failed and waiting, read from the folders of the jobs; works while they run, and after."""

import json
import re
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transfer.results.runs import RunError, read_run
from transfer.suite.forecast import Finished, Forecast, duration, finished_jobs, forecast, summary
from transfer.suite.jobs import RESULTS, Job, State, Status, read_state, status_of

# What a task is judged by, in this order: the first that a run has, and the masks beside the boxes.
MAIN_METRICS = ("mIoU", "dp_AP", "keypoint_AP", "box_AP", "mask_AP")
SECOND_METRIC = {"box_AP": "mask_AP"}
MAX_ITER = re.compile(r"^  MAX_ITER: (\d+)$", re.MULTILINE)
REASON_LENGTH = 110
QUEUED = "queued"
REMOVED = "no longer in the suite; "


class Progress(NamedTuple):
    """How far a running job is.

    Attributes:
        iteration: The last one in its metrics.json.
        seconds_left: Detectron2's estimate, less what has passed since; None if there is none yet.
    """

    iteration: int
    seconds_left: float | None


def progress_of(job: Job, now: float) -> Progress | None:
    """How far a job is by its metrics.json; None before its first line."""
    path = job.run_folder / "metrics.json"
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 65536))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        written = path.stat().st_mtime
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        try:
            entry: Any = json.loads(line)
        except json.JSONDecodeError:  # half a line, at either end
            continue
        if isinstance(entry, dict) and isinstance(entry.get("iteration"), int):
            eta = entry.get("eta_seconds")
            return Progress(entry["iteration"] + 1, max(0.0, eta - (now - written)) if eta is not None else None)
    return None


def result_of(job: Job) -> str:
    """Main metrics and hours of a job that is done, in a few words."""
    try:
        run = read_run(job.run_folder / RESULTS)
    except RunError as error:
        return f"{RESULTS} cannot be used: {error}"
    main = next((name for name in MAIN_METRICS if name in run.metrics), None)
    names = [name for name in (main, SECOND_METRIC.get(main or "")) if name in run.metrics]
    words = [f"{name} {run.metrics[name]:.1f}" for name in names if name is not None]
    return ", ".join(words or ["no main metric"]) + ("" if run.hours is None else f", {duration(run.hours * 3600)}")


def status_report(jobs: Sequence[Job], *, queued: Sequence[str] = (), members: Collection[str] | None = None) -> str:
    """The table of all jobs, the counts, and what is left to do.

    Args:
        jobs: In their order.
        queued: Ids of jobs that a cluster has accepted and not started.
        members: Ids of the jobs that the suite has now; the others are marked, and not counted as left. None: unknown.
    """
    now = time.time()
    removed = {job.id for job in jobs if members is not None and job.id not in members}
    finished = finished_jobs(jobs)
    statuses = [status_of(job) for job in jobs]
    words = [_word(job, status, queued) for job, status in zip(jobs, statuses, strict=True)]
    width = max(len(job.id) for job in jobs)
    lines = [
        f"{job.id:<{width}}  {word:<11}  {REMOVED * (job.id in removed)}{_details(job, status, finished, now)}".rstrip()
        for job, status, word in zip(jobs, statuses, words, strict=True)
    ]
    counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(sorted(words)))
    left = [
        _left(job, status, finished, now)
        for job, status in zip(jobs, statuses, strict=True)
        if status in (Status.WAITING, Status.INTERRUPTED, Status.RUNNING) and job.id not in removed
    ]
    lines += ["", f"{len(jobs)} jobs: {counts}"]
    if left:
        lines.append(f"left, one job at a time: {summary(left, num_gpus=jobs[0].num_gpus, num_slots=1)}")
    failed = [job for job, status in zip(jobs, statuses, strict=True) if status is Status.FAILED]
    for job in failed:
        state = read_state(job)
        lines += ["", f"{job.id}: {state.reason if state else ''}", f"  {job.log}"]
        lines += [f"    {line[:REASON_LENGTH]}" for line in (state.tail if state else ())]
    return "\n".join(lines)


def _left(job: Job, status: Status, finished: Sequence[Finished], now: float) -> Forecast:
    """What a job still takes: Detectron2's own estimate where there is one."""
    progress = progress_of(job, now) if status is Status.RUNNING else None
    if progress is None or progress.seconds_left is None:
        return forecast(job, finished)
    hours = progress.seconds_left / 3600
    return Forecast(hours, hours * max(job.num_gpus, 1), "Detectron2's estimate")


def _word(job: Job, status: Status, queued: Sequence[str]) -> str:
    return QUEUED if job.id in queued and status in (Status.WAITING, Status.INTERRUPTED) else status.value


def _details(job: Job, status: Status, finished: Sequence[Finished], now: float) -> str:
    state = read_state(job)
    if status is Status.DONE:
        return result_of(job)
    if status is Status.RUNNING:
        return _running(job, state, now)
    if status is Status.WAITING or state is None:
        hours = forecast(job, finished)
        bound = "at least" if hours.is_lower_bound else "about"
        return "" if hours.hours is None else f"{bound} {duration(hours.hours * 3600)}"
    cause = f"its {RESULTS} is gone or broken" if state.status is Status.DONE else "its worker was killed"
    return f"{state.reason or cause}; attempt {state.attempts}"[:REASON_LENGTH]


def _running(job: Job, state: State | None, now: float) -> str:
    progress = progress_of(job, now)
    hours = "" if state is None else f", for {duration(now - state.started)}"
    gpus = f", GPU {','.join(state.gpus)}" if state and state.gpus else ""
    if progress is None or (state and progress.seconds_left is None):
        return f"starting{hours}{gpus}"
    total = _max_iter(job)
    place = f"iteration {progress.iteration}" + (f"/{total}" if total else "")
    eta = "" if progress.seconds_left is None else f", ETA {duration(progress.seconds_left)}"
    return f"{place}{hours}{eta}{gpus}"


def _max_iter(job: Job) -> int | None:
    """SOLVER.MAX_ITER of the resolved config that the run wrote down."""
    config: Path = job.run_folder / "config.yaml"
    found = MAX_ITER.search(config.read_text(encoding="utf-8")) if config.is_file() else None
    return int(found[1]) if found else job.iterations
