"""Detectors of the *_soco configs, with converted weights loaded as in training: every tensor is accounted for."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transfer import d2

if d2.info() is None:
    pytest.skip("needs Detectron2 (python tools/install_detectron2.py)", allow_module_level=True)

from detectron2.modeling import build_model

from detco.artifact import IMAGENET_RGB, Artifact, write_artifact
from detco.models.box_head import BoxHead
from detco.models.fpn import FPN
from detco.models.resnet import ResNetTrunk
from transfer.checks.pretrained_parts import transferred_parts
from transfer.config import load_config
from transfer.convert import convert
from transfer.modeling import check_model_available
from transfer.preflight import WeightsDoNotFit
from transfer.tasks import CONFIGS, pairs
from transfer.trainer import load_backbone
from transfer.weights import read_record

pytestmark = pytest.mark.d2

UNTOUCHED = -77.0
NORM = ("weight", "bias", "running_mean", "running_var")
LAYER = ("weight", "bias")


def below(name: str, *tensors: str) -> set[str]:
    return {f"{name}.{tensor}" for tensor in tensors}


def conv_norm(name: str) -> set[str]:
    return below(name, "weight", *(f"norm.{tensor}" for tensor in NORM))


RPN = set().union(
    *(below(f"proposal_generator.rpn_head.{n}", *LAYER) for n in ("conv", "objectness_logits", "anchor_deltas"))
)
PREDICTOR = set().union(*(below(f"roi_heads.box_predictor.{name}", *LAYER) for name in ("cls_score", "bbox_pred")))
MASK_OUTPUT = set().union(*(below(f"roi_heads.mask_head.{name}", *LAYER) for name in ("deconv", "predictor")))
MASK_CONVS = set().union(*(conv_norm(f"roi_heads.mask_head.mask_fcn{number}") for number in range(1, 5)))
P6_P7 = set().union(*(below(f"backbone.top_block.{name}", *LAYER) for name in ("p6", "p7")))
SUBNETS = set().union(
    *(below(f"head.{kind}_subnet.{2 * index}", *LAYER) for kind in ("cls", "bbox") for index in range(4)),
    *(below(f"head.{name}", *LAYER) for name in ("cls_score", "bbox_pred")),
)
# FCOS has GN behind each convolution of its subnets, a scale for each of its five levels, and a third output.
FCOS_HEAD = set().union(
    *(below(f"head.{kind}_subnet.{3 * index}", "weight", "bias") for kind in ("cls", "bbox") for index in range(4)),
    *(below(f"head.{kind}_subnet.{3 * index + 1}", *LAYER) for kind in ("cls", "bbox") for index in range(4)),
    *(below(f"head.{name}", *LAYER) for name in ("cls_score", "bbox_pred", "ctrness")),
)

FPN_LEVELS = {
    levels: set().union(*(conv_norm(f"backbone.fpn_{kind}{n}") for kind in ("lateral", "output") for n in levels))
    for levels in ((2, 3, 4, 5), (3, 4, 5))
}
BOX_HEAD = set().union(*(conv_norm(f"roi_heads.box_head.conv{n}") for n in range(1, 5))) | below(
    "roi_heads.box_head.fc1", *LAYER
)

# Config: what starts from random, and what is loaded beside the 265 tensors of the backbone. Complete.
DETECTORS: dict[str, tuple[set[str], set[str]]] = {
    "coco/mask_rcnn_r50_fpn_4conv1fc_1x_soco": (
        RPN | PREDICTOR | MASK_CONVS | MASK_OUTPUT,
        FPN_LEVELS[2, 3, 4, 5] | BOX_HEAD,
    ),
    "coco/mask_rcnn_r50_c4_1x_soco": (RPN | PREDICTOR | MASK_OUTPUT | below("roi_heads.res5.norm", *NORM), set()),
    "coco/retinanet_r50_fpn_1x_soco": (P6_P7 | SUBNETS, FPN_LEVELS[3, 4, 5]),
    "coco/fcos_r50_fpn_1x_soco": (P6_P7 | FCOS_HEAD, FPN_LEVELS[3, 4, 5]),
}
# Configs with the same detector as one of these, but for the number of classes and the score of a detection.
SAME = {
    "coco/mask_rcnn_r50_fpn_4conv1fc_1x_soco": (
        *("coco/mask_rcnn_r50_fpn_4conv1fc_2x_soco", "coco/mask_rcnn_r50_fpn_4conv1fc_4x_soco"),
        *("coco/minicoco_mask_rcnn_r50_fpn_5pct_soco", "coco/minicoco_mask_rcnn_r50_fpn_10pct_soco"),
        *("coco/minicoco_mask_rcnn_r50_fpn_5pct_1x_soco", "coco/minicoco_mask_rcnn_r50_fpn_10pct_1x_soco"),
        "coco/coco50_mask_rcnn_r50_fpn_1x_soco",
        *("lvis/mask_rcnn_r50_fpn_4conv1fc_1x_soco", "lvis/mask_rcnn_r50_fpn_4conv1fc_2x_soco"),
    ),
    "coco/mask_rcnn_r50_c4_1x_soco": ("coco/mask_rcnn_r50_c4_2x_soco",),
    "coco/retinanet_r50_fpn_1x_soco": (),
    "coco/fcos_r50_fpn_1x_soco": (),
}
MAY_DIFFER = {"ROI_HEADS.NUM_CLASSES", "ROI_HEADS.SCORE_THRESH_TEST"}


@cache
def settings(name: str, *overrides: str) -> Any:
    return load_config(CONFIGS / f"{name}.yaml", ["MODEL.DEVICE", "cpu", *overrides])


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of convert-to-d2 with backbone, FPN and box head, whose norms are as after training."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    parts: dict[str, dict[str, Tensor]] = {}
    for role, module in {"backbone": ResNetTrunk(), "fpn": FPN(), "box_head": BoxHead()}.items():
        parts[role] = dict(module.state_dict())
        for value in parts[role].values():
            if value.dim() == 1:
                value.uniform_(0.5, 1.5)
    write_artifact(folder / "model.safetensors", Artifact(parts, IMAGENET_RGB, {}))
    convert(folder / "model.safetensors", folder / "weights.pth")
    return folder / "weights.pth"


def untouched_detector(cfg: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A detector whose tensors all have one value, and these by name: what is computed from the config is not there."""
    model = build_model(cfg)
    constants = ("pixel_mean", "pixel_std")
    tensors = {
        name: value
        for name, value in model.state_dict().items()
        if name not in constants and "anchor_generator" not in name and not name.endswith("num_batches_tracked")
    }
    for value in tensors.values():
        value.fill_(UNTOUCHED)
    return model, tensors


@pytest.mark.parametrize("name", list(DETECTORS))
def test_every_tensor_of_a_detector_is_loaded_or_listed_as_random(name: str, converted: Path) -> None:
    cfg = settings(name)
    try:
        check_model_available(cfg)
    except ValueError as missing:
        assert "fcos" in name
        pytest.skip(str(missing))
    model, tensors = untouched_detector(cfg)
    record = read_record(str(converted))
    load_backbone(model, record, str(converted))
    random, beside = DETECTORS[name]
    assert {key for key, value in tensors.items() if bool((value == UNTOUCHED).all())} == random
    source = torch.load(converted, weights_only=True)["model"]
    loaded = set(tensors) - random
    backbone = {key for key in loaded if "res" in key or "stem" in key}
    assert loaded - backbone == beside
    assert len(backbone) == 265
    for key in loaded:
        parts = key.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        assert torch.equal(tensors[key], next(source[end] for end in ends if end in source)), key
    assert len(transferred_parts(cfg, record)) == 1 + bool(beside) + (beside >= BOX_HEAD)


def test_every_config_of_socos_has_a_detector_that_was_looked_at() -> None:
    shipped = {str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*_soco.yaml")}
    assert shipped == {*SAME, *(other for others in SAME.values() for other in others)}
    assert SAME.keys() == DETECTORS.keys()
    for name, others in SAME.items():
        model = dict(pairs(settings(name).MODEL))
        for other in others:
            differing = {key for key, value in pairs(settings(other).MODEL) if value != model[key]}
            assert differing <= MAY_DIFFER, other


def test_a_box_head_of_another_width_is_refused_after_loading(converted: Path) -> None:
    cfg = settings("coco/mask_rcnn_r50_fpn_4conv1fc_1x_soco", "MODEL.ROI_BOX_HEAD.FC_DIM", "512")
    with pytest.raises(WeightsDoNotFit, match=r"2 tensors of the detector have another shape in .*box_head\.fc1\.bias"):
        load_backbone(build_model(cfg), read_record(str(converted)), str(converted))
