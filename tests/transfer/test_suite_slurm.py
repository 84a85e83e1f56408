"""Jobs through submitit's local executor, which needs no SLURM: the same states, requeueing, and nothing twice."""

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from transfer.suite.jobs import Job, Status, read_state, status_of, write_job
from transfer.suite.processes import end_processes
from transfer.suite.slurm import RunJob, SlurmMissing, is_pending, is_queued, queued_ids, submit

submitit = pytest.importorskip("submitit")

ROOT = Path(__file__).parents[2]
FINISHED = {
    **{"schema": 1, "task": "t", "recipe": "", "label": "a", "metrics": {"box_AP": 1.0}, "departures": []},
    **{"weights": {"path": "", "sha256": None, "provenance": {}}, "config_digest": "d", "seed": 0},
}
SUCCEED = (
    f"pathlib.Path('run').mkdir(exist_ok=True); pathlib.Path('run/results.json').write_text({json.dumps(FINISHED)!r})"
)
PREAMBLE = "import os, pathlib, sys, time\nos.chdir({folder!r})\n"
WAIT = "print('training', flush=True)\nwhile not pathlib.Path('../go').exists(): time.sleep(0.05)\n"
LOCAL = {"cluster": "local", "timeout_min": "5"}

MakeJob = Callable[..., Job]


@pytest.fixture
def make_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeJob]:
    """`make_job(script)` makes a job that runs a script in its own folder; what is left of it is killed at the end."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    made: list[Job] = []

    def make(script: str) -> Job:
        name = f"job{len(made)}"
        folder = tmp_path / name
        command = (sys.executable, "-c", PREAMBLE.format(folder=str(folder)) + script)
        job = Job(name, len(made), name, "", "a", {}, 0, command, 0, None, folder)
        write_job(job)
        made.append(job)
        return job

    yield make
    for job in made:
        end_processes(job.folder, grace_s=0)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.05)


def test_submitted_jobs_end_in_the_same_states_as_local_ones(make_job: MakeJob, tmp_path: Path) -> None:
    jobs = [make_job(SUCCEED), make_job("raise ValueError('broken')"), make_job(WAIT + SUCCEED)]
    assert submit(jobs, LOCAL, output=tmp_path) == jobs
    until(lambda: status_of(jobs[0]) is Status.DONE and status_of(jobs[1]) is Status.FAILED)
    state = read_state(jobs[1])
    assert state is not None
    assert "ValueError: broken" in state.reason
    until(lambda: status_of(jobs[2]) is Status.RUNNING)
    assert submit(jobs, LOCAL, output=tmp_path) == []  # done, failed, running
    (tmp_path / "go").touch()
    until(lambda: status_of(jobs[2]) is Status.DONE)
    until(lambda: not is_queued(jobs[2]))


def test_a_preempted_job_is_stopped_and_queued_again_and_then_ends(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(WAIT + SUCCEED)
    submit([job], LOCAL, output=tmp_path)
    until(lambda: job.log.exists() and "training" in job.log.read_text().splitlines())
    state = read_state(job)
    assert state is not None
    os.kill(state.pid, signal.SIGUSR2)  # what SLURM sends, as submitit asks it to
    until(lambda: job.log.read_text().splitlines().count("training") == 2)
    (tmp_path / "go").touch()
    until(lambda: status_of(job) is Status.DONE)
    state = read_state(job)
    assert state is not None
    assert state.attempts == 2


def test_a_job_that_waits_in_the_queue_is_not_submitted_twice(make_job: MakeJob, tmp_path: Path) -> None:
    """Its record alone says that it is queued: whoever asks may be another process than the one that submitted it."""
    job = make_job(WAIT + SUCCEED)
    submit([job], LOCAL, output=tmp_path)
    # Between submission and start the job looks as if it waited; the lock comes only with its worker.
    assert status_of(job) is Status.RUNNING or queued_ids([job]) == [job.id]
    assert submit([job], LOCAL, output=tmp_path) == []
    (tmp_path / "go").touch()
    until(lambda: status_of(job) is Status.DONE)
    assert queued_ids([job]) == []


def test_without_a_time_limit_or_with_a_wrong_parameter_nothing_is_submitted(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(SUCCEED)
    with pytest.raises(ValueError, match="timeout_min=MINUTES"):
        submit([job], {"cluster": "local"}, output=tmp_path)
    with pytest.raises(ValueError, match="slurm_partitoin"):
        submit([job], {**LOCAL, "slurm_partitoin": "gpu"}, output=tmp_path)
    with pytest.raises(ValueError, match="cluster=debug: expected slurm, or local"):
        submit([job], {**LOCAL, "cluster": "debug"}, output=tmp_path)
    assert not is_queued(job)


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[]",
        '{"cluster": "local"}',
        '{"cluster": "debug", "job_id": "1", "folder": "x"}',
        f'{{"cluster": "local", "job_id": "{os.getpid()}", "folder": "x"}}',  # of another program by now
        f'{{"cluster": "local", "job_id": "{2**22 + 1}", "folder": "x"}}',
    ],
    ids=["empty", "a list", "no id", "another cluster", "another program", "no process"],
)
def test_a_record_that_leads_to_no_submission_does_not_keep_a_job_queued(make_job: MakeJob, record: str) -> None:
    job = make_job(SUCCEED)
    (job.folder / "submitted.json").write_text(record)
    assert queued_ids([job]) == []


def test_without_submitit_the_message_says_how_to_install_it(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(SlurmMissing, match=r"pip install 'detco\[slurm\]'"):
        submit([make_job("")], LOCAL, output=tmp_path)


@pytest.mark.parametrize(
    ("state", "age_s", "expected"),
    [
        ("PENDING", 1e6, True),
        ("RUNNING", 1e6, True),
        ("CANCELLED by 1000", 1.0, False),
        ("TIMEOUT", 1.0, False),
        ("UNKNOWN", 1.0, True),
        ("UNKNOWN", 1e6, False),
        ("", 1.0, True),
    ],
)
def test_slurm_s_states_say_whether_a_job_is_still_to_come(state: str, age_s: float, expected: bool) -> None:
    assert is_pending(state, age_s) is expected


def test_stopping_before_the_start_is_harmless(tmp_path: Path) -> None:
    assert isinstance(RunJob(tmp_path).checkpoint(), submitit.helpers.DelayedSubmission)
