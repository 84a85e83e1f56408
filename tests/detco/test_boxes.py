"""Boxes: every change of frame against pixels that are moved one by one."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from detco.boxes import area, clip, mirror, overlap_area, scale, to_view


def load_oracle():
    path = Path(__file__).parents[1] / "oracles" / "soco_views_oracle.py"
    spec = importlib.util.spec_from_file_location("soco_views_oracle", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = load_oracle()


def random_box(rng, width, height):
    """A box of whole pixels inside an image, often one pixel wide or reaching its edges."""
    x1, x2 = np.sort(rng.choice(width + 1, 2, replace=False))
    y1, y2 = np.sort(rng.choice(height + 1, 2, replace=False))
    return int(x1), int(y1), int(x2), int(y2)


@pytest.mark.parametrize("seed", range(60))
def test_crop_resize_and_flip_send_a_box_where_its_pixels_go(seed):
    rng = np.random.default_rng(seed)
    width, height = rng.integers(1, 40, 2)
    box_px, (left, top, right, bottom) = random_box(rng, width, height), random_box(rng, width, height)
    is_flipped = bool(seed % 2)
    window = (left, top, right, bottom)
    boxes_view = to_view(clip(np.array([box_px], dtype=np.float64), window), window)
    if is_flipped:
        boxes_view = mirror(boxes_view)
    expected = oracle.box_of_pixels(box_px, (top, left, bottom - top, right - left), is_flipped)
    if expected is None:
        assert area(boxes_view)[0] == 0
    else:
        assert np.allclose(boxes_view[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_the_overlap_area_counts_the_pixels_that_are_in_both(seed):
    rng = np.random.default_rng(seed)
    first, second = random_box(rng, 20, 12), random_box(rng, 20, 12)
    masks = np.zeros((2, 12, 20), dtype=bool)
    for mask, (x1, y1, x2, y2) in zip(masks, (first, second), strict=True):
        mask[y1:y2, x1:x2] = True
    assert overlap_area(np.array([first], dtype=np.float64), second)[0] == masks.all(0).sum()
    assert area(np.array(first, dtype=np.float64)) == masks[0].sum()


def test_boxes_that_touch_an_edge_from_outside_do_not_overlap():
    boxes_px = np.array([[0.0, 0, 10, 10], [20, 0, 30, 10], [10, 10, 20, 20], [40, 40, 50, 50]])
    assert overlap_area(boxes_px, (10, 0, 20, 10)).tolist() == [0, 0, 0, 0]
    assert area(clip(boxes_px, (10, 0, 20, 10))).tolist() == [0, 0, 0, 0]


def test_the_whole_window_is_exactly_the_unit_square():
    for size in range(1, 400):
        assert to_view(np.array([[7.0, 5.0, 7 + size, 5 + 2 * size]]), (7, 5, 7 + size, 5 + 2 * size)).tolist() == [
            [0, 0, 1, 1]
        ]


def test_resizing_scales_each_axis_by_its_own_factor():
    assert scale(np.array([1.0, 2.0, 3.0, 4.0]), 2.0, 10.0).tolist() == [2, 20, 6, 40]


def test_mirroring_twice_gives_the_box_back_and_leaves_the_argument_alone():
    boxes_view = np.array([[[0.125, 0.25, 0.5, 0.75]], [[0.0, 0.0, 1.0, 1.0]]])
    before = boxes_view.copy()
    assert mirror(boxes_view)[0].tolist() == [[0.5, 0.25, 0.875, 0.75]]
    assert np.array_equal(mirror(mirror(boxes_view)), before)
    assert np.array_equal(boxes_view, before)
