import json
import math
from pathlib import Path

import pytest

from detco.artifact import IMAGENET_RGB
from transfer.run_record import RunRecord, Schedule, is_result, label_of, metric_names, with_heads, write_results
from transfer.weights import WeightsRecord

WEIGHTS = WeightsRecord("detco.pkl", "ab" * 32, IMAGENET_RGB, {"method": "detco", "epochs": 200})


def record(**changes: object) -> RunRecord:
    fields = {
        "task": "voc0712_fasterrcnn_c4_24k",
        "based_on": "",
        "recipe": "c4_extra_norm",
        "label": "detco 200ep",
        "weights": WEIGHTS,
        "transferred": ("backbone", "fpn"),
        "metrics": {"box_AP": 57.4, "box_AP75": None},
        "departures": ["SOLVER.MAX_ITER is 30, the task's is 24000"],
        "schedule": Schedule(30, 4, 0.01, 0, False, 1e-4),
        "datasets": {"train": ("voc_2007_trainval",), "test": ("voc_2007_test",)},
        "subsets": {"coco_2017_train_1pct": {"images": 1183}},
        "config_digest": "cd" * 32,
        "seed": 3,
        "hours": 1.23456,
        "detectron2": "0.5",
    }
    return RunRecord(**{**fields, **changes})


def test_results_file_holds_every_agreed_key(tmp_path: Path) -> None:
    path = write_results(tmp_path, record())
    assert path == tmp_path / "results.json"
    found = json.loads(path.read_text())
    assert set(found) == {
        *("schema", "task", "based_on", "recipe", "label", "weights", "metrics", "departures", "schedule", "datasets"),
        *("subsets", "config_digest", "seed", "versions", "hardware", "hours", "finished"),
    }
    assert found["schema"] == 1
    assert found["weights"] == {
        "path": "detco.pkl",
        "sha256": "ab" * 32,
        "provenance": {"method": "detco", "epochs": 200},
        "preprocess": IMAGENET_RGB.as_dict(),
        "transferred": ["backbone", "fpn"],
    }
    assert found["metrics"] == {"box_AP": 57.4, "box_AP75": None}
    assert found["schedule"] == {
        "iterations": 30,
        "batch_size": 4,
        "base_lr": 0.01,
        "num_gpus": 0,
        "auto_scaled": False,
        "weight_decay": 1e-4,
    }
    assert {"torch", "torchvision", "detectron2", "detco"} <= set(found["versions"])
    assert found["hardware"].startswith("CPU, ")
    assert found["finished"].endswith("Z")


def test_results_are_replaced_as_a_whole_and_leave_no_temporary_file(tmp_path: Path) -> None:
    write_results(tmp_path, record())
    write_results(tmp_path, record(seed=4))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert json.loads((tmp_path / "results.json").read_text())["seed"] == 4


def test_metrics_get_the_names_of_the_published_numbers() -> None:
    scalars = {"bbox/AP": 57.4, "bbox/AP50": 82.5, "segm/AP": 35.0, "bbox/AP-person": 60.0, "segm/AP75": math.nan}
    assert metric_names(scalars) == {"box_AP": 57.4, "box_AP50": 82.5, "mask_AP": 35.0, "mask_AP75": None}
    assert metric_names({"voc_2007_test/bbox/AP": 1.0}) == {"voc_2007_test/box_AP": 1.0}
    assert metric_names({"keypoints/AP50": 1.0, "densepose_gps/AP": 2.0}) == {"keypoint_AP50": 1.0, "dp_AP": 2.0}


def test_what_could_not_be_measured_is_unknown_and_not_negative() -> None:
    assert metric_names({"bbox/APl": -100.0, "bbox/AP": 0.0}) == {"box_APl": None, "box_AP": 0.0}


def test_the_mean_iou_has_one_name_whichever_evaluator_gives_it() -> None:
    assert metric_names({"sem_seg/IoU": 75.0, "sem_seg/IoU_sup": 80.0}) == {"mIoU": 75.0}
    assert metric_names({"sem_seg/mIoU": 75.0, "sem_seg/IoU-road": 80.0}) == {"mIoU": 75.0}


def test_results_are_told_from_the_other_scalars_of_a_run() -> None:
    assert all(map(is_result, ("bbox/AP", "a/segm/AP50", "keypoints/AP", "sem_seg/IoU", "densepose_gps/AP")))
    assert not any(map(is_result, ("total_loss", "loss_sem_seg", "roi_head/num_fg_samples", "lr", "sem_seg")))


def test_heads_without_any_detection_are_reported_as_unknown() -> None:
    assert with_heads({"box_AP": 1.0, "mask_AP": 2.0}, "mask") == {"box_AP": 1.0, "mask_AP": 2.0}
    assert with_heads({"v/box_AP": None}, "mask") == {"v/box_AP": None, "v/mask_AP": None}
    assert with_heads({"box_AP": 0.0}, "keypoint") == {"box_AP": 0.0, "keypoint_AP": None}


@pytest.mark.parametrize(
    ("given", "init", "weights", "label"),
    [
        ("mine", "converted", WEIGHTS, "mine"),
        ("", "converted", WEIGHTS, "detco 200ep"),
        ("", "converted", WeightsRecord("a/moco.pkl", None, None, {"method": "moco_v2"}), "moco_v2"),
        ("", "converted", WeightsRecord("a/unknown.pkl", None, None, {}), "unknown"),
        ("", "converted", WeightsRecord("a.pkl", None, None, {"method": "detco", "epochs": 0.5}), "detco 0.5ep"),
        ("", "random", WeightsRecord("", None, None, {}), "random init"),
        (
            "",
            "supervised",
            WeightsRecord("detectron2://ImageNetPretrained/MSRA/R-50.pkl", None, None, {}),
            "supervised",
        ),
    ],
)
def test_row_is_named_by_the_config_else_by_the_weights(
    given: str, init: str, weights: WeightsRecord, label: str
) -> None:
    assert label_of(given, init, weights) == label
