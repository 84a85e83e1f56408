"""Gaussian blur with one sigma per image, equal to Pillow's `GaussianBlur(radius=sigma)`.

Pillow approximates the Gaussian by three passes of an extended box filter (one whose outermost taps count in part)
along each axis, and so does this.

Shape legend:
    N     images in a batch
    H, W  height and width of the images, in pixels
    K     taps on either side of the middle one

Source: Gwosdek et al., "Theoretical Foundations of Gaussian Convolution by Extended Box Filtering", SSVM 2011,
equations 7, 11 and 14, as in Pillow's BoxBlur.c.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from detco.views.rows import known_maximum

BOX_PASSES = 3

ROUNDING = 0.5 - 2**-12
"""Halves go down, as in Pillow, whose weights are cut to 24 bits and so fall just short."""


def gaussian_blur(images: Tensor, sigma: Tensor, *, max_sigma: float) -> Tensor:
    """Blur every image with its own sigma, repeating the edge pixels outwards.

    Args:
        images: Float, whole numbers in [0, 255], shape (N, 3, H, W).
        sigma: In pixels, in [0, max_sigma], shape (N,); 0 leaves an image exactly as it is.
        max_sigma: Settles the filter's width without looking at the values on the device.

    Returns:
        Whole numbers in [0, 255], shape (N, 3, H, W).
    """
    # The widest filter has taps that are zero for most sigmas: of the published recipe, for two in three.
    taps = box_taps(sigma, max_sigma=known_maximum(sigma, bound=max_sigma))[..., None, None, None]
    for along_rows in (True, False):
        for _ in range(BOX_PASSES):
            images = _filter(images, taps, along_rows=along_rows)
    return images


def box_taps(sigma: Tensor, *, max_sigma: float) -> Tensor:
    """Weights of the middle tap and of the K taps beside it, shape (K + 1, N); those beside count on both sides."""
    # float64, so that a row's weights depend on no other row: vectorised and plain float32 functions differ.
    variance = sigma.double().square() / BOX_PASSES
    whole = ((12 * variance + 1).sqrt() - 1).div(2).floor()
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    radius = whole + fraction
    reach = math.floor((math.sqrt(12 * max_sigma**2 / BOX_PASSES + 1) - 1) / 2) + 1
    distance = torch.arange(reach + 1, device=sigma.device)[:, None]
    return ((radius + 1 - distance).clamp(0, 1) / (2 * radius + 1)).float()


def _filter(images: Tensor, taps: Tensor, *, along_rows: bool) -> Tensor:
    axis = -1 if along_rows else -2
    reach, length = len(taps) - 1, images.shape[axis]
    padded = F.pad(images, (reach, reach, 0, 0) if along_rows else (0, 0, reach, reach), mode="replicate")
    result = images * taps[0]
    for step in range(1, reach + 1):
        left, right = (padded.narrow(axis, start, length) for start in (reach - step, reach + step))
        result.addcmul_(left + right, taps[step])
    return result.add_(ROUNDING).floor_()
