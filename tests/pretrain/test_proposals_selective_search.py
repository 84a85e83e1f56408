"""The vectorised grouping against a slow one, and what the whole search finds."""

import importlib.util
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.proposals.selective_search import group, selective_search, texture_codes

REAL = Path(os.environ.get("DETCO_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
AS_RELEASED = {"scale": 300.0, "sigma": 0.9, "min_size": 100}


def load_oracle():
    path = Path(__file__).parents[1] / "oracles" / "selective_search_oracle.py"
    spec = importlib.util.spec_from_file_location("selective_search_oracle", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = load_oracle()


def random_map(rng, height, width, num_regions):
    """Each pixel joins the nearest of random points (a Voronoi map), the regions numbered at random without gaps."""
    points = rng.integers(0, (height, width), (num_regions, 2))
    places = np.stack(np.indices((height, width)), axis=-1)[:, :, None]
    nearest = np.square(places - points).sum(-1).argmin(-1)
    return np.unique(rng.permutation(num_regions)[nearest], return_inverse=True)[1].reshape(height, width)


def assert_equal_to_oracle(labels, image, texture):
    boxes = group(labels, image.max(2), texture)
    expected = oracle.group_slowly(labels.tolist(), image.tolist(), texture.tolist())
    assert [tuple(box) for box in boxes.tolist()] == expected
    return boxes


@pytest.mark.parametrize("seed", range(12))
def test_grouping_random_maps_equals_the_slow_oracle_box_for_box(seed):
    rng = np.random.default_rng(seed)
    height, width, num_regions = rng.integers((6, 6, 2), (40, 40, 30))
    labels = random_map(rng, height, width, num_regions)
    image, texture = rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    boxes = assert_equal_to_oracle(labels, image, texture)
    assert len(boxes) > labels.max() + 1 or num_regions < 8  # something was merged


@pytest.mark.parametrize("seed", range(8))
def test_equal_similarities_are_merged_as_stated(seed):
    # Equal tiles of one colour: dozens of pairs are equally similar at every merge.
    rng = np.random.default_rng(seed)
    labels = random_map(rng, 30, 30, 25)[rng.permutation(30)][:, rng.permutation(30)]  # boxes that overlap a lot
    image = np.full((30, 30, 3), 90, np.uint8)
    assert len(assert_equal_to_oracle(labels, image, image)) > 40


@pytest.mark.parametrize("seed", range(4))
def test_similarities_that_differ_in_the_last_bits_only_are_told_apart_as_stated(seed):
    # 20 scattered regions of 7 pixels and few values: shares of k / 7, whose sums are equal or nearly so.
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(20), 7)).reshape(10, 14)
    image, texture = rng.choice(np.array([0, 60, 120, 180, 240], np.uint8), (2, 10, 14, 3))
    assert_equal_to_oracle(labels, image, texture)


def test_scattered_regions_of_single_pixels_equal_the_slow_oracle():
    rng = np.random.default_rng(0)
    labels = np.unique(rng.integers(0, 30, (15, 20)), return_inverse=True)[1].reshape(15, 20)
    image, texture = rng.integers(0, 256, (2, 15, 20, 3), dtype=np.uint8)
    assert_equal_to_oracle(labels, image, texture)


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} does not exist; set $DETCO_TEST_DATA")
@pytest.mark.parametrize("name", ["coco_animals/valid", "unlabelled_photos/hat", "unlabelled_photos/pants"])
def test_grouping_real_photos_equals_the_slow_oracle_box_for_box(name):
    pytest.importorskip("skimage")
    from skimage.segmentation import felzenszwalb

    photo = Image.open(min((REAL / name).glob("*.jpg"))).convert("RGB").resize((160, 120))
    image = np.asarray(photo)
    labels = felzenszwalb(image, scale=50, sigma=0.9, min_size=30)
    boxes = assert_equal_to_oracle(labels, image, texture_codes(image))
    assert len(boxes) > 40


def test_bins_are_those_of_a_histogram_over_0_to_255():
    # The oracle's rule against NumPy's histogram, which the authors call; the grouping is held to the oracle's above.
    values = np.arange(256)
    for num_bins in (25, 10):
        expected = np.histogram_bin_edges([], num_bins, (0.0, 255.0)).searchsorted(values, side="right") - 1
        assert [oracle.bin_of(int(value), num_bins) for value in values] == np.minimum(expected, num_bins - 1).tolist()


def test_two_regions_merge_only_if_a_corner_of_the_later_lies_inside_the_earlier():
    image = np.zeros((12, 12, 3), np.uint8)

    halves = np.repeat([0, 1], [8 * 12, 4 * 12]).reshape(12, 12)
    assert group(halves, image[..., 0], image).tolist() == [[0, 0, 12, 8], [0, 8, 12, 12]]
    # The lower half reaches up, but its box is as wide as the image: its corners lie on the sides, not inside.
    halves[4:8, 3:6] = 1
    assert group(halves, image[..., 0], image).tolist() == [[0, 0, 12, 8], [0, 4, 12, 12]]

    inner = np.zeros((12, 12), np.int64)
    inner[4:8, 4:8] = 1
    assert group(inner, image[..., 0], image).tolist() == [[0, 0, 12, 12], [4, 4, 8, 8], [0, 0, 12, 12]]
    # One more column, and the inner box ends with the outer one: its left corners still are inside.
    inner[4:8, 4:] = 1
    assert group(inner, image[..., 0], image).tolist() == [[0, 0, 12, 12], [4, 4, 12, 8], [0, 0, 12, 12]]


def test_an_earlier_region_that_pokes_into_a_later_one_is_no_neighbour():
    # T: its foot (rows 4-6, columns 4-7) has both lower corners inside the box of the region below.
    labels = np.full((10, 12), 1)
    labels[:4] = 2
    labels[:7, 4:8] = 0
    labels[0, 3:9] = 0
    boxes = group(labels, np.zeros((10, 12), np.uint8), np.zeros((10, 12, 3), np.uint8)).tolist()
    stem, below = [3, 0, 9, 7], [0, 4, 12, 10]
    assert stem in boxes
    assert below in boxes
    assert [0, 0, 12, 10] not in boxes[:3]
    assert oracle.group_slowly(labels, np.zeros((10, 12, 3), int), np.zeros((10, 12, 3), int)) == [
        tuple(box) for box in boxes
    ]


def test_clear_rectangles_are_found():
    pytest.importorskip("skimage")
    rng = np.random.default_rng(0)
    image = np.full((240, 320, 3), 200, np.int64)
    rectangles = [(30, 40, 110, 150), (150, 60, 290, 120), (140, 150, 220, 220)]
    for (x1, y1, x2, y2), colour in zip(rectangles, [(200, 30, 30), (20, 90, 30), (20, 20, 160)], strict=True):
        image[y1:y2, x1:x2] = colour
    image += rng.integers(-6, 7, image.shape)
    boxes = selective_search(np.clip(image, 0, 255).astype(np.uint8), **AS_RELEASED)
    for rectangle in rectangles:
        assert max(iou(rectangle, box) for box in boxes) > 0.9


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


@pytest.mark.parametrize(
    ("shape", "values"),
    [((1, 1), "one"), ((2, 1500), "noise"), ((1500, 2), "one"), ((90, 120), "one"), ((90, 120), "grey")],
)
def test_odd_images_have_boxes_within_them(shape, values):
    pytest.importorskip("skimage")
    rng = np.random.default_rng(0)
    image = {
        "one": np.full((*shape, 3), 90),
        "noise": rng.integers(0, 256, (*shape, 3)),
        "grey": np.repeat(rng.integers(0, 256, (*shape, 1)), 3, axis=2),
    }[values].astype(np.uint8)
    boxes = selective_search(image, **AS_RELEASED)
    assert len(boxes) >= 1
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    assert (boxes[:, 2:] <= (shape[1], shape[0])).all()


def test_many_regions_around_one_need_little_memory():
    # 600 tiles of 4 x 4 pixels on a background, whose box holds them all: it grows by one of them at every merge.
    rows, columns = np.indices((121, 181))
    labels = np.where((rows % 6 > 1) & (columns % 6 > 1), rows // 6 * 30 + columns // 6 + 1, 0)
    image = np.full((*labels.shape, 3), 90, np.uint8)
    tracemalloc.start()
    boxes = group(labels, image.max(2), image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(boxes) == 2 * 601 - 1
    assert peak < 5e6  # keeping the similarities of regions that are gone would be 11e6
