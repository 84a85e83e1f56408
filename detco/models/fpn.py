"""Feature pyramid: the four stages of a ResNet-50 at one width, each with what the coarser ones know.

Its state dict has the names of an FPN by OpenMMLab, which SoCo's weights have too and `transfer.naming` reads.

Shape legend:
    N     images
    H, W  height and width of a stage's feature map

Source: Lin et al., arXiv:1612.03144, Sec. 3, in the form of SoCo (hologerry/SoCo@624a70d contrast/models/fpn.py).
"""

from collections import OrderedDict
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from detco.models.resnet import ResNetTrunk, Stages

WIDTH = 256
"""Channels of every level."""


class Pyramid(NamedTuple):
    """The levels, fine to coarse, each of shape (N, 256, H, W) with the H and W of its stage."""

    p2: Tensor
    p3: Tensor
    p4: Tensor
    p5: Tensor


class FPN(nn.Module):
    """Lateral 1x1 and output 3x3 convolutions with BatchNorm, without bias and without activation.

    The sum goes from coarse to fine, by nearest-neighbour resize to the size of the finer map: at 112 px the stages
    are 28, 14, 7 and 4 wide, and from 4 to 7 is not a factor of 2.

    Attributes:
        lateral_convs, fpn_convs: One of each per stage, fine to coarse.

    Departures: none known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(_conv_bn(width, kernel=1) for width in ResNetTrunk.channels.values())
        self.fpn_convs = nn.ModuleList(_conv_bn(WIDTH, kernel=3) for _ in ResNetTrunk.channels)

    def forward(self, stages: Stages) -> Pyramid:
        """Compute all levels.

        Args:
            stages: Outputs of the trunk.
        """
        merged = [lateral(stage) for lateral, stage in zip(self.lateral_convs, stages, strict=True)]
        for finer in reversed(range(len(merged) - 1)):
            size = merged[finer].shape[-2:]
            merged[finer] = merged[finer] + F.interpolate(merged[finer + 1], size=size, mode="nearest")
        return Pyramid(*(conv(level) for conv, level in zip(self.fpn_convs, merged, strict=True)))


def _conv_bn(in_channels: int, *, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, WIDTH, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(WIDTH)))
