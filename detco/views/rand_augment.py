"""RandAugment with operations and magnitudes of each image's own: drawn on the host, applied in batches.

The fifteen operations and their ranges are those of PyContrast, which used RandAugment with a MoCo queue; the DetCo
paper states none. Each equals its Pillow counterpart: images are float32 holding whole numbers in [0, 255].

Shape legend:
    N     images in a batch
    H, W  height and width of the views, in pixels
    R     operations drawn per image (0 = RandAugment is off)

Source: RandAugment, arXiv:1909.13719; DetCo, arXiv:2102.04803, Sec. 3.4 (that it is used); operations and ranges:
https://github.com/HobbitLong/PyContrast, pycontrast/datasets/RandAugment.py ("rand-m10-n2-mstd0.5").

Departures: bilinear interpolation throughout, where PyContrast picks bilinear or bicubic at random.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from detco.views.photometric import black, blend, flat_grey, grey_values, invert_from
from detco.views.rows import Operation, apply_by_choice, apply_to_rows
from detco.views.validation import check_positive_int, check_probability

OPERATIONS = (
    "auto_contrast",
    "equalize",
    "invert",
    "posterize",
    "solarize",
    "solarize_add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
"""First those that change values, then geometry."""

SKIPPED = -1
MAX_LEVEL = 10.0
FILL = (124.0, 116.0, 104.0)
"""ImageNet's mean colour, rounded: what geometry draws in from outside."""

MAX_ROTATION_DEGREES = 30.0
MAX_SHEAR = 0.3
MAX_TRANSLATION_SHARE = 0.45
SOLARIZE_ADD_BELOW = 128

_FIRST_WARP = OPERATIONS.index("rotate")


class RandAugmentParams(NamedTuple):
    """The R operations of one view, first one first; after collating, both fields have a leading N."""

    operation: Tensor
    """Index into `OPERATIONS`, or `SKIPPED`; int64, shape (R,)."""

    argument: Tensor
    """In the operation's own unit: degrees, pixels, shear, factor, bits kept, threshold, increment; float32, (R,)."""


@dataclass(frozen=True)
class RandAugmentOptions:
    """How many operations, how strong and how often.

    Attributes:
        num_ops: R; every one is drawn from all fifteen, with replacement.
        magnitude: Mean level, in [0, 10].
        magnitude_std: Standard deviation of the level, which is cut to [0, 10] afterwards.
        prob: Chance of each drawn operation to be applied.

    Raises:
        ValueError: If a value is outside its range.
    """

    num_ops: int
    magnitude: float
    magnitude_std: float
    prob: float

    def __post_init__(self) -> None:
        check_positive_int("rand_augment_num_ops", self.num_ops)
        check_probability("rand_augment_prob", self.prob)
        if not 0 <= self.magnitude <= MAX_LEVEL:
            raise ValueError(f"rand_augment_magnitude is {self.magnitude!r}; it must be in [0, {MAX_LEVEL:g}]")
        if not 0 <= self.magnitude_std < math.inf:
            raise ValueError(f"rand_augment_magnitude_std is {self.magnitude_std!r}; it must be at least 0 and finite")


def draw_rand_augment(options: RandAugmentOptions | None, size: int, rng: np.random.Generator) -> RandAugmentParams:
    """Draw the operations of one view (host half).

    Args:
        options: None means that RandAugment is off: R is 0, and nothing is drawn.
        size: Side of the view in pixels.
        rng: The only source of randomness.
    """
    drawn = [] if options is None else [_draw_operation(options, size, rng) for _ in range(options.num_ops)]
    return RandAugmentParams(
        operation=torch.from_numpy(np.array([operation for operation, _ in drawn], dtype=np.int64)),
        argument=torch.from_numpy(np.array([argument for _, argument in drawn], dtype=np.float32)),
    )


def _draw_operation(options: RandAugmentOptions, size: int, rng: np.random.Generator) -> tuple[int, float]:
    operation = int(rng.integers(len(OPERATIONS)))
    if rng.random() >= options.prob:
        return SKIPPED, 0.0
    level = float(np.clip(rng.normal(options.magnitude, options.magnitude_std), 0.0, MAX_LEVEL))
    argument = argument_at_level(OPERATIONS[operation], level, size)
    if operation >= _FIRST_WARP and rng.random() < 0.5:
        argument = -argument
    return operation, argument


def argument_at_level(operation: str, level: float, size: int) -> float:
    """The (unsigned) argument of an operation at a level in [0, 10], for views of `size` pixels.

    Posterize and solarize are the variants of the EfficientNet TPU code: the level raises the bits kept and the
    threshold, so a higher level changes *less*. At level 10, solarize changes nothing.
    """
    share = level / MAX_LEVEL
    if operation == "posterize":
        return float(int(share * 4))
    if operation == "solarize":
        return float(int(share * 256))
    if operation == "solarize_add":
        return float(int(share * 110))
    if operation in ("color", "contrast", "brightness", "sharpness"):
        return share * 1.8 + 0.1
    if operation == "rotate":
        return share * MAX_ROTATION_DEGREES
    if operation in ("shear_x", "shear_y"):
        return share * MAX_SHEAR
    if operation in ("translate_x", "translate_y"):
        return share * int(MAX_TRANSLATION_SHARE * size)
    return 0.0  # auto_contrast, equalize and invert take none


def rand_augment(images: Tensor, params: RandAugmentParams) -> Tensor:
    """Apply each image's operations, one after the other (device half).

    Args:
        images: Whole numbers in [0, 255], shape (N, 3, H, W).
        params: Collated: fields of shape (N, R).

    Returns:
        Whole numbers in [0, 255], shape (N, 3, H, W).
    """
    for step in range(params.operation.shape[1]):
        operation, argument = params.operation[:, step], params.argument[:, step]
        images = apply_by_choice(operation, _COLOUR_OPERATIONS, images, argument)
        images = apply_to_rows(operation >= _FIRST_WARP, warp, images, operation, argument)
    return images


def auto_contrast(images: Tensor) -> Tensor:
    """Stretch the darkest value of each channel to 0 and the brightest to 255."""
    # float64 as in Pillow: where scale * value is a whole number, float32 may fall just short of it.
    least, most = (extreme.double() for extreme in (images.amin((2, 3), True), images.amax((2, 3), True)))
    # Not 255 / range, which torch computes as a reciprocal times 255, a rounding more.
    scale = torch.full_like(most, 255.0) / (most - least).clamp(min=1)
    is_flat = most == least
    scale, offset = torch.where(is_flat, 1.0, scale), torch.where(is_flat, 0.0, least * scale)
    return (images * scale).sub_(offset).clamp_(0, 255).floor_().to(images.dtype)


def equalize(images: Tensor) -> Tensor:
    """Level the histogram of each channel, by a table per image and channel."""
    indices = images.flatten(2).long()
    histogram = torch.zeros((*images.shape[:2], 256), dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, indices, torch.ones_like(indices))
    return _equalize_table(histogram).to(images.dtype).gather(2, indices).view_as(images)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the `bits` (N,) most significant of eight."""
    bits = bits.long()[:, None, None, None]
    step = (torch.ones_like(bits) << (8 - bits)).to(images.dtype)
    return (images / step).floor_().mul_(step)


def solarize_add(images: Tensor, increment: Tensor) -> Tensor:
    """Add `increment` (N,) to the dark values."""
    is_dark = (SOLARIZE_ADD_BELOW - images).clamp_(0, 1)
    return torch.addcmul(images, is_dark, increment.trunc()[:, None, None, None]).clamp_(max=255)


def _equalize_table(histogram: Tensor) -> Tensor:
    """Level the histogram (N, 3, 256) of each channel, as Pillow's `ImageOps.equalize`: int64, shape (N, 3, 256)."""
    value = torch.arange(256, device=histogram.device)
    brightest = torch.where(histogram > 0, value, 0).amax(2, keepdim=True)
    step = (histogram.sum(2, keepdim=True) - histogram.gather(2, brightest)) // 255
    divisor = step.clamp(min=1)
    table = (divisor // 2 + histogram.cumsum(2) - histogram) // divisor
    return torch.where(step > 0, table.clamp(max=255), value)


def _smooth(images: Tensor) -> Tensor:
    """Pillow's 3x3 filter SMOOTH, (1 1 1, 1 5 1, 1 1 1) / 13, which leaves the outermost pixels as they are."""
    height, width = images.shape[-2:]
    result = images.clone()
    if min(height, width) < 3:
        return result
    rows = images[..., :-2, :] + images[..., 1:-1, :] + images[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inside = images[..., 1:-1, 1:-1]
    result[..., 1:-1, 1:-1] = total.add_(inside, alpha=4).div_(13).add_(0.5).floor_()
    return result


_COLOUR_OPERATIONS: dict[int, Operation] = {
    OPERATIONS.index(name): operation
    for name, operation in {
        "auto_contrast": lambda images, _: auto_contrast(images),
        "equalize": lambda images, _: equalize(images),
        "invert": lambda images, _: 255 - images,
        "posterize": posterize,
        "solarize": lambda images, threshold: invert_from(images, threshold[:, None, None, None]),
        "solarize_add": solarize_add,
        "color": lambda images, factor: blend(grey_values(images), images, factor),
        "contrast": lambda images, factor: blend(flat_grey(images), images, factor),
        "brightness": lambda images, factor: blend(black(images), images, factor),
        "sharpness": lambda images, factor: blend(_smooth(images), images, factor),
    }.items()
}
"""Those that move no pixel, by their index: (images, argument (N,)) -> images."""


def warp(images: Tensor, operation: Tensor, argument: Tensor) -> Tensor:
    """Rotation, shear and translation, bilinear, as Pillow's `Image.transform`; outside lies `FILL`.

    Args:
        images: Whole numbers in [0, 255], shape (N, 3, H, W).
        operation: Indices into `OPERATIONS`, from "rotate" on, shape (N,).
        argument: Degrees counter-clockwise, shear in px per px, or pixels; shape (N,).
    """
    height, width = images.shape[-2:]
    source_x, source_y = _source_positions(height, width, operation, argument)
    # grid_sample wants [-1, 1] from edge to edge of the image.
    grid = torch.stack((source_x * (2 / width) - 1, source_y * (2 / height) - 1), -1)
    sampled = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    # Pillow rounds down. Whole numbers must stay what they are though the grid is exact to about 1e-5 px only.
    sampled.add_(1 / 256).floor_()
    is_outside = (source_x < 0) | (source_x >= width) | (source_y < 0) | (source_y >= height)
    for channel, fill in enumerate(FILL):
        sampled[:, channel].masked_fill_(is_outside, fill)
    return sampled


def _source_positions(height: int, width: int, operation: Tensor, argument: Tensor) -> tuple[Tensor, Tensor]:
    """Where each pixel centre of the result lies in the source, x and y in pixels from its corner: two of (N, H, W)."""
    operation, argument = operation[:, None, None], argument[:, None, None]
    x = torch.arange(width, device=argument.device) + 0.5
    y = (torch.arange(height, device=argument.device) + 0.5)[:, None]

    def argument_of(name: str) -> Tensor:
        return torch.where(operation == OPERATIONS.index(name), argument, 0.0)

    # float64, so that a result depends on no other row: vectorised and plain float32 functions differ.
    angle = argument_of("rotate").double().deg2rad()
    cos, sin = angle.cos().float(), angle.sin().float()
    from_middle_x, from_middle_y = x - width / 2, y - height / 2
    source_x = cos * from_middle_x - sin * from_middle_y + width / 2
    source_y = sin * from_middle_x + cos * from_middle_y + height / 2
    source_x = source_x + argument_of("shear_x") * y + argument_of("translate_x")
    source_y = source_y + argument_of("shear_y") * x + argument_of("translate_y")
    return source_x, source_y
