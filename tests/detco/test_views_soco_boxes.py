"""The boxes of SoCo's views: they show what was painted, the right ones are drawn, on the right level."""

import importlib.util
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from detco.views import Photo, Proposals, SoCoC4Recipe, SoCoFPNRecipe, SoCoStarRecipe, sample_generator
from detco.views.objects import WHOLE_VIEW_ID, assign_levels

SMALL = {"view_size": 64, "small_size": 32, "medium_size": 48}
"""Sides of views small enough to make hundreds of."""

LEVEL_MAX_SIZES = (48.0, 96.0, 192.0, 224.0)


def load_oracle():
    path = Path(__file__).parents[1] / "oracles" / "soco_views_oracle.py"
    spec = importlib.util.spec_from_file_location("soco_views_oracle", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = load_oracle()


def rng_of(index):
    return sample_generator(seed=0, epoch=0, index=index)


def proposals(boxes_px, multiplicity=None):
    count = len(boxes_px)
    return Proposals(
        np.array(boxes_px, dtype=np.float32).reshape(count, 4),
        np.ones(count, dtype=np.int64) if multiplicity is None else np.array(multiplicity, dtype=np.int64),
    )


def pairs_of(sample):
    return [field for name, field in sample._asdict().items() if name != "whole"]


def grid(columns=6, rows=5, side=10, gap=4):
    """Boxes side by side, none touching another."""
    step = side + gap
    return [(x * step, y * step, x * step + side, y * step + side) for y in range(rows) for x in range(columns)]


STILL = {
    "jitter_prob": 0.0,
    "grey_prob": 0.0,
    "blur_prob_whole": 0.0,
    "blur_prob_crop": 0.0,
    "solarise_prob_crop": 0.0,
    "box_jitter_prob": 0.0,
}


def small_recipe(recipe, **settings):
    known = recipe.__dataclass_fields__
    return recipe(**STILL | {name: value for name, value in SMALL.items() if name in known} | settings)


def black(height, width):
    return Photo.of(torch.zeros(3, height, width, dtype=torch.uint8))


def pixels(view, boxes):
    """What of a view the painted box must fill: its channels as rendered, and the box, both in pixels."""
    shown = view.crop.flip(-1) if view.is_flipped else view.crop
    return shown.numpy(), boxes.boxes_view.double().numpy() * view.crop.shape[-1]


def painted_case(seed):
    """A painted image of any size, one in three ten times as long as wide, its box and a mark in it."""
    rng = np.random.default_rng(seed)
    short, long = int(rng.integers(15, 60)), int(rng.integers(60, 300))
    height, width = [(short, long), (short, 10 * short), (10 * short, short)][seed % 3]
    x1, y1 = (int(rng.integers(side)) for side in (width, height))
    x2 = x1 + 1 if seed % 5 == 0 else int(rng.integers(x1 + 1, width + 1))
    y2 = y1 + 1 if seed % 7 == 0 else int(rng.integers(y1 + 1, height + 1))
    mark = (int(rng.integers(x1, x2)), int(rng.integers(y1, y2)))
    return Photo.of(torch.from_numpy(oracle.painted(height, width, (x1, y1, x2, y2), mark))), (x1, y1, x2, y2)


VARIANTS = [
    (SoCoC4Recipe, {}),
    (SoCoFPNRecipe, {}),
    (SoCoFPNRecipe, {"small_view": "resize"}),
    (SoCoFPNRecipe, {"crop_frame": "whole", "small_view": "resize", "shared_boxes": True}),
    (SoCoFPNRecipe, {"outside_boxes": "drop"}),
    (SoCoStarRecipe, {}),
    (SoCoStarRecipe, {"crop_frame": "whole", "shared_boxes": True}),
]


@pytest.mark.parametrize(("recipe", "settings"), VARIANTS)
def test_a_painted_box_fills_its_box_in_every_view_and_a_mark_in_it_stays_inside(recipe, settings):
    recipe = small_recipe(recipe, **settings)
    seen = Counter()
    for seed in range(90):
        image, box_px = painted_case(seed)
        sample = recipe.draw_with_proposals(image, proposals([box_px]), rng_of(seed))
        for name, pair in zip(sample._fields[1:], pairs_of(sample), strict=True):
            is_resampled_twice = recipe.crop_frame == "whole" or (
                name == "small" and getattr(recipe, "small_view", "resize") == "resize"
            )
            paired = (pair.view, pair.boxes, 2 if is_resampled_twice else 1)
            for view, boxes, off_px in ((sample.whole, pair.boxes_in_whole, 1), paired):
                if boxes.ids[0] == WHOLE_VIEW_ID:
                    assert (boxes.boxes_view == torch.tensor([0.0, 0.0, 1.0, 1.0])).all()
                    seen["fallback"] += 1
                    continue
                assert (boxes.ids == 1).all()
                (red, green, _), boxes_px = pixels(view, boxes)
                # Thinner than a pixel, a box is smeared over two; the mark says where it lies.
                is_thin = np.tile(boxes_px[0, 2:] - boxes_px[0, :2] < 1, 2)
                assert (is_thin | (np.abs(oracle.extent(red) - boxes_px[0]) <= off_px)).all()
                if green.max() > 8:  # the crop shows the mark, and resampling has left something of it
                    row, column = np.unravel_index(green.argmax(), green.shape)
                    assert (boxes_px[0, :2] - off_px <= (column + 0.5, row + 0.5)).all()
                    assert (boxes_px[0, 2:] + off_px >= (column + 0.5, row + 0.5)).all()
                    seen["mark"] += 1
                seen["flipped" if view.is_flipped else "upright"] += 1
    assert min(seen["flipped"], seen["upright"], seen["mark"]) > 5
    assert seen["fallback"] > 20 or settings.get("outside_boxes") != "drop"


def test_boxes_have_one_frame_whatever_the_flip():
    """The same draw with and without flips: boxes, cut-outs and pixels are mirror images."""
    image, box_px = painted_case(4)
    upright, flipped = (
        small_recipe(SoCoStarRecipe, flip_prob=prob, cutout_prob=1.0).draw_with_proposals(
            image, proposals([box_px, (0, 0, 5, 9)]), rng_of(3)
        )
        for prob in (0.0, 1.0)
    )
    for ours, theirs in zip(pairs_of(upright), pairs_of(flipped), strict=True):
        for before, after in ((ours.boxes, theirs.boxes), (ours.boxes_in_whole, theirs.boxes_in_whole)):
            left, top, right, bottom = before.boxes_view.unbind(1)
            assert torch.allclose(after.boxes_view, torch.stack((1 - right, top, 1 - left, bottom), 1))
            assert torch.equal(before.ids, after.ids)
            assert torch.equal(before.levels, after.levels)


@pytest.mark.parametrize(
    ("size", "level"),
    [(1, 0), (48, 0), (48.01, 1), (96, 1), (96.01, 2), (192, 2), (192.01, 3), (224, 3), (224.01, -1), (300, -1)],
)
@pytest.mark.parametrize("aspect", [1.0, 3.0, 1 / 3])
def test_levels_at_the_edges_of_their_ranges(size, level, aspect):
    """Anywhere in the view, so that a change of frame has left its rounding in the box."""
    width, height = size * math.sqrt(aspect), size / math.sqrt(aspect)
    for x, y in itertools.product((0.0, 3.0, 10.7, 111.1), repeat=2):
        for view_size in (112, 192, 224, 320):
            boxes_view = np.array([[x, y, x + width, y + height]]) / view_size
            assert assign_levels(boxes_view, view_size, LEVEL_MAX_SIZES).tolist() == [level]
            assert level == oracle.level(size, LEVEL_MAX_SIZES)


def test_every_view_gives_a_box_the_level_of_its_own_size():
    recipe = SoCoStarRecipe(**STILL, flip_prob=0.5)
    sample = recipe.draw_with_proposals(black(300, 260), proposals([(20, 30, 140, 200), (90, 80, 160, 290)]), rng_of(1))
    levels = set()
    for pair, size in zip(pairs_of(sample), (224, 112, 192), strict=True):
        for boxes, side in ((pair.boxes, size), (pair.boxes_in_whole, 224)):
            sides = (boxes.boxes_view[:, 2:] - boxes.boxes_view[:, :2]).double() * side
            expected = [oracle.level(value, LEVEL_MAX_SIZES) for value in sides.prod(1).sqrt().tolist()]
            assert boxes.levels.tolist() == expected
            levels |= set(expected)
    assert len(levels) > 1


def test_c4_has_one_level_for_all_boxes():
    recipe = SoCoC4Recipe(view_size=512)
    sample = recipe.draw_with_proposals(black(90, 90), proposals(grid()), rng_of(0))
    assert sample.crop.boxes.levels.tolist() == sample.crop.boxes_in_whole.levels.tolist() == [0, 0, 0, 0]


def test_boxes_larger_than_the_last_level_match_nothing():
    recipe = SoCoFPNRecipe(level_max_sizes=(8.0, 16.0, 32.0, 64.0))
    sample = recipe.draw(black(90, 90), rng_of(0))
    assert sample.crop.boxes.levels.tolist() == [-1, -1, -1, -1]


@pytest.mark.parametrize("recipe", [SoCoC4Recipe, SoCoFPNRecipe, SoCoStarRecipe])
def test_without_proposals_the_whole_image_is_the_only_object(recipe):
    image = black(60, 90)
    recipe = small_recipe(recipe)
    for sample in (recipe.draw(image, rng_of(0)), recipe.draw_with_proposals(image, Proposals.none(), rng_of(0))):
        for pair in pairs_of(sample):
            for boxes in (pair.boxes, pair.boxes_in_whole):
                assert torch.equal(boxes.boxes_view, torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(4, 4))
                assert boxes.ids.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("size", [(37, 211), (211, 37), (333, 499)])
def test_crops_of_the_whole_view_lie_in_the_squeezed_image(size):
    """A crop ratio of 1 is a square of the view, so of the image a rectangle of the image's own shape."""
    image = black(*size)
    settings = {"crop_ratio": (1.0, 1.0), "crop_scale": (0.5, 0.5), "flip_prob": 0.0}
    whole = (0, 0, size[1], size[0])
    for frame in ("image", "whole"):
        recipe = small_recipe(SoCoC4Recipe, crop_frame=frame, **settings)
        shares = []
        for index in range(20):
            sample = recipe.draw_with_proposals(image, proposals([whole]), rng_of(index))
            assert torch.equal(sample.crop.boxes_in_whole.boxes_view[0], torch.tensor([0.0, 0.0, 1.0, 1.0]))
            (cut,) = recipe.choose_cuts(image, proposals([whole]), rng_of(index), num_crops=1, shared_boxes=False)
            height, width = size if frame == "image" else (recipe.view_size, recipe.view_size)
            shares.append((cut.crop_box.height / height, cut.crop_box.width / width))
        expected = math.sqrt(0.5)
        if frame == "whole":
            assert np.allclose(shares, expected, atol=0.02)
        elif size[0] != size[1]:
            assert np.ptp(np.array(shares), axis=1).min() > 0.1


def test_boxes_along_the_image_edge_are_inside_a_crop_of_the_whole_view_that_is_all_of_it():
    settings = {"crop_frame": "whole", "outside_boxes": "drop", "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    recipe = small_recipe(SoCoC4Recipe, **settings, view_size=63)
    for width in range(40, 140):  # 46, for one, times 63 / 46 is more than 63
        sample = recipe.draw_with_proposals(black(width + 3, width), proposals([(0, 0, width, width + 3)]), rng_of(0))
        assert sample.crop.boxes.ids.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("recipe", [SoCoStarRecipe(**STILL), SoCoFPNRecipe(**STILL, small_view="resize")])
def test_a_small_view_that_is_the_resized_crop_has_its_pixels_and_its_boxes(recipe):
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 256, (3, 9, 7)), np.ones((16, 16))).astype(np.uint8)
    for index in range(10):
        sample = recipe.draw_with_proposals(Photo.of(torch.from_numpy(smooth)), proposals(grid()), rng_of(index))
        crop, small = sample.crop, sample.small
        assert small.view.crop.shape == (3, 112, 112)
        halved = torch.nn.functional.avg_pool2d(crop.view.crop.float(), 2)
        assert (halved - small.view.crop.float()).abs().mean() < 3
        assert torch.equal(crop.boxes_in_whole.boxes_view, small.boxes_in_whole.boxes_view)
        assert torch.equal(crop.boxes_in_whole.ids, small.boxes_in_whole.ids)
        assert torch.equal(crop.boxes.ids, small.boxes.ids)
        is_mirrored = bool(crop.view.is_flipped != small.view.is_flipped)
        sides = crop.boxes.boxes_view
        expected = (
            torch.stack((1 - sides[:, 2], sides[:, 1], 1 - sides[:, 0], sides[:, 3]), 1) if is_mirrored else sides
        )
        assert torch.allclose(small.boxes.boxes_view, expected, atol=1e-6)
        assert not torch.equal(crop.boxes.levels, small.boxes.levels) or (crop.boxes.levels == 0).all()


def test_an_own_small_crop_differs_from_the_crop():
    sample = SoCoFPNRecipe(**STILL).draw_with_proposals(black(90, 90), proposals(grid()), rng_of(0))
    assert not torch.equal(sample.crop.boxes.ids, sample.small.boxes.ids)
