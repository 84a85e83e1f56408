"""DETR's augmentation, with which Sparse R-CNN is trained: half of the images are cropped at another scale first.

Source: DETR, arXiv:2005.12872, Sec. 4, "Technical details"; the short sides are those of PeizeSun/SparseR-CNN@0e5028d,
sparsercnn/dataset_mapper.py.
"""

from collections.abc import Callable
from typing import Any

from transfer import d2

d2.require()

from detectron2.data import DatasetMapper, detection_utils  # noqa: E402
from detectron2.data import transforms as T  # noqa: E402

CROP_PROBABILITY = 0.5
SHORT_SIDES_BEFORE_CROP = (400, 500, 600)  # pixels; a long side may have any length


def resize_or_crop(cfg: Any) -> Callable[[dict[str, Any]], Any]:
    """Detectron2's mapper whose resize and flip follow, for half of the images, a resize and a crop.

    The published order is flip, maybe resize and crop, resize. Every step is symmetric, so the flip may come last.

    Args:
        cfg: Of INPUT, CROP.TYPE and CROP.SIZE are the crop's; the other keys mean what they mean for Detectron2.

    Raises:
        ValueError: If INPUT.CROP.ENABLED is False.
    """
    if not cfg.INPUT.CROP.ENABLED:
        raise ValueError(
            "TRANSFER.MAPPER resize_or_crop crops half of the images, but INPUT.CROP.ENABLED is False; set it to True, "
            'or TRANSFER.MAPPER to ""'
        )
    crop = T.AugmentationList(
        [
            T.ResizeShortestEdge(SHORT_SIDES_BEFORE_CROP, sample_style="choice"),
            T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE),
        ]
    )
    augmentations = [T.RandomApply(crop, CROP_PROBABILITY), *detection_utils.build_augmentation(cfg, is_train=True)]
    mapper: Callable[[dict[str, Any]], Any] = DatasetMapper(cfg, is_train=True, augmentations=augmentations)
    return mapper
