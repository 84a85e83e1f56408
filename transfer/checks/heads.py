"""Which key holds the number of classes, by MODEL.META_ARCHITECTURE. Needs no Detectron2."""

from typing import Any

# The node below MODEL whose NUM_CLASSES a network reads; all others of Detectron2's have ROI heads.
NODES = {
    "RetinaNet": "RETINANET",
    "FCOS": "FCOS",
    "SparseRCNN": "SPARSE_RCNN",
    "SemanticSegmentor": "SEM_SEG_HEAD",
    "FCN16s": "SEM_SEG_HEAD",
}
# Of these, the ones that count things; SEM_SEG_HEAD counts kinds of pixels.
DETECTORS = ("ROI_HEADS", "RETINANET", "FCOS", "SPARSE_RCNN")


def class_node(cfg: Any) -> str:
    """The node below MODEL that holds the NUM_CLASSES of this config's network."""
    return NODES.get(cfg.MODEL.META_ARCHITECTURE, "ROI_HEADS")


def segments_pixels(cfg: Any) -> bool:
    """Whether the network classifies pixels instead of detecting objects."""
    return class_node(cfg) == "SEM_SEG_HEAD"


def set_num_classes(cfg: Any, number: int) -> None:
    """Set NUM_CLASSES of every detector's head."""
    for node in DETECTORS:
        cfg.MODEL[node].NUM_CLASSES = number
