"""Sparse R-CNN as a Detectron2 meta-architecture.

Shape legend:
    B  images
    N  proposals of one image, the same number for every image
    C  channels of the feature maps
    K  classes

Source: Sparse R-CNN, arXiv:2011.12450, Sec. 3; constants from PeizeSun/SparseR-CNN@0e5028d, projects/SparseRCNN.
Departures: none known. Switches that no published config uses (softmax classifier, dropout, losses on the last head
only) do not exist.
"""

from typing import Any

import torch
from torch import Tensor, nn

from transfer import d2
from transfer.modeling.sparse_rcnn.head import IterativeHead, Prediction, RefiningHead
from transfer.modeling.sparse_rcnn.losses import objects_per_process, set_losses
from transfer.modeling.sparse_rcnn.matcher import HungarianMatcher, Target, Terms

d2.require()

from detectron2.config import CfgNode, configurable  # noqa: E402
from detectron2.modeling import Backbone, build_backbone, detector_postprocess  # noqa: E402
from detectron2.modeling.poolers import ROIPooler  # noqa: E402
from detectron2.structures import Boxes, ImageList, Instances  # noqa: E402


class SparseRCNN(nn.Module):
    """N learned boxes and features, refined by the heads against the image; no anchors, no NMS.

    Attributes:
        init_proposal_boxes: Centre x, centre y, width, height relative to the image, one row per proposal; they start
            as the whole image.
        init_proposal_features: Features of the proposals, one row of C each.
    """

    @configurable  # type: ignore[untyped-decorator]
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: IterativeHead,
        matcher: HungarianMatcher,
        in_features: list[str],
        num_proposals: int,
        max_detections: int,
        pixel_mean: list[float],
        pixel_std: list[float],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.matcher = matcher
        self.in_features = in_features
        self.max_detections = max_detections
        self.init_proposal_boxes = nn.Embedding(num_proposals, 4)
        with torch.no_grad():
            self.init_proposal_boxes.weight.copy_(torch.tensor([0.5, 0.5, 1.0, 1.0]))
        self.init_proposal_features = nn.Embedding(num_proposals, backbone.output_shape()[in_features[0]].channels)
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Constructor arguments of a config."""
        backbone = build_backbone(cfg)
        keys = cfg.MODEL.SPARSE_RCNN
        return {
            "backbone": backbone,
            "head": _build_head(cfg, backbone),
            "matcher": HungarianMatcher(
                Terms(keys.CLASS_WEIGHT, keys.L1_WEIGHT, keys.GIOU_WEIGHT, keys.FOCAL_ALPHA, keys.FOCAL_GAMMA)
            ),
            "in_features": list(cfg.MODEL.ROI_HEADS.IN_FEATURES),
            "num_proposals": keys.NUM_PROPOSALS,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Train or predict, by Detectron2's contract for detectors.

        Args:
            batched_inputs: Per image "image", a tensor of shape (3, height, width) with values in [0, 255] in the
                order of INPUT.FORMAT; for training "instances" with gt_boxes and gt_classes; for prediction "height"
                and "width" of the original image.

        Returns:
            In training a dict of scalar losses, three per head. Otherwise per image {"instances": Instances} in pixels
            of the original image, the best score first.
        """
        normalised = [
            (record["image"].to(self.pixel_mean.device) - self.pixel_mean) / self.pixel_std for record in batched_inputs
        ]
        images = ImageList.from_tensors(normalised, self.backbone.size_divisibility)
        maps = self.backbone(images.tensor)
        sizes = torch.tensor([[w, h, w, h] for h, w in images.image_sizes], device=self.pixel_mean.device).float()
        predictions = self.head(
            [maps[name] for name in self.in_features],
            self._first_boxes(sizes),
            self.init_proposal_features.weight.expand(len(sizes), -1, -1),
        )
        if self.training:
            return self._losses(predictions, [record["instances"] for record in batched_inputs], sizes)
        results = []
        for record, size, logits, boxes in zip(batched_inputs, images.image_sizes, *predictions[-1], strict=True):
            found = self._detections(logits, boxes, size)
            original = record.get("height", size[0]), record.get("width", size[1])
            results.append({"instances": detector_postprocess(found, *original)})
        return results

    def _first_boxes(self, sizes: Tensor) -> Tensor:
        """The learned boxes in pixels: `sizes` (B, 4) -> (B, N, 4) as x1, y1, x2, y2."""
        relative = self.init_proposal_boxes.weight
        centre, extent = relative[:, :2], relative[:, 2:]
        return torch.cat([centre - extent / 2, centre + extent / 2], dim=-1) * sizes[:, None]

    def _losses(self, predictions: list[Prediction], instances: list[Instances], sizes: Tensor) -> dict[str, Tensor]:
        targets = [
            Target(of_image.gt_classes.to(sizes.device), of_image.gt_boxes.tensor.to(sizes.device), size)
            for of_image, size in zip(instances, sizes, strict=True)
        ]
        num_objects = objects_per_process(targets)
        losses: dict[str, Tensor] = {}
        for index, (logits, boxes) in enumerate(predictions):
            terms = set_losses(logits, boxes, targets, self.matcher, num_objects)
            losses.update({f"loss_{name}_{index}": value for name, value in terms.items()})
        return losses

    def _detections(self, logits: Tensor, boxes: Tensor, size: tuple[int, int]) -> Instances:
        """The best of one image's N x K scores; a box may be several classes. `logits` (N, K), `boxes` (N, 4)."""
        scores = logits.float().sigmoid().flatten()
        best, index = scores.topk(min(self.max_detections, len(scores)))
        found = Instances(size)
        found.pred_boxes = Boxes(boxes[index // logits.shape[1]])
        found.scores = best
        found.pred_classes = index % logits.shape[1]
        return found


def _build_head(cfg: Any, backbone: Backbone) -> IterativeHead:
    keys, roi = cfg.MODEL.SPARSE_RCNN, cfg.MODEL.ROI_BOX_HEAD
    shapes = [backbone.output_shape()[name] for name in cfg.MODEL.ROI_HEADS.IN_FEATURES]
    heads = [
        RefiningHead(
            channels=shapes[0].channels,
            num_classes=keys.NUM_CLASSES,
            roi_side=roi.POOLER_RESOLUTION,
            attention_heads=keys.ATTENTION_HEADS,
            feedforward_dim=keys.FEEDFORWARD_DIM,
            dynamic_dim=keys.DYNAMIC_DIM,
            num_cls=keys.NUM_CLS,
            num_reg=keys.NUM_REG,
        )
        for _ in range(keys.NUM_HEADS)
    ]
    pooler = ROIPooler(
        output_size=roi.POOLER_RESOLUTION,
        scales=[1.0 / shape.stride for shape in shapes],
        sampling_ratio=roi.POOLER_SAMPLING_RATIO,
        pooler_type=roi.POOLER_TYPE,
    )
    return IterativeHead(heads, pooler, keys.PRIOR_PROB)
