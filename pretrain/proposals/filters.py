"""Which raw proposals of an image are kept, and what happens when that is none.

Source: SoCo, arXiv:2106.02637, Sec. 3.2, and hologerry/SoCo@624a70d selective_search/filters.py (the least side in
pixels, not in the paper) and filter_ss_proposals_json_post_no_prop.py (the relaxed second pass).

Departure: the official code measures boxes one pixel short (last pixel minus first pixel); here a side is its true
extent, so a box 32 pixels wide passes here and fails there.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

NUM_STAGES = 4
"""Stages of `Filtered.stage`: 0 all rules, 1 without the size rule, 2 only the least side, 3 nothing was left."""

SIZE_DECIMALS = 9
"""A size ratio is rounded to this, so that one of exactly a limit, say 0.34, is not lost to a root's last bit."""


@dataclasses.dataclass(frozen=True)
class FilterParams:
    """The rules; every limit itself is allowed.

    Attributes:
        min_side_px: Least width and height, in pixels of the original image.
        max_aspect: Greatest long side / short side.
        min_size: Least sqrt(w * h) / sqrt(W * H), with W and H those of the image.
        max_size: Greatest sqrt(w * h) / sqrt(W * H).

    Raises:
        ValueError: If a limit makes no sense.
    """

    min_side_px: int = 32
    max_aspect: float = 3.0
    min_size: float = 0.3
    max_size: float = 0.8

    def __post_init__(self) -> None:
        if self.min_side_px < 1:
            raise ValueError(f"min_side_px {self.min_side_px} is not at least 1")
        if not self.max_aspect >= 1:
            raise ValueError(f"max_aspect {self.max_aspect} is not at least 1 (long side / short side)")
        if not 0 <= self.min_size <= self.max_size <= 1:
            raise ValueError(
                f"min_size {self.min_size} and max_size {self.max_size} are not 0 <= min_size <= max_size <= 1 "
                "(shares of the image's side)"
            )

    def as_dict(self) -> dict[str, Any]:
        """The rules as JSON values."""
        return dataclasses.asdict(self)


class Filtered(NamedTuple):
    """What is left of the proposals of one image.

    Attributes:
        boxes: (M, 4) int64, (x1, y1, x2, y2), edges in image pixels, unique, in the order in which they first came.
        multiplicity: (M,) int64, how often each came.
        stage: 0 if all rules held, 1 if the size rule was dropped, 2 if the aspect rule was too, 3 if nothing is left.
    """

    boxes: NDArray[np.int64]
    multiplicity: NDArray[np.int64]
    stage: int


def filter_boxes(raw: NDArray[np.int64], width: int, height: int, params: FilterParams) -> Filtered:
    """Apply the rules; if they leave nothing, drop first the size rule, then the aspect rule, as the authors did.

    Args:
        raw: (R, 4), (x1, y1, x2, y2), edges in image pixels, duplicates kept.
        width: Of the image, pixels.
        height: Of the image, pixels.
        params: The rules.

    Raises:
        ValueError: If `raw` is not of shape (R, 4) or a box leaves the image.
    """
    _check_boxes(raw, width, height)
    for stage, is_kept in enumerate(passing(raw, width, height, params)):
        if is_kept.any():
            return Filtered(*_count_duplicates(raw[is_kept]), stage)
    return Filtered(np.zeros((0, 4), np.int64), np.zeros(0, np.int64), NUM_STAGES - 1)


def passing(
    boxes: NDArray[np.int64] | NDArray[np.float64], width: int, height: int, params: FilterParams
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Which boxes (R, 4), edges in image pixels, pass stage 0, stage 1 and stage 2: three times (R,)."""
    box_width, box_height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    short, long = np.minimum(box_width, box_height), np.maximum(box_width, box_height)
    size = np.round(np.sqrt(box_width * box_height / (width * height)), SIZE_DECIMALS)

    is_large_enough = short >= params.min_side_px
    is_compact = is_large_enough & (long <= params.max_aspect * short)
    is_strict = is_compact & (params.min_size <= size) & (size <= params.max_size)
    return is_strict, is_compact, is_large_enough


def _check_boxes(raw: NDArray[np.int64], width: int, height: int) -> None:
    if raw.ndim != 2 or raw.shape[1] != 4:
        raise ValueError(f"expected boxes of shape (R, 4), got {raw.shape}")
    is_inside = (raw[:, :2] >= 0).all(1) & (raw[:, :2] < raw[:, 2:]).all(1) & (raw[:, 2:] <= (width, height)).all(1)
    if not is_inside.all():
        raise ValueError(
            f"box {raw[~is_inside][0].tolist()} is not within its image of {width}x{height} pixels "
            "(x1, y1, x2, y2, edges)"
        )


def _count_duplicates(boxes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    unique, first, counts = np.unique(boxes, axis=0, return_index=True, return_counts=True)
    order = np.argsort(first)
    return unique[order].astype(np.int64), counts[order].astype(np.int64)
