"""Runs jobs on this machine: one at a time over all GPUs, or several side by side on disjoint ones.

Everything that must survive is on disk and held by the workers, so a scheduler can be killed at any moment. Its workers
go on with what they are doing; the next scheduler finds their locks held and waits for them instead of starting those
jobs again.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from transfer.suite.forecast import finished_jobs, forecast, summary
from transfer.suite.jobs import (
    Job,
    State,
    Status,
    find_jobs,
    is_locked,
    read_job,
    read_state,
    status_of,
    take_lock,
    write_job,
    write_state,
)
from transfer.suite.processes import end_processes, marked_environment, processes_of, send
from transfer.suite.status import result_of
from transfer.suite.worker import GRACE_S

POLL_S = 0.2
# A job that is killed so often by something else than us (out of memory, most likely) is a failed one.
KILLS_ALLOWED = 3
LOCK = ".scheduler"
NOT_IDENTITY = ("--num-gpus", "--datasets-root")

Say = Callable[[str], None]


class AlreadyThere(ValueError):
    """The output folder is in use, or holds other jobs; the message says what to do."""


@dataclass
class Active:
    """A job that somebody is working on.

    Attributes:
        job: The job.
        slots: Places that it takes.
        process: Its worker; None if an earlier scheduler started it.
        attempts: How many there had been before; while there are no more, its state is that of an earlier one.
    """

    job: Job
    slots: frozenset[int]
    process: subprocess.Popen[bytes] | None
    attempts: int


@contextmanager
def only_scheduler(output: Path) -> Iterator[None]:
    """Keep every other scheduler off an output folder.

    Raises:
        AlreadyThere: If there is one.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / LOCK
    lock = take_lock(path, patience_s=1.0)
    if lock is None:
        owner = path.read_text(encoding="utf-8").strip() or "of unknown id"
        raise AlreadyThere(
            f"another detco-suite runs in {output}: process {owner}. Wait for it, watch it with `detco-suite status "
            f"{output}`, or stop it there"
        )
    os.ftruncate(lock, 0)
    os.write(lock, f"{os.getpid()} on {socket.gethostname()}".encode())
    try:
        yield
    finally:
        os.close(lock)


def is_at_work(output: Path) -> bool:
    """Whether a scheduler works on an output folder."""
    return is_locked(output / LOCK)


def register(jobs: Sequence[Job]) -> None:
    """Write every job's folder and job.json.

    Raises:
        AlreadyThere: If a job has been tried before with another command, config or weights file. Nothing is written.
    """
    for job in jobs:
        if not (job.folder / "job.json").is_file() or status_of(job) is Status.WAITING:
            continue
        before = read_job(job.folder)
        old, new = _identity(before), _identity(job)
        if old != new:
            now = " ".join(word for word in new if word not in old) or "nothing more"
            then = " ".join(word for word in old if word not in new) or "nothing more"
            raise AlreadyThere(
                f"{job.id} has been started with another command (now {now}, then {then}); give another --output-dir, "
                f"or remove {job.folder}"
            )
        if before.inputs != job.inputs:
            changed = sorted({path for path, _ in before.inputs.items() ^ job.inputs.items()})
            raise AlreadyThere(
                f"{job.id} has been started with another content of {', '.join(changed)}; give another --output-dir, "
                f"or the weights another name, or remove {job.folder}"
            )
    for job in jobs:
        write_job(job)


def slots_of(gpus: Sequence[str], *, per_job: int, cpu_jobs: int) -> list[tuple[str, ...]]:
    """The places where a job can run: disjoint groups of GPUs, or without GPUs `cpu_jobs` empty ones."""
    if not gpus:
        return [()] * cpu_jobs
    return [tuple(gpus[start : start + per_job]) for start in range(0, len(gpus) - per_job + 1, per_job)]


class Scheduler:
    """Works through jobs until every one is done or failed, or a signal stops it.

    Attributes:
        jobs: In the order in which they start.
        slots: See `slots_of`.
        was_stopped: Whether a signal ended it.
    """

    def __init__(self, jobs: Sequence[Job], slots: Sequence[tuple[str, ...]], say: Say) -> None:
        self.jobs = list(jobs)
        self.slots = list(slots)
        self.was_stopped = False
        self._say = say
        self._active: dict[str, Active] = {}
        self._kills: dict[str, int] = {}

    def run(self, *, retry_failed: bool) -> list[Job]:
        """Work through the jobs.

        Args:
            retry_failed: Whether to try those again that have failed before.

        Returns:
            The jobs that are not done, as they have failed or a signal came; to be called once.
        """
        with _signals(self._stop):
            waiting = self._look_around(retry_failed)
            while (waiting or any(map(self._is_ours, self._active.values()))) and not self.was_stopped:
                for active in [item for item in self._active.values() if _has_ended(item)]:
                    with self._going_on(active.job):
                        waiting += self._settle(active)
                while waiting and (slot := self._free_slot()) is not None and not self.was_stopped:
                    job = waiting.pop(0)
                    with self._going_on(job):
                        self._start(job, slot)
                time.sleep(POLL_S)
            if self.was_stopped:
                self._end_all()
        return [job for job in self.jobs if status_of(job) is not Status.DONE]

    def _look_around(self, retry_failed: bool) -> list[Job]:
        """Find what a killed scheduler left in the folder, jobs that are not ours included: they hold GPUs.

        Returns:
            Our jobs that are to be run.
        """
        waiting = []
        ours = {job.id for job in self.jobs}
        found, left_out = find_jobs(self.jobs[0].folder.parent)
        for text in left_out:
            self._say(text)
        for job in [*self.jobs, *(job for job in found if job.id not in ours)]:
            status = status_of(job)
            if status is Status.RUNNING:
                self._adopt(job)
                continue
            if status is Status.INTERRUPTED:
                _end_leftovers(job)
            if job.id in ours and status is not Status.DONE and (status is not Status.FAILED or retry_failed):
                waiting.append(job)
        return waiting

    def _is_ours(self, active: Active) -> bool:
        return active.job in self.jobs

    @contextmanager
    def _going_on(self, job: Job) -> Iterator[None]:
        """Give a job up whose folder cannot be used, on a full disk for instance, and go on with the others."""
        try:
            yield
        except OSError as error:
            self._active.pop(job.id, None)
            self._say(f"FAILED     {self._place(job)}: {error}")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.was_stopped = True

    def _free_slot(self) -> int | None:
        taken = {index for active in self._active.values() for index in active.slots}
        return next((index for index in range(len(self.slots)) if index not in taken), None)

    def _adopt(self, job: Job) -> None:
        state = read_state(job)
        gpus = state.gpus if state else ()
        free = self._free_slot()
        slots = {index for index, slot in enumerate(self.slots) if set(slot) & set(gpus)}
        if not gpus and free is not None:
            slots = {free}
        if state is not None and state.host not in ("", socket.gethostname()):  # by SLURM: our GPUs are free
            slots = set()
        self._active[job.id] = Active(job, frozenset(slots), None, attempts=-1)
        self._say(f"goes on    {self._place(job)}, started by an earlier detco-suite" + _on(gpus))

    def _start(self, job: Job, slot: int) -> None:
        command = [sys.executable, "-m", "transfer.suite.worker", str(job.folder), "--gpus", ",".join(self.slots[slot])]
        environment = marked_environment(job.folder)
        if not self.slots[slot] and len(self.slots) > 1:  # share the cores
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // len(self.slots))))
        before = read_state(job)
        with job.log.open("ab") as log:
            # A session of its own: neither Ctrl-C nor the end of the terminal reach it, only we do.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self._active[job.id] = Active(job, frozenset({slot}), process, attempts=before.attempts if before else 0)
        self._say(f"{'again' if before else 'start':<10} {self._place(job)}" + _on(self.slots[slot]))

    def _settle(self, active: Active) -> list[Job]:
        """Take a job that has ended off the list. Returns it if it must run again."""
        job = active.job
        _end_leftovers(job)
        status, state = status_of(job), read_state(job)
        if status is Status.RUNNING:  # taken by somebody in this instant: look again
            return []
        del self._active[job.id]
        if state is not None and state.attempts <= active.attempts:
            state = None
        if not self._is_ours(active):
            self._say(f"ended      {self._place(job)}")
        elif status is Status.DONE:
            self._say(f"done       {self._place(job)}: {result_of(job)}; {self._left()}")
        elif status is Status.FAILED and state is not None:
            self._say(f"FAILED     {self._place(job)}: {state.reason}\n           all of it in {job.log}")
        elif not self.was_stopped:
            return self._killed(active, state)
        return []

    def _killed(self, active: Active, state: State | None) -> list[Job]:
        """Run a job again that ended without a word, but not for ever. `state` is None if it had not even begun."""
        job = active.job
        self._kills[job.id] = self._kills.get(job.id, 0) + 1
        reason = (state.reason if state is not None else "") or "its worker was killed"
        if state is None and active.process is not None:
            reason = f"its worker ended before it began, with exit code {active.process.poll()}"
        if self._kills[job.id] < KILLS_ALLOWED:
            self._say(f"killed     {self._place(job)}: {reason}; it runs again")
            return [job]
        reason = f"{reason}, {self._kills[job.id]} times in a row" + "; too little memory?" * (state is not None)
        lock = take_lock(job.folder / "lock", patience_s=1.0)
        if lock is not None:
            last = state or State(Status.FAILED, attempts=max(active.attempts, 0), started=time.time())
            try:
                write_state(job, replace(last, status=Status.FAILED, reason=reason, ended=time.time()))
            finally:
                os.close(lock)
        self._say(f"FAILED     {self._place(job)}: {reason}\n           all of it in {job.log}")
        return []

    def _end_all(self) -> None:
        """End what is running of our jobs, as after Ctrl-C. Further signals change nothing."""
        ours = [active for active in self._active.values() if self._is_ours(active)]
        for active in ours:
            send(processes_of(active.job.folder), signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S + 5  # workers wait for GRACE_S themselves, and then write it down
        while not all(map(_has_ended, ours)) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        for active in ours:
            end_processes(active.job.folder, grace_s=0)
            if active.process is not None:
                active.process.wait()
            elsewhere = is_locked(active.job.folder / "lock")
            self._say(
                f"{'goes on' if elsewhere else 'stopped':<10} {self._place(active.job)}" + " elsewhere" * elsewhere
            )

    def _place(self, job: Job) -> str:
        if job not in self.jobs:
            return f"{job.id}, which is not among the chosen jobs"
        return f"{self.jobs.index(job) + 1:>{len(str(len(self.jobs)))}}/{len(self.jobs)} {job.id}"

    def _left(self) -> str:
        left = [job for job in self.jobs if status_of(job) in (Status.WAITING, Status.INTERRUPTED)]
        finished = finished_jobs(self.jobs)
        text = summary(
            [forecast(job, finished) for job in left], num_gpus=self.jobs[0].num_gpus, num_slots=len(self.slots)
        )
        return f"{len(left)} waiting" + (f": {text}" if left else "")


def _end_leftovers(job: Job) -> None:
    """End what a killed attempt left behind, as it may hold a GPU; nothing while somebody works on the job."""
    lock = take_lock(job.folder / "lock")
    if lock is not None:  # with it no worker can begin meanwhile
        try:
            end_processes(job.folder, grace_s=0)
        finally:
            os.close(lock)


def _has_ended(active: Active) -> bool:
    """Whether nobody works on the job any more; a killed worker may leave a training process that does."""
    return (active.process is None or active.process.poll() is not None) and not is_locked(active.job.folder / "lock")


def _identity(job: Job) -> tuple[str, ...]:
    """The words of the command that decide on its result: not the interpreter, not where the data lie."""
    words = list(job.command[1:])
    kept = NOT_IDENTITY if "--auto-scale" not in words else NOT_IDENTITY[1:]
    for option in kept:
        if option in words:
            start = words.index(option)
            del words[start : start + 2]
    return tuple(words)


def _on(gpus: Sequence[str]) -> str:
    return f" on GPU {','.join(gpus)}" if gpus else ""


@contextmanager
def _signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let a handler take SIGINT and SIGTERM for a while."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
