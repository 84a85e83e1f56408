"""Writes the people of the COCO scenes with COCO's 17 keypoints: person_keypoints_{train,val}2017.json.

A person is drawn as a heart; its keypoints sit at fixed places of the heart's own frame, so they turn and stretch with
it and can be learned from its outline alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from demo_coco import COCO_LOOKS, Shot, annotation_file
from demo_scenes import Placed, Scene, visible_mask
from demo_shapes import Point, to_scene

NOT_LABELLED, HIDDEN, VISIBLE = range(3)
"""COCO's visibility flags."""

MIDDLE: dict[str, Point] = {"nose": (0.0, -0.08)}
LEFT: dict[str, Point] = {
    **{"eye": (0.14, -0.22), "ear": (0.32, -0.34), "shoulder": (0.62, -0.42), "elbow": (0.82, -0.14)},
    **{"wrist": (0.66, 0.16), "hip": (0.26, 0.28), "knee": (0.22, 0.52), "ankle": (0.12, 0.76)},
}
"""Where the points of the person's left lie: it looks at us, so its left is on our right."""

BONES = (
    *[("left_ankle", "left_knee"), ("left_knee", "left_hip"), ("right_ankle", "right_knee")],
    *[("right_knee", "right_hip"), ("left_hip", "right_hip"), ("left_shoulder", "left_hip")],
    *[("right_shoulder", "right_hip"), ("left_shoulder", "right_shoulder"), ("left_shoulder", "left_elbow")],
    *[("right_shoulder", "right_elbow"), ("left_elbow", "left_wrist"), ("right_elbow", "right_wrist")],
    *[("left_eye", "right_eye"), ("nose", "left_eye"), ("nose", "right_eye"), ("left_eye", "left_ear")],
    *[("right_eye", "right_ear"), ("left_ear", "left_shoulder"), ("right_ear", "right_shoulder")],
)


def _places() -> dict[str, Point]:
    pairs = {
        f"{side}_{part}": (sign * x, y) for part, (x, y) in LEFT.items() for side, sign in (("left", 1), ("right", -1))
    }
    return {**MIDDLE, **pairs}


KEYPOINTS = _places()
"""Name -> place in the frame of the shape, in COCO's order: the nose, then left and right of each pair."""


def person_keypoints(shots: Sequence[Shot]) -> dict[str, Any]:
    """Content of person_keypoints_{train,val}2017.json: all images, of the objects the people and crowds of people."""
    names = list(KEYPOINTS)
    person = COCO_LOOKS["person"]
    category = {
        "supercategory": "person",
        "id": person,
        "name": "person",
        "keypoints": names,
        "skeleton": [[names.index(start) + 1, names.index(end) + 1] for start, end in BONES],
    }
    annotations = []
    for shot in shots:
        for placed, annotation in shot.objects:
            if annotation["category_id"] == person:
                points = _keypoints(shot.scene, placed, annotation["bbox"])
                number = sum(flag != NOT_LABELLED for flag in points[2::3])
                annotations.append({**annotation, "num_keypoints": number, "keypoints": points})
    return annotation_file([shot.image for shot in shots], annotations, [category])


def _keypoints(scene: Scene, placed: Placed, box: Sequence[float]) -> list[int]:
    """17 triplets x, y, visibility; x and y are numbers of pixels, from 0.

    A point outside the image, or outside the box around what is visible, is not labelled: nobody could say where it is.
    The points of a crowd are not labelled either. Inside the box a point is visible where the person is.
    """
    if placed.pose is None:
        return [0] * (3 * len(KEYPOINTS))
    mask = visible_mask(scene, placed)
    height, width = mask.shape
    left, top, box_width, box_height = box
    triplets: list[int] = []
    for x, y in np.floor(to_scene(np.array(list(KEYPOINTS.values()), dtype=np.float32), placed.pose)).astype(int):
        # The box is continuous, the point is the middle of its pixel.
        inside = left <= x + 0.5 <= left + box_width and top <= y + 0.5 <= top + box_height
        if inside and 0 <= x < width and 0 <= y < height:
            triplets += [int(x), int(y), VISIBLE if mask[y, x] else HIDDEN]
        else:
            triplets += [0, 0, NOT_LABELLED]
    return triplets
