"""Host half of every recipe: decode one image, draw a crop box, cut it out and resize it. Runs in loader workers.

Shape legend:
    H, W  height and width of the decoded image, in pixels
    S     side of the resized crop, in pixels

Source: crops as in torchvision's RandomResizedCrop, which MoCo v2 (arXiv:2003.04297) and DetCo (arXiv:2102.04803,
Sec. 3.4) use.
"""

import io
import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

MAX_PIXELS = 89_478_485
"""Images larger than this are refused. It is where Pillow starts to warn of decompression bombs: 256 MiB of RGB."""

CROP_TRIES = 10
"""How often a crop box is drawn before the central one is taken, as in torchvision."""


class CropBox(NamedTuple):
    """A rectangle of whole pixels inside an image."""

    top: int
    left: int
    height: int
    width: int


def sample_generator(*, seed: int, epoch: int, index: int) -> np.random.Generator:
    """The only randomness of one sample, whoever draws it, wherever and in whichever order."""
    return np.random.default_rng((seed, epoch, index))


def decode(data: bytes) -> Tensor:
    """Decode an image file of any format and mode that Pillow reads.

    Transparency is dropped (not blended), 16-bit values keep their upper 8 bits, of animations the first frame is
    taken, and the EXIF orientation is applied. The format is recognised by content, never by file name.

    Args:
        data: The whole file.

    Returns:
        RGB, uint8, shape (3, H, W). Its memory lies pixel by pixel (channels last), which is what resizing likes.

    Raises:
        ValueError: If the data is no image, is truncated or damaged, or has more than `MAX_PIXELS` pixels.
    """
    try:
        # Pillow warns of odd EXIF blocks and large images; the one does not matter here and the other is refused.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width}x{height} pixels are more than the {MAX_PIXELS} allowed")
            image.load()
            rgb = _to_rgb(_upright(image))
    except UnidentifiedImageError as error:  # its own message holds a memory address
        raise ValueError(f"cannot decode image of {len(data)} bytes: no image format that Pillow knows") from error
    # Damaged files make Pillow's decoders raise nearly anything; for the caller there is one fact: it is unreadable.
    except Exception as error:
        raise ValueError(f"cannot decode image of {len(data)} bytes: {error}") from error
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; an image whose EXIF block cannot be parsed is taken as it lies."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # The pixels have been decoded; a damaged side note is no reason to lose them.
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit grey at 255, which turns nearly all of it white.
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(np.clip(values >> 8, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA"):
        # By way of RGBA: the direct conversion mistreats palettes with several transparent entries.
        image = image.convert("RGBA")
    return image.convert("RGB")


def draw_crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> CropBox:
    """Draw the box of a random resized crop.

    Area share uniform in `scale`, width / height log-uniform in `ratio`, position uniform. If ten boxes do not fit
    into the image, the largest central one with an allowed ratio is taken.
    """
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(CROP_TRIES):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        box_width = round(math.sqrt(area * aspect))
        box_height = round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return CropBox(top, left, box_height, box_width)
    return _central_box(height, width, ratio)


def _central_box(height: int, width: int, ratio: tuple[float, float]) -> CropBox:
    box_height, box_width = height, width
    if width / height < ratio[0]:
        box_height = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        box_width = max(1, round(height * ratio[1]))
    return CropBox((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def crop_and_resize(image: Tensor, box: CropBox, size: int) -> Tensor:
    """Cut a box out and resize it to a square by antialiased bilinear interpolation.

    Args:
        image: RGB, uint8, shape (3, H, W).
        box: Inside the image.
        size: S.

    Returns:
        RGB, uint8, shape (3, S, S).
    """
    crop = image[:, box.top : box.top + box.height, box.left : box.left + box.width]
    resized: Tensor = tv.resize(crop, [size, size], interpolation=tv.InterpolationMode.BILINEAR, antialias=True)
    return resized


def check_image(image: Tensor) -> None:
    """Refuse what is not a decoded image.

    Raises:
        ValueError: If it is not uint8 of shape (3, H, W) with at least one pixel.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"expected an RGB image, uint8 of shape (3, H, W), got {image.dtype} of {tuple(image.shape)}")
