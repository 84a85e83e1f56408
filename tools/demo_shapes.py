"""What the demo data are drawn with: outlines, textures, colours and smooth noise.

Shape legend:
    H, W  height and width of the scene, in pixels
    V     vertices of an outline
"""

import colorsys
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Point = tuple[float, float]


class Pose(NamedTuple):
    """How a shape lies in the scene.

    Attributes:
        centre: x and y of its own origin, in pixels.
        radius: Half of its side, in pixels.
        angle: Turn in radians, clockwise as seen (y points down).
        stretch: Factor on its width; the height is divided by it.
    """

    centre: Point
    radius: float
    angle: float
    stretch: float


class Look(NamedTuple):
    """What makes a class: its outline, its texture, and its hue in [0, 1)."""

    shape: str
    texture: str
    hue: float


LOOKS = {
    "aeroplane": Look("cross", "stripes", 0.56),
    "bicycle": Look("circle", "rings", 0.36),
    "bird": Look("drop", "waves", 0.50),
    "boat": Look("crescent", "stripes", 0.10),
    "bottle": Look("capsule", "dots", 0.40),
    "bus": Look("square", "stripes", 0.02),
    "car": Look("hexagon", "checker", 0.62),
    "cat": Look("star", "dots", 0.13),
    "chair": Look("arrow", "checker", 0.90),
    "cow": Look("circle", "speckle", 0.06),
    "diningtable": Look("square", "waves", 0.30),
    "dog": Look("heart", "dots", 0.97),
    "horse": Look("triangle", "waves", 0.76),
    "motorbike": Look("hexagon", "rings", 0.85),
    "person": Look("heart", "stripes", 0.70),
    "pottedplant": Look("star", "waves", 0.26),
    "sheep": Look("drop", "speckle", 0.66),
    "sofa": Look("capsule", "stripes", 0.80),
    "train": Look("arrow", "rings", 0.16),
    "tvmonitor": Look("triangle", "checker", 0.46),
}
"""The twenty classes of Pascal VOC, in its order. Only the names are real."""


def turn(points: Floats, angle: float) -> Floats:
    """Points (..., 2) turned about the origin by `angle` in radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return (points @ np.array([[cos, sin], [-sin, cos]])).astype(np.float32)


def to_scene(points: Floats, pose: Pose) -> Floats:
    """Points of a shape's own frame, where its outline lies in [-1, 1], in pixels of the scene. Shape (V, 2)."""
    scaled = points * (pose.radius * np.array([pose.stretch, 1 / pose.stretch]))
    return turn(scaled.astype(np.float32), pose.angle) + np.array(pose.centre, dtype=np.float32)


def own_frame(width: int, height: int, pose: Pose) -> tuple[Floats, Floats]:
    """Coordinates of every pixel in the frame of a shape: the inverse of `to_scene`. Two arrays (H, W)."""
    across, down = np.meshgrid(np.arange(width) + 0.5 - pose.centre[0], np.arange(height) + 0.5 - pose.centre[1])
    own = turn(np.stack([across, down], axis=-1), -pose.angle) / pose.radius
    return own[..., 0] / pose.stretch, own[..., 1] * pose.stretch


def colours(rng: np.random.Generator, hue: float) -> tuple[Floats, Floats]:
    """A light colour near `hue` and a dark one beside it, 0..255."""
    hue += rng.uniform(-0.025, 0.025)
    light = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.45, 0.8), rng.uniform(0.85, 1.0))
    dark = colorsys.hsv_to_rgb((hue + 0.06) % 1, rng.uniform(0.7, 1.0), rng.uniform(0.3, 0.5))
    return np.array(light, dtype=np.float32) * 255, np.array(dark, dtype=np.float32) * 255


def noise(rng: np.random.Generator, width: int, height: int, coarsest: int) -> Floats:
    """Smooth noise of three octaves, mean 0, about -1..1, shape (H, W). `coarsest`: bumps along the first octave."""
    total = np.zeros((height, width), dtype=np.float32)
    for octave in range(3):
        cells = coarsest * 2**octave
        grid = rng.uniform(-1, 1, size=(cells + 1, cells + 1)).astype(np.float32)
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) / 2**octave
    return total / 1.75


def _soft(wave: Floats, sharpness: float = 4.0) -> Floats:
    """A wave in [-1, 1] to a share in [0, 1] with soft edges."""
    return (0.5 + 0.5 * np.tanh(sharpness * wave)).astype(np.float32)


def _stripes(across: Floats, down: Floats, rng: np.random.Generator) -> Floats:
    return _soft(np.sin(rng.uniform(9, 11) * across))


def _checker(across: Floats, down: Floats, rng: np.random.Generator) -> Floats:
    pace = rng.uniform(6.5, 8)
    return _soft(np.sin(pace * across) * np.sin(pace * down), 8.0)


def _dots(across: Floats, down: Floats, rng: np.random.Generator) -> Floats:
    pace = rng.uniform(8, 10)
    return _soft(np.cos(pace * across) + np.cos(pace * down) - 0.7, 2.5)


def _rings(across: Floats, down: Floats, rng: np.random.Generator) -> Floats:
    return _soft(np.sin(rng.uniform(11, 14) * np.hypot(across, down)))


def _waves(across: Floats, down: Floats, rng: np.random.Generator) -> Floats:
    return _soft(np.sin(rng.uniform(9, 11) * down + 1.6 * np.sin(6 * across)))


def _speckle(across: Floats, down: Floats, rng: np.random.Generator) -> Floats:
    height, width = across.shape
    pixels_per_unit = 1 / max(abs(float(across[0, -1] - across[0, 0])) / width, 1e-6)
    bumps = int(np.clip(4 * max(width, height) / pixels_per_unit, 4, 60))
    return _soft(noise(rng, width, height, bumps), 6.0)


TEXTURES: dict[str, Callable[[Floats, Floats, np.random.Generator], Floats]] = {
    "stripes": _stripes,
    "checker": _checker,
    "dots": _dots,
    "rings": _rings,
    "waves": _waves,
    "speckle": _speckle,
}
"""Share of the second colour at each point of an object's own frame."""


def _on_circle(count: int, start: float = 0.0) -> Floats:
    angles = start + np.arange(count) * 2 * np.pi / count
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def _points(*points: Point) -> Floats:
    return np.array(points, dtype=np.float32)


def _make_outlines() -> dict[str, Floats]:
    """Closed outlines in [-1, 1], y down, shape (V, 2) each, without holes."""
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    star = _on_circle(10, -np.pi / 2)
    star[1::2] *= 0.5
    heart_x, heart_y = np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    drop_x, drop_y = 0.8 * np.sin(t) * np.sin(t / 2) ** 1.5, -np.cos(t)
    arc = np.linspace(0.18 * np.pi, 1.82 * np.pi, 40)
    outer = np.stack([np.cos(arc), np.sin(arc)], axis=1)
    inner = np.stack([0.28 + 0.68 * np.cos(arc[::-1]), 0.68 * np.sin(arc[::-1])], axis=1)
    cap = np.linspace(0, np.pi, 24)
    right = np.stack([0.52 + 0.48 * np.sin(cap), -0.48 * np.cos(cap)], axis=1)
    return {
        "circle": 0.9 * _on_circle(64),
        "square": 0.82 * _points((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "triangle": 1.1 * _on_circle(3, -np.pi / 2) + np.array([0, 0.2], dtype=np.float32),
        "hexagon": _on_circle(6),
        "star": 1.1 * star,
        "cross": _points(
            *[(-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35), (1, 0.35), (0.35, 0.35)],
            *[(0.35, 1), (-0.35, 1), (-0.35, 0.35), (-1, 0.35), (-1, -0.35), (-0.35, -0.35)],
        ),
        "arrow": _points((-1, -0.4), (0, -0.4), (0, -0.95), (1, 0), (0, 0.95), (0, 0.4), (-1, 0.4)),
        "heart": np.stack([heart_x, heart_y], axis=1).astype(np.float32),
        "drop": np.stack([drop_x, drop_y], axis=1).astype(np.float32),
        "crescent": np.concatenate([outer, inner]).astype(np.float32),
        "capsule": np.concatenate([right, -right]).astype(np.float32),
    }


OUTLINES = _make_outlines()
