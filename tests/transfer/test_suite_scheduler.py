"""The scheduler with real workers and small scripts for training: order, GPUs, failures, kills, signals."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from transfer.suite import scheduler as scheduler_module
from transfer.suite.jobs import (
    Job,
    State,
    Status,
    read_state,
    status_of,
    take_lock,
    write_job,
    write_state,
)
from transfer.suite.processes import end_processes, marked_environment, processes_of
from transfer.suite.scheduler import AlreadyThere, Scheduler, only_scheduler, slots_of

ROOT = Path(__file__).parents[2]
FINISHED = {
    **{"schema": 1, "task": "t", "recipe": "", "label": "a", "metrics": {"box_AP": 1.0}, "departures": []},
    **{"weights": {"path": "", "sha256": None, "provenance": {}}, "config_digest": "d", "seed": 0},
}
SUCCEED = (
    f"pathlib.Path('run').mkdir(exist_ok=True); pathlib.Path('run/results.json').write_text({json.dumps(FINISHED)!r})"
)
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
from transfer.suite.jobs import find_jobs
from transfer.suite.scheduler import Scheduler, only_scheduler
output = Path(sys.argv[1])
with only_scheduler(output):
    scheduler = Scheduler(find_jobs(output)[0], [()] * int(sys.argv[2]), lambda text: print(text, flush=True))
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
        job = Job(name, len(made), name, "", "a", {}, 0, command, 0, None, folder)
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


@pytest.fixture
def other(make_job: MakeJob) -> Job:
    """A job on GPU 0 that a killed scheduler has left running."""
    job = make_job(f"start = time.time(); {WAIT}{SUCCEED}; note(start)", "other")
    command = [sys.executable, "-m", "transfer.suite.worker", str(job.folder), "--gpus", "0"]
    subprocess.Popen(command, env=marked_environment(job.folder), start_new_session=True)
    until(lambda: is_training(job))
    return job


def test_a_running_job_that_is_not_among_the_chosen_keeps_its_gpu(make_job: MakeJob, other: Job) -> None:
    job, elsewhere = make_job(NOTED), make_job(NOTED)
    run([elsewhere], [("1",)])  # does not wait for it either
    assert status_of(other) is Status.RUNNING
    threading.Timer(1.0, (other.folder / "../go").touch).start()
    _, said = run([job], [("0",)])
    (_, other_end, _), (start, _, _) = (eval((item.folder / "note").read_text()) for item in (other, job))
    assert other_end <= start
    assert "other, which is not among the chosen jobs" in said[0]


def test_a_folder_whose_job_cannot_be_read_is_named_and_the_others_run(make_job: MakeJob) -> None:
    jobs, broken = [make_job(SUCCEED), make_job(SUCCEED)], make_job("")
    (broken.folder / "job.json").write_text("{")
    failed, said = run(jobs, [()])
    assert failed == []
    assert said[0].startswith(f"{broken.folder} is left out: ")


def test_a_signal_leaves_a_job_alone_that_is_not_among_the_chosen(make_job: MakeJob, other: Job) -> None:
    job = make_job(SUCCEED)
    scheduler = Scheduler([job], [("0",)], lambda text: os.kill(os.getpid(), signal.SIGINT))
    assert scheduler.run(retry_failed=False) == [job]
    assert scheduler.was_stopped
    assert [status_of(other), status_of(job)] == [Status.RUNNING, Status.WAITING]


def test_a_job_that_runs_on_another_machine_takes_no_place_here(make_job: MakeJob) -> None:
    job, far = make_job(SUCCEED), make_job(SUCCEED)
    write_state(far, State(Status.RUNNING, 1, 0.0, host="elsewhere"))
    lock = take_lock(far.folder / "lock")
    assert lock is not None
    assert run([job], [()])[0] == []
    assert status_of(job) is Status.DONE
    os.close(lock)


def test_what_outlives_a_killed_job_is_ended_before_the_next_one_gets_its_place(
    make_job: MakeJob, scheduler_process: StartScheduler, tmp_path: Path
) -> None:
    child = "import time; time.sleep(60)"
    spawn = f"import subprocess; child = subprocess.Popen([sys.executable, '-c', {child!r}])"
    killed = make_job(
        f"if go(): {SUCCEED}\nelse:\n {spawn}\n open('child', 'w').write(str(child.pid))\n time.sleep(60)"
    )
    look = (
        "pid = open('../job0/child').read(); cmdline = pathlib.Path('/proc', pid, 'cmdline'); lives = cmdline.exists()"
    )
    look += " and bool(cmdline.read_bytes()); open('lives', 'w').write(str(lives)); pathlib.Path('../go').touch(); "
    following = make_job(look + SUCCEED)
    scheduler = scheduler_process(tmp_path)
    until(lambda: (killed.folder / "child").exists() and (killed.folder / "child").read_text())
    orphan = int((killed.folder / "child").read_text())
    for pid in processes_of(killed.folder):
        if pid != orphan:
            os.kill(pid, signal.SIGKILL)
    assert scheduler.wait() == 0
    assert (following.folder / "lives").read_text() == "False"


def test_a_job_whose_folder_disappears_is_given_up_and_the_others_go_on(make_job: MakeJob) -> None:
    jobs = [make_job("import shutil; shutil.rmtree(os.getcwd())"), make_job(SUCCEED)]
    failed, said = run(jobs, [()])
    assert failed == [jobs[0]]
    assert status_of(jobs[1]) is Status.DONE
    assert any(line.startswith("FAILED     1/2 job0: ") for line in said)


def test_on_a_full_disk_a_job_is_given_up_and_the_others_go_on(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(job: Job, state: State) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scheduler_module, "write_state", full)
    jobs = [make_job("os.kill(os.getpid(), signal.SIGKILL)"), make_job(SUCCEED)]
    failed, said = run(jobs, [()])
    assert failed == [jobs[0]]
    assert any("No space left on device" in line for line in said)
    assert [status_of(job) for job in jobs] == [Status.INTERRUPTED, Status.DONE]  # and not locked by us


def test_a_retry_whose_worker_does_not_start_is_not_explained_by_the_attempt_before(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job("raise ValueError('first')")
    run([job], [()])
    monkeypatch.setattr(scheduler_module, "sys", SimpleNamespace(executable="false"))
    failed, said = run([job], [()], retry_failed=True)
    assert failed == [job]
    assert "ValueError" not in "".join(said)
    state = read_state(job)
    assert state is not None
    assert state.reason == "its worker ended before it began, with exit code 1, 3 times in a row"


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
