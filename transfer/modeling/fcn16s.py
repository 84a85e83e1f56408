"""FCN-16s for semantic segmentation, as in MoCo's paper (arXiv:1911.05722, appendix A.5; its code was not released).

ResNet-50 whose res5 has dilation 2 and stride 1 (MODEL.RESNETS.RES5_DILATION 2), two 3x3 convolutions of 256 channels
with dilation 6, BN and ReLU, and a 1x1 classifier: one prediction per 16 x 16 pixels.

Where the predictions lie. Every strided layer of a ResNet pads by half its kernel, so cell i of res5 is centred on
pixel 16 i: 769 = 16 * 48 + 1 pixels give 49 cells, the first on the first pixel, the last on the last. That is what
the paper's crops (769, and 513 for VOC) fit, and what is done here at every size: images are padded to the next
16 k + 1, the cells are joined by linear interpolation from centre to centre, and the padding is cut off.

This is why it has a meta-architecture of its own. Detectron2's SemanticSegmentor pads to multiples only and tells the
head nothing about the image's size, so a head of ours could only have its cells stretched over the image: right on
average over a crop of 769, but 7.5 pixels down and to the right on 1024 x 2048.

What the paper does not state, and what is done here:

- Warm-up: 1000 iterations, as in the detection tasks.
- Learning rate of the head: the backbone's.
- Weights of the head: He initialisation (fan-out) of the convolutions; classifier N(0, 0.01), bias 0.
- Loss: cross-entropy, the mean over a GPU's labelled pixels; classes weigh the same, no auxiliary loss.
- Statistics of BN: SyncBN while training and precise BN at the end, as in the detection tasks.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfer import d2

d2.require()

import fvcore.nn.weight_init as weight_init  # noqa: E402
from detectron2.config import CfgNode, configurable  # noqa: E402
from detectron2.layers import Conv2d, ShapeSpec, get_norm  # noqa: E402
from detectron2.modeling import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY, SemanticSegmentor  # noqa: E402
from detectron2.modeling.postprocessing import sem_seg_postprocess  # noqa: E402

STRIDE = 16  # input pixels between the centres of two cells
DILATION = 6


class FCN16sHead(nn.Module):
    """Two dilated convolutions, a classifier, and the way back to pixels. Detectron2's interface of a sem_seg head.

    Attributes:
        ignore_value: Label of pixels without loss.
    """

    @configurable  # type: ignore[untyped-decorator]
    def __init__(
        self,
        *,
        in_feature: str,
        in_channels: int,
        channels: int,
        num_classes: int,
        norm: str,
        ignore_value: int,
        loss_weight: float,
    ) -> None:
        super().__init__()
        self.in_feature = in_feature
        self.ignore_value = ignore_value
        self.loss_weight = loss_weight
        self.convs = nn.Sequential(_dilated_conv(in_channels, channels, norm), _dilated_conv(channels, channels, norm))
        self.predictor = Conv2d(channels, num_classes, kernel_size=1)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Constructor arguments of MODEL.SEM_SEG_HEAD.

        Raises:
            ValueError: If the head is given several features, or one whose stride is not 16.
        """
        settings = cfg.MODEL.SEM_SEG_HEAD
        if len(settings.IN_FEATURES) != 1 or settings.IN_FEATURES[0] not in input_shape:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES is {settings.IN_FEATURES}; FCN-16s reads one feature out of "
                f"{list(input_shape)}: give ['res5']"
            )
        (in_feature,) = settings.IN_FEATURES
        if input_shape[in_feature].stride != STRIDE:
            raise ValueError(
                f"{in_feature} has stride {input_shape[in_feature].stride}, FCN-16s needs {STRIDE}: "
                "set MODEL.RESNETS.RES5_DILATION 2"
            )
        return {
            "in_feature": in_feature,
            "in_channels": input_shape[in_feature].channels,
            "channels": settings.CONVS_DIM,
            "num_classes": settings.NUM_CLASSES,
            "norm": settings.NORM,
            "ignore_value": settings.IGNORE_VALUE,
            "loss_weight": settings.LOSS_WEIGHT,
        }

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Logits of every pixel, or in training their loss.

        Args:
            features: Of the backbone, (N, C, h, w) each.
            targets: In training: class of every pixel, int64 of shape (N, 16 (h - 1) + 1, 16 (w - 1) + 1).

        Returns:
            In training None and {"loss_sem_seg"}; else logits (N, classes, 16 (h - 1) + 1, 16 (w - 1) + 1) and {}.
        """
        logits = join_cells(self.predictor(self.convs(features[self.in_feature])))
        if not self.training:
            return logits, {}
        assert targets is not None
        return None, {"loss_sem_seg": self.loss_weight * pixel_loss(logits, targets, self.ignore_value)}


class FCN16s(SemanticSegmentor):  # type: ignore[misc]  # Detectron2 is not followed
    """SemanticSegmentor that pads images to 16 k + 1 pixels, for the reason that the module gives."""

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses of a batch in training, predictions else.

        Args:
            batched_inputs: Per image "image" (3, H, W) with grey levels 0-255 in the order of INPUT.FORMAT; in training
                "sem_seg" (H, W), int64; for inference optionally "height" and "width" of the prediction.

        Returns:
            In training {"loss_sem_seg"}; else per image {"sem_seg"}: logits (classes, height, width).
        """
        images = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        features = self.backbone(pad_to_cells(images, 0.0))  # 0 is the mean colour
        if self.training:
            targets = [x["sem_seg"].to(self.device) for x in batched_inputs]
            losses: dict[str, Tensor] = self.sem_seg_head(
                features, pad_to_cells(targets, self.sem_seg_head.ignore_value)
            )[1]
            return losses
        logits, _ = self.sem_seg_head(features)
        return [
            # Cuts the padding off, and resizes where the test image was resized.
            {"sem_seg": sem_seg_postprocess(one, size, x.get("height", size[0]), x.get("width", size[1]))}
            for one, size, x in zip(logits, sizes, batched_inputs, strict=True)
        ]


def pad_to_cells(tensors: list[Tensor], value: float) -> Tensor:
    """Batch tensors (..., H, W) of several sizes; each is padded below and right to a common 16 k + 1 by 16 l + 1."""
    height, width = (STRIDE * -(-(max(t.shape[axis] for t in tensors) - 1) // STRIDE) + 1 for axis in (-2, -1))
    return torch.stack([F.pad(t, (0, width - t.shape[-1], 0, height - t.shape[-2]), value=value) for t in tensors])


def join_cells(cells: Tensor) -> Tensor:
    """Bilinear interpolation from cell centres, (N, C, h, w), to all pixels, (N, C, 16 (h - 1) + 1, 16 (w - 1) + 1)."""
    size = [STRIDE * (side - 1) + 1 for side in cells.shape[-2:]]
    return F.interpolate(cells, size=size, mode="bilinear", align_corners=True)


def pixel_loss(logits: Tensor, targets: Tensor, ignore_value: int) -> Tensor:
    """Mean cross-entropy of the labelled pixels; 0, with a gradient of 0, if there are none.

    Args:
        logits: (N, classes, H, W).
        targets: (N, H, W), int64: 0 to classes - 1, or `ignore_value`.
        ignore_value: Label of pixels that do not count.
    """
    total = F.cross_entropy(logits.float(), targets, ignore_index=ignore_value, reduction="sum")
    return total / (targets != ignore_value).sum().clamp(min=1)


def add_config(cfg: CfgNode) -> None:
    """Nothing to add: every setting is a key that Detectron2 has."""


def register() -> None:
    """Let MODEL.META_ARCHITECTURE and MODEL.SEM_SEG_HEAD.NAME find the model. Idempotent."""
    if FCN16s.__name__ not in META_ARCH_REGISTRY:
        META_ARCH_REGISTRY.register(FCN16s)
        SEM_SEG_HEADS_REGISTRY.register(FCN16sHead)


def _dilated_conv(in_channels: int, out_channels: int, norm: str) -> nn.Module:
    conv: nn.Module = Conv2d(
        in_channels,
        out_channels,
        kernel_size=3,
        padding=DILATION,
        dilation=DILATION,
        bias=not norm,
        norm=get_norm(norm, out_channels),
        activation=F.relu,
    )
    weight_init.c2_msra_fill(conv)
    return conv
