"""Which boxes of an image a pair of views shows, and where: drawn, jittered, cut at the crop, padded to K.

One view of a pair is always the whole image, the other a crop of it. Boxes of the two match by equal numbers (ids).
Everything here is as before any flip.

Shape legend:
    n  objects of an image: its proposals, each as often as it was made
    K  boxes of a view

Source: SoCo, arXiv:2106.02637, Sec. 3.2, and its published code, https://github.com/hologerry/SoCo at 624a70d,
contrast/data/dataset.py and bboxs_utils.py. Where the two differ, the code is the default and the paper an option.

Departures from the code: boxes are edges (`detco.boxes`), so that a crop shows a box of which it has one pixel, where
the code asks for two; and they stay fractions when their level is chosen, where the code cuts them to whole pixels.
With shared boxes, only those are drawn that every crop shows; the paper draws first and lets go of what a crop does
not show.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from detco.boxes import Boxes, Window, area, clip, overlap_area, to_view
from detco.views.base import Proposals
from detco.views.host import CropBox, draw_crop_box
from detco.views.validation import check_choice, check_positive_int, check_probability

CROP_TRIES = 5
"""How often the crops of an image are drawn before those with too few boxes are taken as they are."""

WHOLE_VIEW_ID = 0
"""Of the box that stands in when a pair has no other; objects are numbered from 1."""

UNASSIGNED = -1
"""Level of a box larger than every level takes: it matches nothing."""

LEVEL_PRECISION_PX = 1e-3
"""Sizes closer together than this are one: what changing frames leaves in the last bits does not choose a level."""

OutsideRule = Literal["clip", "drop"]
JitterRule = Literal["corner", "centre"]
JitteredViews = Literal["whole", "all"]


@dataclass(frozen=True, kw_only=True)
class BoxOptions:
    """How the boxes of a pair of views are chosen.

    Attributes:
        num_boxes: K.
        dedup: Whether a proposal counts once however often it was made.
        outside_boxes: "clip": every box that a crop shows a part of may be drawn, and is cut at its edge (the code);
            "drop": only those that lie wholly inside (the paper).
        box_jitter_prob: Chance of each drawn box to be jittered.
        box_jitter_ratio: Largest shift and change of a side, as a share of that side, in [0, 1).
        box_jitter_rule: What the shift moves: the "corner" at the top left (the code), so that the centre moves by up
            to 1.5 times the ratio, or the "centre" (the paper).
        box_jitter_views: Jitter the boxes in the "whole" view (the code) or, each view on its own, in "all" (the
            paper).

    Raises:
        ValueError: If a value is outside its range.
    """

    num_boxes: int = 4
    dedup: bool = False
    outside_boxes: OutsideRule = "clip"
    box_jitter_prob: float = 0.5
    box_jitter_ratio: float = 0.1
    box_jitter_rule: JitterRule = "corner"
    box_jitter_views: JitteredViews = "whole"

    def __post_init__(self) -> None:
        check_positive_int("num_boxes", self.num_boxes)
        check_choice("outside_boxes", self.outside_boxes, get_args(OutsideRule))
        check_probability("box_jitter_prob", self.box_jitter_prob)
        if not 0 <= self.box_jitter_ratio < 1:
            raise ValueError(
                f"box_jitter_ratio is {self.box_jitter_ratio!r}; it must be at least 0 and below 1, "
                "or a box could vanish"
            )
        check_choice("box_jitter_rule", self.box_jitter_rule, get_args(JitterRule))
        check_choice("box_jitter_views", self.box_jitter_views, get_args(JitteredViews))


class CropOptions(NamedTuple):
    """How crops are drawn; see `detco.views.host.draw_crop_box`."""

    scale: tuple[float, float]
    ratio: tuple[float, float]


class Objects(NamedTuple):
    """Numbered boxes in one frame."""

    boxes: Boxes
    """Shape (n, 4)."""

    ids: NDArray[np.int64]
    """Shape (n,); boxes of the same object have the same number, in whichever view."""


class Scene(NamedTuple):
    """The image that crops are cut from, with its objects in its own pixels."""

    height: int
    width: int
    objects: Objects


class Pair(NamedTuple):
    """What the two views of a pair show: K boxes each, in fractions of the view."""

    in_whole: Objects
    in_crop: Objects


class Cut(NamedTuple):
    """A crop, and the boxes of the pair that it forms with the whole image."""

    crop_box: CropBox
    pair: Pair


class _Drawn(NamedTuple):
    """Drawn objects, at most K, in pixels: as they were proposed, and as the whole view is to show them."""

    proposed: Objects
    boxes_in_whole_px: Boxes


def list_objects(proposals: Proposals, height: int, width: int, *, dedup: bool) -> Objects:
    """Number the objects of an image: each proposal as often as it was made, or the whole image if there is none.

    Args:
        proposals: Of this image.
        height: Of the image in pixels.
        width: Of the image in pixels.
        dedup: List every proposal once instead.

    Returns:
        Boxes in pixels of the image, numbered from 1.

    Raises:
        ValueError: If the proposals are not boxes inside the image.
    """
    _check_proposals(proposals, height, width)
    if len(proposals.boxes_image_px) == 0:
        return Objects(np.array([[0.0, 0.0, width, height]]), np.array([1], dtype=np.int64))
    boxes_px = proposals.boxes_image_px.astype(np.float64)
    if not dedup:
        boxes_px = boxes_px.repeat(proposals.multiplicity, axis=0)
    return Objects(boxes_px, np.arange(1, len(boxes_px) + 1, dtype=np.int64))


def _check_proposals(proposals: Proposals, height: int, width: int) -> None:
    boxes_px, multiplicity = proposals
    if boxes_px.ndim != 2 or boxes_px.shape[1] != 4 or multiplicity.shape != boxes_px.shape[:1]:
        raise ValueError(
            f"expected proposals as boxes (M, 4) with a multiplicity (M,) each, got {boxes_px.shape} and "
            f"{multiplicity.shape}"
        )
    is_inside = (boxes_px[:, :2] >= 0).all(1) & (boxes_px[:, :2] < boxes_px[:, 2:]).all(1)
    is_inside &= (boxes_px[:, 2:] <= (width, height)).all(1)
    if not is_inside.all():
        wrong = boxes_px[~is_inside][0].tolist()
        raise ValueError(f"proposal {wrong} is no box (x1, y1, x2, y2) inside an image of {width}x{height} pixels")
    if (multiplicity < 1).any():
        raise ValueError(f"a proposal has multiplicity {multiplicity.min()}; each was made at least once")


def draw_cuts(
    scene: Scene,
    *,
    num_crops: int,
    crop: CropOptions,
    boxes: BoxOptions,
    shared_boxes: bool,
    rng: np.random.Generator,
) -> list[Cut]:
    """Draw crops that show enough objects, and the boxes of each crop's pair with the whole image.

    Args:
        scene: What is cut.
        num_crops: How many crops.
        crop: How they are drawn.
        boxes: How their boxes are chosen.
        shared_boxes: Draw one set of objects, which every crop shows, for all pairs instead of one for each.
        rng: The only source of randomness.
    """
    least = max(1, boxes.num_boxes // 2)
    for _ in range(CROP_TRIES):
        crop_boxes = [draw_crop_box(scene.height, scene.width, *crop, rng) for _ in range(num_crops)]
        candidates = [_is_candidate(scene.objects, _window(crop_box), boxes.outside_boxes) for crop_box in crop_boxes]
        if shared_boxes:
            candidates = [np.logical_and.reduce(candidates)]
        if min(some.sum() for some in candidates) >= least:
            break
        least = max(1, least // 2)
    drawn = [_draw_objects(scene.objects, some, boxes, rng) for some in candidates]
    whole = (0, 0, scene.width, scene.height)
    return [
        Cut(crop_box, _pair_up(some, whole, _window(crop_box), boxes, rng))
        for crop_box, some in zip(crop_boxes, drawn * num_crops if shared_boxes else drawn, strict=True)
    ]


def _is_candidate(objects: Objects, crop_px: Window, outside_boxes: OutsideRule) -> NDArray[np.bool_]:
    seen = overlap_area(objects.boxes, crop_px)
    return seen > 0 if outside_boxes == "clip" else seen == area(objects.boxes)


def _window(crop_box: CropBox) -> Window:
    return crop_box.left, crop_box.top, crop_box.left + crop_box.width, crop_box.top + crop_box.height


def _draw_objects(
    objects: Objects, is_candidate: NDArray[np.bool_], options: BoxOptions, rng: np.random.Generator
) -> _Drawn:
    rows = is_candidate.nonzero()[0]
    if len(rows) > options.num_boxes:
        rows = rng.choice(rows, options.num_boxes, replace=False)
    boxes_px = objects.boxes[rows]
    return _Drawn(Objects(boxes_px, objects.ids[rows]), jitter_boxes(boxes_px, options, rng))


def jitter_boxes(boxes_px: Boxes, options: BoxOptions, rng: np.random.Generator) -> Boxes:
    """Shift and stretch some of the boxes (n, 4) by shares of their sides, all four drawn independently.

    The result may reach out of the image.
    """
    is_jittered = rng.random(len(boxes_px)) < options.box_jitter_prob
    shares = rng.uniform(-options.box_jitter_ratio, options.box_jitter_ratio, (len(boxes_px), 4))
    shares *= is_jittered[:, None]
    shift, stretch = shares[:, :2], shares[:, 2:]
    sides = boxes_px[:, 2:] - boxes_px[:, :2]
    new_sides = sides * (1 + stretch)
    corner = boxes_px[:, :2] + shift * sides
    if options.box_jitter_rule == "centre":
        corner -= (new_sides - sides) / 2
    return np.concatenate((corner, corner + new_sides), axis=1)


def _pair_up(drawn: _Drawn, whole_px: Window, crop_px: Window, options: BoxOptions, rng: np.random.Generator) -> Pair:
    """Cut the drawn boxes at the edges of the two views; without any, the views themselves are the object."""
    boxes_in_crop_px = drawn.proposed.boxes
    if options.box_jitter_views == "all":
        boxes_in_crop_px = jitter_boxes(boxes_in_crop_px, options, rng)
    in_whole = to_view(clip(drawn.boxes_in_whole_px, whole_px), whole_px)
    in_crop = to_view(clip(boxes_in_crop_px, crop_px), crop_px)
    ids = drawn.proposed.ids
    # Jitter may push a box that a view shows the edge of out of it.
    is_common = (area(in_whole) > 0) & (area(in_crop) > 0)
    in_whole, in_crop, ids = in_whole[is_common], in_crop[is_common], ids[is_common]
    if len(ids) == 0:
        in_whole = in_crop = np.array([[0.0, 0.0, 1.0, 1.0]])
        ids = np.array([WHOLE_VIEW_ID], dtype=np.int64)
    return Pair(
        _pad(Objects(in_whole, ids), options.num_boxes, rng), _pad(Objects(in_crop, ids), options.num_boxes, rng)
    )


def _pad(objects: Objects, count: int, rng: np.random.Generator) -> Objects:
    """Repeat randomly drawn ones behind the objects until they are `count`."""
    missing = count - len(objects.ids)
    if missing == 0:
        return objects
    rows = np.append(np.arange(len(objects.ids)), rng.integers(len(objects.ids), size=missing))
    return Objects(objects.boxes[rows], objects.ids[rows])


def assign_levels(boxes_view: Boxes, view_size: int, level_max_sizes: tuple[float, ...]) -> NDArray[np.int64]:
    """The pyramid level of each box by its size, which is the root of its area.

    Args:
        boxes_view: Shape (K, 4).
        view_size: Side of the view in pixels.
        level_max_sizes: Largest size in pixels that each level takes, ascending.

    Returns:
        The first level that takes a box, or `UNASSIGNED`; shape (K,).
    """
    sizes_px = np.sqrt(area(boxes_view)) * view_size
    levels = np.searchsorted(np.array(level_max_sizes), sizes_px - LEVEL_PRECISION_PX)
    return np.where(levels < len(level_max_sizes), levels, UNASSIGNED)
