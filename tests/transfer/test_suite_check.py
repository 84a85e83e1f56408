"""The check of all jobs before the first: what is wrong is said at once, once, and nothing is started."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from transfer.suite import cli, processes
from transfer.suite.check import describe, mark_checked, was_checked
from transfer.suite.jobs import Job, Status, find_jobs, read_members, status_of

ROOT = Path(__file__).parents[2]


def job_of(folder: Path, *command: str, inputs: Mapping[str, str]) -> Job:
    folder.mkdir(exist_ok=True)
    return Job("task__a__seed0", 0, "task", "", "a", inputs, 0, command, 0, None, folder)


@pytest.mark.d2
def test_missing_data_and_a_file_without_a_record_are_each_said_once_and_nothing_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "theirs.pkl"
    weights.write_bytes(pickle.dumps({"model": {"stem.conv1.weight": np.zeros((64, 3, 7, 7), np.float32)}}))
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        f"output: {tmp_path}/out\ndatasets_root: {tmp_path}/nowhere\nseeds: [0, 1, 2, 3]\n"
        f"weights: {{random: {{init: random}}, theirs: {{file: {weights}}}}}\n"
        f"tasks: [{{config: '{ROOT}/configs/transfer/quick/coco_retinanet_{{init}}.yaml'}}]\n"
    )
    assert cli.main(["run", str(suite), "--num-gpus", "0"]) == 2
    said = capsys.readouterr().err
    assert said.count("nowhere/coco/annotations/instances_train2017.json") == 1
    assert "coco_retinanet__random__seed0, coco_retinanet__random__seed1" in said
    assert " and 5 more" in said
    assert said.count(f"convert-to-d2 {weights} {tmp_path}/theirs.d2.pkl") == 1
    assert "Nothing was started." in said
    jobs, _ = find_jobs(tmp_path / "out")
    assert len(jobs) == 8
    assert read_members(tmp_path / "out") == {job.id for job in jobs}
    assert {status_of(job) for job in jobs} == {Status.WAITING}
    assert not any(was_checked(job) for job in jobs)


def test_what_was_found_right_is_remembered_for_this_command_and_these_files_only(tmp_path: Path) -> None:
    job = job_of(tmp_path / "a", "train", "SEED", "1", inputs={"config": "1"})
    assert not was_checked(job)
    mark_checked(job)
    assert was_checked(job)
    assert not was_checked(job_of(tmp_path / "a", "train", "SEED", "2", inputs={"config": "1"}))
    assert not was_checked(job_of(tmp_path / "a", "train", "SEED", "1", inputs={"config": "2"}))


def test_many_jobs_with_one_problem_are_named_in_part() -> None:
    lines = describe({"no coco/": ["a", "b", "c", "d", "e"], "no lvis/": ["x"]}).splitlines()
    assert lines[:4] == ["error: no coco/", "    in a, b, c and 2 more", "error: no lvis/", "    in x"]


@pytest.mark.parametrize(
    ("lacking", "code", "message"), [("output", 1, "File exists"), ("/proc", 2, "Run it on Linux")]
)
def test_where_a_suite_cannot_run_an_error_is_printed_and_nothing_started(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    lacking: str,
    code: int,
    message: str,
) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"output: {tmp_path}/out\nweights: {{random: {{init: random}}}}\ntasks: [coco_retinanet_12k]\n")
    if lacking == "output":
        (tmp_path / "out").touch()
    else:
        monkeypatch.setattr(processes, "PROC", tmp_path / "proc")
    assert cli.main(["run", str(suite), "--num-gpus", "0"]) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert not (tmp_path / "out").is_dir()
