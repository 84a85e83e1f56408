"""Does Detectron2's ResNet-50 compute, with a converted file, what the source network computes?

Nothing else notices a wrong stride convention or lost BatchNorm statistics: both load without a complaint.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from detco.artifact import Preprocess
from detco.models.resnet import ResNetTrunk
from transfer import d2

d2.require()

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.config import get_cfg  # noqa: E402
from detectron2.layers import ShapeSpec  # noqa: E402
from detectron2.modeling.backbone import build_resnet_backbone  # noqa: E402

TOLERANCE = 1e-5
STAGES = ("res2", "res3", "res4", "res5")
# Where detectors keep their ResNet: without and with an FPN.
PLACES = ("backbone", "backbone.bottom_up")


def measure_parity(weights: Path, trunk_tensors: Mapping[str, Tensor], preprocess: Preprocess) -> dict[str, float]:
    """Compare the stages of both networks, in eval mode on the CPU, on the same random input.

    Args:
        weights: The converted file; Detectron2's own checkpointer loads it, as for a detector.
        trunk_tensors: The source network under torchvision's names.
        preprocess: Its `stride_in_1x1` is where Detectron2's network will downsample.

    Returns:
        "backbone.bottom_up.res3" to the largest absolute difference, for every place and stage.
    """
    trunk = ResNetTrunk().eval()
    trunk.load_state_dict(_with_counters(trunk, trunk_tensors))
    # Normalised pixels have about unit variance; an odd size shows differences in padding too.
    images = torch.randn(2, 3, 97, 130, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = trunk(images)._asdict()
        differences: dict[str, float] = {}
        for place in PLACES:
            features = _load_detectron2_resnet(weights, place, preprocess)(images)
            for stage in STAGES:
                differences[f"{place}.{stage}"] = float((features[stage] - expected[stage]).abs().max())
    return differences


def _with_counters(trunk: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cast the trunk's tensors to float32; counters come from the trunk, since not every source has them."""
    counters = {name: value for name, value in trunk.state_dict().items() if name.endswith("num_batches_tracked")}
    return counters | {name: tensors[name].float() for name in trunk.state_dict() if name not in counters}


def _load_detectron2_resnet(weights: Path, place: str, preprocess: Preprocess) -> nn.Module:
    """Build Detectron2's ResNet-50 at `place` in an otherwise empty model, and load it from there."""
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = 50
    cfg.MODEL.RESNETS.OUT_FEATURES = list(STAGES)
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = preprocess.stride_in_1x1
    resnet: nn.Module = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    model = resnet
    for attribute in reversed(place.split(".")):
        model, inner = nn.Module(), model
        model.add_module(attribute, inner)
    DetectionCheckpointer(model).load(str(weights))
    return resnet.eval()
