"""Writes drawn scenes in the directory layout of COCO 2017: images, boxes, masks and crowds.

The names and ids of the categories are the real ones, so that programs made for the real data work unchanged; what is
drawn under a name is a textured shape.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from demo_layouts import COCO_TRAIN, COCO_VAL, Split, labelled_scenes, mask_box, save_jpeg
from demo_scenes import Placed, Scene, visible_mask, visible_polygons
from numpy.typing import NDArray

COCO_SPLITS = {"train": Split(COCO_TRAIN, 0, 48), "val": Split(COCO_VAL, 0, 16)}

COCO_CATEGORIES = {
    "person": {1: "person"},
    "vehicle": {
        **{2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat"},
    },
    "outdoor": {10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench"},
    "animal": {
        **{16: "bird", 17: "cat", 18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear"},
        **{24: "zebra", 25: "giraffe"},
    },
    "accessory": {27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase"},
    "sports": {
        **{34: "frisbee", 35: "skis", 36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat"},
        **{40: "baseball glove", 41: "skateboard", 42: "surfboard", 43: "tennis racket"},
    },
    "kitchen": {44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife", 50: "spoon", 51: "bowl"},
    "food": {
        **{52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot", 58: "hot dog"},
        **{59: "pizza", 60: "donut", 61: "cake"},
    },
    "furniture": {62: "chair", 63: "couch", 64: "potted plant", 65: "bed", 67: "dining table", 70: "toilet"},
    "electronic": {72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard", 77: "cell phone"},
    "appliance": {78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator"},
    "indoor": {
        **{84: "book", 85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush"},
    },
}
"""Super-category -> id -> name: the 80 things of COCO 2017, with the gaps in their ids."""

COCO_LOOKS = {
    **{"person": 1, "bicycle": 2, "car": 3, "aeroplane": 5, "train": 7, "boat": 9, "cat": 17, "dog": 18},
    **{"bottle": 44, "chair": 62, "pottedplant": 64, "tvmonitor": 72},
}
"""The looks that appear in the COCO scenes (twelve, so that a few dozen images show each often), and their ids."""


class Shot(NamedTuple):
    """An image of a COCO split, with what is known about it.

    Attributes:
        image: Its record: "id", "file_name", "width", "height", "license".
        scene: What was drawn.
        objects: Objects with their records: "id", "image_id", "segmentation", "area", "iscrowd", "bbox", "category_id".
    """

    image: dict[str, Any]
    scene: Scene
    objects: list[tuple[Placed, dict[str, Any]]]


def draw_shots(folder: Path, split: Split, seed: int) -> Iterator[Shot]:
    """Draw a split of COCO and write its images to `folder`; yields each."""
    for offset, (scene, rng) in enumerate(labelled_scenes(split, list(COCO_LOOKS), seed)):
        # Ids with gaps, as the real ones have.
        image_id = 1000 * (split.stream + 1) + 7 * offset
        path = folder / f"{image_id:012d}.jpg"
        save_jpeg(scene.pixels, path, rng)
        height, width = scene.pixels.shape[:2]
        objects = []
        for placed in scene.objects:
            annotation = _annotation(scene, placed)
            if annotation is not None:
                record = {"id": 100 * image_id + placed.owner, "image_id": image_id, **annotation}
                objects.append((placed, record))
        yield Shot(
            {"id": image_id, "file_name": path.name, "width": width, "height": height, "license": 1}, scene, objects
        )


def instances(shots: Sequence[Shot]) -> dict[str, Any]:
    """Content of instances_{train,val}2017.json."""
    categories = [
        {"supercategory": group, "id": number, "name": category}
        for group, members in COCO_CATEGORIES.items()
        for number, category in members.items()
    ]
    annotations = [annotation for shot in shots for _, annotation in shot.objects]
    return annotation_file([shot.image for shot in shots], annotations, categories)


def annotation_file(
    images: list[dict[str, Any]], annotations: list[dict[str, Any]], categories: list[dict[str, Any]]
) -> dict[str, Any]:
    """The frame that COCO's annotation files have in common."""
    return {
        "info": {"description": "Drawn by make_demo_data.py", "version": "1", "year": 2017},
        "licenses": [{"id": 1, "name": "none needed: drawn by a program", "url": ""}],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def _annotation(scene: Scene, placed: Placed) -> dict[str, Any] | None:
    """Segmentation, area and box of an object, or None if too little of it is visible."""
    category_id = COCO_LOOKS[placed.name]
    if placed.is_crowd:
        mask = visible_mask(scene, placed)
        x1, y1, x2, y2 = mask_box(mask)
        height, width = mask.shape
        segmentation: Any = {"counts": _run_lengths(mask), "size": [height, width]}
        area, box = float(mask.sum()), [x1, y1, x2 - x1, y2 - y1]
    else:
        segmentation = visible_polygons(scene, placed)
        if not segmentation:
            return None
        outlines = [np.array(polygon, dtype=np.float32).reshape(-1, 2) for polygon in segmentation]
        area = round(sum(cv2.contourArea(outline) for outline in outlines), 2)
        xs = [x for polygon in segmentation for x in polygon[::2]]
        ys = [y for polygon in segmentation for y in polygon[1::2]]
        box = [min(xs), min(ys), round(max(xs) - min(xs), 2), round(max(ys) - min(ys), 2)]
    return {
        "segmentation": segmentation,
        "area": area,
        "iscrowd": int(placed.is_crowd),
        "bbox": box,
        "category_id": category_id,
    }


def _run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed run lengths: down the columns, beginning with the number of zeros."""
    flat = np.concatenate([[False], mask.T.reshape(-1)])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    edges = np.concatenate([[0], changes, [mask.size]])
    return [int(length) for length in np.diff(edges)]
