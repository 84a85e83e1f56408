"""Writes drawn scenes in the directory layouts of Pascal VOC and COCO, and as an unlabelled tree.

The names of classes and categories are the real ones, so that programs made for the real data sets work unchanged;
what is drawn under a name is a textured shape, the same in all three.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import cv2
import numpy as np
from demo_scenes import LOOKS, Placed, Scene, draw_scene, visible_mask, visible_polygons
from numpy.typing import NDArray
from PIL import Image

SIDE_RANGE = (160, 200)
DIFFICULT_BELOW_SHARE = 0.55
DIFFICULT_BELOW_PX = 16

# Each kind of scene draws from its own stream of random numbers.
UNLABELLED, VOC2007, VOC2012, COCO_TRAIN, COCO_VAL = range(5)

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


class Split(NamedTuple):
    """Some labelled scenes: their stream of random numbers, first index in it, and number."""

    stream: int
    first: int
    count: int


VOC2007_TRAINVAL = Split(VOC2007, 0, 24)
VOC2007_TEST = Split(VOC2007, 24, 16)
VOC2012_TRAINVAL = Split(VOC2012, 0, 24)
COCO_TRAIN_SPLIT = Split(COCO_TRAIN, 0, 48)
COCO_VAL_SPLIT = Split(COCO_VAL, 0, 16)


def write_unlabelled(root: Path, num_images: int, seed: int) -> Iterator[Path]:
    """Write `num_images` scenes with one large object, in one folder per shape; yields each file."""
    names = list(LOOKS)
    for index in range(num_images):
        rng = np.random.default_rng((seed, UNLABELLED, index))
        main = names[index % len(names)]
        # The large one lies in front; the small ones fill the scene as in photographs.
        extras = [str(name) for name in rng.choice(names, size=rng.integers(0, 3))]
        radii = [(0.10, 0.17)] * len(extras) + [(0.28, 0.42)]
        scene = draw_scene(rng, _draw_size(rng), [*extras, main], radius_share=radii)
        path = root / LOOKS[main].shape / f"scene_{index:05d}.jpg"
        _save_jpeg(scene.pixels, path, rng)
        yield path


def labelled_scenes(split: Split, names: Sequence[str], seed: int) -> Iterator[tuple[Scene, np.random.Generator]]:
    """The scenes of a split, each with its generator. Classes are dealt like cards, so that all appear alike often.

    One scene in four has a bar in front of everything; for COCO one in twelve has no object, one in eight a crowd.
    """
    dealer = np.random.default_rng((seed, split.stream, split.first, len(names)))
    deck: list[str] = []
    like_coco = split.stream in (COCO_TRAIN, COCO_VAL)
    for index in range(split.first, split.first + split.count):
        rng = np.random.default_rng((seed, split.stream, index))
        count = 0 if like_coco and index % 12 == 11 else int(rng.integers(3, 7))
        while len(deck) < count:
            deck += [names[i] for i in dealer.permutation(len(names))]
        dealt, deck = deck[:count], deck[count:]
        crowd = str(rng.choice(names)) if like_coco and index % 8 == 3 else None
        radii = [(0.13, 0.28)] * count
        scene = draw_scene(
            rng, _draw_size(rng), dealt, radius_share=radii, crowd=crowd, with_bar=bool(count and index % 4 == 1)
        )
        yield scene, rng


def write_voc(root: Path, year: int, splits: dict[str, Split], seed: int) -> Iterator[Path]:
    """Write a VOC year: JPEGImages, Annotations, ImageSets/Main; yields each image file."""
    for name, split in splits.items():
        ids = []
        for offset, (scene, rng) in enumerate(labelled_scenes(split, list(LOOKS), seed)):
            number = split.first + offset + 1
            image_id = f"{number:06d}" if year == 2007 else f"{year}_{number:06d}"
            path = root / "JPEGImages" / f"{image_id}.jpg"
            _save_jpeg(scene.pixels, path, rng)
            _write_bytes(root / "Annotations" / f"{image_id}.xml", _voc_annotation(scene, path.name, f"VOC{year}"))
            ids.append(image_id)
            yield path
        _write_ids(root, name, ids)
        if name == "trainval":
            _write_ids(root, "train", ids[::2])
            _write_ids(root, "val", ids[1::2])


def _write_ids(root: Path, name: str, ids: Sequence[str]) -> None:
    _write_bytes(root / "ImageSets" / "Main" / f"{name}.txt", "".join(f"{i}\n" for i in ids).encode())


def _voc_annotation(scene: Scene, file_name: str, folder: str) -> bytes:
    height, width = scene.pixels.shape[:2]
    root = ElementTree.Element("annotation")
    _add(root, folder=folder, filename=file_name)
    _add(ElementTree.SubElement(root, "source"), database="drawn by make_demo_data.py")
    _add(ElementTree.SubElement(root, "size"), width=width, height=height, depth=3)
    _add(root, segmented=0)
    for placed in scene.objects:
        mask = visible_mask(scene, placed)
        if not mask.any():
            continue
        x1, y1, x2, y2 = _box(mask)
        seen_share = mask.sum() / placed.full_area_px
        at_edge = x1 == 0 or y1 == 0 or x2 == width or y2 == height
        small = min(x2 - x1, y2 - y1) < DIFFICULT_BELOW_PX
        element = ElementTree.SubElement(root, "object")
        _add(element, name=placed.name, pose="Unspecified", truncated=int(at_edge))
        _add(element, difficult=int(small or seen_share < DIFFICULT_BELOW_SHARE))
        # VOC counts pixels from 1 and includes the last one, so x2 and y2 stay and x1 and y1 grow by one.
        _add(ElementTree.SubElement(element, "bndbox"), xmin=x1 + 1, ymin=y1 + 1, xmax=x2, ymax=y2)
    ElementTree.indent(root, space="\t")
    return ElementTree.tostring(root) + b"\n"


def _add(parent: ElementTree.Element, **values: str | int) -> None:
    for name, value in values.items():
        ElementTree.SubElement(parent, name).text = str(value)


def write_coco(root: Path, name: str, split: Split, seed: int) -> Iterator[Path]:
    """Write a COCO split: {name}2017/ and annotations/instances_{name}2017.json; yields each image file."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for offset, (scene, rng) in enumerate(labelled_scenes(split, list(COCO_LOOKS), seed)):
        # Ids with gaps, as the real ones have.
        image_id = 1000 * (split.stream + 1) + 7 * offset
        path = root / f"{name}2017" / f"{image_id:012d}.jpg"
        _save_jpeg(scene.pixels, path, rng)
        height, width = scene.pixels.shape[:2]
        images.append({"id": image_id, "file_name": path.name, "width": width, "height": height, "license": 1})
        for placed in scene.objects:
            annotation = _coco_annotation(scene, placed)
            if annotation is not None:
                annotations.append({"id": 100 * image_id + placed.owner, "image_id": image_id, **annotation})
        yield path
    content = {
        "info": {"description": "Drawn by make_demo_data.py", "version": "1", "year": 2017},
        "licenses": [{"id": 1, "name": "none needed: drawn by a program", "url": ""}],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"supercategory": group, "id": number, "name": category}
            for group, members in COCO_CATEGORIES.items()
            for number, category in members.items()
        ],
    }
    _write_bytes(root / "annotations" / f"instances_{name}2017.json", json.dumps(content).encode())


def _coco_annotation(scene: Scene, placed: Placed) -> dict[str, Any] | None:
    """Segmentation, area and box of an object, or None if too little of it is visible."""
    category_id = COCO_LOOKS[placed.name]
    if placed.is_crowd:
        mask = visible_mask(scene, placed)
        x1, y1, x2, y2 = _box(mask)
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


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 of the set pixels, half-open."""
    xs, ys = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def _draw_size(rng: np.random.Generator) -> tuple[int, int]:
    width, height = rng.integers(SIDE_RANGE[0], SIDE_RANGE[1] + 1, size=2)
    return int(width), int(height)


def _save_jpeg(pixels: NDArray[np.uint8], path: Path, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=int(rng.integers(85, 96)))


def _write_bytes(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
