"""Boxes: edges, frames, and the way from one frame to another.

A box is (x1, y1, x2, y2), the edges of a rectangle: its width is x2 - x1, and one over the pixels a..b is (a, b + 1).
Names say the frame: `_px` counts pixels of an image from its left and top edge, `_view` are fractions of a view, whose
edges lie at 0 and 1. A window is a box too: the rectangle of an image that becomes a view.

Shape legend:
    ...  any leading dimensions, equal for all arguments but windows

Departure from the official code of SoCo (https://github.com/hologerry/SoCo, contrast/data/bboxs_utils.py): that one
names the last pixel instead of the edge (x2 = x1 + w - 1), so its boxes end one pixel short.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float64]
"""(x1, y1, x2, y2) in the last dimension, shape (..., 4)."""

Window = Sequence[float]
"""(x1, y1, x2, y2), not empty."""


def area(boxes: Boxes) -> NDArray[np.float64]:
    """Width times height, in the squared unit of the frame, shape (...)."""
    product: NDArray[np.float64] = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    return product


def clip(boxes: Boxes, window: Window) -> Boxes:
    """What of the boxes lies in the window, in the same frame; of a box that lies outside, one of area 0 is left."""
    left, top, right, bottom = window
    return np.clip(boxes, (left, top, left, top), (right, bottom, right, bottom))


def overlap_area(boxes: Boxes, window: Window) -> NDArray[np.float64]:
    """How much of each box lies in the window, in the squared unit of the frame, shape (...)."""
    return area(clip(boxes, window))


def scale(boxes: Boxes, factor_x: float, factor_y: float) -> Boxes:
    """The boxes after their image was resized by these factors."""
    return boxes * _twice(factor_x, factor_y)


def to_view(boxes: Boxes, window: Window) -> Boxes:
    """Boxes in the frame of an image as fractions of the window that becomes a view, whatever size it is resized to."""
    left, top, right, bottom = window
    return (boxes - _twice(left, top)) / _twice(right - left, bottom - top)


def mirror(boxes_view: Boxes) -> Boxes:
    """The boxes after their view was mirrored left to right."""
    mirrored: Boxes = boxes_view.copy()
    mirrored[..., [0, 2]] = 1 - boxes_view[..., [2, 0]]
    return mirrored


def _twice(x: float, y: float) -> Boxes:
    return np.array((x, y, x, y), dtype=np.float64)
