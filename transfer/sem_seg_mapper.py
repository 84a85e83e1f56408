"""Training samples for semantic segmentation: random scale, then a crop of fixed size, then a flip.

Detectron2's mapper crops before it resizes, so its samples have no fixed size. Its FixedSizeCrop is not used either: it
draws one number for both axes, hence crops along the image's diagonal only, and in v0.5 it labels the padding with 0,
a class.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from transfer import d2

d2.require()

from detectron2.data import DatasetMapper  # noqa: E402
from detectron2.data import transforms as T  # noqa: E402
from detectron2.data.detection_utils import build_augmentation  # noqa: E402


class Window(T.Transform):  # type: ignore[misc]  # Detectron2 is not followed
    """A window of fixed size; what lies below or right of the image is filled.

    Attributes:
        x: Left edge in the image, pixels.
        y: Upper edge.
        size: Height and width.
        colour: Fill of images, one grey level (0-255) per channel.
        label: Fill of labels.
    """

    def __init__(self, x: int, y: int, size: tuple[int, int], colour: tuple[float, ...], label: int) -> None:
        super().__init__()
        self.x = x
        self.y = y
        self.size = size
        self.colour = colour
        self.label = label

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Cut the window out of an image (H, W, C)."""
        fill = np.asarray(self.colour)
        fill = np.rint(fill) if np.issubdtype(img.dtype, np.integer) else fill
        return self._cut(img, np.broadcast_to(fill.astype(img.dtype), (*self.size, img.shape[2])))

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Cut the window out of labels (H, W)."""
        return self._cut(segmentation, np.full(self.size, self.label, dtype=segmentation.dtype))

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Points (N, 2), as x and y, in the window's coordinates."""
        moved: np.ndarray = coords - (self.x, self.y)
        return moved

    def _cut(self, whole: np.ndarray, background: np.ndarray) -> np.ndarray:
        height, width = self.size
        part = whole[self.y : self.y + height, self.x : self.x + width]
        window: np.ndarray = background.copy()
        window[: part.shape[0], : part.shape[1]] = part
        return window


class RandomWindow(T.Augmentation):  # type: ignore[misc]
    """A `Window` at a uniformly random place inside the image; at 0 along an axis on which the image is smaller."""

    def __init__(self, size: tuple[int, int], colour: tuple[float, ...], label: int) -> None:
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Window:
        """Draw the place, from numpy's global generator as all of Detectron2's augmentations do."""
        y, x = (
            int(np.random.randint(max(side - window, 0) + 1))
            for side, window in zip(image.shape[:2], self.size, strict=True)
        )
        return Window(x, y, self.size, self.colour, self.label)


def sem_seg_scale_crop(cfg: Any) -> Callable[[dict[str, Any]], Any]:
    """The mapper of TRANSFER.MAPPER "sem_seg_scale_crop".

    Detectron2's keys keep their meaning: INPUT.MIN_SIZE_TRAIN and its sampling draw the scale (the short side, in
    pixels), INPUT.CROP.SIZE is the crop's height and width in pixels, INPUT.RANDOM_FLIP the flip. Only the order is
    another. What the image does not fill has the colour MODEL.PIXEL_MEAN and the label MODEL.SEM_SEG_HEAD.IGNORE_VALUE.

    Raises:
        ValueError: If INPUT.CROP does not state a size in pixels.
    """
    crop = cfg.INPUT.CROP
    is_in_pixels = len(crop.SIZE) == 2 and all(isinstance(side, int) and side > 0 for side in crop.SIZE)
    if not crop.ENABLED or crop.TYPE != "absolute" or not is_in_pixels:
        raise ValueError(
            f"INPUT.CROP is ENABLED {crop.ENABLED}, TYPE {crop.TYPE}, SIZE {list(crop.SIZE)}; TRANSFER.MAPPER "
            "sem_seg_scale_crop needs ENABLED True, TYPE absolute and SIZE [HEIGHT, WIDTH] in pixels, say [769, 769]"
        )
    window = RandomWindow(tuple(crop.SIZE), tuple(cfg.MODEL.PIXEL_MEAN), cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)
    resize, *flip = build_augmentation(cfg, is_train=True)
    mapper: Callable[[dict[str, Any]], Any] = DatasetMapper(
        is_train=True, augmentations=[resize, window, *flip], image_format=cfg.INPUT.FORMAT
    )
    return mapper
