"""Draws the scenes of the demo data: textured shapes, partly hidden by others, over textured backgrounds.

Everything is a function of a numpy Generator, so a scene can be drawn again from its seed, with the masks that belong
to it.

Shape legend:
    H, W  height and width of the scene, in pixels
    F     sub-pixels per pixel and direction in which outlines and masks are drawn (`FINE`)
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from demo_canvas import FINE, Canvas, background, cover
from demo_shapes import LOOKS, OUTLINES, Point, Pose, to_scene
from numpy.typing import NDArray

MIN_VISIBLE_SHARE = 0.5
MIN_INSIDE_SHARE = 0.7
PLACE_TRIES = 12
STRETCH_RANGE = (0.8, 1.25)
MIN_POLYGON_AREA_PX = 8.0


class Placed(NamedTuple):
    """An object of a scene.

    Attributes:
        name: Key of `LOOKS`.
        owner: Its number in `Scene.owners`.
        full_area_px: Area of its outline, hidden parts and parts outside the scene included.
        pose: How its shape lies in the scene; None for a whole group, which is a crowd.
    """

    name: str
    owner: int
    full_area_px: float
    pose: Pose | None

    @property
    def is_crowd(self) -> bool:
        """Whether it stands for a whole group."""
        return self.pose is None


class Scene(NamedTuple):
    """A drawn scene.

    Attributes:
        pixels: RGB, uint8, shape (H, W, 3).
        owners: Which object is visible in each sub-pixel, uint8, shape (F * H, F * W): 0 for none, else `Placed.owner`.
        objects: The labelled objects, in drawing order.
    """

    pixels: NDArray[np.uint8]
    owners: NDArray[np.uint8]
    objects: list[Placed]


def draw_scene(
    rng: np.random.Generator,
    size: tuple[int, int],
    names: Sequence[str],
    *,
    radius_share: Sequence[tuple[float, float]],
    crowd: str | None = None,
    with_bar: bool = False,
) -> Scene:
    """Draw a scene of `size` (width, height) with the classes `names`, back to front.

    An object that finds no free place in `PLACE_TRIES` draws is left out.

    Args:
        rng: The only source of randomness.
        size: Width and height in pixels.
        names: Keys of `LOOKS`.
        radius_share: For each object the range of its radius, as a share of the shorter side.
        crowd: Class of a group of small objects to draw behind the others.
        with_bar: Lay a bar over everything, which cuts objects in two.
    """
    width, height = size
    canvas = Canvas(background(rng, width, height), rng)
    objects: list[Placed] = []
    if crowd is not None:
        objects.append(_draw_crowd(canvas, crowd, owner=1))
    for name, radius_range in zip(names, radius_share, strict=True):
        placed = _place(canvas, name, radius_range, objects)
        if placed is not None:
            objects.append(placed)
    if with_bar:
        canvas.draw_bar()
    return Scene(
        canvas.finish(), canvas.owners, [placed for placed in objects if (canvas.owners == placed.owner).any()]
    )


def visible_mask(scene: Scene, placed: Placed) -> NDArray[np.bool_]:
    """Pixels of which at least half show the object, shape (H, W)."""
    height, width = scene.pixels.shape[:2]
    mask: NDArray[np.bool_] = cover(scene.owners == placed.owner, width, height) >= 0.5
    return mask


def visible_polygons(scene: Scene, placed: Placed) -> list[list[float]]:
    """Outlines of the visible parts as [x1, y1, x2, y2, ...] in pixels, specks left out."""
    fine = (scene.owners == placed.owner).astype(np.uint8)
    contours, _ = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    polygons = []
    for contour in contours:
        outline = cv2.approxPolyDP(contour, 1.5, closed=True)
        if len(outline) >= 3 and cv2.contourArea(outline) >= MIN_POLYGON_AREA_PX * FINE**2:
            # Contours run through the centres of sub-pixels.
            polygons.append([round((float(v) + 0.5) / FINE, 2) for v in outline.reshape(-1)])
    return polygons


def _place(canvas: Canvas, name: str, radius_range: Point, earlier: Sequence[Placed]) -> Placed | None:
    rng = canvas.rng
    owner = len(earlier) + 1
    for _ in range(PLACE_TRIES):
        radius = rng.uniform(*radius_range) * min(canvas.width, canvas.height)
        centre = (
            rng.uniform(0.8 * radius, canvas.width - 0.8 * radius),
            rng.uniform(0.8 * radius, canvas.height - 0.8 * radius),
        )
        pose = Pose(centre, radius, angle=rng.uniform(-0.6, 0.6), stretch=rng.uniform(*STRETCH_RANGE))
        outline = to_scene(OUTLINES[LOOKS[name].shape], pose)
        full_area_px = float(cv2.contourArea(outline))
        footprint = canvas.footprint(outline)
        if np.count_nonzero(footprint) / FINE**2 < MIN_INSIDE_SHARE * full_area_px:
            continue
        after = np.where(footprint, np.uint8(owner), canvas.owners)
        if all(_is_still_seen(after, placed) for placed in earlier):
            canvas.draw_object(name, owner, pose)
            return Placed(name, owner, full_area_px, pose)
    return None


def _is_still_seen(owners: NDArray[np.uint8], placed: Placed) -> bool:
    """Whether enough of an object is visible, and without holes (which polygons cannot express)."""
    visible = (owners == placed.owner).astype(np.uint8)
    if np.count_nonzero(visible) / FINE**2 < MIN_VISIBLE_SHARE * placed.full_area_px:
        return False
    if placed.is_crowd:
        return True
    _, hierarchy = cv2.findContours(visible, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return bool((hierarchy[0, :, 3] < 0).all())


def _draw_crowd(canvas: Canvas, name: str, owner: int) -> Placed:
    rng = canvas.rng
    side = min(canvas.width, canvas.height)
    middle_x, middle_y = rng.uniform(0.3, 0.7) * canvas.width, rng.uniform(0.25, 0.4) * canvas.height
    for _ in range(int(rng.integers(12, 19))):
        centre = (middle_x + rng.normal(0, 0.13 * side), middle_y + rng.normal(0, 0.08 * side))
        radius, angle = rng.uniform(0.05, 0.07) * side, rng.uniform(-0.6, 0.6)
        canvas.draw_object(name, owner, Pose(centre, radius, angle, stretch=1.0))
    return Placed(name, owner, np.count_nonzero(canvas.owners == owner) / FINE**2, pose=None)
