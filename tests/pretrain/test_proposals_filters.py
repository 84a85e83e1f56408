"""Which boxes pass, at the limits of every rule, and what is dropped when none does."""

import numpy as np
import pytest

from pretrain.proposals.filters import FilterParams, filter_boxes

AS_RELEASED = FilterParams()


def kept(sides, image=(100, 100), params=AS_RELEASED):
    """Stage, and the (width, height) of the boxes that are left."""
    boxes = np.array([(0, 0, width, height) for width, height in sides], np.int64).reshape(-1, 4)
    filtered = filter_boxes(boxes, *image, params)
    return filtered.stage, [(x2 - x1, y2 - y1) for x1, y1, x2, y2 in filtered.boxes.tolist()]


def test_a_side_of_32_pixels_passes_and_one_of_31_does_not():
    assert kept([(32, 32), (31, 40), (40, 31), (32, 40)]) == (0, [(32, 32), (32, 40)])


@pytest.mark.parametrize(("passes", "fails"), [((99, 33), (100, 33)), ((33, 99), (33, 100))])
def test_an_aspect_of_exactly_3_passes_both_ways(passes, fails):
    assert kept([fails, passes]) == (0, [passes])


def test_size_ratios_of_exactly_0_3_and_0_8_pass():
    assert kept([(60, 60), (59, 60), (160, 160), (161, 160)], (200, 200)) == (0, [(60, 60), (160, 160)])


def test_exact_size_ratios_pass_whatever_the_shapes():
    # (17a) x (17b) in (100a) x (100b) is exactly 0.17, and a last bit less as a root of doubles; 0.47 a bit more.
    rng = np.random.default_rng(0)
    for a, b in rng.integers(1, 30, (100, 2)).tolist():
        image = (100 * a, 100 * b)
        for low, high in ((17, 47), (30, 80)):
            params = FilterParams(min_side_px=1, max_aspect=1000.0, min_size=low / 100, max_size=high / 100)
            exact = [(low * a, low * b), (high * a, high * b)]
            assert kept(exact, image, params) == (0, exact)
            outside = [(low * a - 1, low * b), (high * a, high * b + 1)]
            assert kept(outside, image, params)[0] == 1


def test_the_rules_are_dropped_one_by_one_until_something_is_left():
    strict, small, long, tiny = (100, 100), (40, 40), (40, 190), (31, 190)
    image = (200, 200)
    assert kept([tiny, long, small, strict], image) == (0, [strict])
    assert kept([tiny, long, small], image) == (1, [small])
    assert kept([tiny, long], image) == (2, [long])
    assert kept([tiny], image) == (3, [])
    assert kept([], image) == (3, [])


def test_the_relaxed_stages_keep_boxes_as_large_as_the_image():
    assert kept([(200, 200)], (200, 200)) == (1, [(200, 200)])
    assert kept([(640, 100)], (640, 100)) == (2, [(640, 100)])


def test_duplicates_become_multiplicities_in_the_order_of_their_first_coming():
    a, b, c, small = (50, 0, 90, 40), (0, 50, 40, 90), (0, 0, 50, 50), (0, 0, 5, 5)
    filtered = filter_boxes(np.array([a, small, c, a, b, c, a]), 100, 100, FilterParams())
    assert filtered.boxes.tolist() == [list(a), list(c), list(b)]
    assert filtered.multiplicity.tolist() == [3, 2, 1]
    assert filtered.boxes.dtype == filtered.multiplicity.dtype == np.int64


def test_nothing_left_has_the_shape_of_no_boxes():
    filtered = filter_boxes(np.zeros((0, 4), np.int64), 100, 100, FilterParams())
    assert filtered.boxes.shape == (0, 4)
    assert filtered.multiplicity.shape == (0,)


@pytest.mark.parametrize("box", [(-1, 0, 50, 50), (0, 0, 101, 50), (50, 0, 50, 50), (0, 60, 50, 50)])
def test_a_box_that_leaves_its_image_is_refused_by_name(box):
    with pytest.raises(ValueError, match=rf"box \[{box[0]}, .*100x100 pixels"):
        filter_boxes(np.array([(0, 0, 50, 50), box]), 100, 100, FilterParams())


def test_boxes_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \(R, 4\), got \(3, 5\)"):
        filter_boxes(np.zeros((3, 5), np.int64), 100, 100, FilterParams())


@pytest.mark.parametrize(
    "limits",
    [{"min_side_px": 0}, {"max_aspect": 0.5}, {"min_size": 0.9}, {"max_size": 1.2}, {"max_aspect": float("nan")}],
)
def test_limits_that_make_no_sense_are_refused(limits):
    with pytest.raises(ValueError, match=next(iter(limits))):
        FilterParams(**limits)


def test_the_rules_are_recorded_by_name():
    assert FilterParams().as_dict() == {"min_side_px": 32, "max_aspect": 3.0, "min_size": 0.3, "max_size": 0.8}
