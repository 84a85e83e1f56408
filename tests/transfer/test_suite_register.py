"""Registering the jobs of a suite: what may have changed since a job was started, and what is refused."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from transfer.suite.jobs import Job, State, Status, find_jobs, read_job, write_job, write_state
from transfer.suite.scheduler import AlreadyThere, register


def job_of(output: Path) -> Job:
    command = (sys.executable, "-c", "pass")
    job = Job("job", 0, "job", "", "a", {}, 0, command, 0, None, output / "job")
    write_job(job)
    return job


def start(job: Job) -> None:
    write_state(job, State(Status.DONE, attempts=1, started=0.0))


def test_a_job_is_not_continued_with_another_command_or_another_file(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    register([replace(job, command=("python", "x", "SEED", "1"))])  # nothing has happened yet
    assert read_job(job.folder).command[-1] == "1"
    register([job])
    start(job)
    register([replace(job, num_gpus=4)])
    with pytest.raises(AlreadyThere, match="now SEED 1, then nothing more"):
        register([replace(job, command=(*job.command, "SEED", "1"))])
    with pytest.raises(AlreadyThere, match=r"another content of base\.yaml; "):
        register([replace(job, inputs={"base.yaml": "0" * 64})])


def test_where_the_data_lie_and_how_many_gpus_there_are_may_change_unless_the_recipe_is_scaled(
    tmp_path: Path,
) -> None:
    def command(gpus: str, root: str, *more: str) -> tuple[str, ...]:
        return (sys.executable, "-c", "", "--num-gpus", gpus, "--datasets-root", root, *more)

    job = replace(job_of(tmp_path), command=command("8", "/data"))
    write_job(job)
    start(job)
    register([replace(job, command=("python3", *command("4", "/mnt")[1:]))])
    with pytest.raises(AlreadyThere, match="now --num-gpus 4 --auto-scale, then nothing more"):
        register([replace(job, command=command("4", "/data", "--auto-scale"))])


def test_nothing_is_registered_if_one_job_is_refused(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    start(job)
    fresh = replace(job, id="fresh", folder=tmp_path / "fresh")
    with pytest.raises(AlreadyThere):
        register([fresh, replace(job, command=(*job.command, "x"))])
    assert [found.id for found in find_jobs(tmp_path)[0]] == [job.id]
    assert json.loads((job.folder / "job.json").read_text())["command"] == list(job.command)
