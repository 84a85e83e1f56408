"""The dynamic heads of Sparse R-CNN: each refines all proposals once.

Shape legend:
    B  images
    N  proposals of one image
    C  channels of the feature maps and of the proposals' features
    D  channels between the two generated layers
    S  side of the pooled RoI
    K  classes

Boxes are x1, y1, x2, y2 in pixels of the network's input.
Source: Sparse R-CNN, arXiv:2011.12450, Sec. 3.2, "Dynamic instance interactive head", and 3.3; layer order, biases and
initial values are those of PeizeSun/SparseR-CNN@0e5028d, sparsercnn/head.py. Tensors have its names, so that detectors
trained with it can be evaluated.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from transfer import d2

d2.require()

from detectron2.modeling.box_regression import Box2BoxTransform  # noqa: E402
from detectron2.modeling.poolers import ROIPooler  # noqa: E402
from detectron2.structures import Boxes  # noqa: E402

DELTA_WEIGHTS = (2.0, 2.0, 1.0, 1.0)
MAX_LOG_GROWTH = math.log(100000.0 / 16)  # of width and height in one refinement


class Prediction(NamedTuple):
    """What one head says about all proposals.

    Attributes:
        logits: Class scores before the sigmoid, shape (B, N, K).
        boxes: The refined boxes, shape (B, N, 4), float32.
    """

    logits: Tensor
    boxes: Tensor


class DynamicInteraction(nn.Module):
    """Filters each RoI with two 1x1 convolutions that its proposal's feature generates (Sec. 3.2, Figure 4)."""

    def __init__(self, channels: int, dynamic_dim: int, roi_side: int) -> None:
        super().__init__()
        self.dynamic_dim = dynamic_dim
        self.dynamic_layer = nn.Linear(channels, 2 * channels * dynamic_dim)
        self.norm1 = nn.LayerNorm(dynamic_dim)
        self.norm2 = nn.LayerNorm(channels)
        self.out_layer = nn.Linear(channels * roi_side**2, channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, objects: Tensor, rois: Tensor) -> Tensor:
        """Interact.

        Args:
            objects: Features of the proposals, shape (B, N, C).
            rois: Their regions, images in order, shape (B N, C, S, S).

        Returns:
            Shape (B, N, C).
        """
        down, up = self.dynamic_layer(objects).flatten(0, 1).chunk(2, dim=-1)
        cells = rois.flatten(2).transpose(1, 2)  # (B N, S S, C)
        cells = F.relu(self.norm1(cells @ down.unflatten(-1, (-1, self.dynamic_dim))))  # (B N, S S, D)
        cells = F.relu(self.norm2(cells @ up.unflatten(-1, (self.dynamic_dim, -1))))  # (B N, S S, C)
        return F.relu(self.norm3(self.out_layer(cells.flatten(1)))).view_as(objects)


def _tower(channels: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        # Without bias: the norm would remove it.
        layers += [nn.Linear(channels, channels, bias=False), nn.LayerNorm(channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class RefiningHead(nn.Module):
    """One refinement: self-attention, interaction with the RoI, feed-forward; then scores and box deltas."""

    def __init__(
        self,
        *,
        channels: int,
        num_classes: int,
        roi_side: int,
        attention_heads: int,
        feedforward_dim: int,
        dynamic_dim: int,
        num_cls: int,
        num_reg: int,
    ) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(channels, attention_heads, batch_first=True)
        self.norm1 = nn.LayerNorm(channels)
        self.inst_interact = DynamicInteraction(channels, dynamic_dim, roi_side)
        self.norm2 = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, channels)
        self.norm3 = nn.LayerNorm(channels)
        self.cls_module = _tower(channels, num_cls)
        self.class_logits = nn.Linear(channels, num_classes)
        self.reg_module = _tower(channels, num_reg)
        self.bboxes_delta = nn.Linear(channels, 4)
        self.box_transform = Box2BoxTransform(weights=DELTA_WEIGHTS, scale_clamp=MAX_LOG_GROWTH)

    def forward(self, objects: Tensor, boxes: Tensor, rois: Tensor) -> tuple[Prediction, Tensor]:
        """Refine.

        Args:
            objects: Features of the proposals, shape (B, N, C).
            boxes: Shape (B, N, 4).
            rois: What the feature maps hold inside `boxes`, shape (B N, C, S, S).

        Returns:
            The prediction, and the proposals' features for the next head, shape (B, N, C).
        """
        attended, _ = self.self_attn(objects, objects, objects, need_weights=False)
        objects = self.norm1(objects + attended)
        objects = self.norm2(objects + self.inst_interact(objects, rois))
        objects = self.norm3(objects + self.linear2(F.relu(self.linear1(objects))))
        deltas = self.bboxes_delta(self.reg_module(objects))
        # Decodes in float32 whatever the deltas are.
        refined = self.box_transform.apply_deltas(deltas.flatten(0, 1), boxes.flatten(0, 1)).view_as(boxes)
        return Prediction(self.class_logits(self.cls_module(objects)), refined), objects


class IterativeHead(nn.Module):
    """The heads in a row. Each pools where the one before it has moved the boxes to."""

    def __init__(self, heads: Sequence[RefiningHead], pooler: ROIPooler, prior_prob: float) -> None:
        super().__init__()
        self.head_series = nn.ModuleList(heads)
        self.box_pooler = pooler
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for head in heads:
            # Nearly all proposals are background: start from there (focal loss, arXiv:1708.02002, Sec. 3.3).
            nn.init.constant_(head.class_logits.bias, -math.log((1 - prior_prob) / prior_prob))

    def forward(self, features: list[Tensor], boxes: Tensor, objects: Tensor) -> list[Prediction]:
        """Refine as often as there are heads.

        Args:
            features: Feature maps from fine to coarse, each of shape (B, C, height, width).
            boxes: The first boxes, shape (B, N, 4).
            objects: The first features of the proposals, shape (B, N, C).

        Returns:
            One prediction per head, the final one last.
        """
        predictions: list[Prediction] = []
        for head in self.head_series:
            rois = self.box_pooler(features, [Boxes(of_image) for of_image in boxes])
            prediction, objects = head(objects, boxes, rois)
            predictions.append(prediction)
            # A head answers for its own refinement only (Sec. 3.3), as in Cascade R-CNN.
            boxes = prediction.boxes.detach()
        return predictions
