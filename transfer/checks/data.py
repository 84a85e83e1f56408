"""Datasets against the network: classes, kinds of annotations, evaluators, overlap of training and test."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transfer import d2
from transfer.checks.heads import class_node, segments_pixels

d2.require()

from detectron2.data import MetadataCatalog  # noqa: E402

SEM_SEG_EVALUATORS = ("cityscapes_sem_seg", "sem_seg")
BOXES_ONLY_EVALUATORS = ("pascal_voc", "voc_folder")
VOC0712 = ("voc_2007_trainval", "voc_2012_trainval")
VOC0712_IMAGES = 16551  # 5011 + 11540


def check_classes(cfg: Any, names: Sequence[str]) -> list[str]:
    """Refuse a head that has another number of classes than the datasets.

    Args:
        cfg: The resolved config.
        names: Registered datasets.

    Raises:
        ValueError: If so; names the key to change.
    """
    node = class_node(cfg)
    for name in names:
        entry = MetadataCatalog.get(name)
        classes = entry.get("stuff_classes" if segments_pixels(cfg) else "thing_classes")
        if classes is not None and len(classes) != cfg.MODEL[node].NUM_CLASSES:
            raise ValueError(
                f"MODEL.{node}.NUM_CLASSES is {cfg.MODEL[node].NUM_CLASSES}, but {name} has {len(classes)} classes; "
                f"append MODEL.{node}.NUM_CLASSES {len(classes)}"
            )
    return []


def check_annotations(cfg: Any, names: Sequence[str]) -> list[str]:
    """Refuse datasets that lack what the network learns or is measured by.

    Args:
        cfg: The resolved config.
        names: Registered datasets.

    Raises:
        ValueError: If boxes meet semantic segmentation, a mask head boxes only, or a keypoint head no keypoints.
    """
    wants_pixels = segments_pixels(cfg)
    for name in names:
        entry = MetadataCatalog.get(name)
        kind = entry.get("evaluator_type")
        if wants_pixels != (kind in SEM_SEG_EVALUATORS):
            raise ValueError(
                f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, but {name} is evaluated as {kind}: one is "
                "about objects, the other about pixels. Take the task's own datasets"
            )
        if wants_pixels:
            continue
        if cfg.MODEL.MASK_ON and kind in BOXES_ONLY_EVALUATORS:
            raise ValueError(f"MODEL.MASK_ON is True, but {name} has boxes only; append MODEL.MASK_ON False")
        if cfg.MODEL.KEYPOINT_ON and not entry.get("keypoint_names"):
            raise ValueError(f"MODEL.KEYPOINT_ON is True, but {name} has no keypoints; append MODEL.KEYPOINT_ON False")
    return []


def check_overlap(train: Sequence[str], test: Sequence[str]) -> list[str]:
    """Warn of an evaluation on training images.

    Args:
        train: Names or sources.
        test: The same.
    """
    both = [name for name in test if name in train]
    return [f"WARNING: {', '.join(both)} is trained on and evaluated: that measures memory."] if both else []


def count_voc0712(train: Sequence[str]) -> list[str]:
    """Compare the number of VOC 07+12's training images with the published one; "" for other training sets."""
    if sorted(train) != sorted(VOC0712):
        return []
    count = 0
    for name in train:
        entry = MetadataCatalog.get(name)
        listing = Path(entry.dirname) / "ImageSets" / "Main" / f"{entry.split}.txt"
        if not listing.is_file():
            return []  # check_datasets says so
        count += len(listing.read_text(encoding="utf-8").split())
    if count == VOC0712_IMAGES:
        return [f"VOC 07+12 trainval: {count} images, as published."]
    return [f"WARNING: VOC 07+12 trainval has {count} images here; the published runs had {VOC0712_IMAGES}."]
