"""Image files as the views need them: their size at once, their pixels when it is known which crops are cut.

A JPEG is stored as frequencies, so libjpeg makes an image of half, a quarter or an eighth of its sides for a fraction
of the work. Which crops a sample needs follows from its random numbers alone: a recipe draws all of them first and asks
for the crops together, and a photo much larger than the views is decoded no larger than they need.

JPEGs are decoded by simplejpeg where it is installed and by Pillow where it is not. Both are libjpeg-turbo and give the
same pixels, so a run does not depend on which it was.

Shape legend:
    H, W  height and width of the image, in pixels, as it is looked at (after its EXIF orientation)
    S     side of a resized crop, in pixels

Departure from decoding in full, which all published recipes do: where the photo is reduced, the edges of a crop lie on
whole pixels of the reduced image, so they move by half a pixel of the finished crop at most (by one more where EXIF
mirrors a photo whose sides the reduction does not divide); and its pixels have been averaged over blocks before they
are resized. On real photos the second changes a crop by one grey level (of 255) in the mean, both together by three. A
crop is never reduced below the size it is resized to.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from detco.views.host import CropBox, crop_and_resize

try:
    import simplejpeg
except ImportError:  # Pillow decodes the same pixels in more time
    simplejpeg = None

MAX_PIXELS = 89_478_485
"""Images larger than this are refused. It is where Pillow starts to warn of decompression bombs: 256 MiB of RGB."""

REDUCTIONS = (8, 4, 2)
"""By what a JPEG's sides may be divided as it is decoded, rounded up; the strongest first. A JPEG with a side shorter
than the strongest is not reduced: there the roundings of several reductions meet."""

_ON_THEIR_SIDE = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""


class UnreadableImage(ValueError):
    """The data is no image, is truncated or damaged, or has more than `MAX_PIXELS` pixels."""


class Photo:
    """An image whose size is known, and whose pixels are decoded when its crops are cut.

    Made by `Photo.open` or `Photo.of`.

    Attributes:
        height: H.
        width: W.
    """

    def __init__(
        self, height: int, width: int, load: Callable[[int], Tensor], *, reductions: Sequence[int] = ()
    ) -> None:
        """Wrap `load`, which returns the image (3, H, W), or at 1 / r of its sides for an r of `reductions`."""
        self.height = height
        self.width = width
        self._load = load
        self._reductions = reductions

    @classmethod
    def open(cls, data: bytes) -> "Photo":
        """Read how large an image file says it is: any format and mode that Pillow reads, recognised by content.

        Of a JPEG the header is read. The size of other formats is certain only when they have been decoded, so they
        are decoded here.

        Args:
            data: The whole file.

        Raises:
            UnreadableImage: If that is not possible.
        """
        with _refusals(data):
            image = _open(data)
            if image.format != "JPEG" or image.mode not in ("RGB", "L"):
                # Pixels first: TIFF turns itself upright as it is decoded, and PNG may have its EXIF block at the end.
                return cls.of(_to_tensor(_decode_by_pillow(image), _orientation(image)))
            height, width = image.height, image.width
            orientation = _orientation(image)

        def load(reduction: int) -> Tensor:
            with _refusals(data):
                return _to_tensor(_decode_jpeg(data, height, width, reduction), orientation)

        reductions = REDUCTIONS if min(height, width) >= REDUCTIONS[0] else ()
        if orientation in _ON_THEIR_SIDE:
            return cls(width, height, load, reductions=reductions)
        return cls(height, width, load, reductions=reductions)

    @classmethod
    def of(cls, image: Tensor) -> "Photo":
        """An image that has been decoded.

        Args:
            image: RGB, uint8, shape (3, H, W).

        Raises:
            ValueError: If it is not.
        """
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
            raise ValueError(
                f"expected an RGB image, uint8 of shape (3, H, W), got {image.dtype} of {tuple(image.shape)}"
            )
        return cls(image.shape[1], image.shape[2], lambda reduction: image)

    def pixels(self, reduction: int = 1) -> Tensor:
        """The whole image, decoded: RGB, uint8, shape (3, H, W).

        Args:
            reduction: What H and W are divided by, rounded up: 1, or one of `REDUCTIONS` for a JPEG.

        Raises:
            UnreadableImage: If the data behind its header is truncated or damaged.
        """
        return self._load(reduction)

    def crops(self, wanted: Sequence[tuple[CropBox, int]]) -> list[Tensor]:
        """Cut boxes out and resize each to a square by antialiased bilinear interpolation.

        The image is decoded once, at the smallest size at which every box still has as many pixels as its crop, in
        both axes; in full if there is none.

        Args:
            wanted: Boxes inside the image of H x W pixels, and the side S of each crop.

        Returns:
            For each of them RGB, uint8, shape (3, S, S).

        Raises:
            UnreadableImage: If the data behind its header is truncated or damaged.
        """
        for reduction in self._reductions:
            reduced = [(_reduce(box, reduction), size) for box, size in wanted]
            if all(min(box.height, box.width) >= size for box, size in reduced):
                break
        else:
            reduction, reduced = 1, list(wanted)
        image = self.pixels(reduction)
        return [crop_and_resize(image, box, size) for box, size in reduced]


def decode(data: bytes) -> Tensor:
    """Decode an image file of any format and mode that Pillow reads, in full.

    Transparency is dropped (not blended), 16-bit values keep their upper 8 bits, of animations the first frame is
    taken, and the EXIF orientation is applied. The format is recognised by content, never by file name.

    Args:
        data: The whole file.

    Returns:
        RGB, uint8, shape (3, H, W). Its memory lies pixel by pixel (channels last), which is what resizing likes.

    Raises:
        UnreadableImage: If that is not possible.
    """
    return Photo.open(data).pixels()


def _reduce(box: CropBox, reduction: int) -> CropBox:
    """The box in an image of 1 / reduction of the sides, its edges on the nearest whole pixels."""
    top, left = round(box.top / reduction), round(box.left / reduction)
    bottom, right = round((box.top + box.height) / reduction), round((box.left + box.width) / reduction)
    return CropBox(top, left, bottom - top, right - left)


@contextmanager
def _refusals(data: bytes) -> Iterator[None]:
    """Raise whatever a decoder raises as an UnreadableImage that says how long the data is."""
    start = f"cannot decode image of {len(data)} bytes"
    try:
        yield
    except UnidentifiedImageError as error:  # its own message holds a memory address
        raise UnreadableImage(f"{start}: no image format that Pillow knows") from error
    # Damaged files make decoders raise nearly anything; for the caller there is one fact: it is unreadable.
    except Exception as error:
        raise UnreadableImage(f"{start}: {error}") from error


def _open(data: bytes) -> Image.Image:
    # Pillow warns of odd EXIF blocks and large images; the one does not matter here and the other is refused.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data))
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are more than the {MAX_PIXELS} allowed")
    return image


def _decode_jpeg(data: bytes, height: int, width: int, reduction: int) -> NDArray[np.uint8]:
    """A JPEG in RGB or grey, its sides divided by `reduction` and rounded up, as it lies: shape (H, W, 3)."""
    reduced = (-(-height // reduction), -(-width // reduction))
    if simplejpeg is not None:
        try:
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", min_height=reduced[0], min_width=reduced[1])
        except ValueError:
            pass  # damaged, perhaps so little that Pillow reads it: the verdict has to be one wherever a run is made
        else:
            if pixels.shape[:2] == reduced:
                return pixels
    image = _open(data)
    if reduction > 1:
        image.draft(None, (width // reduction, height // reduction))
    return _decode_by_pillow(image)


def _decode_by_pillow(image: Image.Image) -> NDArray[np.uint8]:
    """RGB as it lies, shape (H, W, 3)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.load()
        return np.array(_to_rgb(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit grey at 255, which turns nearly all of it white.
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(np.clip(values >> 8, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA"):
        # By way of RGBA: the direct conversion mistreats palettes with several transparent entries.
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def _orientation(image: Image.Image) -> int:
    """EXIF's number from 1 (upright) to 8; 1 for an image whose EXIF block cannot be parsed: it is taken as it lies."""
    try:
        orientation: int = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # A damaged side note is no reason to lose the pixels.
        return 1
    return orientation


def _to_tensor(pixels: NDArray[np.uint8], orientation: int) -> Tensor:
    """The image upright, shape (3, H, W), of pixels (H, W, 3) as they lie."""
    if orientation in _ON_THEIR_SIDE:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
