"""Reading run directories and averaging repeats."""

import json
import statistics

import pytest

from transfer.results.repeats import group_repeats
from transfer.results.runs import RunError, find_runs, read_run


def _content(**changes):
    content = {
        "schema": 1,
        "task": "voc0712_fasterrcnn_c4_24k",
        "recipe": "c4_extra_norm",
        "label": "detco 200ep",
        "weights": {"path": "detco.pkl", "sha256": "ab" * 32, "provenance": {"method": "detco"}, "preprocess": None},
        "metrics": {"box_AP": 57.4, "box_AP50": 82.5, "box_AP75": 63.9},
        "departures": [],
        "schedule": {"iterations": 24000, "batch_size": 16, "base_lr": 0.02, "num_gpus": 8, "auto_scaled": False},
        "datasets": {"train": ["voc_2007_trainval"], "test": ["voc_2007_test"]},
        "config_digest": "d1",
        "seed": 0,
        "versions": {"detectron2": "0.6"},
        "hardware": "8x V100",
        "hours": 3.0,
        "finished": "2026-01-01T00:00:00Z",
    }
    return {**content, **changes}


def _write(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(_content(**changes)))
    return folder


def test_runs_are_found_at_any_depth_and_each_once(tmp_path):
    _write(tmp_path / "a" / "b" / "run")
    _write(tmp_path / "c", label="other")
    runs, left_out = find_runs([tmp_path, tmp_path / "c", tmp_path / "c" / "results.json"])
    assert [run.label for run in runs] == ["detco 200ep", "other"]
    assert left_out == []


def test_paths_without_results_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "metrics.json").write_text("")
    runs, left_out = find_runs([tmp_path / "empty", tmp_path / "stopped", tmp_path / "gone"])
    assert runs == []
    reasons = {item.path.name: item.reason for item in left_out}
    assert "no results.json here or in any folder below" in reasons["empty"]
    assert "not finished" in reasons["stopped"]
    assert reasons["gone"] == "does not exist"


def test_unfinished_runs_below_a_folder_are_named_beside_the_finished_ones(tmp_path):
    _write(tmp_path / "done")
    (tmp_path / "done" / "metrics.json").write_text("")
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "last_checkpoint").write_text("")
    runs, left_out = find_runs([tmp_path])
    assert len(runs) == 1
    assert [item.path.name for item in left_out] == ["stopped"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 1, "task"', "not JSON"),
        ("[]", "expected an object"),
        (json.dumps(_content(schema=2)), "schema is 2"),
        (
            json.dumps({key: value for key, value in _content().items() if key != "departures"}),
            "'departures' is missing",
        ),
        (json.dumps(_content(metrics={"box_AP": "57"})), "metric 'box_AP' is '57'"),
        (json.dumps(_content(metrics={"box_AP": 5740.0})), "outside 0 to 100"),
        (json.dumps(_content(metrics={"box_AP": None})), "'metrics' has no value"),
        (json.dumps(_content(seed="zero")), "'seed' is 'zero'"),
        (json.dumps(_content(seed=True)), "'seed' is True"),
        (json.dumps(_content(departures=[3])), "not text"),
        (json.dumps(_content(hours="long")), "'hours' is 'long'"),
        (json.dumps(_content(subsets={"coco_2017_train_1pct": {"sha256": "00"}})), "'subsets' has"),
    ],
)
def test_malformed_files_are_refused_with_the_reason(tmp_path, text, message):
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(RunError) as error:
        read_run(file)
    assert message in str(error.value)
    runs, left_out = find_runs([tmp_path])
    assert runs == []
    assert left_out[0].path == file.resolve()


def test_metrics_that_could_not_be_measured_are_absent(tmp_path):
    run = read_run(_write(tmp_path, metrics={"box_AP": 1.0, "box_APl": float("nan"), "mask_AP": None}) / "results.json")
    assert run.metrics == {"box_AP": 1.0}


def test_repeats_give_mean_and_sample_standard_deviation(tmp_path):
    values = [57.6, 57.9, 57.7, 58.0, 57.8]
    for seed, value in enumerate(values):
        _write(tmp_path / str(seed), seed=seed, metrics={"box_AP": value})
    measurements, left_out = group_repeats(find_runs([tmp_path])[0])
    assert left_out == []
    (measurement,) = measurements
    assert measurement.mean("box_AP") == pytest.approx(57.8)
    # By hand: deviations -0.2, 0.1, -0.1, 0.2, 0; squares add up to 0.10; 0.10 / 4 = 0.025.
    assert measurement.std("box_AP") == pytest.approx(0.025**0.5)
    assert measurement.std("box_AP") == pytest.approx(statistics.stdev(values))


def test_a_single_run_has_no_standard_deviation(tmp_path):
    _write(tmp_path)
    assert group_repeats(find_runs([tmp_path])[0])[0][0].std("box_AP") is None


@pytest.mark.parametrize(
    "change",
    [
        {"weights": {"path": "detco.pkl", "sha256": "cd" * 32, "provenance": {}}},
        {"config_digest": "d2"},
        {"task": "coco_retinanet_1x"},
        {"recipe": "moco"},
        {"departures": ["SOLVER.MAX_ITER is 30, the task's is 24000"]},
        {"datasets": {"train": ["mine"], "test": ["mine"]}},
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(tmp_path, change):
    _write(tmp_path / "a", seed=0)
    _write(tmp_path / "b", seed=1, **change)
    assert len(group_repeats(find_runs([tmp_path])[0])[0]) == 2


def test_of_runs_with_one_seed_the_last_counts_and_the_other_is_named(tmp_path):
    _write(tmp_path / "new", metrics={"box_AP": 2.0}, finished="2026-01-02T00:00:00Z")
    _write(tmp_path / "old", metrics={"box_AP": 1.0}, finished="2026-01-01T00:00:00Z")
    (measurement,), left_out = group_repeats(find_runs([tmp_path])[0])
    assert measurement.values("box_AP") == [2.0]
    assert [item.path.name for item in left_out] == ["old"]
    assert "same seed (0)" in left_out[0].reason


@pytest.mark.parametrize("seed", [None, -1])
def test_runs_without_a_seed_each_count(tmp_path, seed):
    _write(tmp_path / "a", seed=seed)
    _write(tmp_path / "b", seed=seed)
    (measurement,), left_out = group_repeats(find_runs([tmp_path])[0])
    assert len(measurement.runs) == 2
    assert left_out == []
