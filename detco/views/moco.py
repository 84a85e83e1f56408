"""The two views of MoCo v2: a query and a key crop of each image.

Shape legend:
    N  images in a batch
    S  side of a view, in pixels

Source: MoCo v2, arXiv:2003.04297, and the transforms of its published code, in their order:
https://github.com/facebookresearch/moco, main_moco.py. RandAugment: see `detco.views.rand_augment`.

Departures: the flip comes first instead of last. It commutes with jitter, grey and blur; with RandAugment, first is
where PyContrast has it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from detco.artifact import IMAGENET_RGB
from detco.views.base import ViewRecipe
from detco.views.host import CropBox, draw_crop_box
from detco.views.photo import Photo
from detco.views.photometric import (
    PhotometricOptions,
    PhotometricParams,
    apply_photometric,
    blur,
    draw_flip,
    draw_photometric,
    flip,
    jitter_colours,
    make_grey,
    normalise,
)
from detco.views.rand_augment import RandAugmentOptions, RandAugmentParams, draw_rand_augment, rand_augment
from detco.views.rows import render_alike
from detco.views.validation import check_positive_int, check_probability, check_range


class GlobalSample(NamedTuple):
    """One global view before the device half; after collating, every tensor has a leading N."""

    crop: Tensor
    """RGB, uint8, shape (3, S, S)."""

    is_flipped: Tensor
    """bool, shape ()."""

    photometric: PhotometricParams
    rand_augment: RandAugmentParams


class GlobalDraw(NamedTuple):
    """What was drawn for one global view, before its crop is cut: see `GlobalSample`."""

    box: CropBox
    is_flipped: Tensor
    photometric: PhotometricParams
    rand_augment: RandAugmentParams

    def with_crop(self, crop: Tensor) -> GlobalSample:
        """The view with the pixels of its box, shape (3, S, S)."""
        return GlobalSample(crop, self.is_flipped, self.photometric, self.rand_augment)


class MoCoSample(NamedTuple):
    """What the host half makes of one image."""

    query: GlobalSample
    key: GlobalSample


class MoCoViews(NamedTuple):
    """Normalised views, float32, shape (N, 3, S, S)."""

    global_query: Tensor
    global_key: Tensor


class MoCoRecipe(ViewRecipe[MoCoSample, MoCoViews]):
    """Views of MoCo v2.

    Args:
        global_size: S.
        global_scale: Share of the image's area that a crop covers, (least, most).
        crop_ratio: Width / height of a crop, (least, most).
        jitter: Strengths of brightness, contrast, saturation (factors in 1 +- strength) and hue (turns).
        jitter_prob: Chance of colour jitter.
        grey_prob: Chance of greyscale.
        blur_prob: Chance of Gaussian blur.
        blur_sigma: Its sigma in pixels of the view, (least, most).
        flip_prob: Chance of a horizontal flip.
        rand_augment: Whether RandAugment is applied after the blur and before greyscale.
        rand_augment_num_ops: Operations drawn per view.
        rand_augment_magnitude: Mean of their level, in [0, 10].
        rand_augment_magnitude_std: Standard deviation of the level.
        rand_augment_prob: Chance of each drawn operation to be applied.

    Raises:
        ValueError: If a setting is outside its range.
    """

    preprocess = IMAGENET_RGB

    def __init__(
        self,
        *,
        global_size: int = 224,
        global_scale: Sequence[float] = (0.2, 1.0),
        crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
        jitter: Sequence[float] = (0.4, 0.4, 0.4, 0.1),
        jitter_prob: float = 0.8,
        grey_prob: float = 0.2,
        blur_prob: float = 0.5,
        blur_sigma: Sequence[float] = (0.1, 2.0),
        flip_prob: float = 0.5,
        rand_augment: bool = False,
        rand_augment_num_ops: int = 2,
        rand_augment_magnitude: float = 10.0,
        rand_augment_magnitude_std: float = 0.5,
        rand_augment_prob: float = 0.5,
    ) -> None:
        self.global_size = check_positive_int("global_size", global_size)
        self.global_scale = check_range("global_scale", global_scale, low=0.0, high=1.0, low_open=True)
        self.crop_ratio = check_range("crop_ratio", crop_ratio, low=0.0, high=100.0, low_open=True)
        self.photometric = PhotometricOptions(
            jitter=jitter,
            jitter_prob=jitter_prob,
            grey_prob=grey_prob,
            blur_prob=blur_prob,
            blur_sigma=blur_sigma,
        )
        self.flip_prob = check_probability("flip_prob", flip_prob)
        options = RandAugmentOptions(
            num_ops=rand_augment_num_ops,
            magnitude=rand_augment_magnitude,
            magnitude_std=rand_augment_magnitude_std,
            prob=rand_augment_prob,
        )
        self.rand_augment = options if rand_augment else None

    def draw(self, photo: Photo, rng: np.random.Generator) -> MoCoSample:
        """Host half: two independent crops of one image and their parameters."""
        draws = self.draw_views(photo, rng)
        crops = photo.crops([(draw.box, self.global_size) for draw in draws])
        return MoCoSample(*(draw.with_crop(crop) for draw, crop in zip(draws, crops, strict=True)))

    def draw_views(self, photo: Photo, rng: np.random.Generator) -> tuple[GlobalDraw, GlobalDraw]:
        """Draw the query and the key view of one image, without cutting them."""
        return self._draw_view(photo, rng), self._draw_view(photo, rng)

    def render(self, batch: MoCoSample) -> MoCoViews:
        """Device half: the normalised views of a collated batch."""
        return MoCoViews(*render_alike(self._render_view, batch.query, batch.key))

    def _draw_view(self, photo: Photo, rng: np.random.Generator) -> GlobalDraw:
        return GlobalDraw(
            box=draw_crop_box(photo.height, photo.width, self.global_scale, self.crop_ratio, rng),
            is_flipped=draw_flip(self.flip_prob, rng),
            photometric=draw_photometric(self.photometric, rng),
            rand_augment=draw_rand_augment(self.rand_augment, self.global_size, rng),
        )

    def _render_view(self, sample: GlobalSample) -> Tensor:
        images = flip(sample.crop, sample.is_flipped).float()
        params = sample.photometric
        if self.rand_augment is None:
            return normalise(apply_photometric(images, params, self.photometric), self.preprocess)
        images = jitter_colours(images, params.jitter_order, params.jitter_factors)
        images = blur(images, params.blur_sigma, max_sigma=self.photometric.blur_sigma[1])
        images = rand_augment(images, sample.rand_augment)
        return normalise(make_grey(images, params.is_grey), self.preprocess)
