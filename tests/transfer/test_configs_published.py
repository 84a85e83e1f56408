"""Every file of configs/transfer against the values of the published protocols."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from transfer import d2

if d2.info() is None:
    pytest.skip("needs Detectron2 (python tools/install_detectron2.py)", allow_module_level=True)

from detectron2.config import CfgNode

from transfer import densepose
from transfer.config import load_config
from transfer.tasks import (
    CONFIGS,
    Task,
    config_file,
    departures,
    is_same,
    load_init_values,
    load_tasks,
    pairs,
    published_values,
    value_at,
)

pytestmark = pytest.mark.d2

TASKS = load_tasks()
FOLDERS = ("voc", "coco", "cityscapes", "lvis")
PUBLISHED = sorted(path for folder in FOLDERS for path in CONFIGS.glob(f"{folder}/*.yaml"))
SOCO = [path for path in PUBLISHED if path.stem.endswith("_soco")]
# What fine-tunes with SoCo's weight decay in its paper: the rows of its own weights, COCO and LVIS.
SOCO_TASKS = {
    *("coco_maskrcnn_c4_1x", "coco_maskrcnn_c4_2x"),
    *(f"coco_maskrcnn_fpn_{schedule}/4conv1fc" for schedule in ("1x", "2x", "4x")),
    *(f"minicoco_maskrcnn_fpn_{percent}pct{end}" for percent in (5, 10) for end in ("", "_1x")),
    *("coco50_maskrcnn_fpn_1x", "lvis1_maskrcnn_fpn_1x", "lvis1_maskrcnn_fpn_2x"),
    *("coco_retinanet_1x", "coco_fcos_1x"),
}
needs_densepose = pytest.mark.skipif(not densepose.is_installed(), reason="needs the DensePose project of Detectron2")


@cache
def resolved(path: Path) -> Any:
    """The resolved config, shared by the tests; frozen."""
    cfg = load_config(path)
    cfg.freeze()
    return cfg


def with_marks(path: Path) -> Any:
    """A path as a parameter of a test; DensePose's keys exist only where its project is installed."""
    return pytest.param(
        path, id=f"{path.parent.name}/{path.stem}", marks=[needs_densepose] if "densepose" in path.stem else []
    )


def of(path: Path) -> Task:
    """The task that a config names."""
    return TASKS[resolved(path).TRANSFER.TASK]


@pytest.mark.parametrize("path", [with_marks(path) for path in PUBLISHED])
def test_published_config_resolves_to_the_published_values(path: Path) -> None:
    cfg, task = resolved(path), of(path)
    assert departures(published_values(task, cfg.TRANSFER.INIT), cfg, task.accepts) == []
    init = "soco" if path in SOCO else cfg.TRANSFER.INIT
    assert path == config_file(task, init)


@pytest.mark.skipif(densepose.is_installed(), reason="the DensePose project is installed")
def test_densepose_config_without_the_project_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="DensePose"):
        load_config(config_file(TASKS["coco_densepose_fpn_s1x"], "converted"))


def test_every_task_has_a_config_of_every_kind_of_weights_and_there_are_no_others() -> None:
    regular = {config_file(task, init) for task in TASKS.values() for init in load_init_values()}
    assert regular == set(PUBLISHED) - set(SOCO)
    assert len(regular) == 3 * len(TASKS)


@pytest.mark.parametrize("path", SOCO, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_soco_variant_differs_in_the_weight_decay_alone(path: Path) -> None:
    cfg, usual = dict(pairs(resolved(path))), dict(pairs(resolved(config_file(of(path), "converted"))))
    assert {key: value for key, value in cfg.items() if value != usual[key]} == {"SOLVER.WEIGHT_DECAY": 2.5e-5}


def test_the_tasks_of_socos_tables_have_its_variant() -> None:
    assert {of(path).name for path in SOCO} == SOCO_TASKS
    assert all(TASKS[name].accepts for name in SOCO_TASKS)


@pytest.mark.parametrize("schedule", ["12k", "1x", "2x", "4x"])
@pytest.mark.parametrize("init", ["converted", "supervised", "random"])
def test_the_two_fpn_recipes_depart_from_each_other_in_both_heads(schedule: str, init: str) -> None:
    moco, heavy = (TASKS[f"coco_maskrcnn_fpn_{schedule}{recipe}"] for recipe in ("", "/4conv1fc"))
    for task, other in ((moco, heavy), (heavy, moco)):
        named = departures(published_values(other, init), resolved(config_file(task, init)), other.accepts)
        assert [sentence.split()[0] for sentence in named] == [
            "MODEL.ROI_BOX_HEAD.NORM",
            "MODEL.ROI_BOX_HEAD.NUM_CONV",
            "MODEL.ROI_BOX_HEAD.NUM_FC",
            "MODEL.ROI_MASK_HEAD.NORM",
        ]


def test_recipe_is_what_the_heads_are() -> None:
    for path in PUBLISHED:
        if "densepose" in path.stem:
            continue
        cfg, recipe = resolved(path), of(path).recipe
        if cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
            assert recipe in ("moco", "sparsercnn")
        elif cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeadsExtraNorm":
            assert recipe == "c4_extra_norm"
        else:
            assert recipe == ("4conv1fc" if cfg.MODEL.ROI_BOX_HEAD.NUM_CONV else "moco")


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("SOLVER.MAX_ITER", "30", "SOLVER.MAX_ITER is 30, the task's is 90000"),
        ("MODEL.FPN.NORM", "''", 'MODEL.FPN.NORM is "", the task\'s is SyncBN'),
        ("SOLVER.STEPS", "(60000,)", "SOLVER.STEPS is [60000], the task's is [60000, 80000]"),
        ("SOLVER.BASE_LR", "0.021", "SOLVER.BASE_LR is 0.021, the task's is 0.02"),
        ("SOLVER.WEIGHT_DECAY", "0.000025", "SOLVER.WEIGHT_DECAY is 2.5e-05, the task's is 0.0001"),
        ("TEST.PRECISE_BN.ENABLED", "False", "TEST.PRECISE_BN.ENABLED is False, the task's is True"),
    ],
)
def test_a_changed_value_is_named_as_a_departure(key: str, value: str, sentence: str) -> None:
    task = TASKS["coco_maskrcnn_fpn_1x"]
    cfg = load_config(config_file(task, "converted"), [key, value])
    assert departures(task.values, cfg, task.accepts) == [sentence]


@pytest.mark.parametrize("name", [name for name in TASKS if "densepose" not in name])
def test_every_published_value_of_a_task_is_compared(name: str) -> None:
    task = TASKS[name]
    cfg = resolved(config_file(task, "converted"))
    published = published_values(task, "converted")
    for key in published:
        named = departures({**published, key: "another value"}, cfg, task.accepts)
        assert named == [f"{key} is {sentence_value(cfg, key)}, the task's is another value"]


def sentence_value(cfg: Any, key: str) -> str:
    """How a sentence shows the config's value."""
    (sentence,) = departures({key: "another value"}, cfg)
    return sentence.removeprefix(f"{key} is ").removesuffix(", the task's is another value")


def test_retinanet_anchors_are_three_per_octave() -> None:
    sizes = resolved(CONFIGS / "coco/retinanet_r50_fpn_1x_random.yaml").MODEL.ANCHOR_GENERATOR.SIZES
    for row, x in zip(sizes, (32, 64, 128, 256, 512), strict=True):
        assert row == pytest.approx([x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)])


def test_the_rows_of_a_subset_differ_from_the_full_task_in_the_images_alone() -> None:
    for percent in (1, 2, 5, 10):
        for detector in ("retinanet", "mask_rcnn"):
            subset = resolved(CONFIGS / f"coco/{detector}_r50_fpn_{percent}pct_12k_converted.yaml")
            full = dict(pairs(resolved(CONFIGS / f"coco/{detector}_r50_fpn_12k_converted.yaml")))
            differing = {key: value for key, value in pairs(subset) if value != full[key] and key != "TRANSFER.TASK"}
            assert differing == {"DATASETS.TRAIN": (f"coco_2017_train_{percent}pct",)}


QUICK = sorted(path for path in CONFIGS.glob("quick/*.yaml") if not path.stem.startswith("cpu"))
QUICK_TASKS = {
    "voc_faster_rcnn_c4": "voc0712_fasterrcnn_c4_24k",
    "coco_mask_rcnn_fpn": "coco_maskrcnn_fpn_1x",
    "coco_mask_rcnn_fpn_4conv1fc": "coco_maskrcnn_fpn_1x/4conv1fc",
    "coco_retinanet": "coco_retinanet_1x",
    "coco_fcos": "coco_fcos_1x",
    "coco_sparse_rcnn": "coco_sparsercnn_300pro_3x",
    "coco_keypoint_rcnn_fpn": "coco_keypoint_fpn_2x",
    "cityscapes_mask_rcnn_fpn": "cityscapes_maskrcnn_fpn_24k",
    "cityscapes_fcn16s": "cityscapes_semseg_fcn16s_90k",
    "lvis_mask_rcnn_fpn_4conv1fc": "lvis1_maskrcnn_fpn_1x",
}


def test_every_kind_of_detector_and_data_has_a_pair_of_quick_configs() -> None:
    found = {path.stem: of(path).name for path in QUICK}
    assert found == {f"{name}_{init}": QUICK_TASKS[name] for name in QUICK_TASKS for init in ("random", "converted")}


@pytest.mark.parametrize("path", QUICK, ids=lambda path: path.stem)
def test_quick_config_inherits_a_task_and_says_what_it_changed(path: Path) -> None:
    cfg, task = resolved(path), of(path)
    named = departures(published_values(task, cfg.TRANSFER.INIT), cfg, task.accepts)
    assert any(sentence.startswith("SOLVER.MAX_ITER is ") for sentence in named)
    assert cfg.INPUT.MIN_SIZE_TEST <= 160
    assert cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "choice" or len(cfg.INPUT.MIN_SIZE_TRAIN) == 2  # "range" has two ends
    assert cfg.DATALOADER.NUM_WORKERS <= 2
    assert departures(load_init_values()[cfg.TRANSFER.INIT], cfg) == []


def test_every_published_value_of_a_config_names_its_source() -> None:
    paths = [*CONFIGS.glob("base/*.yaml"), *CONFIGS.glob("init/*.yaml"), *PUBLISHED]
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            text = line.split("#")[0].strip()
            unsourced = ("_BASE_", "VERSION", "TASK:", "INIT:", 'WEIGHTS: ""')
            is_value = ": " in text and not text.startswith(unsourced)
            assert not is_value or "#" in line, f"{path.name}: {line}"


def test_no_file_repeats_a_value_that_its_bases_have() -> None:
    for path in CONFIGS.rglob("*.yaml"):
        own = yaml.safe_load(path.read_text(encoding="utf-8"))
        bases = own.pop("_BASE_", [])
        inherited: dict[str, Any] = {}
        for base in [bases] if isinstance(bases, str) else bases:
            inherited |= pairs(CfgNode.load_yaml_with_base(str(path.parent / base)))
        repeated = [key for key, value in pairs(own) if key in inherited and is_same(inherited[key], value)]
        assert repeated == [], path


def test_value_at_raises_for_unknown_keys() -> None:
    with pytest.raises(KeyError):
        value_at({"A": {"B": 1}}, "A.C")
