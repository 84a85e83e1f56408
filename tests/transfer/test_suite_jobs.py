"""A job from start to end, with real processes: its states, its lock, its worker. Small scripts stand for training."""

import fcntl
import itertools
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

from transfer.digest import sha256_of
from transfer.results.runs import RunError, read_run
from transfer.run_record import RunRecord, Schedule, write_results
from transfer.suite.jobs import (
    BUSY,
    RESULT_KEYS,
    Job,
    State,
    Status,
    find_jobs,
    is_finished,
    is_locked,
    read_job,
    read_state,
    status_of,
    take_lock,
    write_job,
    write_state,
)
from transfer.suite.processes import end_processes, marked_environment, processes_of
from transfer.weights import WeightsRecord

FINISHED = {
    **{"schema": 1, "task": "t", "recipe": "", "label": "a", "metrics": {"box_AP": 1.0}, "departures": []},
    **{"weights": {"path": "", "sha256": None, "provenance": {}}, "config_digest": "d", "seed": 0},
}
SUCCEED = (
    "import pathlib; run = pathlib.Path('run'); run.mkdir(exist_ok=True); "
    f"(run / 'results.json').write_text({json.dumps(FINISHED)!r})"
)
SLEEP = "import time; print('training', flush=True); time.sleep(60)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP

MakeJob = Callable[..., Job]


@pytest.fixture
def make_job(tmp_path: Path) -> Iterator[MakeJob]:
    """`make_job(script)` makes a job that runs a script in its own folder; what is left of it is killed at the end."""
    made: list[Job] = []

    def make(script: str, name: str = "task__a__seed0") -> Job:
        folder = tmp_path / name
        script = f"import os; os.chdir({str(folder)!r})\n{script}"
        command = (sys.executable, "-c", script)
        job = Job(name, len(made), "task", "", "a", {}, 0, command, 0, None, folder)
        write_job(job)
        made.append(job)
        return job

    yield make
    for job in made:
        end_processes(job.folder, grace_s=0)


def worker(job: Job) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "transfer.suite.worker", str(job.folder)]
    return subprocess.Popen(command, env=marked_environment(job.folder), start_new_session=True)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.02)


def is_training(job: Job) -> bool:
    return job.log.exists() and "training" in job.log.read_text().splitlines()


def training_of(job: Job, process: subprocess.Popen[bytes]) -> int:
    (pid,) = [pid for pid in processes_of(job.folder) if pid != process.pid]
    return pid


def attempts_of(job: Job) -> list[dict[str, object]]:
    return [json.loads(line) for line in (job.folder / "attempts.jsonl").read_text().splitlines()]


def test_the_status_follows_from_lock_results_and_state(make_job: MakeJob) -> None:
    """All combinations against the rule in words: a held lock wins, then results, then what the state says."""
    states = [None, *Status]
    for number, (locked, has_results, state) in enumerate(itertools.product([True, False], [True, False], states)):
        job = make_job("", f"task__a__seed{number}")
        if state is not None:
            write_state(job, State(state, attempts=1, started=0.0))
        if has_results:
            job.run_folder.mkdir()
            (job.run_folder / "results.json").write_text(json.dumps(FINISHED))
        lock = take_lock(job.folder / "lock") if locked else None
        if locked:
            expected = Status.RUNNING
        elif has_results:
            expected = Status.DONE
        elif state is None:
            expected = Status.WAITING
        else:
            expected = Status.FAILED if state is Status.FAILED else Status.INTERRUPTED
        assert status_of(job) is expected
        if lock is not None:
            os.close(lock)


def test_jobs_and_states_are_read_as_they_were_written(make_job: MakeJob, tmp_path: Path) -> None:
    second, first = make_job("b", "b"), make_job("a", "a")
    state = State(Status.FAILED, 3, 1.5, 2.5, 7, "why", ("x", "y"), ("0", "1"), "host", 12)
    write_state(first, state)
    assert read_state(first) == state
    assert read_state(second) is None
    assert read_job(first.folder) == first
    assert find_jobs(tmp_path) == ([second, first], [])


def test_looking_at_a_lock_does_not_take_it(make_job: MakeJob) -> None:
    job = make_job("")
    path = job.folder / "lock"
    assert not is_locked(path)
    lock = take_lock(path)
    assert lock is not None
    assert is_locked(path)
    assert take_lock(path) is None
    os.close(lock)
    assert not is_locked(path)
    with path.open() as looking:  # as `is_locked` does in another process
        fcntl.flock(looking, fcntl.LOCK_SH)
        assert not is_locked(path)


def test_a_run_that_leaves_results_is_done_and_not_run_again(make_job: MakeJob) -> None:
    job = make_job(SUCCEED)
    assert worker(job).wait() == 0
    assert status_of(job) is Status.DONE
    assert worker(job).wait() == 0
    assert [entry["event"] for entry in attempts_of(job)] == ["start", "end"]


@pytest.mark.parametrize("content", ["", '{"schema": ', "{}", "[]"])
def test_a_broken_result_is_none_so_that_the_job_runs_again(make_job: MakeJob, content: str) -> None:
    job = make_job(SUCCEED)
    job.run_folder.mkdir()
    (job.run_folder / "results.json").write_text(content)
    assert status_of(job) is Status.WAITING
    assert worker(job).wait() == 0
    assert status_of(job) is Status.DONE
    assert len(attempts_of(job)) == 2
    (job.run_folder / "results.json").write_text(content)
    assert status_of(job) is Status.INTERRUPTED


def test_a_run_that_leaves_a_broken_result_has_failed(make_job: MakeJob) -> None:
    job = make_job("os.mkdir('run'); open('run/results.json', 'w').write('{')")
    assert worker(job).wait() == 1
    assert status_of(job) is Status.FAILED


@pytest.mark.parametrize("key", sorted(FINISHED))
def test_a_result_is_whole_with_all_that_the_tables_need_and_not_without(make_job: MakeJob, key: str) -> None:
    job = make_job("")
    job.run_folder.mkdir()
    path = job.run_folder / "results.json"
    path.write_text(json.dumps(FINISHED))
    assert is_finished(job)
    read_run(path)
    path.write_text(json.dumps({name: value for name, value in FINISHED.items() if name != key}))
    assert not is_finished(job)
    with pytest.raises(RunError):
        read_run(path)


def test_what_a_run_writes_is_whole_even_with_nothing_measured_and_on_the_disk_before_it_has_its_name(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job("")
    job.run_folder.mkdir()
    weights, schedule = WeightsRecord("", None, {}, None), Schedule(1, 1, 0.1, 0, False, 0.0)
    record = RunRecord("t", "", "", "a", weights, (), {"box_AP": None}, [], schedule, {}, {}, "d", 0, 1.0, "0.5")
    synced: list[tuple[int, bool]] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.fstat(file).st_size, is_finished(job))))
    path = write_results(job.run_folder, record)
    assert synced == [(path.stat().st_size, False)]
    assert is_finished(job)
    assert json.loads(path.read_text()).keys() >= RESULT_KEYS


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_job_is_not_trained_with_another_file_than_it_was_registered_with(
    make_job: MakeJob, tmp_path: Path, is_gone: bool
) -> None:
    weights = tmp_path / "weights.pkl"
    weights.write_text("old")
    job = replace(make_job(SUCCEED), inputs={str(weights): sha256_of(weights)})
    write_job(job)
    weights.unlink() if is_gone else weights.write_text("new")
    assert worker(job).wait() == 1
    state = read_state(job)
    assert state is not None
    assert state.reason.startswith(f"{weights}: the file has changed")
    assert status_of(job) is Status.FAILED
    weights.write_text("old")
    assert worker(job).wait() == 0


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"status": "paused", "tail": [], "gpus": []}'])
def test_a_broken_state_is_an_interruption_that_says_so(make_job: MakeJob, content: str) -> None:
    job = make_job(SUCCEED)
    (job.folder / "state.json").write_text(content)
    assert status_of(job) is Status.INTERRUPTED
    state = read_state(job)
    assert state is not None
    assert state.reason.startswith("state.json cannot be used")
    assert worker(job).wait() == 0
    assert status_of(job) is Status.DONE


@pytest.mark.parametrize("content", ["", "[]", "null", '{"command": "abc"}', None])
def test_a_folder_whose_job_cannot_be_read_is_named_and_left_out(
    make_job: MakeJob, tmp_path: Path, content: str | None
) -> None:
    good, bad = make_job("", "good"), make_job("", "bad").folder / "job.json"
    bad.unlink()
    bad.mkdir() if content is None else bad.write_text(content)
    found, left_out = find_jobs(tmp_path)
    assert found == [good]
    (text,) = left_out
    assert text.startswith(f"{bad.parent} is left out: ")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("raise ValueError('no such thing')", "exit code 1: ValueError: no such thing"),
        ("import sys; print('error: wrong --option'); sys.exit(2)", "exit code 2: error: wrong --option"),
        ("print('almost there')", "ended without a whole results.json: almost there"),
        ("", "ended without a whole results.json: nothing was printed"),
    ],
)
def test_a_run_that_fails_keeps_its_reason_and_its_log_s_last_lines(
    make_job: MakeJob, script: str, reason: str
) -> None:
    job = make_job("import sys\nfor i in range(40): print('line', i)\n" * ("print" in script) + script)
    assert worker(job).wait() == 1
    state = read_state(job)
    assert state is not None
    assert status_of(job) is Status.FAILED
    assert reason in state.reason or (script == "" and "ended without" in state.reason)
    assert len(state.tail) <= 15
    assert "line 3" not in state.tail


def test_a_second_attempt_is_counted_and_its_tail_is_its_own(make_job: MakeJob) -> None:
    job = make_job("import pathlib; n = len(pathlib.Path('attempts.jsonl').read_text().split()); raise KeyError(n)")
    for _ in range(2):
        worker(job).wait()
    state = read_state(job)
    assert state is not None
    assert state.attempts == 2
    assert sum(line.startswith("KeyError") for line in state.tail) == 1
    assert job.log.read_text().count("\nKeyError") == 2


def test_while_a_job_runs_a_second_worker_leaves_it_alone(make_job: MakeJob) -> None:
    job = make_job(SLEEP)
    first = worker(job)
    until(lambda: is_training(job))
    assert worker(job).wait() == BUSY
    assert status_of(job) is Status.RUNNING
    assert len(attempts_of(job)) == 1
    first.terminate()
    assert first.wait() == 130


@pytest.mark.parametrize("script", [SLEEP, STUBBORN], ids=["obedient", "stubborn"])
def test_a_worker_that_is_asked_to_stop_ends_the_training_and_says_interrupted(
    make_job: MakeJob, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(script)
    process = worker(job)
    until(lambda: is_training(job))
    training = training_of(job, process)
    process.terminate()
    if script == STUBBORN:
        time.sleep(0.3)
        os.kill(training, 0)  # still there: it is given time
        os.kill(training, signal.SIGKILL)  # instead of waiting ten seconds for the worker to do it
    assert process.wait() == 130
    state = read_state(job)
    assert state is not None
    assert (state.status, state.reason) == (Status.INTERRUPTED, "stopped")
    assert status_of(job) is Status.INTERRUPTED
    assert processes_of(job.folder) == []


def test_a_killed_training_is_interrupted_and_names_the_signal(make_job: MakeJob) -> None:
    job = make_job(SLEEP)
    process = worker(job)
    until(lambda: is_training(job))
    os.kill(training_of(job, process), signal.SIGKILL)
    assert process.wait() == 130
    state = read_state(job)
    assert state is not None
    assert state.reason == "killed by SIGKILL"
    assert status_of(job) is Status.INTERRUPTED


def test_a_signal_without_a_name_is_given_by_its_number(make_job: MakeJob) -> None:
    job = make_job("os.kill(os.getpid(), 40)")
    assert worker(job).wait() == 130
    state = read_state(job)
    assert state is not None
    assert state.reason == "killed by signal 40"


def test_a_killed_worker_s_training_keeps_the_lock_until_it_ends(make_job: MakeJob) -> None:
    job = make_job(SLEEP)
    process = worker(job)
    until(lambda: is_training(job))
    training = training_of(job, process)
    process.kill()
    process.wait()
    assert status_of(job) is Status.RUNNING
    assert worker(job).wait() == BUSY
    os.kill(training, signal.SIGKILL)
    until(lambda: status_of(job) is Status.INTERRUPTED)


def test_what_a_killed_attempt_left_behind_is_ended_before_the_next(make_job: MakeJob) -> None:
    """Ranks and loader workers may outlive the process that held the lock."""
    child = "import time; time.sleep(60)"
    script = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); {SLEEP}"
    job = make_job(script)
    process = worker(job)
    until(lambda: is_training(job))
    until(lambda: len(processes_of(job.folder)) == 3)
    orphan = max(processes_of(job.folder))
    for pid in processes_of(job.folder):
        if pid != orphan:
            os.kill(pid, signal.SIGKILL)
    process.wait()
    until(lambda: processes_of(job.folder) == [orphan])
    assert status_of(job) is Status.INTERRUPTED
    again = worker(job)
    until(lambda: job.log.read_text().count("training\n") == 2)
    assert orphan not in processes_of(job.folder)
    again.terminate()
    assert again.wait() == 130


def test_the_processes_of_one_job_are_not_those_of_another(make_job: MakeJob) -> None:
    one, other = make_job(SLEEP, "task__a__seed1"), make_job(SLEEP, "task__a__seed10")
    workers = [worker(one), worker(other)]
    until(lambda: is_training(one) and is_training(other))
    end_processes(one.folder, grace_s=5)
    workers[0].wait()
    assert status_of(one) is Status.INTERRUPTED
    assert status_of(other) is Status.RUNNING
    workers[1].terminate()
    workers[1].wait()
