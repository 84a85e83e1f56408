"""Colour jitter, greyscale and blur with parameters of each image's own: drawn on the host, applied in batches.

Images on the device are float32 holding whole numbers in [0, 255]: every operation rounds as Pillow's 8-bit
arithmetic does, so that it equals the Pillow pipeline of the published recipes and not merely resembles it.

Shape legend:
    N     images in a batch
    H, W  height and width of the views, in pixels

Source: MoCo v2, arXiv:2003.04297, and its published code; DetCo, arXiv:2102.04803, Sec. 3.4.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from detco.artifact import Preprocess
from detco.views.blur import gaussian_blur
from detco.views.rows import apply_to_rows, picks_rows
from detco.views.validation import check_probability, check_range

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""The four jitter operations, in the order of torchvision's `ColorJitter` arguments."""

MAX_BLUR_SIGMA = 32.0
_NO_JITTER = np.array([1.0, 1.0, 1.0, 0.0])
"""The factors that change nothing."""

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

    @functools.cached_property
    def factor_range(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The least `PhotometricParams.jitter_factors` and how far they reach from there, shape (4,) each."""
        strength = np.asarray(self.jitter, dtype=np.float64)
        # A factor below 0 would invert the image; torchvision cuts the range there, and so do we.
        least = np.maximum(_NO_JITTER - strength, [0.0, 0.0, 0.0, -0.5])
        return least, _NO_JITTER + strength - least


def draw_flip(prob: float, rng: np.random.Generator) -> Tensor:
    """Draw whether one view is mirrored (host half): bool, shape ()."""
    return torch.from_numpy(np.array(rng.random() < prob))


def draw_photometric(options: PhotometricOptions, rng: np.random.Generator) -> PhotometricParams:
    """Draw what happens to the colours of one view (host half). Only what will be applied is drawn."""
    # By way of numpy: torch.tensor takes three times as long for a number, and a sample has dozens.
    order: npt.NDArray[np.int64] = np.arange(4)
    factors = _NO_JITTER
    if rng.random() < options.jitter_prob:
        order = rng.permutation(4)
        least, span = options.factor_range
        factors = least + span * rng.random(4)  # what rng.uniform does with arrays, in a quarter of its time
    is_grey = rng.random() < options.grey_prob
    sigma = rng.uniform(options.blur_sigma[0], options.blur_sigma[1]) if rng.random() < options.blur_prob else 0.0
    return PhotometricParams(
        jitter_order=torch.from_numpy(order),
        jitter_factors=torch.from_numpy(factors.astype(np.float32)),
        is_grey=torch.from_numpy(np.array(is_grey)),
        blur_sigma=torch.from_numpy(np.array(sigma, dtype=np.float32)),
    )


def flip(images: Tensor, is_flipped: Tensor) -> Tensor:
    """Mirror the marked images left to right: any dtype, shape (N, 3, H, W)."""
    return apply_to_rows(is_flipped, lambda chosen: chosen.flip(-1), images)


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
    return (_jitter_row_by_row if picks_rows(images) else _jitter_all_rows)(images, order, factors)


def _jitter_row_by_row(images: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    jittered = []
    for row, operations in enumerate(order.tolist()):
        image = images[row : row + 1]
        for operation in operations:
            image = _jitter_once(image, operation, factors[row : row + 1, operation])
        jittered.append(image)
    return jittered[0] if len(jittered) == 1 else torch.cat(jittered)


def _jitter_once(image: Tensor, operation: int, factor: Tensor) -> Tensor:
    if operation == HUE:
        return shift_hue(image, factor) if is_hue_shifted(factor) else image
    if factor == 1:
        return image
    return blend(BLEND_STARTS[operation](image), image, factor)


def _jitter_all_rows(images: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    # Brightness, contrast and saturation are blends towards some image, so one step can do a different one of them for
    # every image. Hue is not: it runs once, with the blends that precede it before and the others behind.
    hue_position = (order == HUE).int().argmax(1)
    positions = torch.arange(4, device=order.device)
    blends = torch.where(order == HUE, BRIGHTNESS, order)
    blend_factors = torch.where(order == HUE, 1.0, factors.gather(1, blends))
    before = positions < hue_position[:, None]
    for position in range(3):
        images = _blend_each(images, blends[:, position], torch.where(before, blend_factors, 1.0)[:, position])
    shift = factors[:, HUE]
    images = apply_to_rows(is_hue_shifted(shift), shift_hue, images, shift)
    for position in range(1, 4):
        images = _blend_each(images, blends[:, position], torch.where(before, 1.0, blend_factors)[:, position])
    return images


def _blend_each(images: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    # No choice of rows: a factor of 1 gives exactly the image.
    grey = grey_values(images)
    operation = operation[:, None, None, None]
    start = torch.where(operation == SATURATION, grey, torch.where(operation == CONTRAST, mean_grey(grey), 0.0))
    return blend(start, images, factor)


def blend(start: Tensor, end: Tensor, factor: Tensor) -> Tensor:
    """Go `factor` of the way from start to end, cut to [0, 255] and rounded down, as Pillow's `Image.blend`.

    Args:
        start: Whole numbers, shape (N, 1 or 3, H, W).
        end: Whole numbers, shape (N, 3, H, W).
        factor: 0 gives start, 1 gives end, more exaggerates the difference; shape (N,).
    """
    return torch.lerp(start, end, factor[:, None, None, None]).clamp_(0, 255).floor_()


def black(images: Tensor) -> Tensor:
    """What brightness blends from: zeros, shape (N, 1, H, W)."""
    return torch.zeros_like(images[:, :1])


def flat_grey(images: Tensor) -> Tensor:
    """What contrast blends from: the mean of the grey image everywhere, shape (N, 1, H, W)."""
    grey = grey_values(images)
    return grey.copy_(mean_grey(grey))


def grey_values(images: Tensor) -> Tensor:
    """Luma (ITU-R 601-2) as Pillow's conversion to "L", what saturation blends from: whole numbers, (N, 1, H, W)."""
    red, green, blue = images.unbind(1)
    # 16-bit fixed-point weights; every sum stays below 2**24 of their units, so float32 holds it exactly.
    luma = (red * (19595 / 65536)).add_(green, alpha=38470 / 65536).add_(blue, alpha=7471 / 65536)
    return luma.add_(0.5).floor_()[:, None]


BLEND_STARTS = {BRIGHTNESS: black, CONTRAST: flat_grey, SATURATION: grey_values}
"""What each of these operations blends from."""


def mean_grey(grey: Tensor) -> Tensor:
    """Mean of each grey image (N, 1, H, W), rounded, shape (N, 1, 1, 1)."""
    # The sum of whole numbers is exact, of a row in float32 and of an image in float64, so it depends on no order.
    row_sums = grey.sum(3, keepdim=True).double()
    mean = row_sums.sum(2, keepdim=True).div_(grey.shape[2] * grey.shape[3])
    return mean.add_(0.5).floor_().to(grey.dtype)


def make_grey(images: Tensor, is_grey: Tensor) -> Tensor:
    """Greyscale (three equal channels) where marked."""
    return apply_to_rows(is_grey, lambda chosen: grey_values(chosen).expand_as(chosen).contiguous(), images)


def blur(images: Tensor, sigma: Tensor, *, max_sigma: float) -> Tensor:
    """Gaussian blur where sigma (N,) is not 0; `max_sigma` bounds it."""
    return apply_to_rows(
        sigma > 0, lambda chosen, sigmas: gaussian_blur(chosen, sigmas, max_sigma=max_sigma), images, sigma
    )


def solarise(images: Tensor, is_solarised: Tensor) -> Tensor:
    """Invert the bright values of the marked images (N, 3, H, W), as Pillow's `ImageOps.solarize`."""
    return apply_to_rows(is_solarised, lambda chosen: invert_from(chosen, SOLARISE_FROM), images)


def invert_from(images: Tensor, threshold: Tensor | int) -> Tensor:
    """255 - value where a value, a whole number in [0, 255], is not below the threshold, a whole number too."""
    # Arithmetic on 0 and 1 here and in `shift_hue`, because torch.where takes ten times as long on a CPU.
    is_bright = (images - (threshold - 1)).clamp_(0, 1)
    return torch.lerp(images, 255 - images, is_bright)


def is_hue_shifted(shift: Tensor) -> Tensor:
    """Whether a shift in turns is at least one step of Pillow's 8-bit hue: bool, of the same shape."""
    return (shift * 255).abs() >= 1


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` turns (N,), through Pillow's 8-bit HSV as torchvision does on Pillow images."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    # 0 where a channel is the strongest, else 1. Red counts first, then green.
    not_red = (value - red).clamp_(max=1)
    not_green = (value - green).clamp_(max=1)
    hue = torch.lerp(green - blue, torch.lerp(blue - red, red - green, not_green), not_red)
    hue.div_(chroma.clamp(min=1)).add_(not_green.add_(1).mul_(not_red), alpha=2)  # in sixths of a turn, [-1, 5]
    turns = hue.div_(6)
    hue_byte = turns.sub_(turns.floor()).mul_(255).floor_()
    saturation_byte = chroma.div_(value.clamp(min=1)).mul_(255).floor_()
    minus_depth = saturation_byte.div_(-255).mul_(value)
    hue_byte.add_((shift * 255).trunc()[:, None, None])
    sextant = hue_byte.sub_((hue_byte / 256).floor_(), alpha=256).mul_(6 / 255)  # in [0, 6], red at both ends
    # How far each channel is from being the strongest, as a piecewise linear function of the hue.
    share = torch.stack((sextant - 3, sextant - 2, sextant.sub_(4)), 1).abs_()
    share[:, 0].neg_().add_(3)
    share.sub_(1).clamp_(0, 1)
    return torch.addcmul(value[:, None], minus_depth[:, None], share).add_(0.5).floor_()


def normalise(images: Tensor, preprocess: Preprocess) -> Tensor:
    """Subtract the mean and divide by the standard deviation of each channel: (..., 3, H, W), in place."""
    # Numbers, not tensors: making a tensor on a GPU from a list would wait for it.
    for channel, (mean, std) in enumerate(zip(preprocess.mean_255, preprocess.std_255, strict=True)):
        images[..., channel, :, :].sub_(mean).div_(std)
    return images
