"""What was repaired in a dataset, counted, with the first places; and the checks that VOC and COCO readers share."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

# EXIF orientations that swap width and height (EXIF 2.32, tag 0x0112).
_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)


class DatasetError(ValueError):
    """A dataset that cannot be used as it is; the message says what is wrong, where, and what to change."""


class Tally:
    """Counts repairs by kind and remembers where the first of each kind was."""

    def __init__(self) -> None:
        self._where: dict[str, list[str]] = {}

    def add(self, what: str, where: str) -> None:
        """Note one repair: `what` in the plural ("boxes without area dropped"), `where` a file or an id."""
        self._where.setdefault(what, []).append(where)

    def notes(self) -> list[str]:
        """One sentence for each kind of repair, in the order of their first occurrence."""
        return [f"{len(where)} {what} ({some_of(dict.fromkeys(where))})" for what, where in self._where.items()]


def some_of(names: Iterable[object], limit: int = 5) -> str:
    """The first few names for a message, and how many more there are."""
    listed = [str(name) for name in names]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels as the image is shown, that is, after EXIF rotation. Reads the header only.

    Raises:
        DatasetError: If Pillow cannot read it.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            is_sideways = image.getexif().get(_EXIF_ORIENTATION) in _SIDEWAYS
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some broken PNGs
        raise DatasetError(f"{path} cannot be read as an image: {error}") from error
    return (height, width) if is_sideways else (width, height)


class Box(NamedTuple):
    """A box in image pixels: x1, y1, x2, y2, half-open, origin at the outer corner of the first pixel."""

    x1: float
    y1: float
    x2: float
    y2: float

    def clip(self, width: int, height: int) -> "Box":
        """The part inside an image of this size; without area if there is none."""
        x1, x2 = (min(max(x, 0.0), float(width)) for x in (self.x1, self.x2))
        y1, y2 = (min(max(y, 0.0), float(height)) for y in (self.y1, self.y2))
        return Box(x1, y1, x2, y2)

    def has_area(self) -> bool:
        """False for empty, inverted and non-finite boxes."""
        return all(map(math.isfinite, self)) and self.x2 > self.x1 and self.y2 > self.y1


def repair_box(box: Box, width: int, height: int, tally: Tally, where: str) -> Box | None:
    """Clip a box to its image; None if nothing is left. Every box dropped or cut by more than a pixel is counted."""
    if not box.has_area():
        tally.add("boxes without area dropped", where)
        return None
    clipped = box.clip(width, height)
    if not clipped.has_area():
        tally.add("boxes outside their image dropped", where)
        return None
    # Up to a pixel is rounding (and, in VOC, annotation tools that count from 0): not worth a word.
    if max(abs(a - b) for a, b in zip(box, clipped, strict=True)) > 1.0:
        tally.add("boxes reaching outside their image clipped", where)
    return clipped
