"""The views of SoCo: the whole image and crops of it, with the boxes of the same objects in both.

Paper and code number the views differently, so here they are named by their role: whole (V1), crop (V2), small (112
pixels) and medium (192 pixels).

Shape legend:
    N  images in a batch
    S  side of a view, in pixels

Source: SoCo, arXiv:2106.02637, Sec. 3.2, 3.3, 4.1, and its published code, https://github.com/hologerry/SoCo at
624a70d, contrast/data/dataset.py and transform.py. Where the two differ, the code is the default, because it made the
published weights, and the paper is an option: small_view "resize", crop_frame "whole", shared_boxes, outside_boxes
"drop", box_jitter_rule "centre", box_jitter_views "all", and for C4 crop_scale (0.5, 1) and box_jitter_prob 0.5.

Departures: those of `detco.views.objects`, `detco.views.cutout` and `detco.boxes`.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from torch import Tensor

from detco.views.base import Proposals, SampleT, ViewsT
from detco.views.object_views import BoxSet, ObjectSample, PairedSample, PairedView, PairRecipe, shrink
from detco.views.photo import Photo
from detco.views.validation import check_choice, check_positive_int

__all__ = [
    "BoxSet",
    "ObjectSample",
    "PairedSample",
    "PairedView",
    "SoCoC4Recipe",
    "SoCoC4Sample",
    "SoCoC4Views",
    "SoCoFPNRecipe",
    "SoCoFPNSample",
    "SoCoFPNViews",
    "SoCoStarRecipe",
    "SoCoStarSample",
    "SoCoStarViews",
]

NUM_LEVELS = 4
"""P2 to P5."""

SmallView = Literal["crop", "resize"]


class SoCoC4Sample(NamedTuple):
    """What the host half makes of one image."""

    whole: ObjectSample
    crop: PairedSample


class SoCoFPNSample(NamedTuple):
    """What the host half makes of one image."""

    whole: ObjectSample
    crop: PairedSample
    small: PairedSample


class SoCoStarSample(NamedTuple):
    """What the host half makes of one image."""

    whole: ObjectSample
    crop: PairedSample
    small: PairedSample
    medium: PairedSample


class SoCoC4Views(NamedTuple):
    """The whole view is normalised, float32, shape (N, 3, S, S)."""

    whole: Tensor
    crop: PairedView


class SoCoFPNViews(NamedTuple):
    """The whole view is normalised, float32, shape (N, 3, S, S)."""

    whole: Tensor
    crop: PairedView
    small: PairedView


class SoCoStarViews(NamedTuple):
    """The whole view is normalised, float32, shape (N, 3, S, S)."""

    whole: Tensor
    crop: PairedView
    small: PairedView
    medium: PairedView


@dataclass(frozen=True, kw_only=True)
class SoCoC4Recipe(PairRecipe[SoCoC4Sample, SoCoC4Views]):
    """Views of SoCo-C4: the whole image and a crop. The paper has the crop scale and the box jitter of the others."""

    crop_scale: tuple[float, float] = (0.6, 1.0)
    box_jitter_prob: float = 0.0

    def draw_with_proposals(self, photo: Photo, proposals: Proposals, rng: np.random.Generator) -> SoCoC4Sample:
        """Host half: the views of one image, unrendered."""
        (cut,) = self.choose_cuts(photo, proposals, rng, num_crops=1, shared_boxes=False)
        whole_pixels, pixels = self.cut_views(photo, (cut, self.view_size))
        whole = self.draw_whole(whole_pixels, rng)
        return SoCoC4Sample(whole, self.draw_paired(pixels, cut.pair, whole, rng, cutout_prob=self.cutout_prob))

    def render(self, batch: SoCoC4Sample) -> SoCoC4Views:
        """Device half: the normalised views of a collated batch."""
        return SoCoC4Views(self.render_whole(batch.whole), self.render_paired(batch.crop))


@dataclass(frozen=True, kw_only=True)
class PyramidRecipe(PairRecipe[SampleT, ViewsT]):
    """What the variants with a feature pyramid share.

    Attributes:
        small_size: S of the small view.
        shared_boxes: One draw of objects for all pairs (the paper) instead of one for each (the code).
        level_max_sizes: Largest box in pixels of its view, by the root of its area, on each of P2 to P5.
    """

    small_size: int = 112
    shared_boxes: bool = False
    level_max_sizes: tuple[float, float, float, float] = (48.0, 96.0, 192.0, 224.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("small_size", self.small_size)
        sizes = self.level_max_sizes
        if len(sizes) != NUM_LEVELS or sizes[0] <= 0 or list(sizes) != sorted(set(sizes)):
            raise ValueError(
                f"level_max_sizes is {tuple(sizes)!r}; it must be {NUM_LEVELS} ascending sizes in pixels, for P2 to P5"
            )

    def level_limits(self) -> tuple[float, ...]:
        """Those of P2 to P5."""
        return self.level_max_sizes


@dataclass(frozen=True, kw_only=True)
class SoCoFPNRecipe(PyramidRecipe[SoCoFPNSample, SoCoFPNViews]):
    """Views of SoCo-FPN: the whole image, a crop and a small view.

    Attributes:
        small_view: The small view is a "crop" of its own (the code) or the crop "resize"d, with its boxes (the paper).
    """

    small_view: SmallView = "crop"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("small_view", self.small_view, get_args(SmallView))

    def draw_with_proposals(self, photo: Photo, proposals: Proposals, rng: np.random.Generator) -> SoCoFPNSample:
        """Host half: the views of one image, unrendered."""
        num_crops = 2 if self.small_view == "crop" else 1
        cuts = self.choose_cuts(photo, proposals, rng, num_crops=num_crops, shared_boxes=self.shared_boxes)
        cut, small_cut = cuts[0], cuts[-1]
        if self.small_view == "crop":
            wanted = ((cut, self.view_size), (small_cut, self.small_size))
            whole_pixels, pixels, small_pixels = self.cut_views(photo, *wanted)
        else:
            whole_pixels, pixels = self.cut_views(photo, (cut, self.view_size))
            small_pixels = shrink(pixels, self.small_size)
        whole = self.draw_whole(whole_pixels, rng)
        return SoCoFPNSample(
            whole=whole,
            crop=self.draw_paired(pixels, cut.pair, whole, rng, cutout_prob=self.cutout_prob),
            small=self.draw_paired(small_pixels, small_cut.pair, whole, rng, cutout_prob=self.cutout_prob),
        )

    def render(self, batch: SoCoFPNSample) -> SoCoFPNViews:
        """Device half: the normalised views of a collated batch."""
        return SoCoFPNViews(
            self.render_whole(batch.whole), self.render_paired(batch.crop), self.render_paired(batch.small)
        )


@dataclass(frozen=True, kw_only=True)
class SoCoStarRecipe(PyramidRecipe[SoCoStarSample, SoCoStarViews]):
    """Views of SoCo-FPN*: the whole image, a crop, the same crop made small, and a medium crop of its own.

    Attributes:
        medium_size: S of the medium view.
    """

    medium_size: int = 192

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("medium_size", self.medium_size)

    def draw_with_proposals(self, photo: Photo, proposals: Proposals, rng: np.random.Generator) -> SoCoStarSample:
        """Host half: the views of one image, unrendered."""
        cut, medium_cut = self.choose_cuts(photo, proposals, rng, num_crops=2, shared_boxes=self.shared_boxes)
        wanted = ((cut, self.view_size), (medium_cut, self.medium_size))
        whole_pixels, pixels, medium_pixels = self.cut_views(photo, *wanted)
        small_pixels = shrink(pixels, self.small_size)
        whole = self.draw_whole(whole_pixels, rng)
        return SoCoStarSample(
            whole=whole,
            crop=self.draw_paired(pixels, cut.pair, whole, rng, cutout_prob=self.cutout_prob),
            small=self.draw_paired(small_pixels, cut.pair, whole, rng, cutout_prob=self.cutout_prob),
            medium=self.draw_paired(medium_pixels, medium_cut.pair, whole, rng, cutout_prob=0.0),
        )

    def render(self, batch: SoCoStarSample) -> SoCoStarViews:
        """Device half: the normalised views of a collated batch."""
        return SoCoStarViews(
            self.render_whole(batch.whole),
            self.render_paired(batch.crop),
            self.render_paired(batch.small),
            self.render_paired(batch.medium),
        )
