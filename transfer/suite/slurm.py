"""Hands jobs to SLURM through submitit: one job of the suite per SLURM job, on one node.

The states are the same files in the same folders, written by the same worker, so `status` and a local `run` understand
them. A job that SLURM preempts or ends for its time limit is stopped and queued again, and goes on from its checkpoint.
"""

import importlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transfer.suite.jobs import Job, Status, read_job, status_of, write_json
from transfer.suite.processes import PROC
from transfer.suite.worker import Attempt

RECORD = "submitted.json"
SLURM, LOCAL = "slurm", "local"
MODULE_START = "submitit."  # of the modules that submitit starts processes with
STOP_GRACE_S = 20.0  # SLURM itself kills 30 s after it has asked, or what KillWait says
AT_WORK = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "RUNNING", "SUSPENDED")
# Right after submission SLURM's accounting may know nothing of a job; long after its end it has forgotten it.
UNKNOWN_FOR_S = 600.0


class SlurmMissing(RuntimeError):
    """submitit is not installed; the message says how to install it."""


class RunJob:
    """What SLURM runs: one attempt at the job of a folder. submitit stores it and calls it on the node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._attempt: Attempt | None = None

    def __call__(self) -> int:
        """Train. Returns the worker's exit code."""
        self._attempt = Attempt(read_job(self.folder), gpus=None)
        return self._attempt.run()

    def checkpoint(self) -> Any:
        """Called by submitit when SLURM is about to end the job: stop, and queue the rest of it."""
        if self._attempt is not None:
            self._attempt.stop(STOP_GRACE_S)
        return _submitit().helpers.DelayedSubmission(RunJob(self.folder))


def submit(
    jobs: Sequence[Job], parameters: Mapping[str, str], *, output: Path, retry_failed: bool = False
) -> list[Job]:
    """Submit every job that is neither done, failed, running nor queued.

    Args:
        jobs: Registered ones.
        parameters: submitit's, such as slurm_partition=gpu and timeout_min=2880; "cluster" is slurm, or local, which
            tries the whole thing out on this machine.
        output: The suite's folder; submitit's files go below it.
        retry_failed: Submit failed ones as well.

    Returns:
        The submitted jobs.

    Raises:
        SlurmMissing: Without submitit.
        ValueError: If a parameter is missing or unknown, or there is no SLURM here.
    """
    submitit = _submitit()
    wanted = {name: _number(value) for name, value in parameters.items()}
    cluster = str(wanted.pop("cluster", SLURM))
    if cluster not in (SLURM, LOCAL):
        raise ValueError(f"--slurm cluster={cluster}: expected {SLURM}, or {LOCAL} to try it out on this machine")
    if "timeout_min" not in wanted:
        raise ValueError("--slurm timeout_min=MINUTES is needed: submitit's default is 5 minutes, too short for a run")
    try:
        executor = submitit.AutoExecutor(folder=output / "slurm" / "%j", cluster=cluster)
        gpus = {"gpus_per_node": jobs[0].num_gpus} if jobs[0].num_gpus else {}
        executor.update_parameters(nodes=1, tasks_per_node=1, **{**gpus, **wanted})
    except (NameError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"--launcher slurm: {error}") from error
    wanted_states = (Status.WAITING, Status.INTERRUPTED, *((Status.FAILED,) if retry_failed else ()))
    waiting = [job for job in jobs if status_of(job) in wanted_states and not is_queued(job)]
    for job in waiting:
        executor.update_parameters(name=job.id)
        handle = executor.submit(RunJob(job.folder))
        record = {"job_id": handle.job_id, "cluster": cluster, "folder": str(handle.paths.folder)}
        write_json(job.folder / RECORD, record)
    return waiting


def is_queued(job: Job) -> bool:
    """Whether SLURM has accepted a job and not ended it, as far as SLURM says."""
    path = job.folder / RECORD
    if not path.is_file():
        return False
    submitit = _submitit()
    kinds = {SLURM: submitit.SlurmJob, LOCAL: submitit.LocalJob}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        folder, job_id = str(record["folder"]), str(record["job_id"])
        handle = kinds[record["cluster"]](folder=folder, job_id=job_id)
    except (KeyError, TypeError, ValueError):
        return False  # nothing is known of it; if it comes all the same, the job's lock keeps it from training twice
    if record["cluster"] == LOCAL:
        return not handle.paths.result_pickle.exists() and _is_submitted(job_id)
    return is_pending(str(handle.state), time.time() - path.stat().st_mtime)


def _is_submitted(pid: str) -> bool:
    """Whether the process of a local submission lives; later another one may have its number."""
    try:
        words = (PROC / pid / "cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return False
    return any(word.startswith(MODULE_START) for word in words)


def is_pending(state: str, age_s: float) -> bool:
    """Whether a state of SLURM's means that the job is still to come or at work.

    Args:
        state: As sacct prints it, "CANCELLED by 1000" for instance.
        age_s: Seconds since its submission.
    """
    word = state.split()[0] if state else "UNKNOWN"
    return word in AT_WORK or (word == "UNKNOWN" and age_s < UNKNOWN_FOR_S)


def queued_ids(jobs: Sequence[Job]) -> list[str]:
    """Ids of the jobs that wait in SLURM's queue; empty if none was ever submitted."""
    submitted = [job for job in jobs if (job.folder / RECORD).is_file()]
    return [job.id for job in submitted if status_of(job) in (Status.WAITING, Status.INTERRUPTED) and is_queued(job)]


def _submitit() -> Any:
    try:
        return importlib.import_module("submitit")
    except ImportError as error:
        raise SlurmMissing(
            "--launcher slurm needs submitit: pip install 'detco[slurm]' (or: pip install submitit)"
        ) from error


def _number(value: str) -> int | str:
    return int(value) if value.lstrip("-").isdigit() else value
