"""Runs one job: takes its lock, starts the training, writes down how it ends. `python -m transfer.suite.worker FOLDER`.

A worker outlives a scheduler that is killed: hours of GPU time do not depend on a terminal. The training process shares
the worker's lock, so that even a killed worker's job is not started a second time while the first is going on.
"""

import argparse
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from transfer.suite.inputs import changed_files
from transfer.suite.jobs import (
    BUSY,
    RESULTS,
    Job,
    State,
    Status,
    is_finished,
    read_job,
    read_state,
    tail_of,
    take_lock,
    write_state,
)
from transfer.suite.processes import end_processes, marked_environment

GRACE_S = 10.0  # between asking a training process to end and killing it
LOCK_PATIENCE_S = 1.0
# The line of a log that says what went wrong: Python's last, or that of our own commands.
TELLING = re.compile(r"^(error:|[\w.]*(Error|Exception|Interrupt|DoNotFit)\b)")
SIGNAL_NAMES = {item.value: item.name for item in signal.Signals}  # most real-time signals have none
EXIT_CODES = {Status.DONE: 0, Status.FAILED: 1, Status.INTERRUPTED: 130}


class Attempt:
    """One attempt at a job.

    Attributes:
        job: The job.
        gpus: CUDA devices to use; None leaves them to the environment, as SLURM sets it.
    """

    def __init__(self, job: Job, gpus: Sequence[str] | None) -> None:
        self.job = job
        self.gpus = None if gpus is None else tuple(gpus)
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopped = False

    def run(self) -> int:
        """Train until the end. Returns the worker's exit code: 0 done, 1 failed, 130 interrupted, 75 already taken."""
        lock = take_lock(self.job.folder / "lock", patience_s=LOCK_PATIENCE_S)
        if lock is None:
            return BUSY
        try:
            if is_finished(self.job):
                return 0
            end_processes(self.job.folder, grace_s=0)  # of an attempt whose first process was killed
            return EXIT_CODES[self._train(lock)]
        finally:
            os.close(lock)

    def stop(self, grace_s: float = GRACE_S) -> None:
        """End the training; `run` then returns as interrupted. For signal handlers."""
        self._is_stopped = True
        if self._process is not None:
            end_processes(self.job.folder, grace_s=grace_s)

    def _train(self, lock: int) -> Status:
        earlier = read_state(self.job)
        state = State(
            status=Status.RUNNING,
            attempts=1 + (earlier.attempts if earlier else 0),
            started=time.time(),
            gpus=self.gpus or (),
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        write_state(self.job, state)
        self._note("start", state)
        if changed := changed_files(self.job.inputs):
            reason = f"{', '.join(changed)}: the file has changed since the suite was started, or is gone"
            state = replace(state, status=Status.FAILED, ended=time.time(), reason=reason)
        else:
            state = self._ended(state, *self._run_command(lock))
        write_state(self.job, state)
        self._note("end", state)
        return state.status

    def _run_command(self, lock: int) -> tuple[int, tuple[str, ...]]:
        """Train, with the output in the log. Returns the exit code, and the last lines."""
        with self.job.log.open("ab") as log:
            start = log.tell()
            log.write(f"$ {shlex.join(self.job.command)}\n".encode())
            log.flush()
            exit_code = self._wait(lock, log.fileno())
        end_processes(self.job.folder, grace_s=0)
        return exit_code, tail_of(self.job.log, start)

    def _wait(self, lock: int, log: int) -> int:
        if self._is_stopped:
            return -signal.SIGTERM
        environment = marked_environment(self.job.folder)
        if self.gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        self._process = subprocess.Popen(
            self.job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            pass_fds=(lock,),
        )
        if self._is_stopped:  # in between
            end_processes(self.job.folder, grace_s=0)
        return self._process.wait()

    def _ended(self, state: State, exit_code: int, tail: tuple[str, ...]) -> State:
        """The state after the end, by what the training left behind."""
        state = replace(state, ended=time.time(), exit_code=exit_code)
        if is_finished(self.job):
            return replace(state, status=Status.DONE)
        if self._is_stopped:
            return replace(state, status=Status.INTERRUPTED, reason="stopped")
        if exit_code < 0:
            name = SIGNAL_NAMES.get(-exit_code, f"signal {-exit_code}")
            return replace(state, status=Status.INTERRUPTED, reason=f"killed by {name}")
        telling = [line for line in tail if TELLING.match(line)]
        last = (telling or list(tail) or ["nothing was printed"])[-1]
        reason = f"exit code {exit_code}: {last}" if exit_code else f"ended without a whole {RESULTS}: {last}"
        return replace(state, status=Status.FAILED, reason=reason, tail=tail)

    def _note(self, event: str, state: State) -> None:
        line = {"event": event, "attempt": state.attempts, "time": time.time(), "status": state.status.value}
        line |= {"exit_code": state.exit_code, "reason": state.reason, "pid": state.pid, "host": state.host}
        with (self.job.folder / "attempts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job. Returns what `Attempt.run` does."""
    parser = argparse.ArgumentParser(description="Run one job of a suite; detco-suite starts this.")
    parser.add_argument("folder", type=Path, help="the job's folder")
    parser.add_argument("--gpus", default="", metavar="IDS", help="CUDA devices, 0,1,...; empty is the CPU")
    arguments = parser.parse_args(argv)
    attempt = Attempt(read_job(arguments.folder), [item for item in arguments.gpus.split(",") if item])

    def stop(number: int, frame: FrameType | None) -> None:
        attempt.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    return attempt.run()


if __name__ == "__main__":
    sys.exit(main())
