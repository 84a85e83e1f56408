"""Host half of the views: crop boxes and resizing."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detco.views.host import CropBox, crop_and_resize, draw_crop_box, sample_generator


def load_oracle():
    path = Path(__file__).parents[1] / "oracles" / "views_pillow.py"
    spec = importlib.util.spec_from_file_location("views_pillow", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = load_oracle()


def test_a_sample_generator_depends_on_seed_epoch_and_index():
    first = sample_generator(seed=1, epoch=2, index=3).random()
    assert first == sample_generator(seed=1, epoch=2, index=3).random()
    others = [(0, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2), (2, 1, 3)]
    draws = {sample_generator(seed=s, epoch=e, index=i).random() for s, e, i in others}
    assert len(draws | {first}) == 6


def test_crop_areas_and_ratios_fill_their_ranges():
    rng = np.random.default_rng(0)
    scale, ratio = (0.2, 1.0), (3 / 4, 4 / 3)
    boxes = [draw_crop_box(480, 480, scale, ratio, rng) for _ in range(4000)]
    areas = np.array([box.height * box.width / 480**2 for box in boxes])
    log_ratios = np.log([box.width / box.height for box in boxes])
    assert areas.min() == pytest.approx(0.2, abs=0.005)
    assert areas.max() > 0.97
    assert areas.max() <= 1.0
    # Few small boxes are rejected, so over the lower half the area is uniform: mean of U(0.2, 0.6).
    small = areas[areas < 0.6]
    assert small.mean() == pytest.approx(0.4, abs=5 * 0.4 / math.sqrt(12 * len(small)))
    assert np.abs(log_ratios).max() <= math.log(4 / 3) + 0.02
    # Log-uniform means symmetric about the square.
    assert abs(log_ratios.mean()) < 5 * log_ratios.std() / math.sqrt(len(boxes))


def test_crop_positions_reach_every_edge_and_stay_inside():
    rng = np.random.default_rng(1)
    boxes = [draw_crop_box(50, 80, (0.1, 0.5), (3 / 4, 4 / 3), rng) for _ in range(3000)]
    assert min(box.top for box in boxes) == 0
    assert min(box.left for box in boxes) == 0
    assert max(box.top + box.height for box in boxes) == 50
    assert max(box.left + box.width for box in boxes) == 80


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 400), (400, 1), (2, 3), (30, 3000)])
def test_tiny_and_very_long_images_get_a_box_inside(height, width):
    rng = np.random.default_rng(2)
    for _ in range(100):
        box = draw_crop_box(height, width, (0.2, 1.0), (3 / 4, 4 / 3), rng)
        assert 0 < box.height <= height - box.top
        assert 0 < box.width <= width - box.left
        assert min(box.top, box.left) >= 0


def test_an_impossible_area_falls_back_to_the_largest_central_box():
    box = draw_crop_box(100, 400, (1.0, 1.0), (3 / 4, 4 / 3), np.random.default_rng(3))
    assert box == CropBox(top=0, left=133, height=100, width=133)


@pytest.mark.parametrize("size", [32, 224])
def test_resizing_equals_pillow(size):
    box = CropBox(top=7, left=11, height=90, width=121)
    differences = []
    for seed in range(6):
        image = oracle.photo(seed)
        ours = crop_and_resize(oracle.to_tensor(image), box, size)
        assert ours.dtype == torch.uint8
        crop = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
        theirs = oracle.to_tensor(crop.resize((size, size), Image.BILINEAR))
        differences.append((ours.float() - theirs.float()).abs().mean())
    assert torch.stack(differences).mean() < 0.05


def test_resizing_is_antialiased():
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    assert crop_and_resize(stripes, CropBox(0, 0, 64, 64), 8).float().std() < 20
