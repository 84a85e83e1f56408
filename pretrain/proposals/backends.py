"""The generators of raw proposals, one interface: scikit-image with our grouping, and OpenCV's two.

`skimage` reproduces the generator that the released SoCo weights were trained with (hologerry/SoCo@624a70d
selective_search/) and is the default. The paper's App. A.1 names scale 500 and min_size 10 instead of 300 and 100.

OpenCV's generator is only in the wheels whose name contains "contrib". All four OpenCV wheels own the same module cv2,
so only one of them may be installed; after a plain wheel has overwritten a contrib one, `cv2.ximgproc` still exists
and is empty. The test is therefore for `cv2.ximgproc.segmentation`.

OpenCV ranks its boxes by C's `rand()`, whose state depends on all images before and which `cv2.setRNGSeed` does not
reach; the set of boxes does not depend on it. They are returned sorted, so that the order carries no chance.
"""

import dataclasses
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pretrain.proposals.selective_search import selective_search

_SKIMAGE_DEFAULTS = (300.0, 0.9, 100)  # scale, sigma, min_size


@dataclasses.dataclass(frozen=True)
class SearchParams:
    """How proposals are generated. The defaults are those of the released weights.

    Attributes:
        backend: Key of `BACKENDS`.
        scale: `skimage` only: k of the segmentation; higher means larger first regions.
        sigma: `skimage` only: blur before the segmentation, pixels.
        min_size: `skimage` only: least area of a first region, pixels.
        max_side: Images with a longer side are shrunk to it before the search, and their boxes scaled back; None never
            shrinks (as the authors).

    Raises:
        ValueError: If a value is out of range, or one is set that the backend does not take.
    """

    backend: str = "skimage"
    scale: float = 300.0
    sigma: float = 0.9
    min_size: int = 100
    max_side: int | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"no backend {self.backend!r} for proposals: choose one of {', '.join(BACKENDS)}")
        if self.scale <= 0 or self.sigma < 0 or self.min_size < 1:
            raise ValueError(
                f"scale {self.scale}, sigma {self.sigma}, min_size {self.min_size}: scale must be above 0, sigma at "
                "least 0, min_size at least 1"
            )
        if self.max_side is not None and self.max_side < 32:
            raise ValueError(f"max_side {self.max_side} is less than 32 pixels: too small an image to find objects in")
        if BACKENDS[self.backend].constants and (self.scale, self.sigma, self.min_size) != _SKIMAGE_DEFAULTS:
            raise ValueError(
                f"backend {self.backend!r} has constants of its own ({dict(BACKENDS[self.backend].constants)}) and "
                f"takes no scale, sigma or min_size: leave them at {_SKIMAGE_DEFAULTS} or choose backend 'skimage'"
            )

    def as_dict(self) -> dict[str, Any]:
        """What determines the boxes, as JSON values: the backend, its own constants, and max_side."""
        own = BACKENDS[self.backend].constants or {
            "scale": float(self.scale),
            "sigma": float(self.sigma),
            "min_size": self.min_size,
        }
        return {"backend": self.backend, **own, "max_side": self.max_side}


class Backend(NamedTuple):
    """One generator.

    Attributes:
        search: (image (H, W, 3) uint8 RGB, params) -> raw boxes (R, 4), before any scaling back.
        check: Raises ValueError with the remedy if what it needs is not installed.
        distributions: The installed packages that determine the boxes, besides this one.
        constants: What the generator runs with if `SearchParams` has no say in it.
    """

    search: Callable[[NDArray[np.uint8], SearchParams], NDArray[np.int64]]
    check: Callable[[], None]
    distributions: tuple[str, ...]
    constants: Mapping[str, float]


def check_available(params: SearchParams) -> None:
    """Refuse a backend that is not installed.

    Raises:
        ValueError: If it is not, with the command that installs it.
    """
    BACKENDS[params.backend].check()


def versions(params: SearchParams) -> dict[str, str]:
    """Versions of the libraries that determine the boxes, by name; those of another version may differ.

    Raises:
        ValueError: If the backend is not installed.
    """
    check_available(params)
    found = {name: importlib.metadata.version(name) for name in BACKENDS[params.backend].distributions}
    if params.backend != "skimage":
        found["opencv"] = str(importlib.import_module("cv2").__version__)  # the wheel has one of four names
    if params.max_side is not None:
        found["Pillow"] = importlib.metadata.version("Pillow")
    return found


def propose(image: NDArray[np.uint8], params: SearchParams) -> NDArray[np.int64]:
    """Raw proposals of an image, the same for the same pixels, whatever was searched before.

    Args:
        image: RGB, (H, W, 3), at least one pixel.
        params: Which generator, and how.

    Returns:
        (R, 4), (x1, y1, x2, y2), edges in image pixels: 0 <= x1 < x2 <= W. Duplicates are kept.

    Raises:
        ValueError: If the image is of another kind, or the backend is not installed.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"expected an RGB image, uint8 of shape (H, W, 3), got {image.dtype} of {image.shape}")
    check_available(params)
    height, width = image.shape[:2]
    if params.max_side is None or max(height, width) <= params.max_side:
        return BACKENDS[params.backend].search(image, params)

    shrink = params.max_side / max(height, width)
    small_width, small_height = max(1, round(width * shrink)), max(1, round(height * shrink))
    small = Image.fromarray(image).resize((small_width, small_height), Image.Resampling.BOX)
    boxes = BACKENDS[params.backend].search(np.asarray(small), params)
    image_size, small_size = np.array([width, height] * 2), np.array([small_width, small_height] * 2)
    # To the nearest edge, in whole numbers.
    scaled: NDArray[np.int64] = (2 * boxes * image_size + small_size) // (2 * small_size)
    return scaled


def _search_skimage(image: NDArray[np.uint8], params: SearchParams) -> NDArray[np.int64]:
    return selective_search(image, scale=params.scale, sigma=params.sigma, min_size=params.min_size)


def _check_skimage() -> None:
    try:
        importlib.import_module("skimage.segmentation")
        importlib.import_module("skimage.feature")
    except ImportError as error:
        raise ValueError(
            f"proposals by backend 'skimage' need scikit-image, which cannot be imported ({error}): install it with "
            '`pip install "detco[proposals]"`, or from a checkout `pip install -e ".[proposals]"`'
        ) from error


OPENCV_SINGLE = {"k": 200, "sigma": 0.8}
"""OpenCV's defaults of `switchToSingleStrategy`: one segmentation, all cues together."""

OPENCV_FAST = {"base_k": 150, "inc_k": 150, "sigma": 0.8}
"""OpenCV's defaults of `switchToSelectiveSearchFast`: two colour spaces, two scales, two sets of cues."""


def _search_opencv_single(image: NDArray[np.uint8], _: SearchParams) -> NDArray[np.int64]:
    return _search_opencv(image, lambda search: search.switchToSingleStrategy(**OPENCV_SINGLE))


def _search_opencv_fast(image: NDArray[np.uint8], _: SearchParams) -> NDArray[np.int64]:
    return _search_opencv(image, lambda search: search.switchToSelectiveSearchFast(**OPENCV_FAST))


def _search_opencv(image: NDArray[np.uint8], choose_strategy: Callable[[Any], None]) -> NDArray[np.int64]:
    segmentation = importlib.import_module("cv2").ximgproc.segmentation
    search = segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(image[:, :, ::-1]))  # OpenCV's order is BGR
    choose_strategy(search)
    boxes = np.asarray(search.process(), dtype=np.int64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # (x, y, width, height) of true extent
    return boxes[np.lexsort(boxes.T[::-1])]


def _check_opencv() -> None:
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError as error:
        raise ValueError(
            f"proposals by OpenCV need the module cv2, which cannot be imported ({error}): {_ONE_WHEEL}"
        ) from error
    if not hasattr(getattr(cv2, "ximgproc", None), "segmentation"):
        raise ValueError(
            f"proposals by OpenCV need cv2.ximgproc.segmentation, which this cv2 {cv2.__version__} lacks: {_ONE_WHEEL}"
        )


_ONE_WHEEL = (
    "it is only in the wheels named contrib, and of the four OpenCV wheels only one may be installed, as all own the "
    "module cv2. Run `pip uninstall opencv-python opencv-python-headless opencv-contrib-python "
    "opencv-contrib-python-headless` and then `pip install opencv-contrib-python-headless`, or choose backend 'skimage'"
)

BACKENDS: dict[str, Backend] = {
    "skimage": Backend(_search_skimage, _check_skimage, ("scikit-image", "scipy", "numpy"), {}),
    "opencv_single": Backend(_search_opencv_single, _check_opencv, (), OPENCV_SINGLE),
    "opencv_fast": Backend(_search_opencv_fast, _check_opencv, (), OPENCV_FAST),
}
"""The generators by name; the first is the default."""
