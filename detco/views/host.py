"""Host half of every recipe: draw a crop box, cut it out of an image and resize it. Runs in loader workers.

Shape legend:
    H, W  height and width of the image, in pixels
    S     side of the resized crop, in pixels

Source: crops as in torchvision's RandomResizedCrop, which MoCo v2 (arXiv:2003.04297) and DetCo (arXiv:2102.04803,
Sec. 3.4) use.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

CROP_TRIES = 10
"""How often a crop box is drawn before the central one is taken, as in torchvision."""


class CropBox(NamedTuple):
    """A rectangle of whole pixels inside an image."""

    top: int
    left: int
    height: int
    width: int


def sample_generator(*, seed: int, epoch: int, index: int) -> np.random.Generator:
    """The only randomness of one sample, whoever draws it, wherever and in whichever order."""
    return np.random.default_rng((seed, epoch, index))


def draw_crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> CropBox:
    """Draw the box of a random resized crop.

    Area share uniform in `scale`, width / height log-uniform in `ratio`, position uniform. If ten boxes do not fit
    into the image, the largest central one with an allowed ratio is taken.
    """
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(CROP_TRIES):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        box_width = round(math.sqrt(area * aspect))
        box_height = round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return CropBox(top, left, box_height, box_width)
    return _central_box(height, width, ratio)


def _central_box(height: int, width: int, ratio: tuple[float, float]) -> CropBox:
    box_height, box_width = height, width
    if width / height < ratio[0]:
        box_height = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        box_width = max(1, round(height * ratio[1]))
    return CropBox((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def crop_and_resize(image: Tensor, box: CropBox, size: int) -> Tensor:
    """Cut a box out and resize it to a square by antialiased bilinear interpolation.

    Args:
        image: RGB, uint8, shape (3, H, W).
        box: Inside the image.
        size: S.

    Returns:
        RGB, uint8, shape (3, S, S). Its memory lies pixel by pixel (channels last).
    """
    crop = image[None, :, box.top : box.top + box.height, box.left : box.left + box.width]
    # Resizing is fastest on pixels that lie one behind the other, by more than the copy costs.
    crop = crop.contiguous(memory_format=torch.channels_last)
    return functional.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
