"""The generators behind one interface: parameters, what is missing, determinism, shrunk images."""

import importlib.util
import sys
from types import ModuleType

import cv2
import numpy as np
import pytest
from PIL import Image

from pretrain.proposals.backends import BACKENDS, SearchParams, check_available, propose, versions
from pretrain.proposals.selective_search import selective_search

NEEDS_SKIMAGE = pytest.mark.skipif(
    importlib.util.find_spec("skimage") is None, reason="scikit-image is missing: install the extra [proposals]"
)
NEEDS_OPENCV = pytest.mark.skipif(
    not hasattr(getattr(cv2, "ximgproc", None), "segmentation"),
    reason="cv2.ximgproc.segmentation is missing: this OpenCV wheel is not a contrib one",
)
EACH_BACKEND = pytest.mark.parametrize(
    "backend",
    [pytest.param(name, marks=NEEDS_SKIMAGE if name == "skimage" else NEEDS_OPENCV) for name in BACKENDS],
)


@pytest.fixture(scope="module")
def photos(photo_dir):
    return [np.asarray(Image.open(path)) for path in sorted(photo_dir.glob("*.jpg"))[:4]]


@EACH_BACKEND
def test_the_same_image_has_the_same_boxes_in_whatever_order_images_come(backend, photos):
    params = SearchParams(backend=backend)
    forth = [propose(photo, params) for photo in photos]
    back = [propose(photo, params) for photo in reversed(photos)][::-1]
    for one, other in zip(forth, back, strict=True):
        assert np.array_equal(one, other)
    assert sum(map(len, forth)) > 20


@EACH_BACKEND
def test_boxes_lie_within_the_image_and_cover_a_clear_rectangle(backend):
    image = np.full((150, 200, 3), 220, np.uint8)
    image[30:110, 50:170] = (20, 90, 200)
    boxes = propose(image, SearchParams(backend=backend))
    assert boxes.dtype == np.int64
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    assert (boxes[:, 2:] <= (200, 150)).all()
    assert np.abs(boxes - (50, 30, 170, 110)).max(axis=1).min() <= 2


@EACH_BACKEND
@pytest.mark.parametrize("shape", [(1, 1), (3, 400)])
def test_tiny_and_thin_images_work(backend, shape):
    assert len(propose(np.full((*shape, 3), 128, np.uint8), SearchParams(backend=backend))) >= 1


@NEEDS_SKIMAGE
def test_the_default_is_the_search_of_the_released_weights(photos):
    expected = selective_search(photos[0], scale=300, sigma=0.9, min_size=100)
    assert np.array_equal(propose(photos[0], SearchParams()), expected)
    assert next(iter(BACKENDS)) == SearchParams().backend == "skimage"


@NEEDS_SKIMAGE
def test_boxes_of_a_shrunk_image_are_those_of_the_small_one_scaled_back():
    rng = np.random.default_rng(0)
    small = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((80, 60)))
    large = small.repeat(5, axis=0).repeat(5, axis=1)  # shrinking by means gives the small one back exactly
    shrunk = propose(large, SearchParams(max_side=80))
    assert np.array_equal(shrunk, 5 * propose(small, SearchParams()))
    assert len(shrunk) > 3
    assert not np.array_equal(shrunk, propose(large, SearchParams()))
    assert np.array_equal(propose(small, SearchParams(max_side=80)), propose(small, SearchParams()))


@NEEDS_SKIMAGE
def test_boxes_are_scaled_back_to_the_nearest_edge_if_the_image_does_not_divide():
    coarse = np.random.default_rng(0).integers(0, 256, (7, 13, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((211, 97))
    boxes = propose(np.asarray(image), SearchParams(max_side=80))
    small = propose(np.asarray(image.resize((80, 37), Image.Resampling.BOX)), SearchParams())
    assert np.array_equal(boxes, np.rint(small * np.tile([211 / 80, 97 / 37], 2)))
    assert len(boxes) > 3
    assert (boxes.min(axis=0)[:2] == 0).all()
    assert (boxes.max(axis=0)[2:] == (211, 97)).all()
    assert (boxes[:, :2] < boxes[:, 2:]).all()


@NEEDS_SKIMAGE
def test_what_determines_the_boxes_is_recorded():
    expected = {"backend": "skimage", "scale": 300.0, "sigma": 0.9, "min_size": 100, "max_side": None}
    assert SearchParams().as_dict() == expected
    assert SearchParams(scale=300).as_dict() == expected
    fast = {"backend": "opencv_fast", "base_k": 150, "inc_k": 150, "sigma": 0.8, "max_side": 256}
    assert SearchParams(backend="opencv_fast", max_side=256).as_dict() == fast
    assert set(versions(SearchParams())) == {"scikit-image", "scipy", "numpy"}
    assert set(versions(SearchParams(max_side=256))) == {"scikit-image", "scipy", "numpy", "Pillow"}


@NEEDS_OPENCV
def test_the_version_of_opencv_is_recorded_whatever_the_wheel_is_called():
    assert versions(SearchParams(backend="opencv_single")) == {"opencv": cv2.__version__}


@pytest.mark.parametrize("backend", ["opencv_single", "opencv_fast"])
def test_an_opencv_without_the_search_is_refused_with_the_one_wheel_rule(backend, photos, monkeypatch):
    plain = ModuleType("cv2")
    plain.__version__ = "5.0.0"
    plain.ximgproc = ModuleType("ximgproc")  # the empty shell that a plain wheel over a contrib one leaves
    monkeypatch.setitem(sys.modules, "cv2", plain)
    params = SearchParams(backend=backend)
    for refused in (lambda: check_available(params), lambda: versions(params), lambda: propose(photos[0], params)):
        with pytest.raises(ValueError, match=r"this cv2 5\.0\.0 lacks.*only one.*pip install opencv-contrib-python-"):
            refused()


def test_a_missing_opencv_is_refused_with_the_same_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match=r"module cv2, which cannot be imported.*or choose backend 'skimage'"):
        check_available(SearchParams(backend="opencv_single"))


def test_a_missing_scikit_image_is_refused_with_the_command_that_installs_it(photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    for refused in (lambda: check_available(SearchParams()), lambda: propose(photos[0], SearchParams())):
        with pytest.raises(ValueError, match=r"scikit-image") as refusal:
            refused()
        assert 'pip install "detco[proposals]"' in str(refusal.value)
        assert 'pip install -e ".[proposals]"' in str(refusal.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backend": "opencv"}, "no backend 'opencv'.*skimage, opencv_single, opencv_fast"),
        ({"scale": 0.0}, "scale 0.0"),
        ({"sigma": -1.0}, "sigma -1.0"),
        ({"min_size": 0}, "min_size 0"),
        ({"max_side": 31}, "max_side 31"),
        ({"backend": "opencv_fast", "scale": 500.0}, "takes no scale.*choose backend 'skimage'"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SearchParams(**values)


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((3, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)],
)
def test_what_is_no_rgb_image_is_refused(image):
    with pytest.raises(ValueError, match=r"uint8 of shape \(H, W, 3\)"):
        propose(image, SearchParams())
