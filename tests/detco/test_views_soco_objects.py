"""Which objects SoCo's pairs show: how often each is drawn, when crops are drawn anew, jitter, cutting, padding."""

import math
from collections import Counter

import numpy as np
import pytest

from detco.views import Proposals, sample_generator
from detco.views.host import CropBox
from detco.views.objects import (
    WHOLE_VIEW_ID,
    BoxOptions,
    CropOptions,
    Scene,
    draw_cuts,
    jitter_boxes,
    list_objects,
)

ALL_OF_IT = CropOptions(scale=(1.0, 1.0), ratio=(1.0, 1.0))
"""Crops that are the whole of a square image."""

THREE = ((0, 0, 20, 20), (30, 0, 50, 20), (60, 0, 80, 20))
DRAWS = 2000


def rng_of(index):
    return sample_generator(seed=0, epoch=0, index=index)


def proposals(boxes_px, multiplicity=None):
    count = len(boxes_px)
    return Proposals(
        np.array(boxes_px, dtype=np.float32).reshape(count, 4),
        np.ones(count, dtype=np.int64) if multiplicity is None else np.array(multiplicity, dtype=np.int64),
    )


def grid(columns=6, rows=5, side=10, gap=4):
    """Boxes side by side, none touching another."""
    step = side + gap
    return [(x * step, y * step, x * step + side, y * step + side) for y in range(rows) for x in range(columns)]


def cuts_of(boxes_px, *, num_crops=1, multiplicity=None, size=100, shared=False, crop=ALL_OF_IT, index=0, **options):
    """Cuts of a square image."""
    objects = list_objects(proposals(boxes_px, multiplicity), size, size, dedup=options.get("dedup", False))
    return draw_cuts(
        Scene(size, size, objects),
        num_crops=num_crops,
        crop=crop,
        boxes=BoxOptions(**{"box_jitter_prob": 0.0} | options),
        shared_boxes=shared,
        rng=rng_of(index),
    )


def assert_share(count, prob, draws):
    """Within five standard deviations of a binomial."""
    assert abs(count / draws - prob) < 5 * math.sqrt(prob * (1 - prob) / draws)


def test_proposals_that_no_crop_shows_give_the_whole_view_in_both():
    crop = CropOptions(scale=(0.01, 0.02), ratio=(1.0, 1.0))
    for index in range(50):
        (cut,) = cuts_of([(0, 0, 1, 1)], crop=crop, index=index)
        for objects in cut.pair:
            assert objects.boxes.tolist() == [[0, 0, 1, 1]] * 4
            assert objects.ids.tolist() == [WHOLE_VIEW_ID] * 4


@pytest.mark.parametrize(
    ("num_boxes", "shown", "num_tries"),
    [
        (8, [4], 1),
        (8, [3, 2], 2),
        (8, [3, 1, 1], 3),
        (8, [0, 0, 0, 1], 4),
        (8, [0, 0, 0, 0, 0], 5),
        (4, [2], 1),
        (4, [1, 1], 2),
        (1, [1], 1),
    ],
)
def test_crops_are_drawn_anew_until_enough_boxes_are_shown_and_less_is_enough_each_time(
    monkeypatch, num_boxes, shown, num_tries
):
    """A crop over the first n of ten boxes in a row shows n."""
    drawn = []

    def crop_of(*arguments):
        count = shown[len(drawn)]
        drawn.append(CropBox(0, 0, 10, 10 * count) if count else CropBox(50, 0, 10, 100))
        return drawn[-1]

    monkeypatch.setattr("detco.views.objects.draw_crop_box", crop_of)
    (cut,) = cuts_of([(10 * x, 0, 10 * x + 10, 10) for x in range(10)], num_boxes=num_boxes)
    assert len(drawn) == num_tries
    assert cut.crop_box == drawn[-1]
    assert set(cut.pair.in_crop.ids) == (set(range(1, shown[-1] + 1)) or {WHOLE_VIEW_ID})


def test_every_pair_must_have_enough_boxes(monkeypatch):
    nothing, all_of_it = CropBox(90, 0, 10, 100), CropBox(0, 0, 100, 100)
    script = [all_of_it, nothing, nothing, all_of_it, all_of_it, all_of_it]
    crop_boxes = iter(script)
    monkeypatch.setattr("detco.views.objects.draw_crop_box", lambda *arguments: next(crop_boxes))
    first, second = cuts_of(grid(), num_crops=2)
    assert (first.crop_box, second.crop_box) == (all_of_it, all_of_it)
    assert next(crop_boxes, None) is None


def test_with_enough_candidates_all_ids_of_a_view_are_distinct_and_equal_in_both():
    for index in range(200):
        for cut in cuts_of(grid(), num_crops=2, crop=CropOptions((0.5, 1.0), (0.75, 4 / 3)), index=index):
            assert len(set(cut.pair.in_crop.ids)) == 4
            assert np.array_equal(cut.pair.in_crop.ids, cut.pair.in_whole.ids)


def test_every_pair_has_a_draw_of_its_own():
    different = 0
    for index in range(100):
        first, second = cuts_of(grid(), num_crops=2, index=index)
        different += set(first.pair.in_crop.ids) != set(second.pair.in_crop.ids)
    assert different > 90


def test_shared_boxes_are_one_draw_jittered_once_that_every_crop_shows():
    crop = CropOptions((0.3, 0.5), (0.75, 4 / 3))
    kept = Counter()
    for index in range(200):
        first, second = cuts_of(grid(), num_crops=2, crop=crop, index=index, shared=True, box_jitter_prob=1.0)
        first_whole, second_whole = (
            {int(i): tuple(b) for i, b in zip(cut.pair.in_whole.ids, cut.pair.in_whole.boxes, strict=True)}
            for cut in (first, second)
        )
        assert first_whole == second_whole
        kept[WHOLE_VIEW_ID in first_whole] += 1
    assert kept[False] > 190


def test_more_boxes_than_survived_are_filled_up_from_those_in_each_view_on_its_own():
    boxes_px = [(0, 0, 20, 20), (50, 50, 90, 90)]
    paddings = Counter()
    for index in range(DRAWS):
        (cut,) = cuts_of(boxes_px, num_boxes=3, index=index)
        for objects in cut.pair:
            assert objects.ids[:2].tolist() == [1, 2]
            for box_view, number in zip(objects.boxes, objects.ids, strict=True):
                assert np.allclose(box_view * 100, boxes_px[number - 1])
        paddings[cut.pair.in_whole.ids[2], cut.pair.in_crop.ids[2]] += 1
    assert len(paddings) == 4
    for count in paddings.values():
        assert_share(count, 1 / 4, DRAWS)


def test_many_more_boxes_than_survived_repeat_them():
    (cut,) = cuts_of([(0, 0, 20, 20)], num_boxes=9)
    assert cut.pair.in_whole.ids.tolist() == cut.pair.in_crop.ids.tolist() == [1] * 9


def drawn_boxes(index, **options):
    (cut,) = cuts_of(THREE, multiplicity=(3, 1, 2), index=index, **options)
    return tuple((cut.pair.in_crop.boxes[:, 0] * 100).round().astype(int) // 30)


def test_duplicates_are_weights():
    firsts = Counter(drawn_boxes(index, num_boxes=1)[0] for index in range(DRAWS))
    for which, weight in enumerate((3, 1, 2)):
        assert_share(firsts[which], weight / 6, DRAWS)
    twice = Counter(tuple(sorted(drawn_boxes(index, num_boxes=2))) for index in range(DRAWS))
    expected = {(0, 0): 3 / 15, (2, 2): 1 / 15, (0, 1): 3 / 15, (0, 2): 6 / 15, (1, 2): 2 / 15}
    assert set(twice) == set(expected)
    for which, prob in expected.items():
        assert_share(twice[which], prob, DRAWS)


def test_duplicates_keep_ids_of_their_own():
    (cut,) = cuts_of(THREE, multiplicity=(3, 1, 2), num_boxes=6)
    assert sorted(cut.pair.in_crop.ids) == [1, 2, 3, 4, 5, 6]


def test_dedup_makes_all_proposals_equally_likely():
    firsts = Counter(drawn_boxes(index, num_boxes=1, dedup=True)[0] for index in range(DRAWS))
    for which in range(3):
        assert_share(firsts[which], 1 / 3, DRAWS)


@pytest.mark.parametrize("rule", ["clip", "drop"])
def test_boxes_that_reach_out_of_the_crop_are_cut_or_left_out(monkeypatch, rule):
    monkeypatch.setattr("detco.views.objects.draw_crop_box", lambda *arguments: CropBox(20, 20, 40, 40))
    inside, reaching, touching, outside = (20, 20, 60, 60), (10, 30, 30, 50), (0, 20, 20, 60), (70, 70, 80, 80)
    (cut,) = cuts_of([inside, reaching, touching, outside], outside_boxes=rule)
    shown = {int(i): b.tolist() for i, b in zip(cut.pair.in_crop.ids, cut.pair.in_crop.boxes, strict=True)}
    assert shown == {"clip": {1: [0, 0, 1, 1], 2: [0, 0.25, 0.25, 0.75]}, "drop": {1: [0, 0, 1, 1]}}[rule]


@pytest.mark.parametrize(("rule", "most", "deviation"), [("corner", 0.15, 0.0645), ("centre", 0.10, 0.0577)])
def test_jitter_moves_centres_and_sides_as_its_rule_says(rule, most, deviation):
    count = 20000
    boxes_px = np.tile([[100.0, 50.0, 140.0, 130.0]], (count, 1))
    options = BoxOptions(box_jitter_prob=1.0, box_jitter_ratio=0.1, box_jitter_rule=rule)
    jittered = jitter_boxes(boxes_px, options, np.random.default_rng(0))
    sides = jittered[:, 2:] - jittered[:, :2]
    shifts = ((jittered[:, 2:] + jittered[:, :2]) / 2 - (120, 90)) / (40, 80)
    stretches = sides / (40, 80) - 1
    assert np.abs(shifts).max() <= most + 1e-9
    assert np.abs(shifts).max() > 0.95 * most
    assert np.allclose(shifts.std(0), deviation, rtol=0.03)
    assert np.abs(shifts.mean(0)).max() < 5 * deviation / math.sqrt(count)
    assert np.abs(stretches).max() <= 0.1 + 1e-9
    assert np.allclose(stretches.std(0), 0.1 / math.sqrt(3), rtol=0.03)
    # Shift and stretch of the two axes are drawn independently; moving the corner ties an axis' centre to its side.
    correlation = np.corrcoef(np.concatenate((shifts, stretches), 1).T)
    tie = {"corner": 0.5 / math.sqrt(1.25), "centre": 0.0}[rule]
    expected = np.eye(4) + tie * np.roll(np.eye(4), 2, axis=0)
    assert np.allclose(correlation, expected, atol=5 / math.sqrt(count))


def test_jitter_happens_to_each_box_on_its_own_as_often_as_asked():
    boxes_px = np.tile([[10.0, 10.0, 20.0, 20.0]], (DRAWS, 1))

    def num_moved(prob):
        jittered = jitter_boxes(boxes_px, BoxOptions(box_jitter_prob=prob), np.random.default_rng(1))
        return (jittered != boxes_px).any(1).sum()

    assert num_moved(0.0) == 0
    assert_share(num_moved(0.5), 0.5, DRAWS)
    assert num_moved(1.0) == DRAWS


@pytest.mark.parametrize("views", ["whole", "all"])
def test_jitter_is_for_the_whole_view_or_for_all(views):
    boxes_px = np.array(grid())
    for index in range(20):
        (cut,) = cuts_of(boxes_px, index=index, box_jitter_prob=1.0, box_jitter_views=views)
        raw = boxes_px[cut.pair.in_crop.ids - 1] / 100
        assert not np.isclose(cut.pair.in_whole.boxes, raw).all(1).any()
        is_raw = np.isclose(cut.pair.in_crop.boxes, raw).all(1)
        assert is_raw.all() if views == "whole" else not is_raw.any()
        assert not np.isclose(cut.pair.in_whole.boxes, cut.pair.in_crop.boxes).all(1).any()


def test_jittered_boxes_stay_in_their_view_and_are_never_empty(monkeypatch):
    monkeypatch.setattr("detco.views.objects.draw_crop_box", lambda *arguments: CropBox(19, 19, 40, 40))
    options = {"box_jitter_prob": 1.0, "box_jitter_ratio": 0.9, "box_jitter_views": "all"}
    lost = 0
    for index in range(300):
        # The first is shown by one pixel, so jitter pushes it out of the crop half of the time.
        (cut,) = cuts_of([(0, 30, 20, 40), (80, 80, 100, 100), (40, 40, 60, 60)], index=index, **options)
        for objects in cut.pair:
            left, top, right, bottom = objects.boxes.T
            assert min(left.min(), top.min()) >= 0
            assert max(right.max(), bottom.max()) <= 1
            assert (left < right).all()
            assert (top < bottom).all()
        assert set(cut.pair.in_whole.ids) == set(cut.pair.in_crop.ids)
        lost += 1 not in cut.pair.in_crop.ids
    assert 50 < lost < 250


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (proposals([(0, 0, 101, 50)]), r"proposal \[0.0, 0.0, 101.0, 50.0\] is no box .* inside an image of 100x100"),
        (proposals([(-1, 0, 10, 50)]), "is no box"),
        (proposals([(0, 0, 10, 10), (10, 0, 10, 50)]), r"proposal \[10.0, 0.0, 10.0, 50.0\] is no box"),
        (proposals([(0, float("nan"), 10, 10)]), "is no box"),
        (proposals([(0, 0, 10, 10)], [0]), "a proposal has multiplicity 0; each was made at least once"),
        (Proposals(np.zeros((2, 4), np.float32), np.ones(1, np.int64)), r"got \(2, 4\) and \(1,\)"),
    ],
)
def test_what_are_no_proposals_of_the_image_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        list_objects(wrong, 100, 100, dedup=False)


def test_objects_are_numbered_from_one():
    objects = list_objects(proposals(THREE, (3, 1, 2)), 100, 100, dedup=False)
    assert objects.ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert objects.ids.dtype == np.int64
    assert objects.boxes[:, 0].tolist() == [0, 0, 0, 30, 60, 60]
