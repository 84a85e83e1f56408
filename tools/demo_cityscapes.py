"""Writes street scenes in the directory layout of Cityscapes: leftImg8bit/, and gtFine/ with polygons and label images.

The label images are drawn from the polygons in their order, as Cityscapes' own preparation scripts do it, with the same
drawing function; the ids are Cityscapes'. So those scripts, where installed, give the same images.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from demo_layouts import CITYSCAPES_TRAIN, CITYSCAPES_VAL, Split, write_bytes
from demo_street_things import THINGS
from demo_streets import HEIGHT, WIDTH, Polygon, draw_street
from PIL import Image, ImageDraw

CITYSCAPES_SPLITS = {"train": Split(CITYSCAPES_TRAIN, 0, 8), "val": Split(CITYSCAPES_VAL, 0, 4)}
CITIES = {"train": ("aachen", "bochum"), "val": ("frankfurt",)}
FRAME = 19
"""Of the 30 frames of a recorded snippet the one that is labelled."""

UNLABELLED_ID, IGNORED = 0, 255

IDS = {
    **{"ego vehicle": 1, "out of roi": 3, "static": 4, "road": 7, "sidewalk": 8, "building": 11, "wall": 12},
    **{"fence": 13, "pole": 17, "traffic light": 19, "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23},
    **{"person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33},
    **{"license plate": -1},
}
"""Label -> id; labels with a negative id are in the polygons only."""

EVALUATED = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
"""The 19 classes in the order of their ids for training; everything else is IGNORED there."""

THINGS_PER_SCENE = 6


class LabelImages(NamedTuple):
    """Label images by the ends of their file names.

    Attributes:
        instanceIds: 16-bit: 1000 * id + a number from 0 for things, the plain id for groups and what is no thing.
        labelIds: 8-bit: ids.
        labelTrainIds: 8-bit: ids for training.
    """

    instanceIds: Image.Image
    labelIds: Image.Image
    labelTrainIds: Image.Image


def write_cityscapes(root: Path, name: str, split: Split, seed: int) -> Iterator[Path]:
    """Write a split of Cityscapes; yields each image file. Things are dealt like cards, so that all appear alike."""
    dealer = np.random.default_rng((seed, split.stream, split.first, len(THINGS)))
    deck: list[str] = []
    cities = CITIES[name]
    for offset in range(split.count):
        rng = np.random.default_rng((seed, split.stream, split.first + offset))
        while len(deck) < THINGS_PER_SCENE:
            deck += [str(thing) for thing in dealer.permutation(list(THINGS))]
        dealt, deck = deck[:THINGS_PER_SCENE], deck[THINGS_PER_SCENE:]
        street = draw_street(rng, dealt)
        city, sequence = cities[offset * len(cities) // split.count], offset % (split.count // len(cities))
        stem = f"{city}_{sequence:06d}_{FRAME:06d}"
        path = root / "leftImg8bit" / name / city / f"{stem}_leftImg8bit.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(street.pixels).save(path)
        ground_truth = root / "gtFine" / name / city / f"{stem}_gtFine"
        write_bytes(Path(f"{ground_truth}_polygons.json"), _polygon_file(street.polygons))
        for kind, image in label_images(street.polygons)._asdict().items():
            image.save(f"{ground_truth}_{kind}.png")
        yield path


def _polygon_file(polygons: Sequence[Polygon]) -> bytes:
    objects = [{"label": polygon.label, "polygon": polygon.points.tolist()} for polygon in polygons]
    return json.dumps({"imgHeight": HEIGHT, "imgWidth": WIDTH, "objects": objects}).encode()


def label_images(polygons: Sequence[Polygon]) -> LabelImages:
    """Draw polygons in their order."""
    images = LabelImages(
        Image.new("I", (WIDTH, HEIGHT), UNLABELLED_ID),
        Image.new("L", (WIDTH, HEIGHT), UNLABELLED_ID),
        Image.new("L", (WIDTH, HEIGHT), IGNORED),
    )
    pens = [ImageDraw.Draw(image) for image in images]
    instances: Counter[str] = Counter()
    for polygon in polygons:
        name = polygon.label.removesuffix("group")
        label_id = IDS[name]
        if label_id < 0:
            continue
        instance_id = label_id
        # Only here things and groups differ: a group has no instances.
        if name in THINGS and polygon.label == name:
            instance_id = 1000 * label_id + instances[name]
            instances[name] += 1
        values = (instance_id, label_id, EVALUATED.index(name) if name in EVALUATED else IGNORED)
        for pen, value in zip(pens, values, strict=True):
            pen.polygon([(int(x), int(y)) for x, y in polygon.points], fill=value)
    # Pillow draws in 32 bits, but no longer writes them; the real files have 16.
    return images._replace(instanceIds=Image.fromarray(np.asarray(images.instanceIds).astype(np.uint16)))
