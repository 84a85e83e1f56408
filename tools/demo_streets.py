"""Draws street scenes for the demo data from labelled polygons, as those of Cityscapes are labelled.

A scene is a list of polygons in drawing order: each hides what was drawn before it, in the picture as in the label
images. Classes differ in outline, place, hue and texture; all 19 that Cityscapes evaluates occur.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from demo_canvas import Canvas
from demo_shapes import Floats, Pose
from demo_street_things import THINGS, Thing, thing_outline
from numpy.typing import NDArray

WIDTH, HEIGHT = 320, 160
MIN_THING_PX = 150
"""Cityscapes' evaluation leaves out instances below 100 pixels."""
MIN_VISIBLE_SHARE = 0.6
PLACE_TRIES = 60
BORDER_PX = 2

SURFACES = {
    **{"sky": (0.55, "waves"), "building": (0.08, "checker"), "vegetation": (0.30, "speckle")},
    **{"terrain": (0.22, "speckle"), "road": (0.72, "waves"), "sidewalk": (0.92, "checker")},
    **{"wall": (0.03, "dots"), "fence": (0.14, "stripes"), "pole": (0.50, "waves")},
    **{"traffic sign": (0.16, "rings"), "traffic light": (0.00, "dots")},
    **{"static": (0.42, "checker"), "license plate": (0.18, "dots")},
    **{"ego vehicle": (0.62, "rings"), "out of roi": (0.0, "waves")},
}
"""Hue and texture of what is not a thing."""


class Polygon(NamedTuple):
    """A labelled outline: integer pixels (V, 2), counted from the middle of the first, inside the image."""

    label: str
    points: NDArray[np.int32]


class Street(NamedTuple):
    """A drawn scene: RGB, uint8, shape (HEIGHT, WIDTH, 3), and its polygons in drawing order."""

    pixels: NDArray[np.uint8]
    polygons: list[Polygon]


def draw_street(rng: np.random.Generator, things: Sequence[str]) -> Street:
    """Draw a street with `things` (keys of THINGS), a group of one of them in the distance, and everything else.

    A thing that finds no free place in PLACE_TRIES draws is left out.
    """
    horizon = int(HEIGHT * rng.uniform(0.40, 0.46))
    behind = [*_far(rng, horizon), *_ground(rng, horizon), _group(rng, horizon)]
    before = [*_posts(rng, horizon), *_frame()]
    polygons = [*behind, *_place_things(rng, horizon, things, before), *before]
    canvas = Canvas(np.full((HEIGHT, WIDTH, 3), 90, dtype=np.float32), rng)
    for polygon in polygons:
        _draw(canvas, polygon)
    return Street(canvas.finish(), polygons)


def _polygon(label: str, points: Floats | Sequence[tuple[float, float]]) -> Polygon:
    rounded = np.round(np.asarray(points, dtype=np.float64)).astype(np.int32)
    return Polygon(label, np.clip(rounded, 0, (WIDTH - 1, HEIGHT - 1)))


def _rectangle(label: str, left: float, top: float, right: float, bottom: float) -> Polygon:
    return _polygon(label, [(left, top), (right, top), (right, bottom), (left, bottom)])


def _far(rng: np.random.Generator, horizon: int) -> Iterator[Polygon]:
    """Sky, a row of buildings, and trees before them."""
    yield _rectangle("sky", 0, 0, WIDTH, horizon)
    left = 0.0
    while left < WIDTH:
        right = left + rng.uniform(30, 70)
        yield _rectangle("building", left, rng.uniform(0.05, 0.6) * horizon, right - 1, horizon)
        left = right + rng.choice([0, 25])
    for _ in range(int(rng.integers(2, 5))):
        angles = np.linspace(0, 2 * np.pi, 14, endpoint=False)
        radii = rng.uniform(0.75, 1.1, size=14) * rng.uniform(14, 26)
        middle = np.array([rng.uniform(0, WIDTH), horizon - 12])
        crown = middle + radii[:, None] * np.stack([1.2 * np.cos(angles), np.sin(angles)], axis=1)
        yield _polygon("vegetation", np.minimum(crown, (WIDTH, horizon)))


def _ground(rng: np.random.Generator, horizon: int) -> Iterator[Polygon]:
    """The road, narrow in the distance, between sidewalks; terrain at one side; a wall and a fence along them."""
    middle = WIDTH * rng.uniform(0.42, 0.58)
    yield _rectangle("road", 0, horizon, WIDTH, HEIGHT)
    sides = [("left", 0, middle - 30), ("right", WIDTH, middle + 30)]
    barriers = [str(name) for name in rng.permutation(["wall", "fence"])]
    for (_, edge, near), barrier in zip(sides, barriers, strict=True):
        knee = HEIGHT * rng.uniform(0.72, 0.84)
        yield _polygon("sidewalk", [(edge, horizon), (near, horizon), (edge, knee)])
        if barrier == "fence":
            yield _polygon("terrain", [(edge, horizon), ((edge + near) / 2, horizon), (edge, (horizon + knee) / 2)])
        ends = (edge, edge + (near - edge) * rng.uniform(0.5, 0.8))
        yield _rectangle(barrier, min(ends), horizon - 9, max(ends), horizon + 4)


def _group(rng: np.random.Generator, horizon: int) -> Polygon:
    """Things too far away to be told apart: one polygon with the label "cargroup", "persongroup" or the like."""
    name = str(rng.choice(["car", "person", "bicycle"]))
    left, height = rng.uniform(0.3, 0.6) * WIDTH, 12
    tops = [(left + 8 * i, horizon + 4 - height * rng.uniform(0.5, 1.0)) for i in range(6)]
    return _polygon(f"{name}group", [(left, horizon + 4), *tops, (left + 40, horizon + 4)])


def _place_things(
    rng: np.random.Generator, horizon: int, names: Sequence[str], before: Sequence[Polygon]
) -> list[Polygon]:
    """Polygons of things from far to near, with the plates of cars; enough is seen of each, with `before` before it."""
    owners = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    placed: list[Polygon] = []
    full_areas: list[int] = []
    depths = np.sort(rng.uniform(0.15, 0.85, size=len(names)))
    for name, depth in zip(names, depths, strict=True):
        for _ in range(PLACE_TRIES):
            polygon = _thing(rng, THINGS[name], name, horizon + depth * (HEIGHT - horizon), 0.7 + 0.5 * depth)
            after = owners.copy()
            cv2.fillPoly(after, [polygon.points], len(full_areas) + 1)
            areas = [*full_areas, int((after == len(full_areas) + 1).sum())]
            final = after.copy()
            for other in before:
                cv2.fillPoly(final, [other.points], 0)
            seen = np.bincount(final.ravel(), minlength=len(areas) + 1)[1:]
            if (seen >= np.maximum(MIN_THING_PX, MIN_VISIBLE_SHARE * np.array(areas))).all():
                owners, full_areas = after, areas
                placed.append(polygon)
                if name == "car":
                    placed.append(_plate(polygon))
                break
    return placed


def _thing(rng: np.random.Generator, thing: Thing, name: str, bottom: float, scale: float) -> Polygon:
    width, height = scale * thing.width * rng.uniform(0.9, 1.15), scale * thing.height * rng.uniform(0.9, 1.1)
    left = rng.uniform(4, WIDTH - 4 - width)
    outline = thing_outline(name, mirrored=bool(rng.random() < 0.5))
    return _polygon(name, outline * (width, height) + (left, bottom - height))


def _plate(car: Polygon) -> Polygon:
    x, y = car.points.mean(axis=0)
    bottom = float(car.points[:, 1].max())
    return _rectangle("license plate", x - 3, (y + bottom) / 2, x + 3, (y + bottom) / 2 + 2)


def _posts(rng: np.random.Generator, horizon: int) -> Iterator[Polygon]:
    """Two posts before everything: one with a sign, one with a light; and something unnamed beside the road."""
    first, second = rng.uniform(0.06, 0.4) * WIDTH, rng.uniform(0.6, 0.94) * WIDTH
    for x, label in ((first, "traffic sign"), (second, "traffic light")):
        top = horizon * rng.uniform(0.25, 0.5)
        yield _rectangle("pole", x - 2, top, x + 2, horizon + rng.uniform(25, 40))
        if label == "traffic sign":
            yield _polygon(label, [(x, top - 12), (x + 11, top), (x, top + 12), (x - 11, top)])
        else:
            yield _rectangle(label, x - 5, top - 12, x + 5, top + 12)
    x = rng.uniform(0.1, 0.9) * WIDTH
    yield _rectangle("static", x, horizon + 6, x + 10, horizon + 18)


def _frame() -> Iterator[Polygon]:
    """What Cityscapes leaves out of every image: the bonnet of its own car, and a border."""
    bonnet = [(0.2, 1.0), (0.28, 0.95), (0.4, 0.925), (0.6, 0.925), (0.72, 0.95), (0.8, 1.0)]
    yield _polygon("ego vehicle", [(x * WIDTH, y * HEIGHT) for x, y in bonnet])
    right, bottom = WIDTH - 1, HEIGHT - 1
    # One polygon around and back along the inside, joined at the upper left corner.
    outer = [(0, 0), (0, bottom), (right, bottom), (right, 0), (0, 0)]
    x, y = right - BORDER_PX, bottom - BORDER_PX
    inner = [(BORDER_PX, BORDER_PX), (x, BORDER_PX), (x, y), (BORDER_PX, y), (BORDER_PX, BORDER_PX)]
    yield _polygon("out of roi", [*outer, *inner])


def _draw(canvas: Canvas, polygon: Polygon) -> None:
    name = polygon.label.removesuffix("group")
    hue, texture = (THINGS[name].hue, THINGS[name].texture) if name in THINGS else SURFACES[name]
    # Integer coordinates mean the middles of pixels.
    outline = polygon.points.astype(np.float32) + 0.5
    low, high = outline.min(axis=0), outline.max(axis=0)
    centre = (float(low[0] + high[0]) / 2, float(low[1] + high[1]) / 2)
    radius = min(40.0, max(6.0, float((high - low).max()) / 2))
    surface = canvas.surface(hue, texture, Pose(centre, radius, angle=0.0, stretch=1.0))
    canvas.paint(canvas.footprint(outline), surface, shadow_px=1.5 if name in THINGS else 0.8)
