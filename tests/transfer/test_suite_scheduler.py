"""The scheduler with real workers and small scripts for training: order, GPUs, failures, kills, signals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from transfer.suite.jobs import Job, Status, read_job, read_jobs, read_state, status_of, write_job
from transfer.suite.processes import end_processes, processes_of
from transfer.suite.scheduler import AlreadyThere, Scheduler, only_scheduler, register, slots_of

ROOT = Path(__file__).parents[2]
SUCCEED = "pathlib.Path('run').mkdir(exist_ok=True); pathlib.Path('run/results.json').touch()"
# Notes when it ran and on which GPUs.
NOTED = f"start = time.time(); time.sleep(0.4); {SUCCEED}; note(start)"
PREAMBLE = """
import os, pathlib, signal, sys, time
os.chdir({folder!r})
def note(start):
    pathlib.Path('note').write_text(repr((start, time.time(), os.environ['CUDA_VISIBLE_DEVICES'])))
def go():
    return pathlib.Path('../go').exists()
"""
WAIT = "print('training', flush=True)\nwhile not go(): time.sleep(0.02)\n"
# What a scheduler in a process of its own does; its jobs are read from the folder.
PROGRAM = """
import sys
from pathlib import Path
from transfer.suite.jobs import read_jobs
from transfer.suite.scheduler import Scheduler, only_scheduler
output = Path(sys.argv[1])
with only_scheduler(output):
    scheduler = Scheduler(read_jobs(output), [()] * int(sys.argv[2]), lambda text: print(text, flush=True))
    failed = scheduler.run(retry_failed=False)
sys.exit(130 if scheduler.was_stopped else len(failed))
"""

MakeJob = Callable[..., Job]


@pytest.fixture
def make_job(tmp_path: Path) -> Iterator[MakeJob]:
    """`make_job(script)` makes a job that runs a script in its own folder; what is left of it is killed at the end."""
    made: list[Job] = []

    def make(script: str, name: str = "") -> Job:
        name = name or f"job{len(made)}"
        folder = tmp_path / name
        command = (sys.executable, "-c", PREAMBLE.format(folder=str(folder)) + script)
        job = Job(name, len(made), name, "", "a", "", 0, command, 0, None, folder)
        write_job(job)
        made.append(job)
        return job

    yield make
    for job in made:
        end_processes(job.folder, grace_s=0)


StartScheduler = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def scheduler_process() -> Iterator[StartScheduler]:
    """`scheduler_process(output, slots)` starts a scheduler in a process that does not outlive the test."""
    started: list[subprocess.Popen[str]] = []

    def start(output: Path, slots: int = 1) -> subprocess.Popen[str]:
        environment = dict(os.environ, PYTHONPATH=f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
        command = [sys.executable, "-c", PROGRAM, str(output), str(slots)]
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.02)


def is_training(job: Job) -> bool:
    return job.log.exists() and "training" in job.log.read_text().splitlines()


def starts_of(job: Job) -> int:
    path = job.folder / "attempts.jsonl"
    return sum('"start"' in line for line in path.read_text().splitlines()) if path.exists() else 0


def run(jobs: list[Job], slots: list[tuple[str, ...]], *, retry_failed: bool = False) -> tuple[list[Job], list[str]]:
    said: list[str] = []
    failed = Scheduler(jobs, slots, said.append).run(retry_failed=retry_failed)
    return failed, said


def test_jobs_run_one_after_another_in_their_order_and_a_failed_one_does_not_stop_the_rest(make_job: MakeJob) -> None:
    jobs = [make_job(NOTED), make_job("raise ValueError('broken')"), make_job(NOTED)]
    failed, said = run(jobs, [()])
    assert failed == [jobs[1]]
    assert [status_of(job) for job in jobs] == [Status.DONE, Status.FAILED, Status.DONE]
    (_, first_end, gpus), (second_start, _, _) = (eval((jobs[i].folder / "note").read_text()) for i in (0, 2))
    assert first_end <= second_start
    assert gpus == ""
    assert any("ValueError: broken" in line and str(jobs[1].log) in line for line in said)
    assert [line.split()[0] for line in said] == ["start", "done", "start", "FAILED", "start", "done"]


def test_failed_jobs_stay_failed_until_they_are_retried_and_done_ones_are_never_repeated(make_job: MakeJob) -> None:
    flaky = f"if go(): {SUCCEED}\nelse: sys.exit(2)"
    jobs = [make_job(flaky), make_job(SUCCEED)]
    assert run(jobs, [()])[0] == [jobs[0]]
    (jobs[0].folder / "../go").touch()
    assert run(jobs, [()])[0] == [jobs[0]]
    assert starts_of(jobs[0]) == 1
    assert run(jobs, [()], retry_failed=True)[0] == []
    assert [starts_of(job) for job in jobs] == [2, 1]


def test_side_by_side_jobs_have_disjoint_gpus_and_all_of_their_own(make_job: MakeJob) -> None:
    jobs = [make_job(NOTED) for _ in range(5)]
    slots = slots_of(["3", "5", "6", "7", "9"], per_job=2, cpu_jobs=1)
    assert slots == [("3", "5"), ("6", "7")]
    run(jobs, slots)
    notes = [eval((job.folder / "note").read_text()) for job in jobs]
    assert {gpus for _, _, gpus in notes} == {"3,5", "6,7"}
    overlaps = 0
    for index, (start, end, gpus) in enumerate(notes):
        for other_start, other_end, other_gpus in notes[:index]:
            if start < other_end and other_start < end:
                overlaps += 1
                assert gpus != other_gpus
    assert overlaps > 0
    assert read_state(jobs[0]).gpus in slots  # type: ignore[union-attr]


def test_slots_on_the_cpu_are_as_many_as_asked_for() -> None:
    assert slots_of([], per_job=0, cpu_jobs=3) == [(), (), ()]
    assert slots_of(["0", "1"], per_job=2, cpu_jobs=1) == [("0", "1")]


def test_when_the_scheduler_is_killed_its_worker_goes_on_and_the_next_scheduler_waits_for_it(
    make_job: MakeJob, scheduler_process: StartScheduler, tmp_path: Path
) -> None:
    jobs = [make_job(f"{WAIT}{SUCCEED}"), make_job(SUCCEED)]
    first = scheduler_process(tmp_path)
    until(lambda: is_training(jobs[0]))
    first.kill()
    first.wait()
    assert [status_of(job) for job in jobs] == [Status.RUNNING, Status.WAITING]
    second = scheduler_process(tmp_path)
    assert second.stdout is not None
    assert second.stdout.readline().startswith("goes on    1/2 job0, started by an earlier detco-suite")
    time.sleep(0.5)
    assert status_of(jobs[1]) is Status.WAITING  # its place is taken
    (tmp_path / "go").touch()
    assert second.wait() == 0
    assert [(status_of(job), starts_of(job)) for job in jobs] == [(Status.DONE, 1)] * 2


def test_when_everything_is_killed_the_next_scheduler_repeats_the_running_job_only(
    make_job: MakeJob, scheduler_process: StartScheduler, tmp_path: Path
) -> None:
    jobs = [make_job(SUCCEED), make_job(f"{WAIT}{SUCCEED}"), make_job(SUCCEED)]
    first = scheduler_process(tmp_path)
    until(lambda: is_training(jobs[1]))
    for pid in [first.pid, *processes_of(jobs[1].folder)]:
        os.kill(pid, signal.SIGKILL)
    first.wait()
    until(lambda: status_of(jobs[1]) is Status.INTERRUPTED)
    (tmp_path / "go").touch()
    assert scheduler_process(tmp_path).wait() == 0
    assert [starts_of(job) for job in jobs] == [1, 2, 1]


def test_a_killed_worker_s_training_is_waited_for_by_the_same_scheduler(
    make_job: MakeJob, scheduler_process: StartScheduler, tmp_path: Path
) -> None:
    job = make_job(f"{WAIT}{SUCCEED}")
    scheduler = scheduler_process(tmp_path)
    until(lambda: is_training(job))
    state = read_state(job)
    assert state is not None
    os.kill(state.pid, signal.SIGKILL)
    time.sleep(0.5)
    assert status_of(job) is Status.RUNNING
    (tmp_path / "go").touch()
    assert scheduler.wait() == 0
    assert (status_of(job), starts_of(job)) == (Status.DONE, 1)


def test_a_job_that_is_killed_again_and_again_becomes_a_failed_one(make_job: MakeJob) -> None:
    jobs = [make_job("os.kill(os.getpid(), signal.SIGKILL)"), make_job(SUCCEED)]
    failed, said = run(jobs, [()])
    assert failed == [jobs[0]]
    assert [starts_of(job) for job in jobs] == [3, 1]
    state = read_state(jobs[0])
    assert state is not None
    assert state.reason == "killed by SIGKILL, 3 times in a row; too little memory?"
    assert sum("it runs again" in line for line in said) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_scheduler_and_jobs_and_they_go_on_later(
    make_job: MakeJob, scheduler_process: StartScheduler, tmp_path: Path, number: signal.Signals
) -> None:
    jobs = [make_job(f"{WAIT}{SUCCEED}") for _ in range(3)]
    scheduler = scheduler_process(tmp_path, slots=2)
    until(lambda: is_training(jobs[0]) and is_training(jobs[1]))
    scheduler.send_signal(number)
    assert scheduler.wait() == 130
    assert scheduler.stdout is not None
    assert scheduler.stdout.read().count("stopped ") == 2
    assert [status_of(job) for job in jobs] == [Status.INTERRUPTED, Status.INTERRUPTED, Status.WAITING]
    assert not any(processes_of(job.folder) for job in jobs)
    assert {state.reason for job in jobs[:2] if (state := read_state(job))} == {"stopped"}  # asked, not killed
    (tmp_path / "go").touch()
    assert scheduler_process(tmp_path, slots=2).wait() == 0
    assert [starts_of(job) for job in jobs] == [2, 2, 1]


def test_a_signal_also_stops_what_a_killed_scheduler_had_started(
    make_job: MakeJob, scheduler_process: StartScheduler, tmp_path: Path
) -> None:
    job = make_job(f"{WAIT}{SUCCEED}")
    first = scheduler_process(tmp_path)
    until(lambda: is_training(job))
    first.kill()
    first.wait()
    second = scheduler_process(tmp_path)
    assert second.stdout is not None
    second.stdout.readline()
    second.send_signal(signal.SIGINT)
    assert second.wait() == 130
    assert status_of(job) is Status.INTERRUPTED
    assert processes_of(job.folder) == []


def test_two_schedulers_never_share_a_folder(tmp_path: Path) -> None:
    again = only_scheduler(tmp_path)
    with only_scheduler(tmp_path), pytest.raises(AlreadyThere, match=f"process {os.getpid()} on "), again:
        pass
    with only_scheduler(tmp_path):
        pass


def test_a_job_is_not_continued_with_another_command_or_another_file(make_job: MakeJob) -> None:
    job = make_job(SUCCEED)
    register([replace(job, command=("python", "x", "SEED", "1"))])  # nothing has happened yet
    assert read_job(job.folder).command[-1] == "1"
    register([job])
    run([job], [()])
    register([replace(job, num_gpus=4)])
    with pytest.raises(AlreadyThere, match="now SEED 1, then nothing more"):
        register([replace(job, command=(*job.command, "SEED", "1"))])
    with pytest.raises(AlreadyThere, match="another file under the same name"):
        register([replace(job, weights_sha256="0" * 64)])


def test_where_the_data_lie_and_how_many_gpus_there_are_may_change_unless_the_recipe_is_scaled(
    make_job: MakeJob,
) -> None:
    def command(gpus: str, root: str, *more: str) -> tuple[str, ...]:
        return (sys.executable, "-c", "", "--num-gpus", gpus, "--datasets-root", root, *more)

    job = replace(make_job(""), command=command("8", "/data"))
    write_job(job)
    run([job], [()])
    register([replace(job, command=("python3", *command("4", "/mnt")[1:]))])
    with pytest.raises(AlreadyThere, match="now --num-gpus 4 --auto-scale, then nothing more"):
        register([replace(job, command=command("4", "/data", "--auto-scale"))])


def test_nothing_is_registered_if_one_job_is_refused(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(SUCCEED)
    run([job], [()])
    fresh = replace(job, id="fresh", folder=tmp_path / "fresh")
    with pytest.raises(AlreadyThere):
        register([fresh, replace(job, command=(*job.command, "x"))])
    assert [found.id for found in read_jobs(tmp_path)] == [job.id]
    assert json.loads((job.folder / "job.json").read_text())["command"] == list(job.command)
