"""Cut-out inside boxes: squares of the view that become zero, which is the mean colour, after normalisation.

Shape legend:
    N     images in a batch
    K     boxes of a view
    H, W  height and width of the views, in pixels

Source: SoCo's published code, https://github.com/hologerry/SoCo at 624a70d, contrast/data/transform_ops.py
(`RandomCutoutInBbox`); not in the paper.

Departure: the squares are mirrored with their view, and not rounded to whole pixels.
"""

import numpy as np
import torch
from torch import Tensor

from detco.boxes import Boxes, area, clip
from detco.views.rows import apply_to_rows


def draw_cutout(boxes_view: Boxes, *, prob: float, area_share: tuple[float, float], rng: np.random.Generator) -> Boxes:
    """Draw a square for some of the boxes, centred anywhere in its box and cut at the edges of the view.

    Args:
        boxes_view: Shape (K, 4).
        prob: Chance of each box to get one.
        area_share: Share of its box's area that a square has before it is cut, (least, most).
        rng: The only source of randomness.

    Returns:
        The rectangles in the frame of the boxes, all zeros where there is none, shape (K, 4).
    """
    if prob == 0:
        return np.zeros_like(boxes_view)
    is_cut = rng.random(len(boxes_view)) < prob
    half_sides = np.sqrt(rng.uniform(*area_share, len(boxes_view)) * area(boxes_view))[:, None] / 2
    centres = rng.uniform(boxes_view[:, :2], boxes_view[:, 2:])
    squares = np.concatenate((centres - half_sides, centres + half_sides), axis=1)
    return np.where(is_cut[:, None], clip(squares, (0, 0, 1, 1)), 0.0)


def blank(images: Tensor, rectangles_view: Tensor) -> Tensor:
    """Set the pixels whose centre lies in one of its image's rectangles to zero (device half).

    Args:
        images: Float, shape (N, 3, H, W).
        rectangles_view: Fractions of the view; all zeros cover nothing; shape (N, K, 4).
    """
    return apply_to_rows(rectangles_view.flatten(1).any(1), _blank, images, rectangles_view)


def _blank(images: Tensor, rectangles_view: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    left, top, right, bottom = rectangles_view[..., None].unbind(2)
    x = (torch.arange(width, device=images.device) + 0.5) / width
    y = (torch.arange(height, device=images.device) + 0.5) / height
    in_columns, in_rows = (left < x) & (x < right), (top < y) & (y < bottom)
    is_covered = (in_rows[..., None] & in_columns[:, :, None]).any(1)
    return images.masked_fill(is_covered[:, None], 0.0)
