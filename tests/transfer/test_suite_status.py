"""Forecasts and the status table, from files as detco-transfer and Detectron2 write them; dry runs of the command."""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from transfer.suite import cli
from transfer.suite.forecast import Forecast, duration, finished_jobs, forecast, summary
from transfer.suite.jobs import Job, State, Status, take_lock, write_job, write_members, write_state
from transfer.suite.status import progress_of, result_of, status_report

ROOT = Path(__file__).parents[2]


def job_of(
    folder: Path,
    task: str = "coco_retinanet_12k",
    *,
    num_gpus: int = 8,
    iterations: int | None = 12000,
    command: tuple[str, ...] = ("x",),
) -> Job:
    name = f"{task}__a__seed0"
    job = Job(name, len(list(folder.iterdir())), task, task, "a", {}, 0, command, num_gpus, iterations, folder / name)
    write_job(job)
    return job


def finish(
    job: Job, *, hours: float, iterations: int, hardware: str, metrics: Mapping[str, float] | None = None
) -> None:
    job.run_folder.mkdir(parents=True)
    content: dict[str, Any] = {
        "schema": 1,
        "task": job.task,
        "recipe": "moco",
        "label": "a",
        "weights": {"path": "", "sha256": None, "provenance": {}},
        "metrics": metrics or {"box_AP": 1.0},
        "departures": [],
        "config_digest": "d",
        "seed": 0,
        "hours": hours,
        "hardware": hardware,
        "schedule": {"iterations": iterations, "num_gpus": job.num_gpus},
        "finished": f"2026-01-01T00:00:{int(hours):02d}Z",
    }
    (job.run_folder / "results.json").write_text(json.dumps(content))


def test_without_finished_runs_the_forecast_is_the_zoo_s_seconds_times_iterations(tmp_path: Path) -> None:
    expected = forecast(job_of(tmp_path), [])
    assert expected.gpu_hours == pytest.approx(0.205 * 12000 * 8 / 3600)
    assert expected.hours == pytest.approx(0.205 * 12000 / 3600)
    assert expected.is_lower_bound
    assert "lower bound: FrozenBN" in expected.source


@pytest.mark.parametrize(
    ("task", "v100_hours", "is_lower_bound"),
    [  # the table of costs that was made from the zoo independently of seconds.yaml
        ("voc0712_fasterrcnn_c4_24k", 29, True),
        ("coco_maskrcnn_c4_2x", 234, True),
        ("coco_maskrcnn_fpn_1x", 52, True),
        ("coco_maskrcnn_fpn_4x/4conv1fc", 276, False),
        ("coco_retinanet_2x", 82, True),
        ("coco_keypoint_fpn_2x", 126, True),
        ("cityscapes_maskrcnn_fpn_24k", 13, True),
        ("lvis1_maskrcnn_fpn_1x", 58, True),
    ],
)
def test_the_zoo_s_forecasts_are_the_known_costs(
    tmp_path: Path, task: str, v100_hours: float, is_lower_bound: bool
) -> None:
    iterations = {"24k": 24000, "1x": 90000, "2x": 180000, "4x": 360000}[task.split("/")[0].split("_")[-1]]
    job = replace(job_of(tmp_path), task=task, protocol=task, iterations=iterations)
    expected = forecast(job, [])
    assert expected.gpu_hours == pytest.approx(v100_hours, abs=0.75)
    assert expected.is_lower_bound is is_lower_bound


def test_scaling_to_fewer_gpus_changes_hours_but_not_gpu_hours(tmp_path: Path) -> None:
    eight = forecast(job_of(tmp_path), [])
    scaled = job_of(tmp_path, num_gpus=2, iterations=48000, command=("x", "--auto-scale"))
    assert forecast(scaled, []).gpu_hours == pytest.approx(eight.gpu_hours)
    assert forecast(scaled, []).hours == pytest.approx(4 * (eight.hours or 0))
    assert forecast(job_of(tmp_path, num_gpus=2), []).gpu_hours == pytest.approx(eight.gpu_hours)


def test_finished_runs_of_the_task_count_more_than_their_detector_s_speed_and_that_more_than_the_zoo(
    tmp_path: Path,
) -> None:
    short, long = job_of(tmp_path), job_of(tmp_path, "coco_retinanet_1x", iterations=90000)
    other = job_of(tmp_path, "coco_maskrcnn_fpn_12k")
    finish(short, hours=2.0, iterations=12000, hardware="8 x H200")
    finished = finished_jobs([short, long, other])
    assert forecast(long, finished).hours == pytest.approx(2.0 / 12000 * 90000)
    assert "0.600 s/iteration x 90000" in forecast(long, finished).source
    assert forecast(other, finished).gpu_hours == pytest.approx(0.261 * 12000 * 8 / 3600)
    assert forecast(replace(short, seed=1), finished).gpu_hours == pytest.approx(16.0)
    going_on_with_fewer = finished_jobs([replace(short, num_gpus=4)])
    assert forecast(short, going_on_with_fewer).hours == 2.0  # it is the run that says on how many it was measured
    fewer = replace(short, num_gpus=4)  # nothing has been measured on 4
    assert forecast(fewer, finished).gpu_hours == pytest.approx(0.205 * 12000 * 8 / 3600)


def test_only_runs_on_the_hardware_used_last_count(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    jobs = [job_of(folder) for folder in folders]
    for job, (hours, hardware) in zip(jobs, [(9.0, "8 x V100"), (10.0, "8 x H200"), (12.0, "8 x H200")], strict=True):
        finish(job, hours=hours, iterations=12000, hardware=hardware)
    assert forecast(jobs[0], finished_jobs(jobs)).hours == pytest.approx(11.0)


@pytest.mark.parametrize(
    ("num_gpus", "iterations", "task"), [(0, 40, "coco_retinanet_12k"), (8, None, ""), (8, 9, "x")]
)
def test_what_nobody_has_recorded_is_not_guessed(
    tmp_path: Path, num_gpus: int, iterations: int | None, task: str
) -> None:
    job = replace(job_of(tmp_path, num_gpus=num_gpus, iterations=iterations), protocol=task)
    assert forecast(job, []).gpu_hours is None
    assert summary([forecast(job, [])], num_gpus=num_gpus, num_slots=1) == "1 of unknown duration"


def test_a_summary_adds_up_and_says_what_is_a_bound_and_what_is_unknown() -> None:
    known = [Forecast(2.0, 16.0, ""), Forecast(1.0, 8.0, "", is_lower_bound=True)]
    assert summary(known[:1], num_gpus=8, num_slots=1) == "about 16.0 GPU-hours, 2:00:00 on 8 GPUs"
    text = summary([*known, Forecast(None, None, "")], num_gpus=4, num_slots=2)
    assert text == "at least 24.0 GPU-hours, 1:30:00 on 8 GPUs, and 1 of unknown duration"
    assert summary(known, num_gpus=0, num_slots=2) == "at least 1:30:00"
    assert summary([], num_gpus=8, num_slots=1) == "nothing left to do"


def test_durations_are_hours_minutes_seconds() -> None:
    assert [duration(seconds) for seconds in (0, 59.6, 3723)] == ["0:00:00", "0:01:00", "1:02:03"]


def test_progress_is_the_last_whole_line_with_the_estimate_less_what_has_passed(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    assert progress_of(job, 0.0) is None
    job.run_folder.mkdir()
    path = job.run_folder / "metrics.json"
    lines = [{"iteration": 19, "eta_seconds": 500.0}, {"iteration": 39, "eta_seconds": 400.0}, {"bbox/AP": 1.0}]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"iteration": 59, "eta_sec')
    os.utime(path, (1000.0, 1000.0))
    progress = progress_of(job, 1060.0)
    assert progress is not None
    assert (progress.iteration, progress.seconds_left) == (40, 340.0)


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"mask_AP": 2.0, "box_AP50": 5.0, "box_AP": 1.04}, "box_AP 1.0, mask_AP 2.0, 0:30:00"),
        ({"box_AP": 50.0, "keypoint_AP": 60.0}, "keypoint_AP 60.0, 0:30:00"),
        ({"mIoU": 70.0}, "mIoU 70.0, 0:30:00"),
        ({"mask_AP": 33.0, "mask_AP50": 60.0}, "mask_AP 33.0, 0:30:00"),
    ],
)
def test_a_finished_job_shows_what_its_task_is_judged_by(
    tmp_path: Path, metrics: dict[str, float], expected: str
) -> None:
    job = job_of(tmp_path)
    finish(job, hours=0.5, iterations=10, hardware="x", metrics=metrics)
    assert result_of(job) == expected


def test_the_table_shows_every_state_and_why_a_job_failed(tmp_path: Path) -> None:
    names = ["coco_retinanet_12k", "coco_retinanet_1x", "coco_retinanet_2x", "coco_maskrcnn_fpn_12k", "voc"]
    done, running, failed, waiting, queued = [job_of(tmp_path, name) for name in names]
    finish(done, hours=2.0, iterations=12000, hardware="8 x H200")
    running.run_folder.mkdir()
    (running.run_folder / "metrics.json").write_text('{"iteration": 39, "eta_seconds": 3700.0}\n')
    (running.run_folder / "config.yaml").write_text("SOLVER:\n  MAX_ITER: 90000\n")
    write_state(running, State(Status.RUNNING, 1, time.time() - 60, gpus=("0", "1")))
    write_state(failed, State(Status.FAILED, 2, 0.0, 1.0, 1, "exit code 1: OSError: disk", ("many", "OSError: disk")))
    lock = take_lock(running.folder / "lock")
    assert lock is not None
    report = status_report([done, running, failed, waiting, queued], queued=[queued.id])
    os.close(lock)
    lines = report.splitlines()
    states = ["done", "running", "failed", "waiting", "queued"]
    assert [line.split()[:2] for line in lines[:5]] == [
        [job.id, state] for job, state in zip((done, running, failed, waiting, queued), states, strict=True)
    ]
    assert "box_AP 1.0, 2:00:00" in lines[0]
    assert "iteration 40/90000, for 0:01:0" in lines[1]
    assert "ETA 1:01:" in lines[1]
    assert "GPU 0,1" in lines[1]
    assert lines[2].endswith("exit code 1: OSError: disk; attempt 2")
    assert lines[3].endswith("at least 0:52:12")
    assert lines[6] == "5 jobs: 1 done, 1 failed, 1 queued, 1 running, 1 waiting"
    # The running one by its own estimate, an hour on 8 GPUs; the waiting one by the zoo; the queued one is unknown.
    assert "left, one job at a time: at least 15.2 GPU-hours" in lines[7]
    assert "    OSError: disk" in lines
    interrupted = status_report([running])
    assert "interrupted  its worker was killed; attempt 1" in interrupted


def test_a_job_that_is_no_longer_in_the_suite_is_marked_and_not_left_to_do(tmp_path: Path) -> None:
    kept, removed = job_of(tmp_path), job_of(tmp_path, "coco_retinanet_1x", iterations=90000)
    lines = status_report([kept, removed], members=[kept.id]).splitlines()
    assert ["no longer in the suite" in line for line in lines[:2]] == [False, True]
    assert lines[-1] == status_report([kept]).splitlines()[-1]
    assert "no longer" not in status_report([kept, removed])


def test_a_job_whose_results_are_lost_is_not_called_killed(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    write_state(job, State(Status.DONE, 1, 0.0, 1.0, 0))
    assert "interrupted  its results.json is gone or broken; attempt 1" in status_report([job])


def test_status_shows_all_jobs_but_the_broken_and_marks_what_the_suite_has_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, removed, broken = [job_of(tmp_path, name) for name in ("good", "removed", "broken")]
    (broken.folder / "job.json").write_text("{")
    write_members(tmp_path, [good.id])
    assert cli.main(["status", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert f"{broken.folder} is left out" in said.err
    assert "2 jobs: 2 waiting" in said.out
    assert f"{removed.id}  waiting      no longer in the suite;" in said.out
    (tmp_path / "suite.json").write_text("{")
    assert cli.main(["status", str(tmp_path)]) == 0
    assert "no longer" not in capsys.readouterr().out


def test_a_dry_run_prints_commands_that_can_be_typed_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "w w.pkl"
    weights.touch()
    suite = str(ROOT / "configs/suites/ranking_12k.yaml")
    words = ["run", suite, "--weights", f"mine={weights}", "--num-gpus", "8", "--gpus-per-job", "4", "--auto-scale"]
    output = tmp_path / "out"
    assert cli.main([*words, "--output-dir", str(output), "--datasets-root", "/data", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    config = ROOT / "configs/transfer/coco/retinanet_r50_fpn_12k_converted.yaml"
    assert lines[1] == (
        f"detco-transfer --config-file {config} --resume --num-gpus 4 --auto-scale --datasets-root /data "
        f"--output-dir {output}/coco_retinanet_12k__mine__seed0/run MODEL.WEIGHTS '{weights}' SEED 0"
    )
    assert lines[0].startswith("# coco_retinanet_12k__mine__seed0: 5.47 GPU-hours: 0.205 s/iteration x 12000")
    assert lines[-1] == "# 4 jobs to run: at least 56.6 GPU-hours, 7:04:48 on 8 GPUs"
    assert not output.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.yaml"], "no suite file nowhere.yaml"),
        (["SUITE"], "--weights NAME=FILE"),
        (["SUITE", "--num-gpus", "4", "--gpus-per-job", "8"], "--gpus-per-job must be from 1"),
        (["SUITE", "--num-gpus", "4", "--jobs", "2"], "--jobs is for the CPU"),
        (["SUITE", "--num-gpus", "0", "--auto-scale"], "there is none"),
        (["SUITE", "--num-gpus", "4", "--launcher", "slurm", "--gpus-per-job", "2"], "leave --gpus-per-job out"),
        (["SUITE", "--launcher", "slurm"], "needs --num-gpus N"),
    ],
)
def test_wrong_input_is_refused_with_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    suite = str(ROOT / "configs/suites/ranking_12k.yaml")
    given = [suite if word == "SUITE" else word for word in words]
    on_cpu = [] if {"--num-gpus", "--launcher"} & set(given) else ["--num-gpus", "0"]
    assert cli.main(["run", *given, *on_cpu]) == 2
    assert message in capsys.readouterr().err


def test_more_gpus_than_are_visible_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert cli.main(["run", str(ROOT / "configs/suites/ranking_12k.yaml"), "--num-gpus", "4"]) == 2
    assert "CUDA_VISIBLE_DEVICES names 2: '2,3'" in capsys.readouterr().err


def test_status_takes_a_suite_or_its_folder_and_says_when_nothing_has_been_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"output: {tmp_path}/out\nweights: {{a: {{init: random}}}}\ntasks: [coco_retinanet_12k]\n")
    assert cli.main(["status", str(suite)]) == 2
    assert "no job has been started" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    job = job_of(tmp_path / "out")
    for place in (suite, tmp_path / "out"):
        assert cli.main(["status", str(place), "--watch", "1"]) == 0
        assert job.id in capsys.readouterr().out


def test_help_teaches_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["run", "--help"], ["status", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(words)
        assert stopped.value.code == 0
        assert "examples:" in capsys.readouterr().out
