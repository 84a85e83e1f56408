"""Writes the people of the COCO scenes with DensePose's points, in the layout of COCO 2014.

A person is drawn as a heart. Its surface is cut into DensePose's 24 parts, which lie at fixed places of the heart's own
frame, so they turn and stretch with it; U runs across each part and V down. As in reality the images are some of those
of COCO 2017 under other names. make_demo_data.py does not draw these: they need pycocotools, and few have the project
that reads them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from demo_canvas import FINE
from demo_coco import COCO_LOOKS, Shot, annotation_file, draw_shots
from demo_layouts import COCO_TRAIN, COCO_VAL, Split, write_json
from demo_scenes import Placed, Scene
from demo_shapes import Floats, Pose, turn
from numpy.typing import NDArray
from pycocotools import mask as run_lengths

MASK_SIDE = 256
POINTS_PER_PART = 5
MARGIN = 6
"""Points keep this distance from the edges of their part, in 256ths of the box; a part that is too small has none."""

MIN_SIDE_PX = 44
"""People with a smaller box have no points, and crowds have none, as some in the real data."""

SPLITS = {"train": Split(COCO_TRAIN, 0, 12), "val": Split(COCO_VAL, 0, 12)}

ROWS = (
    *[(24, 23), (16, 18, 17, 15), (20, 22, 21, 19), (3, 1, 4), (2,)],
    *[(9, 7, 8, 10), (13, 11, 12, 14), (6, 5)],
)
"""The 24 parts from the head to the feet, each row from our left to our right: the person looks at us, so its right is
on our left. A mirrored row is the row of the parts' partners."""

TOP, BOTTOM = -0.8, 1.05
"""Where the rows begin and end in the frame of the shape; the columns fill [-1, 1]."""

BODY_PARTS = (
    *[(1, 2), (3,), (4,), (5,), (6,), (7, 9), (8, 10), (11, 13), (12, 14)],
    *[(15, 17), (16, 18), (19, 21), (20, 22), (23, 24)],
)
"""The parts that make up each of the 14 masks: torso, hands, feet, upper and lower legs, upper and lower arms, head."""


class Surface(NamedTuple):
    """What a grid of places shows of a person; arrays of one shape.

    Attributes:
        part: 1 to 24, and 0 where it does not show the person.
        u: Place across the part, 0 to 1.
        v: Place down the part, 0 to 1.
    """

    part: NDArray[np.int64]
    u: Floats
    v: Floats


def write_densepose(root: Path, seed: int) -> Iterator[Path]:
    """Write coco/{train,val}2014 and coco/annotations/densepose_{train,valminusminival,minival}2014.json below `root`.

    Yields each image file. As in reality some images are in none of the three files: those without a person.
    """
    shots: dict[str, list[Shot]] = {}
    for name, split in SPLITS.items():
        folder = root / f"coco/{name}2014"
        shots[name] = []
        for shot in draw_shots(folder, split, seed):
            number = shot.image["file_name"]
            shot.image["file_name"] = f"COCO_{name}2014_{number}"
            shots[name].append(shot)
            yield (folder / number).replace(folder / shot.image["file_name"])
    val = [shot for shot in shots["val"] if _people(shot)]
    # The two shares of the validation images, like the real ones, have no image in common.
    parts = {"train": shots["train"], "valminusminival": val[1::2], "minival": val[::2]}
    for name, members in parts.items():
        write_json(root / f"coco/annotations/densepose_{name}2014.json", densepose(members, seed))


def densepose(shots: Sequence[Shot], seed: int) -> dict[str, Any]:
    """Content of densepose_*2014.json: the images with people, and of the objects the people."""
    category = {"supercategory": "person", "id": COCO_LOOKS["person"], "name": "person"}
    images, annotations = [], []
    for shot in shots:
        people = _people(shot)
        if people:
            images.append(shot.image)
        for placed, annotation in people:
            is_labelled = placed.pose is not None and min(annotation["bbox"][2:]) >= MIN_SIDE_PX
            points = _points(shot.scene, placed, annotation, seed) if is_labelled else {}
            annotations.append({**annotation, **points})
    return annotation_file(images, annotations, [category])


def surface_at(scene: Scene, placed: Placed, xs: Floats, ys: Floats) -> Surface:
    """What the scene shows of a person at places in pixels; `xs` and `ys` have any one shape."""
    assert placed.pose is not None
    rows, columns = (np.floor(values * FINE).astype(int) for values in (ys, xs))
    height, width = scene.owners.shape
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    seen = inside & (scene.owners[rows.clip(0, height - 1), columns.clip(0, width - 1)] == placed.owner)
    across, down = _own_places(xs, ys, placed.pose)
    part, u, v = np.zeros(xs.shape, dtype=np.int64), np.zeros_like(across), np.zeros_like(across)
    row = (down * len(ROWS)).clip(0, len(ROWS) - 1e-3)
    for number, labels in enumerate(ROWS):
        column = (across * len(labels)).clip(0, len(labels) - 1e-3)
        here = seen & (row.astype(int) == number)
        part[here] = np.array(labels)[column[here].astype(int)]
        u[here], v[here] = column[here] % 1, row[here] % 1
    return Surface(part, u, v)


def _people(shot: Shot) -> list[tuple[Placed, dict[str, Any]]]:
    return [item for item in shot.objects if item[1]["category_id"] == COCO_LOOKS["person"]]


def _own_places(xs: Floats, ys: Floats, pose: Pose) -> tuple[Floats, Floats]:
    """Places in pixels as shares of the width and height that the rows fill."""
    offsets = np.stack([xs - pose.centre[0], ys - pose.centre[1]], axis=-1).astype(np.float32)
    own = turn(offsets, -pose.angle) / pose.radius
    across, down = own[..., 0] / pose.stretch, own[..., 1] * pose.stretch
    return (across + 1) / 2, (down - TOP) / (BOTTOM - TOP)


def _points(scene: Scene, placed: Placed, annotation: dict[str, Any], seed: int) -> dict[str, Any]:
    """DensePose's keys of one person: some points of every visible part, and the masks.

    Points and masks are relative to the box, which is 256 wide and high.
    """
    rng = np.random.default_rng((seed, annotation["id"]))
    left, top, width, height = annotation["bbox"]
    scaled_x, scaled_y = np.meshgrid(np.arange(MASK_SIDE) + 0.5, np.arange(MASK_SIDE) + 0.5)
    xs, ys = left + scaled_x * width / MASK_SIDE, top + scaled_y * height / MASK_SIDE
    surface = surface_at(scene, placed, xs.astype(np.float32), ys.astype(np.float32))
    chosen: list[tuple[int, int]] = []
    for part in np.unique(surface.part[surface.part > 0]):
        here = (surface.part == part).astype(np.uint8)
        core = cv2.erode(here, np.ones((2 * MARGIN + 1, 2 * MARGIN + 1), np.uint8), borderValue=0)
        places = np.argwhere(core)
        chosen += [(int(y), int(x)) for y, x in rng.permutation(places)[:POINTS_PER_PART]]
    rows, columns = np.array(chosen).T
    return {
        "dp_x": [float(x) for x in scaled_x[rows, columns]],
        "dp_y": [float(y) for y in scaled_y[rows, columns]],
        "dp_I": [float(part) for part in surface.part[rows, columns]],
        "dp_U": [round(float(u), 4) for u in surface.u[rows, columns]],
        "dp_V": [round(float(v), 4) for v in surface.v[rows, columns]],
        "dp_masks": [_mask(np.isin(surface.part, parts)) for parts in BODY_PARTS],
    }


def _mask(mask: NDArray[np.bool_]) -> dict[str, Any] | list[Any]:
    """Run lengths of a mask; an empty list, as in the real files, where nothing is seen."""
    if not mask.any():
        return []
    encoded = run_lengths.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"counts": encoded["counts"].decode(), "size": encoded["size"]}
