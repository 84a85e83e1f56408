"""A canvas for the demo data: lit, textured surfaces with shadows, and a map of what each sub-pixel shows.

Shape legend:
    H, W  height and width of the scene, in pixels
    F     sub-pixels per pixel and direction in which outlines and masks are drawn (`FINE`)
"""

import colorsys

import cv2
import numpy as np
from demo_shapes import LOOKS, OUTLINES, TEXTURES, Floats, Pose, colours, noise, own_frame, to_scene, turn
from numpy.typing import NDArray

FINE = 4
BAR = 255
"""Owner of the sub-pixels of a bar: in front of everything, and no object."""


def cover(fine: NDArray[np.bool_], width: int, height: int) -> Floats:
    """Share of each pixel's sub-pixels that are set, shape (H, W)."""
    share: Floats = cv2.resize(fine.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    return share


class Canvas:
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

    def paint(self, footprint: NDArray[np.bool_], colour: Floats, shadow_px: float) -> None:
        """Blend `colour` (H, W, 3) over the footprint, with a bevelled edge and a soft shadow away from the light."""
        alpha = cover(footprint, self.width, self.height)
        offset = -self.light * shadow_px
        shift = np.array([[1, 0, offset[0]], [0, 1, offset[1]]], dtype=np.float32)
        shadow = cv2.GaussianBlur(cv2.warpAffine(alpha, shift, (self.width, self.height)), (0, 0), shadow_px * 0.6)
        bevel = 0.72 + 0.28 * np.clip(2 * cv2.GaussianBlur(alpha, (0, 0), 2.0) - 1, 0, 1)
        ground = self.pixels * (1 - 0.45 * shadow)[..., None]
        self.pixels = ground + alpha[..., None] * (colour * bevel[..., None] - ground)

    def draw_object(self, name: str, owner: int, pose: Pose) -> None:
        """Draw one shape in front of everything so far."""
        look = LOOKS[name]
        footprint = self.footprint(to_scene(OUTLINES[look.shape], pose))
        self.paint(footprint, self.surface(look.hue, look.texture, pose), shadow_px=max(1.5, pose.radius * 0.1))
        self.owners[footprint] = owner

    def surface(self, hue: float, texture: str, pose: Pose) -> Floats:
        """The colour of every pixel if a lit surface in the frame of `pose` covered all: 0..255, shape (H, W, 3)."""
        across, down = own_frame(self.width, self.height, pose)
        first, second = colours(self.rng, hue)
        share = TEXTURES[texture](across, down, self.rng)[..., None]
        light = turn(self.light, -pose.angle)
        shading = np.clip(1 + 0.28 * (across * light[0] + down * light[1]), 0.5, 1.4)
        lit: Floats = (first + share * (second - first)) * shading[..., None]
        return lit

    def draw_bar(self) -> None:
        """Draw a grey bar from edge to edge."""
        width_px = self.rng.uniform(0.05, 0.09) * self.width
        top, bottom = self.rng.uniform(0.2, 0.8, size=2) * self.width
        half = width_px / 2
        corners = [(top - half, 0), (top + half, 0), (bottom + half, self.height), (bottom - half, self.height)]
        footprint = self.footprint(np.array(corners, dtype=np.float32))
        grain = noise(self.rng, self.width, self.height, 3)[..., None] * 40 + self.rng.uniform(60, 150)
        self.paint(footprint, np.repeat(grain, 3, axis=2).astype(np.float32), shadow_px=3.0)
        self.owners[footprint] = BAR

    def finish(self) -> NDArray[np.uint8]:
        """Expose, darken the corners, add sensor noise, round."""
        across, down = np.meshgrid(np.linspace(-1, 1, self.width), np.linspace(-1, 1, self.height))
        vignette = 1 - self.rng.uniform(0, 0.25) * (across**2 + down**2) / 2
        exposed = self.pixels * (vignette * self.rng.uniform(0.75, 1.12))[..., None]
        noisy = exposed + self.rng.normal(0, self.rng.uniform(1, 4), size=exposed.shape)
        return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def background(rng: np.random.Generator, width: int, height: int) -> Floats:
    """A muted colour gradient with soft clouds and, half of the time, a faint texture. 0..255, shape (H, W, 3)."""
    corners = [colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.05, 0.3), rng.uniform(0.35, 0.85)) for _ in range(4)]
    grid = np.array(corners, dtype=np.float32).reshape(2, 2, 3) * 255
    pixels = cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR)
    relief = 0.16 * noise(rng, width, height, int(rng.integers(2, 7)))
    if rng.random() < 0.5:
        texture = TEXTURES[str(rng.choice(sorted(TEXTURES)))]
        side = min(width, height) * rng.uniform(0.12, 0.4)
        centre = (rng.uniform(0, width), rng.uniform(0, height))
        across, down = own_frame(width, height, Pose(centre, side, rng.uniform(-1.5, 1.5), 1.0))
        relief += rng.uniform(0.08, 0.2) * (texture(across, down, rng) - 0.5)
    return (pixels * (1 + relief)[..., None]).astype(np.float32)
