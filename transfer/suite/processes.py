"""The processes of a job, wherever they hang in the process tree. Linux: they are found by a mark in /proc.

A training run is many processes: one for each GPU, loader workers. When their parent is killed some live on, keep the
GPU's memory, and would write into the run directory beside the next attempt.
"""

import os
import signal
import time
from pathlib import Path

MARK = "DETCO_SUITE_JOB"
PROC = Path("/proc")
POLL_S = 0.05
UNKILLABLE_S = 60.0


def marked_environment(folder: Path) -> dict[str, str]:
    """The environment for a process that works on the job of a folder; it hands the mark down to its children."""
    root = str(Path(__file__).resolve().parents[2])
    search = [root, *filter(None, [os.environ.get("PYTHONPATH")])]  # without an installed package, from any folder
    return {**os.environ, MARK: str(folder.resolve()), "PYTHONPATH": os.pathsep.join(search)}


def require_proc() -> None:
    """Make sure that processes can be found here.

    Raises:
        ValueError: If not, as on macOS.
    """
    if not (PROC / "self/environ").exists():
        raise ValueError(f"there is no {PROC}/self/environ: without it no job can be stopped safely. Run it on Linux")


def processes_of(folder: Path) -> list[int]:
    """Ids of the living processes that carry the mark of a job's folder, on this machine, without the calling one."""
    wanted = f"{MARK}={folder.resolve()}".encode()
    found = []
    for entry in PROC.glob("[0-9]*"):
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):  # a zombie's is empty
                found.append(int(entry.name))
        except OSError:  # another user's, or gone meanwhile
            continue
    return [pid for pid in found if pid != os.getpid()]


def end_processes(folder: Path, *, grace_s: float) -> None:
    """Ask the processes of a job to end, and kill what is left after `grace_s` seconds; 0 kills at once.

    Raises:
        TimeoutError: If some are still there a minute later, as when they hang in a file system that does not answer.
    """
    deadline = time.monotonic() + grace_s
    if grace_s > 0:
        send(processes_of(folder), signal.SIGTERM)
    while pids := processes_of(folder):
        if time.monotonic() >= deadline + UNKILLABLE_S:
            raise TimeoutError(f"processes {', '.join(map(str, pids))} of {folder} cannot be killed")
        if time.monotonic() >= deadline:
            send(pids, signal.SIGKILL)
        time.sleep(POLL_S)


def send(pids: list[int], number: signal.Signals) -> None:
    """Send a signal to those that are still there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
