"""Do Detectron2's ResNet-50, FPN and box head compute, with a converted file, what the source network computes?

Nothing else notices a wrong stride convention or lost BatchNorm statistics: both load without a complaint.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from detco.artifact import Preprocess
from detco.models.box_head import BoxHead
from detco.models.fpn import FPN, WIDTH
from detco.models.resnet import ResNetTrunk, Stages
from transfer import d2

d2.require()

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.config import get_cfg  # noqa: E402
from detectron2.layers import ShapeSpec  # noqa: E402
from detectron2.modeling.backbone import build_resnet_backbone  # noqa: E402
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone  # noqa: E402
from detectron2.modeling.roi_heads import build_box_head, build_roi_heads  # noqa: E402

TOLERANCE = 1e-5
STAGES = Stages._fields
LEVELS = ("p2", "p3", "p4", "p5")
Tensors = Mapping[str, Tensor]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Parity:
    """How far two implementations are apart.

    Attributes:
        differences: "backbone.bottom_up.res3" to the largest absolute difference of that feature.
        uncompared: What could not be compared, and why; empty if nothing was left out.
    """

    differences: Mapping[str, float]
    uncompared: tuple[str, ...]


def measure_parity(weights: Path, tensors: Tensors, preprocess: Preprocess) -> Parity:
    """Compare the features of both networks, in eval mode on the CPU, on the same random input.

    Backbones are compared in the three places where detectors keep theirs: without and with an FPN, and in a C4
    detector, whose last stage is in its heads. FPN and box head are compared if the source has them.

    Args:
        weights: The converted file; Detectron2's own checkpointer loads it, as for a detector.
        tensors: The source network under an artifact's names, "role/library name".
        preprocess: Its `stride_in_1x1` is where Detectron2's network will downsample.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        role, _, name = full_name.partition("/")
        parts.setdefault(role, {})[name] = tensor
    trunk = _loaded(ResNetTrunk(), parts["backbone"])
    fpn = _KnownFPN.of(parts["fpn"]) if "fpn" in parts else None
    with torch.inference_mode():
        differences = _compare_backbones(weights, trunk, preprocess)
        differences |= _compare_in_fpn(weights, trunk, fpn, preprocess)
        if "box_head" in parts:
            differences |= _compare_box_heads(weights, _loaded(BoxHead(), parts["box_head"]))
    return Parity(differences, fpn.uncompared() if fpn else ())


@dataclass(frozen=True)
class _KnownFPN:
    """An FPN of a known kind (transfer/sources/parts.py), as ours.

    Attributes:
        module: Ours; levels that the source lacks are random in it.
        has_norm: Whether the source has BatchNorm after each convolution, rather than a bias in it.
        levels: The outputs that the source determines: those with an output convolution and all lateral ones above.
    """

    module: FPN
    has_norm: bool
    levels: tuple[str, ...]

    @classmethod
    def of(cls, tensors: Tensors) -> "_KnownFPN":
        module = FPN()
        biases = [name for name in tensors if name.endswith(".conv.bias")]
        for name in biases:
            layer = module.get_submodule(name.removesuffix(".conv.bias"))
            assert isinstance(layer.conv, nn.Conv2d)
            layer.conv.bias, layer.bn = nn.Parameter(torch.empty(WIDTH)), nn.Identity()
        absent = {name: value for name, value in module.state_dict().items() if name not in tensors}

        def has(name: str) -> bool:
            return f"{name}.conv.weight" in tensors

        laterals = [all(has(f"lateral_convs.{above}") for above in range(level, 4)) for level in range(4)]
        known = [laterals[level] and has(f"fpn_convs.{level}") for level in range(4)]
        levels = tuple(name for name, is_known in zip(LEVELS, known, strict=True) if is_known)
        return cls(_loaded(module, {**absent, **tensors}), not biases, levels)

    def uncompared(self) -> tuple[str, ...]:
        missing = [level for level in LEVELS if level not in self.levels]
        return (f"{' and '.join(missing)} of the FPN, whose convolutions are not in the source",) if missing else ()


def _compare_backbones(weights: Path, trunk: ResNetTrunk, preprocess: Preprocess) -> dict[str, float]:
    """Compare the stages in a detector without an FPN and in a C4 detector."""
    images = _normal(2, 3, 97, 130)  # an odd size shows differences in padding too
    expected = trunk(images)
    cfg = _config(preprocess, STAGES)
    plain = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    _load_at({"backbone": plain}, weights)
    found = plain(images)
    differences = {f"backbone.{stage}": _gap(found[stage], getattr(expected, stage)) for stage in STAGES}
    cfg = _config(preprocess, ("res4",))  # Detectron2's defaults are those of a C4 detector
    c4 = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    heads = build_roi_heads(cfg, c4.output_shape())
    _load_at({"backbone": c4, "roi_heads": heads}, weights)
    return differences | {"roi_heads.res5": _gap(heads.res5(c4(images)["res4"]), expected.res5)}


def _compare_in_fpn(
    weights: Path, trunk: ResNetTrunk, fpn: _KnownFPN | None, preprocess: Preprocess
) -> dict[str, float]:
    """Compare the stages below an FPN, and the levels that the source determines."""
    cfg = _config(preprocess, STAGES)
    cfg.MODEL.FPN.IN_FEATURES = list(STAGES)
    cfg.MODEL.FPN.NORM = "BN" if fpn and fpn.has_norm else ""
    theirs = build_resnet_fpn_backbone(cfg, ShapeSpec(channels=3))
    _load_at({"backbone": theirs}, weights)
    images = _normal(2, 3, 97, 130)
    expected, found = trunk(images)._asdict(), theirs.bottom_up(images)
    differences = {f"backbone.bottom_up.{stage}": _gap(found[stage], expected[stage]) for stage in STAGES}
    if fpn is None:
        return differences
    # Detectron2 enlarges by 2 and ours to the size of the finer level: the same for the sizes that it pads images to.
    images = _normal(2, 3, 96, 160)
    expected, found = fpn.module(trunk(images))._asdict(), theirs(images)
    return differences | {f"backbone.{level}": _gap(found[level], expected[level]) for level in fpn.levels}


def _compare_box_heads(weights: Path, ours: BoxHead) -> dict[str, float]:
    cfg = get_cfg()
    box = cfg.MODEL.ROI_BOX_HEAD
    box.NAME, box.NUM_CONV, box.CONV_DIM, box.NUM_FC, box.FC_DIM, box.NORM = (
        *("FastRCNNConvFCHead", 4, WIDTH, 1, ours.fc1.out_features, "BN"),
    )
    theirs = build_box_head(cfg, ShapeSpec(channels=WIDTH, height=7, width=7))
    heads = nn.Module()
    heads.add_module("box_head", theirs)
    _load_at({"roi_heads": heads}, weights)
    pooled = _normal(3, WIDTH, 7, 7)
    return {"roi_heads.box_head": _gap(theirs(pooled), ours(pooled))}


def _config(preprocess: Preprocess, stages: tuple[str, ...]) -> Any:
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = 50
    cfg.MODEL.RESNETS.OUT_FEATURES = list(stages)
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = preprocess.stride_in_1x1
    return cfg


def _load_at(modules: Mapping[str, nn.Module], weights: Path) -> None:
    """Let Detectron2 load the file into a model that has nothing but these modules, and set them to eval mode."""
    model = nn.Module()
    for name, module in modules.items():
        model.add_module(name, module)
    with _no_warnings():
        DetectionCheckpointer(model).load(str(weights))
    model.eval()


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Keep the loader from listing what a lone part does not use, or has that is never pretrained."""
    loggers = {name: logging.getLogger(name) for name in ("detectron2", "fvcore")}
    levels = {name: logger.level for name, logger in loggers.items()}
    try:
        for logger in loggers.values():
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])


def _normal(*shape: int) -> Tensor:
    """Normalised pixels, and what follows a norm, have about unit variance."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


def _loaded(module: ModuleT, tensors: Tensors) -> ModuleT:
    """Load a part in float32, in eval mode; counters come from the module, since not every source has them."""
    state = module.state_dict()
    counters = {name: value for name, value in state.items() if name.endswith("num_batches_tracked")}
    module.load_state_dict(counters | {name: tensors[name].float() for name in state if name not in counters})
    return module.eval()
