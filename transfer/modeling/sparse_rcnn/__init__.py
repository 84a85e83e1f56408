"""Sparse R-CNN (arXiv:2011.12450): a fixed set of learned boxes and features, refined six times; no anchors, no NMS."""

from typing import Any

from transfer import d2
from transfer.modeling.sparse_rcnn.model import SparseRCNN

d2.require()

from detectron2.config import CfgNode  # noqa: E402
from detectron2.modeling import META_ARCH_REGISTRY  # noqa: E402


def add_config(cfg: Any) -> None:
    """Add MODEL.SPARSE_RCNN with the published values (PeizeSun/SparseR-CNN@0e5028d, sparsercnn/config.py).

    The width of all layers is FPN.OUT_CHANNELS; ROI_HEADS.IN_FEATURES, ROI_BOX_HEAD.POOLER_* and
    TEST.DETECTIONS_PER_IMAGE mean what they mean for Detectron2's own detectors.
    """
    keys = CfgNode()
    keys.NUM_CLASSES = 80
    keys.NUM_PROPOSALS = 300
    # Refinements; each is a head with its own weights and losses.
    keys.NUM_HEADS = 6
    keys.ATTENTION_HEADS = 8
    keys.FEEDFORWARD_DIM = 2048
    # Channels between the two layers that each proposal's feature generates.
    keys.DYNAMIC_DIM = 64
    # Fully connected layers before the class scores and before the box deltas.
    keys.NUM_CLS = 1
    keys.NUM_REG = 3
    # Weights of the three terms, in the matching and in the loss.
    keys.CLASS_WEIGHT = 2.0
    keys.L1_WEIGHT = 5.0
    keys.GIOU_WEIGHT = 2.0
    keys.FOCAL_ALPHA = 0.25
    keys.FOCAL_GAMMA = 2.0
    # Score of every class that the untrained classifier gives.
    keys.PRIOR_PROB = 0.01
    cfg.MODEL.SPARSE_RCNN = keys


def register() -> None:
    """Let MODEL.META_ARCHITECTURE find "SparseRCNN". Idempotent."""
    if SparseRCNN.__name__ not in META_ARCH_REGISTRY:
        META_ARCH_REGISTRY.register(SparseRCNN)
