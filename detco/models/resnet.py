"""ResNet-50 without its classifier, giving the outputs of its four stages.

Shape legend:
    N     images
    C     channels of a stage
    H, W  height and width of the image, in pixels

Source: He et al., arXiv:1512.03385, with the stride in the 3x3 convolution as in torchvision and MoCo.
"""

from typing import ClassVar, NamedTuple

from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet


class Stages(NamedTuple):
    """Outputs of the four stages after their last ReLU, each of shape (N, C, H / stride, W / stride)."""

    res2: Tensor
    res3: Tensor
    res4: Tensor
    res5: Tensor


class ResNetTrunk(ResNet):  # type: ignore[misc]  # torchvision is untyped
    """torchvision's ResNet-50, under torchvision's parameter names, without `fc`; newly initialised.

    Args:
        zero_init_residual: Whether the last BatchNorm of every block starts with weight 0, so that the block starts as
            the identity, instead of 1.
        norm: Class of the BatchNorm layers, made from their number of channels.

    Attributes:
        channels: C of each stage.
        strides: Image pixels per feature pixel of each stage.
    """

    channels: ClassVar[dict[str, int]] = {"res2": 256, "res3": 512, "res4": 1024, "res5": 2048}
    strides: ClassVar[dict[str, int]] = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}

    def __init__(self, zero_init_residual: bool = False, norm: type[nn.BatchNorm2d] = nn.BatchNorm2d) -> None:
        blocks = [3, 4, 6, 3]
        super().__init__(Bottleneck, blocks, num_classes=1, zero_init_residual=zero_init_residual, norm_layer=norm)
        del self.fc, self.avgpool

    def forward(self, images: Tensor) -> Stages:
        """Run all stages.

        Args:
            images: Normalised, shape (N, 3, H, W).
        """
        res2 = self.layer1(self._stem(images))
        res3 = self.layer2(res2)
        res4 = self.layer3(res3)
        res5 = self.layer4(res4)
        return Stages(res2, res3, res4, res5)

    def until_res4(self, images: Tensor) -> Tensor:
        """Run all stages but the last, `layer4`, which a C4 detector runs on regions of interest instead.

        Args:
            images: Normalised, shape (N, 3, H, W).

        Returns:
            The output of res4, shape (N, 1024, H / 16, W / 16).
        """
        features: Tensor = self.layer3(self.layer2(self.layer1(self._stem(images))))
        return features

    def _stem(self, images: Tensor) -> Tensor:
        features: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return features
