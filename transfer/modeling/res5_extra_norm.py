"""The C4 head of MoCo: res5 ends with one more norm layer.

ResNet-50's res5 ends in an unnormalised sum; box and mask branches of an SSL-pretrained C4 detector work on it only if
it is normalised. Source: facebookresearch/moco@87e36d3, detection/train_net.py (Res5ROIHeadsExtraNorm).
"""

from typing import Any

from torch import nn

from transfer import d2

d2.require()

from detectron2.config import CfgNode, configurable  # noqa: E402
from detectron2.layers import get_norm  # noqa: E402
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads  # noqa: E402


class Res5ROIHeadsExtraNorm(Res5ROIHeads):  # type: ignore[misc]  # Detectron2 is not followed
    """`Res5ROIHeads` with a norm of RESNETS.NORM after the last block of res5, as `roi_heads.res5.norm`.

    MoCo's first form overrode Detectron2's private method that builds res5, which broke when Detectron2 0.4 changed it;
    adding the layer here works for every version.
    """

    @configurable  # type: ignore[untyped-decorator]
    def __init__(self, *, extra_norm: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        channels = self.res5[-1].out_channels
        self.res5: nn.Sequential
        self.res5.add_module("norm", get_norm(extra_norm, channels))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        """Constructor arguments of a config: Detectron2's plus the kind of norm."""
        return {**super().from_config(cfg, input_shape), "extra_norm": cfg.MODEL.RESNETS.NORM}


def register() -> None:
    """Let MODEL.ROI_HEADS.NAME find our heads. Idempotent."""
    if Res5ROIHeadsExtraNorm.__name__ not in ROI_HEADS_REGISTRY:
        ROI_HEADS_REGISTRY.register(Res5ROIHeadsExtraNorm)
