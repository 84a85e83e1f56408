"""JPEGs for the benchmarks: drawn ones with the statistics of photographs, or those of a folder.

What decoding costs depends on the number of pixels and on the bits that describe them. ImageNet's photos have 474 x 392
pixels and 108 KB in the mean; the drawn ones are as large in both, and their contrast falls with the fineness of
detail as in photographs, so that a decoder and an interpolation find what they usually find.
"""

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detco.views import decode

IMAGENET_SIZES = ((500, 375), (500, 375), (375, 500), (500, 333))
"""Width and height of the drawn photos, in turn: ImageNet's commonest."""

LARGE_SIZES = ((4000, 3000),)
"""12 megapixels, as a telephone takes them."""

QUALITY = 95
COARSEST_CELLS = 4
"""Cells along the width of the coarsest octave."""

CONTRAST = 55.0
"""Standard deviation of the coarsest octave, in grey levels."""

FALL = 0.73
"""Contrast of an octave over that of the next coarser one: makes 500 x 375 pixels about 110 KB of JPEG."""

COLOUR = 0.4
"""Contrast of the two colour planes over that of the light."""

SUFFIXES = (".jpg", ".jpeg")


def draw_photos(count: int, sizes: Sequence[tuple[int, int]] = IMAGENET_SIZES) -> list[bytes]:
    """JPEGs of drawn photos, always the same ones.

    Args:
        count: How many.
        sizes: Width and height in pixels, taken in turn.
    """
    return [draw_photo(*sizes[index % len(sizes)], np.random.default_rng(index)) for index in range(count)]


def draw_photo(width: int, height: int, rng: np.random.Generator) -> bytes:
    """One JPEG: noise of all octaves, its colours at half the resolution."""
    half_size = ((width + 1) // 2, (height + 1) // 2)
    planes = [Image.fromarray(_octaves(width, height, CONTRAST, rng))]
    planes += [Image.fromarray(_octaves(*half_size, COLOUR * CONTRAST, rng)).resize((width, height)) for _ in range(2)]
    buffer = BytesIO()
    Image.merge("YCbCr", planes).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _octaves(width: int, height: int, contrast: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    total = np.full((height, width), 128, dtype=np.float32)
    finest = math.ceil(math.log2(width / COARSEST_CELLS))
    for octave in range(finest + 1):
        cells = min(width, COARSEST_CELLS * 2**octave)
        noise = rng.standard_normal((max(1, cells * height // width), cells), dtype=np.float32)
        detail = np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR))
        total += contrast * FALL**octave * detail
    return total.clip(0, 255).astype(np.uint8)


def read_photos(folder: Path, count: int) -> list[bytes]:
    """The JPEGs of a folder, at most `count`, spread evenly over all below it.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no JPEG, or one of those taken cannot be decoded.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: give one with JPEGs")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"no {' or '.join(SUFFIXES)} below {folder}: give a folder with JPEGs")
    photos = []
    for index in np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int):
        photos.append(paths[index].read_bytes())
        try:
            decode(photos[-1])
        except ValueError as error:
            raise ValueError(f"{paths[index]}: {error}; remove it or give another folder") from error
    return photos


def describe(photos: Sequence[bytes]) -> str:
    """How many there are, and their mean size."""
    sizes = [Image.open(BytesIO(photo)).size for photo in photos]
    megapixels = float(np.mean([width * height for width, height in sizes])) / 1e6
    kilobytes = float(np.mean([len(photo) for photo in photos])) / 1e3
    return f"{len(photos)} photos of {megapixels:.2f} megapixels and {kilobytes:.0f} KB in the mean"
