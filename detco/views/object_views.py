"""What the views of all variants of SoCo have in common: views with boxes, in pairs, and how one is drawn and rendered.

A *pair* is the whole image and one other view. Its boxes are one set in each of the two, matched by equal ids; the
views other than the whole one form no pairs among themselves. Every flip is drawn on the host, where the boxes are
mirrored with their view.

Shape legend:
    N  images in a batch
    K  boxes of a view
    S  side of a view, in pixels

Source and departures: see `detco.views.soco`. Order of operations: flip, jitter, grey, blur, solarise, normalise,
cut-out.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from detco.artifact import IMAGENET_RGB
from detco.boxes import mirror, scale, to_view
from detco.views.base import ProposalRecipe, Proposals, SampleT, ViewsT
from detco.views.cutout import blank, draw_cutout
from detco.views.host import CropBox, crop_and_resize
from detco.views.objects import (
    BoxOptions,
    CropOptions,
    Cut,
    Objects,
    Pair,
    Scene,
    assign_levels,
    draw_cuts,
    list_objects,
)
from detco.views.photo import Photo
from detco.views.photometric import (
    PhotometricOptions,
    PhotometricParams,
    blur,
    draw_flip,
    draw_photometric,
    flip,
    jitter_colours,
    make_grey,
    normalise,
    solarise,
)
from detco.views.rows import render_rows
from detco.views.validation import check_choice, check_positive_int, check_probability, check_range

CropFrame = Literal["image", "whole"]


class BoxSet(NamedTuple):
    """K boxes of one view; after collating, every tensor has a leading N."""

    boxes_view: Tensor
    """(x1, y1, x2, y2), edges in fractions of the view as rendered, so after its flip; float32, shape (K, 4)."""

    ids: Tensor
    """Boxes with equal ids in the two views of a pair show the same object; int64, shape (K,)."""

    levels: Tensor
    """Pyramid level, 0 to 3 for P2 to P5, or -1: too large for all, matches nothing. Zeros in C4. int64, shape (K,)."""


class ObjectSample(NamedTuple):
    """One view before the device half; after collating, every tensor has a leading N."""

    crop: Tensor
    """RGB, uint8, shape (3, S, S)."""

    is_flipped: Tensor
    """bool, shape ()."""

    photometric: PhotometricParams

    is_solarised: Tensor
    """bool, shape ()."""

    cutout_view: Tensor
    """Rectangles that are blanked, in the frame of `BoxSet.boxes_view`, all zeros = none; float32, shape (K, 4)."""


class PairedSample(NamedTuple):
    """A view and the boxes of the pair that it forms with the whole view."""

    view: ObjectSample
    boxes: BoxSet
    boxes_in_whole: BoxSet


class PairedView(NamedTuple):
    """A rendered view and the boxes of the pair that it forms with the whole view."""

    image: Tensor
    """Normalised, float32, shape (N, 3, S, S)."""

    boxes: BoxSet
    boxes_in_whole: BoxSet


@dataclass(frozen=True, kw_only=True)
class PairRecipe(BoxOptions, ProposalRecipe[SampleT, ViewsT]):
    """Makes views in pairs with the whole image. The fields, with those of `BoxOptions`, are the recipe's keywords.

    Attributes:
        view_size: S of the whole view and of the crop.
        crop_scale: Share of the image's area that a crop covers, (least, most).
        crop_ratio: Width / height of a crop, (least, most).
        crop_frame: Crops are taken from the "image" (the code) or from the squeezed "whole" view (the paper).
        jitter: Strengths of brightness, contrast, saturation (factors in 1 +- strength) and hue (turns).
        jitter_prob: Chance of colour jitter.
        grey_prob: Chance of greyscale.
        blur_sigma: Sigma of the Gaussian blur in pixels of the view, (least, most).
        blur_prob_whole: Chance of blur in the whole view.
        blur_prob_crop: Chance of blur in every other view.
        solarise_prob_whole: Chance of solarisation in the whole view.
        solarise_prob_crop: Chance of solarisation in every other view.
        flip_prob: Chance of a horizontal flip, for each view on its own.
        cutout_prob: Chance of each box of the crop and of the small view to have a square blanked.
        cutout_area: Share of the box's area that the square has, (least, most).

    Raises:
        ValueError: If a value is outside its range.
    """

    preprocess = IMAGENET_RGB

    view_size: int = 224
    crop_scale: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_frame: CropFrame = "image"
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_prob: float = 0.8
    grey_prob: float = 0.2
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_prob_whole: float = 1.0
    blur_prob_crop: float = 0.1
    solarise_prob_whole: float = 0.0
    solarise_prob_crop: float = 0.2
    flip_prob: float = 0.5
    cutout_prob: float = 0.0
    cutout_area: tuple[float, float] = (0.1, 0.3)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("view_size", self.view_size)
        check_range("crop_scale", self.crop_scale, low=0.0, high=1.0, low_open=True)
        check_range("crop_ratio", self.crop_ratio, low=0.0, high=100.0, low_open=True)
        check_choice("crop_frame", self.crop_frame, get_args(CropFrame))
        probabilities = ("blur_prob_whole", "blur_prob_crop", "solarise_prob_whole", "solarise_prob_crop")
        for name in (*probabilities, "flip_prob", "cutout_prob"):
            check_probability(name, getattr(self, name))
        check_range("cutout_area", self.cutout_area, low=0.0, high=1.0, low_open=True)
        self._whole_colours  # noqa: B018  # refuses its own settings

    @functools.cached_property
    def _whole_colours(self) -> PhotometricOptions:
        return self._colours(self.blur_prob_whole)

    @functools.cached_property
    def _crop_colours(self) -> PhotometricOptions:
        return self._colours(self.blur_prob_crop)

    def _colours(self, blur_prob: float) -> PhotometricOptions:
        return PhotometricOptions(
            jitter=self.jitter,
            jitter_prob=self.jitter_prob,
            grey_prob=self.grey_prob,
            blur_prob=blur_prob,
            blur_sigma=self.blur_sigma,
        )

    def level_limits(self) -> tuple[float, ...]:
        """Largest size of a box on each pyramid level, in pixels of its view; without a pyramid one level takes all."""
        return (math.inf,)

    def choose_cuts(
        self, photo: Photo, proposals: Proposals, rng: np.random.Generator, *, num_crops: int, shared_boxes: bool
    ) -> list[Cut]:
        """Draw where the crops of an image lie and which boxes their pairs have.

        Args:
            photo: The image.
            proposals: Of this image.
            rng: The only source of randomness.
            num_crops: Pairs with boxes of their own.
            shared_boxes: One draw of objects for all pairs.

        Raises:
            ValueError: If the proposals are not boxes inside the image.
        """
        height, width = photo.height, photo.width
        objects = list_objects(proposals, height, width, dedup=self.dedup)
        if self.crop_frame == "whole":
            boxes_view = to_view(objects.boxes, (0, 0, width, height))
            objects = objects._replace(boxes=scale(boxes_view, self.view_size, self.view_size))
            height = width = self.view_size
        return draw_cuts(
            Scene(height, width, objects),
            num_crops=num_crops,
            crop=CropOptions(self.crop_scale, self.crop_ratio),
            boxes=self,
            shared_boxes=shared_boxes,
            rng=rng,
        )

    def cut_views(self, photo: Photo, *wanted: tuple[Cut, int]) -> list[Tensor]:
        """The pixels of the whole view, then those of each wanted cut at its size S: RGB, uint8, shape (3, S, S).

        Raises:
            UnreadableImage: If the image turns out to be damaged.
        """
        whole_view = (CropBox(0, 0, photo.height, photo.width), self.view_size)
        crops = [(cut.crop_box, size) for cut, size in wanted]
        if self.crop_frame == "image":
            return photo.crops([whole_view, *crops])
        (whole,) = photo.crops([whole_view])
        return [whole, *Photo.of(whole).crops(crops)]

    def draw_whole(self, pixels: Tensor, rng: np.random.Generator) -> ObjectSample:
        """Draw what happens to the whole view (3, S, S)."""
        return ObjectSample(
            crop=pixels,
            is_flipped=draw_flip(self.flip_prob, rng),
            photometric=draw_photometric(self._whole_colours, rng),
            is_solarised=torch.from_numpy(np.array(rng.random() < self.solarise_prob_whole)),
            cutout_view=torch.zeros(self.num_boxes, 4),
        )

    def draw_paired(
        self, pixels: Tensor, pair: Pair, whole: ObjectSample, rng: np.random.Generator, *, cutout_prob: float
    ) -> PairedSample:
        """Draw what happens to another view, and mirror its pair's boxes with the two views.

        Args:
            pixels: RGB, uint8, shape (3, S, S), whatever S.
            pair: Its boxes, before any flip.
            whole: The whole view as drawn.
            rng: The only source of randomness.
            cutout_prob: Chance of each of its boxes to have a square blanked.
        """
        is_flipped = draw_flip(self.flip_prob, rng)
        photometric = draw_photometric(self._crop_colours, rng)
        is_solarised = torch.from_numpy(np.array(rng.random() < self.solarise_prob_crop))
        cutout_view = draw_cutout(pair.in_crop.boxes, prob=cutout_prob, area_share=self.cutout_area, rng=rng)
        if is_flipped:
            cutout_view = np.where(cutout_view.any(1, keepdims=True), mirror(cutout_view), 0.0)
        return PairedSample(
            view=ObjectSample(
                pixels, is_flipped, photometric, is_solarised, torch.from_numpy(cutout_view.astype(np.float32))
            ),
            boxes=self._box_set(pair.in_crop, pixels, is_flipped),
            boxes_in_whole=self._box_set(pair.in_whole, whole.crop, whole.is_flipped),
        )

    def _box_set(self, objects: Objects, pixels: Tensor, is_flipped: Tensor) -> BoxSet:
        boxes_view = mirror(objects.boxes) if is_flipped else objects.boxes
        return BoxSet(
            boxes_view=torch.from_numpy(boxes_view.astype(np.float32)),
            ids=torch.from_numpy(objects.ids),
            levels=torch.from_numpy(assign_levels(boxes_view, pixels.shape[-1], self.level_limits())),
        )

    def _render_view(self, sample: ObjectSample) -> Tensor:
        params = sample.photometric
        images = flip(sample.crop, sample.is_flipped).float()
        images = jitter_colours(images, params.jitter_order, params.jitter_factors)
        images = make_grey(images, params.is_grey)
        images = blur(images, params.blur_sigma, max_sigma=self.blur_sigma[1])
        images = solarise(images, sample.is_solarised)
        return blank(normalise(images, self.preprocess), sample.cutout_view)

    def render_whole(self, sample: ObjectSample) -> Tensor:
        """Device half of the whole view: normalised, float32, shape (N, 3, S, S)."""
        return render_rows(self._render_view, sample)

    def render_paired(self, sample: PairedSample) -> PairedView:
        """Device half of another view; its boxes are as they were drawn."""
        return PairedView(render_rows(self._render_view, sample.view), sample.boxes, sample.boxes_in_whole)


def shrink(pixels: Tensor, size: int) -> Tensor:
    """A view (3, S, S) at another size: (3, size, size)."""
    return crop_and_resize(pixels, CropBox(0, 0, pixels.shape[1], pixels.shape[2]), size)
