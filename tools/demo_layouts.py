"""What the layouts of the demo data share: which random numbers they draw from, and how files are written."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from demo_scenes import Scene, draw_scene
from numpy.typing import NDArray
from PIL import Image

SIDE_RANGE = (160, 200)

# Each kind of scene draws from its own stream of random numbers. New kinds go to the end: the number is in the seed.
UNLABELLED, VOC2007, VOC2012, COCO_TRAIN, COCO_VAL, CITYSCAPES_TRAIN, CITYSCAPES_VAL, LVIS = range(8)


class Split(NamedTuple):
    """Some labelled scenes: their stream of random numbers, first index in it, and number."""

    stream: int
    first: int
    count: int


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
            rng, draw_size(rng), dealt, radius_share=radii, crowd=crowd, with_bar=bool(count and index % 4 == 1)
        )
        yield scene, rng


def mask_box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 of the set pixels, half-open."""
    xs, ys = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height of a scene in pixels, each in SIDE_RANGE."""
    width, height = rng.integers(SIDE_RANGE[0], SIDE_RANGE[1] + 1, size=2)
    return int(width), int(height)


def save_jpeg(pixels: NDArray[np.uint8], path: Path, rng: np.random.Generator) -> None:
    """Write RGB pixels (H, W, 3) with a quality drawn from `rng`, as photographs have different ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=int(rng.integers(85, 96)))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file and the folders that lead to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """The same for a JSON file."""
    write_bytes(path, json.dumps(content).encode())
