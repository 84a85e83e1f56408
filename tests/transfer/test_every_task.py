"""Every published protocol as a user runs it, made small: two iterations, then the task's own evaluator.

The datasets lie in the real layouts, drawn by tools/make_demo_data.py; some protocols run on real photos as well.
`pytest tests/transfer/test_every_task.py -k <protocol>` runs one.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from transfer import d2, train_net
from transfer.convert import convert
from transfer.tasks import CONFIGS, Task, config_file, load_tasks, pairs, show

pytestmark = pytest.mark.d2

d2.require()

from fvcore.common.config import CfgNode  # noqa: E402

from transfer import densepose  # noqa: E402
from transfer.modeling import fcos  # noqa: E402

ROOT = Path(__file__).parents[2]
REAL = Path(os.environ.get("DETCO_TEST_DATA", ROOT.parent / "shared/data"))
TASKS = load_tasks()
METRICS = {
    "voc0712": ("box_AP", "box_AP50", "box_AP75"),
    "keypoint": ("box_AP", "keypoint_AP", "keypoint_AP50", "keypoint_AP75"),
    "cityscapes_maskrcnn": ("mask_AP", "mask_AP50"),
    "semseg": ("mIoU",),
    "maskrcnn": ("box_AP", "box_AP50", "box_AP75", "mask_AP", "mask_AP50", "mask_AP75"),
    "": ("box_AP", "box_AP50", "box_AP75"),
}
"""The metrics of the papers' columns, by the first of these words that a protocol's name holds."""

OVERLAYS = {"semseg": "cpu_semseg.yaml", "sparsercnn": "cpu_sparse_rcnn.yaml"}
"""What else than quick/cpu.yaml makes a protocol small."""

SHORT = {
    "SOLVER.MAX_ITER": 2,
    "SOLVER.STEPS": (1,),
    "SOLVER.WARMUP_ITERS": 1,
    "SOLVER.BASE_LR": 1e-4,
    "TEST.PRECISE_BN.NUM_ITER": 1,
}
TINY = {
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MAX_SIZE_TRAIN": 96,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 96,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 4,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "TEST.DETECTIONS_PER_IMAGE": 4,
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory, load_tool: Any) -> Path:
    root = tmp_path_factory.mktemp("datasets") / "demo"
    assert load_demo(load_tool).main([str(root), "--images", "1"]) == 0
    assert load_tool("make_coco_subsets").main([str(root), "--seeds", "0"]) == 0
    lists = root / "coco" / "subsets"
    for percent in (1, 2, 5):  # of 48 images, too few to hold an object each
        shutil.copy(lists / "train2017_10pct_seed0.txt", lists / f"train2017_{percent}pct_seed0.txt")
    return root


def load_demo(load_tool: Any) -> Any:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return load_tool("make_demo_data")
    finally:
        sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet50().state_dict(), folder / "resnet50.pth")
    convert(folder / "resnet50.pth", folder / "resnet50.pkl")
    return folder / "resnet50.pkl"


def metrics_of(task: Task) -> tuple[str, ...]:
    return next(metrics for word, metrics in METRICS.items() if word in task.name)


def run_small(task: Task, datasets: Path, weights: Path, folder: Path) -> dict[str, Any]:
    overlay = next((file for word, file in OVERLAYS.items() if word in task.name), "cpu.yaml")
    quick = CfgNode.load_yaml_with_base(str(CONFIGS / "quick" / overlay))
    values = {**dict(pairs(quick)), **(SHORT if "semseg" in task.name else {**SHORT, **TINY}), "MODEL.WEIGHTS": weights}
    words = [word for key, value in values.items() for word in (key, show(value))]
    arguments = ["--config-file", str(config_file(task, "converted")), "--num-gpus", "0"]
    arguments += ["--datasets-root", str(datasets), "--output-dir", str(folder), *words]
    assert train_net.main(arguments) == 0
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def refusal_of(task: Task) -> str:
    """Why this installation cannot train a protocol; "" if it can."""
    try:
        if "fcos" in task.name:
            fcos.check_available()
        if "densepose" in task.name:
            densepose.require()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", TASKS)
def test_a_protocol_trains_and_evaluates_with_its_own_evaluator(
    name: str, datasets: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = TASKS[name]
    if reason := refusal_of(task):
        command = ["--config-file", str(config_file(task, "converted")), "--num-gpus", "0"]
        assert train_net.main([*command, "--datasets-root", str(datasets), "MODEL.WEIGHTS", str(weights)]) == 2
        assert reason in capsys.readouterr().err
        return
    if "densepose" in name:
        pytest.skip("tests/transfer/test_densepose.py trains it, with made-up body geometry")
    results = run_small(task, datasets, weights, tmp_path)
    assert (results["task"], results["recipe"]) == (task.id, task.recipe)
    assert set(metrics_of(task)) <= set(results["metrics"])
    assert "SOLVER.MAX_ITER is 2, the task's is" in " ".join(results["departures"])
    assert not Path("matches.json").exists()  # cityscapesscripts leaves it where the program was started
    assert bool(results["subsets"]) == ("pct" in name or "coco50" in name)


def link_real_coco(folder: Path) -> Path:
    """The small real COCO sets under Detectron2's names."""
    coco = folder / "coco"
    (coco / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        sources = {
            f"annotations/instances_{split}2017.json": REAL / f"coco_mini/instances_{split}.json",
            f"{split}2017": REAL / "coco_mini/images",
        }
        for name, source in sources.items():
            (coco / name).symlink_to(source.resolve())
    return folder


REAL_PROTOCOLS = (
    *("coco_maskrcnn_c4_12k", "coco_maskrcnn_fpn_1x", "coco_maskrcnn_fpn_1x/4conv1fc", "coco_retinanet_1x"),
    *("coco_maskrcnn_fpn_10pct_12k", "coco_sparsercnn_300pro_3x"),
)


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} does not exist; set $DETCO_TEST_DATA")
@pytest.mark.parametrize("name", REAL_PROTOCOLS)
def test_a_protocol_trains_and_evaluates_on_real_coco_images(
    name: str, weights: Path, tmp_path: Path, load_tool: Any
) -> None:
    root = link_real_coco(tmp_path / "data")
    assert load_tool("make_coco_subsets").main([str(root), "--seeds", "0"]) == 0
    results = run_small(TASKS[name], root, weights, tmp_path / "run")
    assert set(metrics_of(TASKS[name])) <= set(results["metrics"])


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} does not exist; set $DETCO_TEST_DATA")
def test_keypoints_train_and_evaluate_on_real_people(weights: Path, tmp_path: Path) -> None:
    coco = tmp_path / "data" / "coco"
    (coco / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        name = f"annotations/person_keypoints_{split}2017.json"
        (coco / name).symlink_to((REAL / "coco_keypoints" / name).resolve())
        (coco / f"{split}2017").symlink_to((REAL / f"coco_keypoints/images/{split}2017").resolve())
    results = run_small(TASKS["coco_keypoint_fpn_2x"], tmp_path / "data", weights, tmp_path / "run")
    assert results["metrics"]["keypoint_AP"] is not None
