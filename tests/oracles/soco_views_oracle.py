"""Boxes and views of SoCo the slow way: pixel by pixel, and read off painted images."""

import numpy as np


def box_of_pixels(box_px, crop, is_flipped):
    """Send every pixel of a whole-numbered box through crop, resize and flip; the edges of what arrives, in fractions.

    `crop` is (top, left, height, width). None if no pixel lies in it.
    """
    top, left, height, width = crop
    x1, y1, x2, y2 = box_px
    arrived = []
    for x in range(x1, x2):
        for y in range(y1, y2):
            column, row = x - left, y - top
            if not (0 <= column < width and 0 <= row < height):
                continue
            if is_flipped:
                column = width - 1 - column
            arrived.append((column / width, row / height, (column + 1) / width, (row + 1) / height))
    if not arrived:
        return None
    edges = np.array(arrived)
    return np.concatenate((edges[:, :2].min(0), edges[:, 2:].max(0)))


def painted(height, width, box_px, mark_px):
    """A black image (3, H, W) with a red box and, in the green channel, a mark of one pixel (x, y)."""
    image = np.zeros((3, height, width), dtype=np.uint8)
    x1, y1, x2, y2 = box_px
    image[0, y1:y2, x1:x2] = 255
    image[1, mark_px[1], mark_px[0]] = 255
    return image


def extent(channel):
    """Edges (x1, y1, x2, y2) in pixels of what is at least half as bright as the brightest pixel."""
    rows, columns = np.nonzero(channel > channel.max() / 2)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=np.float64)


def covered(size, rectangles_view):
    """Which pixels of a (size, size) view have their centre in one of the rectangles."""
    result = np.zeros((size, size), dtype=bool)
    for row in range(size):
        for column in range(size):
            x, y = (column + 0.5) / size, (row + 0.5) / size
            result[row, column] = any(x1 < x < x2 and y1 < y < y2 for x1, y1, x2, y2 in rectangles_view)
    return result


def level(size_px, level_max_sizes):
    """The first level whose threshold is not exceeded, or -1."""
    for index, largest in enumerate(level_max_sizes):
        if size_px <= largest:
            return index
    return -1
