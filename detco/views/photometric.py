"""Colour jitter, greyscale and blur with parameters of each image's own: drawn on the host, applied in batches.

Images on the device are float32 holding whole numbers in [0, 255]: every operation rounds as Pillow's 8-bit
arithmetic does, so that it equals the Pillow pipeline of the published recipes and not merely resembles it.

Shape legend:
    N     images in a batch
    H, W  height and width of the views, in pixels

Source: MoCo v2, arXiv:2003.04297, and its published code; DetCo, arXiv:2102.04803, Sec. 3.4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from detco.artifact import Preprocess
from detco.views.blur import gaussian_blur
from detco.views.rows import apply_to_rows
from detco.views.validation import check_probability, check_range

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""The four jitter operations, in the order of torchvision's `ColorJitter` arguments."""

MAX_BLUR_SIGMA = 32.0
SOLARISE_FROM = 128
"""Values from here on are inverted; the threshold of BYOL's recipe, and Pillow's default."""


class PhotometricParams(NamedTuple):
    """What happens to the pixels of one view; after collating, every field has a leading N."""

    jitter_order: Tensor
    """A permutation of the four jitter operations, first one first; int64, shape (4,)."""

    jitter_factors: Tensor
    """Brightness, contrast and saturation factor (1 = unchanged), hue shift in turns (0 = unchanged); float32, (4,)."""

    is_grey: Tensor
    """bool, shape ()."""

    blur_sigma: Tensor
    """Sigma in pixels of the view, 0 = not blurred; float32, shape ()."""


@dataclass(frozen=True)
class PhotometricOptions:
    """How often and how strongly views are changed; the fields are the recipe keywords of the same names.

    Raises:
        ValueError: If a value is outside its range.
    """

    jitter: Sequence[float]
    jitter_prob: float
    grey_prob: float
    blur_prob: float
    blur_sigma: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.jitter) != 4 or min(self.jitter) < 0 or self.jitter[HUE] > 0.5:
            raise ValueError(
                f"jitter is {tuple(self.jitter)!r}; it must be four strengths of at least 0 for brightness, contrast, "
                "saturation and hue, the last at most 0.5"
            )
        for name in ("jitter_prob", "grey_prob", "blur_prob"):
            check_probability(name, getattr(self, name))
        check_range("blur_sigma", self.blur_sigma, low=0.0, high=MAX_BLUR_SIGMA, low_open=True)


def draw_flip(prob: float, rng: np.random.Generator) -> Tensor:
    """Draw whether one view is mirrored (host half): bool, shape ()."""
    return torch.tensor(rng.random() < prob)


def draw_photometric(options: PhotometricOptions, rng: np.random.Generator) -> PhotometricParams:
    """Draw what happens to the colours of one view (host half). Only what will be applied is drawn."""
    order: npt.NDArray[np.int64] = np.arange(4)
    factors = np.array([1.0, 1.0, 1.0, 0.0])
    if rng.random() < options.jitter_prob:
        order = rng.permutation(4)
        strength = np.asarray(options.jitter, dtype=np.float64)
        centre = factors
        # A factor below 0 would invert the image; torchvision cuts the range there, and so do we.
        least = np.maximum(centre - strength, [0.0, 0.0, 0.0, -0.5])
        factors = rng.uniform(least, centre + strength)
    is_grey = rng.random() < options.grey_prob
    sigma = rng.uniform(options.blur_sigma[0], options.blur_sigma[1]) if rng.random() < options.blur_prob else 0.0
    return PhotometricParams(
        jitter_order=torch.from_numpy(order),
        jitter_factors=torch.from_numpy(factors.astype(np.float32)),
        is_grey=torch.tensor(is_grey),
        blur_sigma=torch.tensor(sigma, dtype=torch.float32),
    )


def flip(images: Tensor, is_flipped: Tensor) -> Tensor:
    """Mirror the marked images left to right: any dtype, shape (N, 3, H, W)."""
    return torch.where(is_flipped[:, None, None, None], images.flip(-1), images)


def apply_photometric(images: Tensor, params: PhotometricParams, options: PhotometricOptions) -> Tensor:
    """Jitter, greyscale, blur, in MoCo's order (device half).

    Args:
        images: Whole numbers in [0, 255], shape (N, 3, H, W).
        params: Collated: fields with a leading N.
        options: What the parameters were drawn from.

    Returns:
        Whole numbers in [0, 255], shape (N, 3, H, W).
    """
    images = jitter_colours(images, params.jitter_order, params.jitter_factors)
    images = make_grey(images, params.is_grey)
    return blur(images, params.blur_sigma, max_sigma=options.blur_sigma[1])


def jitter_colours(images: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Colour jitter, the four operations in each image's own order.

    Args:
        images: Whole numbers in [0, 255], shape (N, 3, H, W).
        order: As `PhotometricParams.jitter_order`, shape (N, 4).
        factors: As `PhotometricParams.jitter_factors`, shape (N, 4).
    """
    # Brightness, contrast and saturation are blends towards some image, so one step can do a different one of them for
    # every image. Hue is not: it runs once, with the blends that precede it before and the others behind.
    hue_position = (order == HUE).int().argmax(1)
    positions = torch.arange(4, device=order.device)
    blends = torch.where(order == HUE, BRIGHTNESS, order)
    blend_factors = torch.where(order == HUE, 1.0, factors.gather(1, blends))
    before = positions < hue_position[:, None]
    for position in range(3):
        images = _blend_some(images, blends[:, position], torch.where(before, blend_factors, 1.0)[:, position])
    images = apply_to_rows(factors[:, HUE].mul(255).trunc() != 0, shift_hue, images, factors[:, HUE])
    for position in range(1, 4):
        images = _blend_some(images, blends[:, position], torch.where(before, 1.0, blend_factors)[:, position])
    return images


def _blend_some(images: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    return apply_to_rows(factor != 1, _blend_by_operation, images, operation, factor)


def _blend_by_operation(images: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    grey = grey_values(images)
    operation = operation[:, None, None, None]
    target = torch.where(operation == SATURATION, grey, torch.where(operation == CONTRAST, mean_grey(grey), 0.0))
    return blend(target, images, factor)


def blend(start: Tensor, end: Tensor, factor: Tensor) -> Tensor:
    """Go `factor` of the way from start to end, cut to [0, 255] and rounded down, as Pillow's `Image.blend`.

    Args:
        start: Whole numbers, shape (N, 1 or 3, H or 1, W or 1).
        end: Whole numbers, shape (N, 3, H, W).
        factor: 0 gives start, 1 gives end, more exaggerates the difference; shape (N,).
    """
    return torch.addcmul(start, end - start, factor[:, None, None, None]).clamp_(0, 255).floor_()


def grey_values(images: Tensor) -> Tensor:
    """Luma (ITU-R 601-2) as Pillow's conversion to "L": whole numbers, shape (N, 1, H, W)."""
    red, green, blue = images.unbind(1)
    # 16-bit fixed-point weights; every sum stays below 2**24, so float32 holds it exactly.
    luma = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471)
    return luma.add_(32768).div_(65536).floor_()[:, None]


def mean_grey(grey: Tensor) -> Tensor:
    """Mean of each grey image (N, 1, H, W), rounded, shape (N, 1, 1, 1): what contrast blends towards."""
    # In float64 the sum of whole numbers is exact, so it depends on no summation order.
    return grey.mean((1, 2, 3), keepdim=True, dtype=torch.float64).add_(0.5).floor_().to(grey.dtype)


def make_grey(images: Tensor, is_grey: Tensor) -> Tensor:
    """Greyscale (three equal channels) where marked."""
    return apply_to_rows(is_grey, lambda chosen: grey_values(chosen).repeat(1, 3, 1, 1), images)


def blur(images: Tensor, sigma: Tensor, *, max_sigma: float) -> Tensor:
    """Gaussian blur where sigma (N,) is not 0; `max_sigma` bounds it."""
    return apply_to_rows(
        sigma > 0, lambda chosen, sigmas: gaussian_blur(chosen, sigmas, max_sigma=max_sigma), images, sigma
    )


def solarise(images: Tensor, is_solarised: Tensor) -> Tensor:
    """Invert the bright values of the marked images (N, 3, H, W), as Pillow's `ImageOps.solarize`."""
    return apply_to_rows(is_solarised, lambda chosen: invert_from(chosen, SOLARISE_FROM), images)


def invert_from(values: Tensor, threshold: Tensor | int) -> Tensor:
    """255 - value where a value in [0, 255] is not below the threshold."""
    return torch.where(values < threshold, values, 255 - values)


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` turns (N,), through Pillow's 8-bit HSV as torchvision does on Pillow images."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    divisor = chroma.clamp(min=1)
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    turns = hue.div_(6)
    hue_byte = turns.sub_(turns.floor()).mul_(255).floor_()
    saturation = (chroma / value.clamp(min=1)).mul_(255).floor_().div_(255)
    hue_byte = hue_byte.add_((shift * 255).trunc()[:, None, None])
    sextant = hue_byte.sub_((hue_byte / 256).floor_(), alpha=256).mul_(6 / 255)  # in [0, 6], red at both ends
    depth = value * saturation
    # How far each channel is from being the strongest, as a piecewise linear function of the hue.
    red_share = (2 - (sextant - 3).abs_()).clamp_(0, 1)
    green_share = (sextant - 2).abs_().sub_(1).clamp_(0, 1)
    blue_share = (sextant - 4).abs_().sub_(1).clamp_(0, 1)
    shares = torch.stack((red_share, green_share, blue_share), 1)
    return torch.addcmul(value[:, None], depth[:, None], shares, value=-1).add_(0.5).floor_()


def normalise(images: Tensor, preprocess: Preprocess) -> Tensor:
    """Subtract the mean and divide by the standard deviation of each channel: (..., 3, H, W), in place."""
    # Numbers, not tensors: making a tensor on a GPU from a list would wait for it.
    for channel, (mean, std) in enumerate(zip(preprocess.mean_255, preprocess.std_255, strict=True)):
        images[..., channel, :, :].sub_(mean).div_(std)
    return images
