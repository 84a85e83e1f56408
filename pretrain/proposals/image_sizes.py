"""The size that a decoded image will have, from the header of its file."""

import io
import warnings

from PIL import ExifTags, Image

from detco.views.photo import MAX_PIXELS

_ON_THEIR_SIDE = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


def decoded_size(data: bytes) -> tuple[int, int]:
    """(width, height) of `detco.views.photo.decode` of a file's bytes, without decoding pixels where the format allows.

    Returns (0, 0) if the header cannot be read, or has more pixels than `decode` takes. What is damaged further on is
    not noticed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    return 0, 0
                return (height, width) if _orientation(image) in _ON_THEIR_SIDE else (width, height)
    except Exception:  # as in decode: damaged files make Pillow raise nearly anything
        return 0, 0


def _orientation(image: Image.Image) -> int | None:
    try:
        orientation: int | None = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # decode takes an image whose EXIF block cannot be parsed as it lies
        return None
    return orientation
