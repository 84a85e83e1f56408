"""The eight things of the street scenes: outlines, sizes and looks."""

from typing import NamedTuple

import numpy as np
from demo_shapes import Floats, Point


class Thing(NamedTuple):
    """What makes a class of things: width and height in pixels at medium distance, hue in [0, 1), texture."""

    width: float
    height: float
    hue: float
    texture: str


THINGS = {
    "person": Thing(16, 40, 0.97, "stripes"),
    "rider": Thing(22, 38, 0.86, "dots"),
    "car": Thing(56, 27, 0.62, "checker"),
    "truck": Thing(66, 42, 0.10, "stripes"),
    "bus": Thing(72, 46, 0.02, "checker"),
    "train": Thing(100, 40, 0.34, "rings"),
    "motorcycle": Thing(40, 24, 0.76, "waves"),
    "bicycle": Thing(38, 26, 0.44, "rings"),
}
"""The classes of Cityscapes' instances, in its order. Only the names are real."""


def _wheel(middle: float, radius: float) -> list[Point]:
    """The lower half of a wheel that stands on the ground, from right to left."""
    angles = np.linspace(0, np.pi, 7)
    return [(middle + radius * float(np.cos(a)), 1 - radius + radius * float(np.sin(a))) for a in angles]


_OUTLINES: dict[str, list[Point]] = {
    "person": [
        *[(0.36, 0.0), (0.64, 0.0), (0.70, 0.10), (0.60, 0.20), (0.90, 0.26), (1.0, 0.55), (0.84, 0.58)],
        *[(0.76, 0.38), (0.74, 0.60), (0.86, 1.0), (0.62, 1.0), (0.50, 0.68), (0.38, 1.0), (0.14, 1.0)],
        *[(0.26, 0.60), (0.24, 0.38), (0.16, 0.58), (0.0, 0.55), (0.10, 0.26), (0.40, 0.20), (0.30, 0.10)],
    ],
    "rider": [
        *[(0.58, 0.0), (0.82, 0.0), (0.88, 0.12), (0.74, 0.22), (1.0, 0.44), (0.94, 0.54), (0.66, 0.40)],
        *[(0.56, 0.56), (0.80, 0.66), (0.62, 1.0), (0.44, 1.0), (0.54, 0.74), (0.12, 0.66), (0.10, 0.50)],
        *[(0.44, 0.22), (0.54, 0.12)],
    ],
    "car": [
        *[(0.0, 0.5), (0.16, 0.42), (0.30, 0.0), (0.70, 0.0), (0.86, 0.42), (1.0, 0.5), (1.0, 0.85)],
        *_wheel(0.78, 0.12), *_wheel(0.22, 0.12), (0.0, 0.85),
    ],
    "truck": [
        *[(0.0, 0.0), (0.66, 0.0), (0.66, 0.22), (0.88, 0.22), (1.0, 0.55), (1.0, 0.88)],
        *_wheel(0.84, 0.10), *_wheel(0.20, 0.10), (0.0, 0.88),
    ],
    "bus": [
        *[(0.03, 0.0), (0.97, 0.0), (1.0, 0.08), (1.0, 0.90), *_wheel(0.80, 0.08), *_wheel(0.22, 0.08)],
        *[(0.0, 0.90), (0.0, 0.08)],
    ],
    "train": [(0.0, 0.0), (0.80, 0.0), (0.90, 0.15), (1.0, 0.70), (1.0, 1.0), (0.0, 1.0)],
    "motorcycle": [
        *[(0.02, 0.28), (0.40, 0.25), (0.55, 0.35), (0.70, 0.0), (0.82, 0.0), (0.84, 0.40), (1.0, 0.72)],
        *_wheel(0.80, 0.20), *_wheel(0.20, 0.20), (0.0, 0.70),
    ],
    "bicycle": [
        *[(0.22, 0.10), (0.42, 0.10), (0.40, 0.28), (0.66, 0.24), (0.62, 0.0), (0.80, 0.0), (0.78, 0.40)],
        *[(0.94, 0.50), (1.0, 0.72), *_wheel(0.78, 0.22), (0.50, 0.80), *_wheel(0.22, 0.22), (0.0, 0.72)],
        *[(0.06, 0.50), (0.28, 0.42)],
    ],
}  # fmt: skip


def thing_outline(name: str, *, mirrored: bool) -> Floats:
    """Closed outline in [0, 1], y down, shape (V, 2); the thing stands on y = 1."""
    points = np.array(_OUTLINES[name], dtype=np.float32)
    return points * np.array([-1, 1], dtype=np.float32) + np.array([1, 0], dtype=np.float32) if mirrored else points
