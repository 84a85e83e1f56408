"""A job of a suite on disk: what it is, in which state it is, and who is working on it.

    <output>/<job id>/job.json        the command and what it belongs to; written by the scheduler
    <output>/<job id>/state.json      what the last attempt came to; written only by the holder of the lock
    <output>/<job id>/attempts.jsonl  one line for each start and each end of an attempt
    <output>/<job id>/lock            held while anything works on the job, the training process included
    <output>/<job id>/log.txt         what all attempts printed
    <output>/<job id>/run/            the run directory of detco-transfer; its results.json says that the job is done
    <output>/suite.json               ids of the jobs that the suite had when it was run last

The lock is flock(2). It belongs to the open file, which worker and training process share, and the kernel releases it
with the last of them, however they end: so a scheduler that comes later can tell running from interrupted.
"""

import fcntl
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

RESULTS = "results.json"
# What detco-results needs; with all of it the file is whole, even if there was nothing to measure.
RESULT_KEYS = frozenset(
    ("schema", "task", "recipe", "label", "weights", "metrics", "departures", "config_digest", "seed")
)
MEMBERS = "suite.json"
TAIL_LINES = 15
BUSY = 75  # exit code of a worker that found its job taken (EX_TEMPFAIL)
RETRY_S = 0.05


class Status(str, Enum):
    """Where a job stands."""

    WAITING = "waiting"
    RUNNING = "running"
    INTERRUPTED = "interrupted"  # was running, and nobody is working on it: goes on with the next run
    FAILED = "failed"  # ended by itself without a result: stays so until --retry-failed
    DONE = "done"


@dataclass(frozen=True)
class Job:
    """One training run of a suite.

    Attributes:
        id: Name of its folder, "<task>__<weights>__seed<n>".
        index: Position in the suite.
        task: The suite's name of the task.
        protocol: Name of the published protocol (transfer/tasks.yaml); "" for a config of the user's own.
        weights: The suite's name of the weights.
        inputs: Digest by absolute path of the local files that decide on its result: config, its bases, weights.
        seed: SEED of the run.
        command: The whole command line.
        num_gpus: GPUs it trains on; 0 is the CPU.
        iterations: Optimiser steps, None if only its config knows.
        folder: Where its files are.
    """

    id: str
    index: int
    task: str
    protocol: str
    weights: str
    inputs: Mapping[str, str]
    seed: int
    command: tuple[str, ...]
    num_gpus: int
    iterations: int | None
    folder: Path

    @property
    def run_folder(self) -> Path:
        """The run directory of detco-transfer."""
        return self.folder / "run"

    @property
    def log(self) -> Path:
        """What all attempts printed."""
        return self.folder / "log.txt"


@dataclass(frozen=True)
class State:
    """What the last attempt came to, as its worker wrote it down.

    Attributes:
        status: RUNNING while it lasts; if nobody holds the lock then, the worker was killed.
        attempts: Number of attempts so far.
        started: Seconds since 1970, of the last attempt.
        ended: The same; None while it lasts.
        exit_code: Of the training process, negative for a signal; None while it lasts.
        reason: Why it failed or was interrupted, in a line.
        tail: Last lines of the log, if it failed.
        gpus: CUDA devices it was given.
        host: Name of the machine.
        pid: Of the worker.
    """

    status: Status
    attempts: int
    started: float
    ended: float | None = None
    exit_code: int | None = None
    reason: str = ""
    tail: tuple[str, ...] = field(default=())
    gpus: tuple[str, ...] = field(default=())
    host: str = ""
    pid: int = 0


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file so that a reader finds the old content or the new, whatever happens."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_job(job: Job) -> None:
    """Write job.json, making the folder if need be."""
    job.folder.mkdir(parents=True, exist_ok=True)
    content = asdict(job)
    del content["folder"]
    write_json(job.folder / "job.json", content)


def read_job(folder: Path) -> Job:
    """Read the job of a folder.

    Raises:
        FileNotFoundError: If it holds none.
        ValueError: If its job.json is not one of this program.
    """
    path = folder / "job.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Job(**{**content, "command": tuple(content["command"])}, folder=folder)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a job of this version ({error}); give another --output-dir, or remove {folder}"
        ) from error


def find_jobs(output: Path) -> tuple[list[Job], list[str]]:
    """All jobs below an output folder, in the order of their suite, and what is wrong with the folders left out."""
    found, left_out = [], []
    for path in sorted(output.glob("*/job.json")):
        try:
            found.append(read_job(path.parent))
        except (OSError, ValueError) as error:
            left_out.append(f"{path.parent} is left out: {error}")
    return sorted(found, key=lambda job: (job.index, job.id)), left_out


def write_members(output: Path, ids: Sequence[str]) -> None:
    """Remember which jobs the suite has, those of --only and all others."""
    write_json(output / MEMBERS, {"jobs": list(ids)})


def read_members(output: Path) -> frozenset[str] | None:
    """Ids of the jobs that the suite had when it was run last; None if that cannot be told."""
    try:
        return frozenset(json.loads((output / MEMBERS).read_text(encoding="utf-8"))["jobs"])
    except (OSError, KeyError, TypeError, ValueError):
        return None


def write_state(job: Job, state: State) -> None:
    """Write state.json. Only the holder of the job's lock may."""
    write_json(job.folder / "state.json", asdict(state))


def read_state(job: Job) -> State | None:
    """What the last attempt wrote down; None before the first. An unusable file counts as an interruption."""
    path = job.folder / "state.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = {item.name: content[item.name] for item in fields(State) if item.name in content}
        known |= {"status": Status(content["status"]), "tail": tuple(content["tail"]), "gpus": tuple(content["gpus"])}
        return State(**known)
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = f"{path.name} cannot be used ({type(error).__name__}: {error})"
        return State(Status.INTERRUPTED, attempts=0, started=time.time(), reason=reason)


def is_finished(job: Job) -> bool:
    """Whether the run has left a whole results.json; a broken one is none."""
    try:
        content = json.loads((job.run_folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= RESULT_KEYS


def status_of(job: Job) -> Status:
    """Where a job stands, from its lock, its results and its state, in this order."""
    if is_locked(job.folder / "lock"):
        return Status.RUNNING
    if is_finished(job):
        return Status.DONE
    state = read_state(job)
    if state is None:
        return Status.WAITING
    # A worker that says "running" without the lock was killed. One that said "done" has lost its results since.
    return Status.FAILED if state.status is Status.FAILED else Status.INTERRUPTED


def take_lock(path: Path, *, patience_s: float = 0.0) -> int | None:
    """Take a lock for as long as the returned file descriptor, or a copy of it in another process, is open.

    Args:
        path: The lock's file; made if it does not exist. Its folder must exist.
        patience_s: How long to try. `is_locked` holds a lock for an instant, so who must have it needs some.

    Returns:
        The file descriptor; None if somebody else holds the lock.

    Raises:
        ValueError: If the file system knows no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                return None
        except OSError as error:
            os.close(descriptor)
            raise ValueError(f"{path.parent} is on a file system without locks ({error}); write elsewhere") from error
        time.sleep(RETRY_S)


def is_locked(path: Path) -> bool:
    """Whether somebody holds a lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: those who only look do not see each other
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def tail_of(log: Path, start: int) -> tuple[str, ...]:
    """Last lines of a log from a byte on, without carriage returns and escape sequences' weight: long lines are cut."""
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(start, file.tell() - 65536))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.rpartition("\r")[2].rstrip()[:500] for line in text.splitlines() if line.strip()]
    return tuple(lines[-TAIL_LINES:])
