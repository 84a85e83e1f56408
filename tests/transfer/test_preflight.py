"""Refusals and warnings before the first iteration, on real configs and a real model's tensor names."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from detco.artifact import IMAGENET_RGB, Preprocess
from transfer import d2
from transfer.weights import WeightsRecord

if d2.info() is None:
    pytest.skip("needs Detectron2 (python tools/install_detectron2.py)", allow_module_level=True)

from detectron2.modeling import build_model

from transfer.checks.schedule import check_batch
from transfer.config import load_config
from transfer.modeling import register_models
from transfer.modeling.res5_extra_norm import Res5ROIHeadsExtraNorm
from transfer.preflight import (
    WeightsDoNotFit,
    backbone_tensors,
    check_backbone_loaded,
    check_init,
    check_preprocess,
    check_processes,
    preprocess_values,
)
from transfer.scaling import auto_scale, refuse_silent_scaling
from transfer.tasks import load_tasks

pytestmark = pytest.mark.d2

CONFIGS = Path(__file__).parents[2] / "configs" / "transfer"
VOC = CONFIGS / "voc" / "faster_rcnn_r50_c4_24k_converted.yaml"
MASK_C4 = CONFIGS / "coco" / "mask_rcnn_r50_c4_1x_converted.yaml"
FPN = CONFIGS / "coco" / "mask_rcnn_r50_fpn_1x_converted.yaml"
RETINANET = CONFIGS / "coco" / "retinanet_r50_fpn_1x_converted.yaml"
RECORD = WeightsRecord("detco.pkl", "0" * 64, IMAGENET_RGB, {"method": "detco"})
MSRA = Preprocess("BGR", (103.530, 116.280, 123.675), (1.0, 1.0, 1.0), stride_in_1x1=True)


def test_config_that_agrees_with_the_weights_is_let_through() -> None:
    assert check_preprocess(load_config(VOC), RECORD) == ["Input settings agree with what detco.pkl was trained with."]
    supervised = load_config(CONFIGS / "voc" / "faster_rcnn_r50_c4_24k_supervised.yaml")
    check_preprocess(supervised, replace(RECORD, preprocess=MSRA))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["INPUT.FORMAT", "BGR"], "INPUT.FORMAT is BGR, the weights need RGB"),
        (
            ["MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"],
            "MODEL.PIXEL_STD is [1, 1, 1], the weights need [58.395, 57.12, 57.375]",
        ),
        (
            ["MODEL.PIXEL_MEAN", "[103.53, 116.28, 123.675]"],
            "MODEL.PIXEL_MEAN is [103.53, 116.28, 123.675], the weights need [123.675, 116.28, 103.53]",
        ),
        (["MODEL.RESNETS.STRIDE_IN_1X1", "True"], "MODEL.RESNETS.STRIDE_IN_1X1 is True, the weights need False"),
    ],
)
def test_config_that_contradicts_the_weights_is_refused_with_both_values(overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match="quietly lose AP") as refusal:
        check_preprocess(load_config(VOC, overrides), RECORD)
    lines = str(refusal.value).splitlines()
    assert lines[1:-1] == [f"  {said}"]
    # The remedy can be pasted: with it the config agrees.
    remedy = lines[-1].removeprefix("Append to the command: ").replace('"', "")
    key, value = remedy.split(" ", 1)
    check_preprocess(load_config(VOC, [*overrides, key, value]), RECORD)


def test_converted_weights_in_a_supervised_config_are_refused_for_all_four_reasons() -> None:
    cfg = load_config(CONFIGS / "voc" / "faster_rcnn_r50_c4_24k_supervised.yaml", ["MODEL.WEIGHTS", "detco.pkl"])
    with pytest.raises(ValueError, match="FORMAT") as refusal:
        check_preprocess(cfg, RECORD)
    assert all(key in str(refusal.value) for key in preprocess_values(IMAGENET_RGB))


def test_weights_without_a_record_are_a_warning() -> None:
    (note,) = check_preprocess(load_config(VOC), replace(RECORD, preprocess=None))
    assert note.startswith("WARNING: detco.pkl does not say")


def test_forgotten_weights_are_refused_and_unwanted_ones_too() -> None:
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is empty"):
        check_init(load_config(VOC))
    check_init(load_config(VOC, ["MODEL.WEIGHTS", "detco.pkl"]))
    random = CONFIGS / "voc" / "faster_rcnn_r50_c4_24k_random.yaml"
    check_init(load_config(random))
    with pytest.raises(ValueError, match=r"TRANSFER\.INIT is random, but MODEL\.WEIGHTS is detco\.pkl"):
        check_init(load_config(random, ["MODEL.WEIGHTS", "detco.pkl"]))


@pytest.mark.parametrize(
    ("num_gpus", "num_machines", "cuda_gpus", "message"),
    [
        (8, 1, 0, "this machine has 0 CUDA devices; use --num-gpus 0"),
        (8, 1, 2, "use --num-gpus 2"),
        (0, 2, 0, "SyncBN needs CUDA in more than one process"),
        (1, 2, 0, "SyncBN needs CUDA in more than one process"),
        (3, 1, 4, "IMS_PER_BATCH 16 cannot be divided among 3 processes"),
    ],
)
def test_impossible_numbers_of_processes_are_refused(
    num_gpus: int, num_machines: int, cuda_gpus: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_processes(load_config(VOC), num_gpus=num_gpus, num_machines=num_machines, cuda_gpus=cuda_gpus)


def test_cpu_is_taken_without_cuda_and_said() -> None:
    cfg = load_config(VOC)
    assert check_processes(cfg, num_gpus=1, num_machines=1, cuda_gpus=0) == ["No CUDA device: training on the CPU."]
    assert check_processes(cfg, num_gpus=0, num_machines=1, cuda_gpus=0) == []
    assert check_processes(cfg, num_gpus=8, num_machines=2, cuda_gpus=8) == []


def test_learning_rate_that_does_not_belong_to_the_batch_is_a_warning() -> None:
    published = load_tasks()["voc0712_fasterrcnn_c4_24k"].values
    assert check_batch(load_config(VOC), published, 8) == []
    (note,) = check_batch(load_config(VOC), published, 2)
    assert "the 8-GPU batch of 16 images on 2 GPUs (8 on each)" in note
    assert "--auto-scale" in note
    rate, length = check_batch(load_config(VOC, ["SOLVER.IMS_PER_BATCH", "2"]), published, 1)
    assert "SOLVER.BASE_LR 0.02 with 2 images per step" in rate
    assert rate.endswith("gives 0.0025.")
    assert (
        "24000 iterations are the task's for 16 images per step; with 2 the same number of images takes 192000"
        in length
    )
    scaled = ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.0025", "SOLVER.MAX_ITER", "192000"]
    assert check_batch(load_config(VOC, scaled), published, 1) == []
    assert check_batch(load_config(VOC), {}, 2) == []


# Batch, lr, iterations, steps, warm-up on 4 GPUs and on 1: the published 8-GPU values times and divided by 2 and 8.
@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [
        ("voc/faster_rcnn_r50_c4_24k", 8, (16, 0.02, 24000, (18000, 22000), 100)),
        ("voc/faster_rcnn_r50_c4_24k", 4, (8, 0.01, 48000, (36000, 44000), 200)),
        ("voc/faster_rcnn_r50_c4_24k", 1, (2, 0.0025, 192000, (144000, 176000), 800)),
        ("coco/mask_rcnn_r50_c4_1x", 4, (8, 0.01, 180000, (120000, 160000), 2000)),
        ("coco/mask_rcnn_r50_fpn_1x", 1, (2, 0.0025, 720000, (480000, 640000), 8000)),
        ("coco/mask_rcnn_r50_fpn_12k", 4, (8, 0.01, 24000, (18000, 22000), 2000)),
        ("coco/mask_rcnn_r50_fpn_12k", 1, (2, 0.0025, 96000, (72000, 88000), 8000)),
        ("coco/retinanet_r50_fpn_1x", 4, (8, 0.005, 180000, (120000, 160000), 2000)),
        ("coco/retinanet_r50_fpn_1x", 1, (2, 0.00125, 720000, (480000, 640000), 8000)),
    ],
)
def test_auto_scale_gives_the_published_table(name: str, gpus: int, expected: tuple[Any, ...]) -> None:
    scaled, table = auto_scale(load_config(CONFIGS / f"{name}_random.yaml"), gpus)
    solver = scaled.SOLVER
    numbers = [solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER, *solver.STEPS, solver.WARMUP_ITERS]
    batch, lr, iterations, steps, warmup = expected
    assert numbers == pytest.approx([batch, lr, iterations, *steps, warmup])
    assert ("->" in table) == (gpus != 8)
    if gpus != 8:
        line = next(line for line in table.splitlines() if "SOLVER.MAX_ITER" in line)
        assert line.split()[-1] == str(iterations)


def test_auto_scale_refuses_a_batch_that_is_not_for_eight_gpus() -> None:
    with pytest.raises(ValueError, match="IMS_PER_BATCH 2 is not a multiple of 8"):
        auto_scale(load_config(CONFIGS / "quick" / "voc_faster_rcnn_c4_random.yaml"), 1)


def test_detectron2_may_not_scale_without_being_asked() -> None:
    cfg = load_config(VOC, ["SOLVER.REFERENCE_WORLD_SIZE", "8"])
    refuse_silent_scaling(cfg, 8)
    with pytest.raises(ValueError, match="without a word"):
        refuse_silent_scaling(cfg, 4)


@pytest.fixture(scope="module")
def names() -> dict[Path, list[str]]:
    """Tensor names of the four detectors, built on the meta device of their memory's cost only."""
    register_models()
    found = {}
    for path in (VOC, MASK_C4, FPN, RETINANET):
        cfg = load_config(path, ["MODEL.DEVICE", "cpu"])
        found[path] = list(build_model(cfg).state_dict())
    return found


def test_every_detector_wants_the_265_tensors_of_a_resnet50(names: dict[Path, list[str]]) -> None:
    assert {path.stem: len(backbone_tensors(found)) for path, found in names.items()} == {
        VOC.stem: 265,
        MASK_C4.stem: 265,
        FPN.stem: 265,
        RETINANET.stem: 265,
    }


def test_c4_head_has_the_extra_norm_and_only_that_is_extra(names: dict[Path, list[str]]) -> None:
    extra = {name for name in names[VOC] if name.startswith("roi_heads.res5.norm.")}
    assert {name.rsplit(".", 1)[1] for name in extra} == {
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


def test_extra_norm_normalises_what_box_and_mask_branches_see() -> None:
    register_models()
    register_models()  # a second time must not fail
    model = build_model(load_config(MASK_C4, ["MODEL.DEVICE", "cpu"]))
    heads = model.roi_heads
    assert type(heads) is Res5ROIHeadsExtraNorm
    heads.train()
    features = heads.res5(torch.randn(8, 1024, 14, 14))
    assert features.shape == (8, 2048, 7, 7)
    assert features.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert features.std(dim=(0, 2, 3)).sub(1).abs().max() < 1e-2


@pytest.mark.parametrize(("path", "heads"), [(VOC, 14), (MASK_C4, 18), (FPN, 66), (RETINANET, 54)])
def test_missing_heads_are_expected_and_counted(names: dict[Path, list[str]], path: Path, heads: int) -> None:
    counted = [name for name in names[path] if not name.endswith(".num_batches_tracked")]
    missing = set(counted) - set(backbone_tensors(counted)) - {"pixel_mean", "pixel_std"}
    missing = {name for name in missing if "anchor_generator" not in name}
    note = check_backbone_loaded(names[path], missing, RECORD)
    assert note == f"Backbone: all 265 tensors found in detco.pkl; {heads} others (heads) start from random."


@pytest.mark.parametrize("lost", ["roi_heads.res5.2.conv3.weight", "backbone.stem.conv1.norm.running_var"])
def test_one_missing_backbone_tensor_is_refused(names: dict[Path, list[str]], lost: str) -> None:
    with pytest.raises(WeightsDoNotFit, match=r"1 of the backbone's 265 tensors are not in detco\.pkl"):
        check_backbone_loaded(names[VOC], [lost], RECORD)


def test_msra_weights_may_lack_running_statistics_but_nothing_else(names: dict[Path, list[str]]) -> None:
    record = replace(RECORD, preprocess=MSRA)
    statistics = [name for name in backbone_tensors(names[VOC]) if ".running_" in name]
    assert len(statistics) == 106
    check_backbone_loaded(names[VOC], statistics, record)
    with pytest.raises(WeightsDoNotFit):
        check_backbone_loaded(names[VOC], [*statistics, "backbone.stem.conv1.norm.bias"], record)
