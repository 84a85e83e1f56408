"""Draws the scenes of the demo data: textured shapes, partly hidden by others, over textured backgrounds.

Everything is a function of a numpy Generator, so a scene can be drawn again from its seed, with the masks that belong
to it.

Shape legend:
    H, W  height and width of the scene, in pixels
    F     sub-pixels per pixel and direction in which outlines and masks are drawn (`FINE`)
"""

import colorsys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

FINE = 4
BAR = 255
"""Owner of the sub-pixels of a bar: in front of everything, and no object."""

MIN_VISIBLE_SHARE = 0.5
MIN_INSIDE_SHARE = 0.7
PLACE_TRIES = 12
MIN_POLYGON_AREA_PX = 8.0

Floats = NDArray[np.float32]
Point = tuple[float, float]


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


class Placed(NamedTuple):
    """An object of a scene.

    Attributes:
        name: Key of `LOOKS`.
        owner: Its number in `Scene.owners`.
        full_area_px: Area of its outline, hidden parts and parts outside the scene included.
        is_crowd: Whether it stands for a whole group.
    """

    name: str
    owner: int
    full_area_px: float
    is_crowd: bool


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
    canvas = _Canvas(_background(rng, width, height), rng)
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
    mask: NDArray[np.bool_] = _cover(scene.owners == placed.owner, width, height) >= 0.5
    return mask


def _cover(fine: NDArray[np.bool_], width: int, height: int) -> Floats:
    """Share of each pixel's sub-pixels that are set, shape (H, W)."""
    share: Floats = cv2.resize(fine.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    return share


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


class _Canvas:
    """Pixels (float, 0..255) and owners of the scene so far."""

    def __init__(self, pixels: Floats, rng: np.random.Generator) -> None:
        self.pixels = pixels
        self.rng = rng
        self.height, self.width = pixels.shape[:2]
        self.owners = np.zeros((self.height * FINE, self.width * FINE), dtype=np.uint8)
        angle = rng.uniform(0, 2 * np.pi)
        self.light = np.array([np.cos(angle), np.sin(angle)], dtype=np.float32)

    def footprint(self, outline: Floats) -> NDArray[np.bool_]:
        """Sub-pixels inside an outline in pixels, shape (F * H, F * W)."""
        filled = np.zeros_like(self.owners)
        cv2.fillPoly(filled, [np.round(outline * FINE - 0.5).astype(np.int32)], 1)
        return filled.astype(bool)

    def paint(self, footprint: NDArray[np.bool_], colours: Floats, shadow_px: float) -> None:
        """Blend `colours` (H, W, 3) over the footprint, with a bevelled edge and a soft shadow away from the light."""
        alpha = _cover(footprint, self.width, self.height)
        offset = -self.light * shadow_px
        shift = np.array([[1, 0, offset[0]], [0, 1, offset[1]]], dtype=np.float32)
        shadow = cv2.GaussianBlur(cv2.warpAffine(alpha, shift, (self.width, self.height)), (0, 0), shadow_px * 0.6)
        bevel = 0.72 + 0.28 * np.clip(2 * cv2.GaussianBlur(alpha, (0, 0), 2.0) - 1, 0, 1)
        ground = self.pixels * (1 - 0.45 * shadow)[..., None]
        self.pixels = ground + alpha[..., None] * (colours * bevel[..., None] - ground)

    def draw_object(self, name: str, owner: int, centre: Point, radius: float, angle: float, stretch: float) -> None:
        """Draw one shape in front of everything so far."""
        footprint = self.footprint(_outline(LOOKS[name].shape, centre, radius, angle, stretch))
        across, down = _own_frame(self.width, self.height, centre, radius, angle, stretch)
        first, second = _colours(self.rng, LOOKS[name].hue)
        share = TEXTURES[LOOKS[name].texture](across, down, self.rng)[..., None]
        light = _turn(self.light, -angle)
        shading = np.clip(1 + 0.28 * (across * light[0] + down * light[1]), 0.5, 1.4)
        self.paint(footprint, (first + share * (second - first)) * shading[..., None], shadow_px=max(1.5, radius * 0.1))
        self.owners[footprint] = owner

    def draw_bar(self) -> None:
        """Draw a grey bar from edge to edge."""
        width_px = self.rng.uniform(0.05, 0.09) * self.width
        top, bottom = self.rng.uniform(0.2, 0.8, size=2) * self.width
        half = width_px / 2
        corners = [(top - half, 0), (top + half, 0), (bottom + half, self.height), (bottom - half, self.height)]
        footprint = self.footprint(np.array(corners, dtype=np.float32))
        grain = _noise(self.rng, self.width, self.height, 3)[..., None] * 40 + self.rng.uniform(60, 150)
        self.paint(footprint, np.repeat(grain, 3, axis=2).astype(np.float32), shadow_px=3.0)
        self.owners[footprint] = BAR

    def finish(self) -> NDArray[np.uint8]:
        """Expose, darken the corners, add sensor noise, round."""
        across, down = np.meshgrid(np.linspace(-1, 1, self.width), np.linspace(-1, 1, self.height))
        vignette = 1 - self.rng.uniform(0, 0.25) * (across**2 + down**2) / 2
        exposed = self.pixels * (vignette * self.rng.uniform(0.75, 1.12))[..., None]
        noisy = exposed + self.rng.normal(0, self.rng.uniform(1, 4), size=exposed.shape)
        return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def _place(canvas: _Canvas, name: str, radius_range: Point, earlier: Sequence[Placed]) -> Placed | None:
    rng = canvas.rng
    owner = len(earlier) + 1
    for _ in range(PLACE_TRIES):
        radius = rng.uniform(*radius_range) * min(canvas.width, canvas.height)
        centre = (
            rng.uniform(0.8 * radius, canvas.width - 0.8 * radius),
            rng.uniform(0.8 * radius, canvas.height - 0.8 * radius),
        )
        angle, stretch = rng.uniform(-0.6, 0.6), rng.uniform(0.8, 1.25)
        outline = _outline(LOOKS[name].shape, centre, radius, angle, stretch)
        full_area_px = float(cv2.contourArea(outline))
        footprint = canvas.footprint(outline)
        if np.count_nonzero(footprint) / FINE**2 < MIN_INSIDE_SHARE * full_area_px:
            continue
        after = np.where(footprint, np.uint8(owner), canvas.owners)
        if all(_is_still_seen(after, placed) for placed in earlier):
            canvas.draw_object(name, owner, centre, radius, angle, stretch)
            return Placed(name, owner, full_area_px, is_crowd=False)
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


def _draw_crowd(canvas: _Canvas, name: str, owner: int) -> Placed:
    rng = canvas.rng
    side = min(canvas.width, canvas.height)
    middle_x, middle_y = rng.uniform(0.3, 0.7) * canvas.width, rng.uniform(0.25, 0.4) * canvas.height
    for _ in range(int(rng.integers(12, 19))):
        centre = (middle_x + rng.normal(0, 0.13 * side), middle_y + rng.normal(0, 0.08 * side))
        radius, angle = rng.uniform(0.05, 0.07) * side, rng.uniform(-0.6, 0.6)
        canvas.draw_object(name, owner, centre, radius, angle, 1.0)
    return Placed(name, owner, np.count_nonzero(canvas.owners == owner) / FINE**2, is_crowd=True)


def _turn(points: Floats, angle: float) -> Floats:
    cos, sin = np.cos(angle), np.sin(angle)
    return (points @ np.array([[cos, sin], [-sin, cos]])).astype(np.float32)


def _outline(shape: str, centre: Point, radius: float, angle: float, stretch: float) -> Floats:
    points = OUTLINES[shape] * (radius * np.array([stretch, 1 / stretch]))
    return _turn(points.astype(np.float32), angle) + np.array(centre, dtype=np.float32)


def _own_frame(
    width: int, height: int, centre: Point, radius: float, angle: float, stretch: float
) -> tuple[Floats, Floats]:
    """Coordinates of every pixel in the frame of an object: its outline lies in [-1, 1]. Two arrays (H, W)."""
    across, down = np.meshgrid(np.arange(width) + 0.5 - centre[0], np.arange(height) + 0.5 - centre[1])
    own = _turn(np.stack([across, down], axis=-1), -angle) / radius
    return own[..., 0] / stretch, own[..., 1] * stretch


def _colours(rng: np.random.Generator, hue: float) -> tuple[Floats, Floats]:
    """A light colour near `hue` and a dark one beside it, 0..255."""
    hue += rng.uniform(-0.025, 0.025)
    light = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.45, 0.8), rng.uniform(0.85, 1.0))
    dark = colorsys.hsv_to_rgb((hue + 0.06) % 1, rng.uniform(0.7, 1.0), rng.uniform(0.3, 0.5))
    return np.array(light, dtype=np.float32) * 255, np.array(dark, dtype=np.float32) * 255


def _noise(rng: np.random.Generator, width: int, height: int, coarsest: int) -> Floats:
    """Smooth noise of three octaves, mean 0, about -1..1, shape (H, W). `coarsest`: bumps along the first octave."""
    total = np.zeros((height, width), dtype=np.float32)
    for octave in range(3):
        cells = coarsest * 2**octave
        grid = rng.uniform(-1, 1, size=(cells + 1, cells + 1)).astype(np.float32)
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) / 2**octave
    return total / 1.75


def _background(rng: np.random.Generator, width: int, height: int) -> Floats:
    """A muted colour gradient with soft clouds and, half of the time, a faint texture. 0..255, shape (H, W, 3)."""
    corners = [colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.05, 0.3), rng.uniform(0.35, 0.85)) for _ in range(4)]
    grid = np.array(corners, dtype=np.float32).reshape(2, 2, 3) * 255
    pixels = cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR)
    relief = 0.16 * _noise(rng, width, height, int(rng.integers(2, 7)))
    if rng.random() < 0.5:
        texture = TEXTURES[str(rng.choice(sorted(TEXTURES)))]
        side = min(width, height) * rng.uniform(0.12, 0.4)
        centre = (rng.uniform(0, width), rng.uniform(0, height))
        across, down = _own_frame(width, height, centre, side, rng.uniform(-1.5, 1.5), 1.0)
        relief += rng.uniform(0.08, 0.2) * (texture(across, down, rng) - 0.5)
    return (pixels * (1 + relief)[..., None]).astype(np.float32)


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
    return _soft(_noise(rng, width, height, bumps), 6.0)


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
