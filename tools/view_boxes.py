"""Draws the boxes of objects onto pictures of views, and proposals onto an image. Part of `tools/show_views.py`.

Boxes are (x1, y1, x2, y2), edges: in fractions of the view, or in pixels of the original image, as the names say.
"""

import colorsys
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]
"""Left, top, right, bottom in whole pixels; right and bottom are one past the last."""

LINE = 2
"""Thickness of an outline in pixels."""

DASH = 6
"""Length in pixels of what each of several boxes gets of an edge that they share."""

LABEL_SIZE = 13
MAX_PROPOSALS = 30
"""Proposals drawn onto an image; more would hide it."""

PROPOSAL_COLOUR = (255, 225, 0)
FIRST_LEVEL = 2
"""Level 0 is P2, as the finest map of an FPN is called."""


def colours_of(ids: Iterable[int]) -> dict[int, Colour]:
    """A colour for each id, no two alike: hues around the circle, light and dark by turns."""
    distinct = sorted(set(ids))
    colours = {}
    for position, number in enumerate(distinct):
        rgb = colorsys.hls_to_rgb(position / len(distinct), 0.4 if position % 2 else 0.6, 1.0)
        colours[number] = (round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2]))
    return colours


def label_of(number: int, level: int, has_levels: bool) -> str:
    """What is written at a box: its id and, where a box has one, the level it is pooled from."""
    if not has_levels:
        return str(number)
    return f"{number} no level" if level < 0 else f"{number} P{FIRST_LEVEL + level}"


def rectangle_of(box_view: Sequence[float], size: tuple[int, int]) -> Rectangle:
    """The pixels of a box in a picture of `size` (width, height): at least one, inside the picture."""
    left, top = (min(round(box_view[axis] * size[axis]), size[axis] - 1) for axis in (0, 1))
    right, bottom = (round(box_view[2 + axis] * size[axis]) for axis in (0, 1))
    return left, top, max(right, left + 1), max(bottom, top + 1)


def draw_boxes(
    picture: Image.Image,
    boxes_view: NDArray[np.floating],
    ids: Sequence[int],
    labels: Sequence[str],
    colours: dict[int, Colour],
) -> Image.Image:
    """A copy of the picture of a view with the outlines of its boxes, each labelled at one of its corners.

    An edge that several boxes share is dashed in their colours. A box that repeats another with the same id, as
    padding does, is drawn once.

    Args:
        picture: RGB.
        boxes_view: In fractions of the view, shape (K, 4).
        ids: The object of each box, K.
        labels: What to write at each box, K.
        colours: Of each id.
    """
    entries = dict.fromkeys(
        (number, rectangle_of(box, picture.size), label)
        for number, box, label in zip(ids, boxes_view.tolist(), labels, strict=True)
    )
    drawn = _draw_outlines(picture, [(rectangle, colours[number]) for number, rectangle, _ in entries])
    taken: list[Rectangle] = []
    for number, rectangle, label in entries:
        taken.append(_write_label(drawn, label, rectangle, colours[number], taken))
    return drawn


def _draw_outlines(picture: Image.Image, outlines: Sequence[tuple[Rectangle, Colour]]) -> Image.Image:
    pixels = np.array(picture)
    if not outlines:
        return Image.fromarray(pixels)
    edges = np.zeros((len(outlines), *pixels.shape[:2]), dtype=bool)
    for edge, ((left, top, right, bottom), _) in zip(edges, outlines, strict=True):
        edge[top:bottom, left:right] = True
        edge[top + LINE : max(bottom - LINE, top + LINE), left + LINE : max(right - LINE, left + LINE)] = False
    rows, columns = np.indices(pixels.shape[:2])
    count = edges.sum(0)
    turn = (rows + columns) // DASH % np.maximum(count, 1)
    owner = (edges & (edges.cumsum(0) == turn + 1)).argmax(0)
    palette = np.array([colour for _, colour in outlines], dtype=np.uint8)
    pixels[count > 0] = palette[owner[count > 0]]
    return Image.fromarray(pixels)


def _write_label(
    picture: Image.Image, text: str, box: Rectangle, colour: Colour, taken: Sequence[Rectangle]
) -> Rectangle:
    """Write a label on its colour inside the box, or where there is room near it; returns the place it takes."""
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(LABEL_SIZE)
    width, height = math.ceil(pen.textlength(text, font)) + 6, LABEL_SIZE + 4
    place = _free_place(box, (width, height), picture.size, taken)
    ink = (0, 0, 0) if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 128 else (255, 255, 255)
    pen.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=colour)
    pen.text((place[0] + 3, place[1] + height / 2), text, fill=ink, font=font, anchor="lm")
    return place


def _free_place(
    box: Rectangle, size: tuple[int, int], picture_size: tuple[int, int], taken: Sequence[Rectangle]
) -> Rectangle:
    """Where a label of `size` fits: the box's corners first, then down its sides; its first corner if nowhere."""
    width, height = size
    left, top, right, bottom = box
    columns = [left, right - width]
    rows = [top, bottom - height, *range(top + height, bottom - height, height), *range(top - height, -1, -height)]
    places = []
    for y in rows:
        for x in columns:
            x_inside = min(max(x, 0), max(picture_size[0] - width, 0))
            y_inside = min(max(y, 0), max(picture_size[1] - height, 0))
            places.append((x_inside, y_inside, x_inside + width, y_inside + height))
    return next((place for place in places if not any(_overlap(place, other) for other in taken)), places[0])


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def draw_proposals(
    picture: Image.Image, boxes_image_px: NDArray[np.floating], image_size: tuple[int, int]
) -> tuple[Image.Image, int]:
    """A copy of the picture of a whole image with its proposals in thin lines, and how many of them it shows.

    Args:
        picture: The image, perhaps shrunk; RGB.
        boxes_image_px: In pixels of the image itself, shape (M, 4).
        image_size: Width and height of the image itself, in pixels.
    """
    shown = boxes_image_px[:: max(1, math.ceil(len(boxes_image_px) / MAX_PROPOSALS))]
    drawn = picture.copy()
    pen = ImageDraw.Draw(drawn)
    for box in (shown / np.array([*image_size, *image_size])).tolist():
        left, top, right, bottom = rectangle_of(box, picture.size)
        pen.rectangle((left, top, right - 1, bottom - 1), outline=PROPOSAL_COLOUR)
    return drawn, len(shown)
