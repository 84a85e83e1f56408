"""Colour jitter, greyscale, blur and flip: parity with Pillow and torchvision, and how often each happens."""

import importlib.util
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from detco.artifact import IMAGENET_RGB
from detco.views.photometric import (
    HUE,
    PhotometricOptions,
    blur,
    draw_flip,
    draw_photometric,
    flip,
    grey_values,
    invert_from,
    jitter_colours,
    make_grey,
    mean_grey,
    normalise,
    shift_hue,
)
from detco.views.rows import apply_to_all_rows, apply_to_picked_rows

OPTIONS = {
    "jitter": (0.4, 0.4, 0.4, 0.1),
    "jitter_prob": 0.8,
    "grey_prob": 0.2,
    "blur_prob": 0.5,
    "blur_sigma": (0.1, 2.0),
}
DRAWS = 4000


def load_oracle():
    path = Path(__file__).parents[1] / "oracles" / "views_pillow.py"
    spec = importlib.util.spec_from_file_location("views_pillow", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = load_oracle()


@pytest.fixture(scope="module")
def photos():
    return [oracle.photo(seed) for seed in range(5)]


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    return [draw_photometric(PhotometricOptions(**OPTIONS), rng) for _ in range(DRAWS)]


def mean_difference(ours, pictures):
    return (ours - oracle.to_batch(pictures)).abs().mean().item()


def assert_share(count, prob, draws):
    """Within five standard deviations of a binomial: a right program fails once in two million."""
    assert abs(count / draws - prob) < 5 * math.sqrt(prob * (1 - prob) / draws)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_jitter_in_every_order_equals_torchvision_on_pillow_images(photos, order):
    rng = np.random.default_rng(order)
    factors = np.append(rng.uniform(0.6, 1.4, 3), rng.uniform(-0.1, 0.1)).astype(np.float32)
    count = len(photos)
    ours = jitter_colours(
        oracle.to_batch(photos), torch.tensor(order).expand(count, 4), torch.from_numpy(factors).expand(count, 4)
    )
    assert mean_difference(ours, [oracle.jitter(photo, order, factors) for photo in photos]) < 0.1
    assert torch.equal(ours, ours.round())


def test_jitter_orders_are_told_apart(photos):
    """The parity above means something: another order of the same factors is far off."""
    factors = torch.tensor([[1.4, 0.6, 1.4, 0.1]]).expand(len(photos), 4)
    ours = jitter_colours(oracle.to_batch(photos), torch.tensor([[0, 1, 2, 3]]).expand(len(photos), 4), factors)
    others = [oracle.jitter(photo, (1, 0, 3, 2), factors[0].tolist()) for photo in photos]
    assert mean_difference(ours, others) > 1


def test_every_image_of_a_batch_gets_its_own_order_and_factors(photos):
    rng = np.random.default_rng(7)
    orders = np.stack([rng.permutation(4) for _ in photos])
    factors = np.concatenate((rng.uniform(0.6, 1.4, (5, 3)), rng.uniform(-0.1, 0.1, (5, 1))), 1).astype(np.float32)
    ours = jitter_colours(oracle.to_batch(photos), torch.from_numpy(orders), torch.from_numpy(factors))
    theirs = [oracle.jitter(*row) for row in zip(photos, orders, factors, strict=True)]
    assert mean_difference(ours, theirs) < 0.1


def test_neutral_jitter_changes_nothing(photos):
    images = oracle.to_batch(photos)
    neutral = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).expand(len(photos), 4)
    assert torch.equal(jitter_colours(images, torch.arange(4).expand(len(photos), 4), neutral), images)


def test_jitter_of_all_rows_at_once_is_that_of_each_image_bit_for_bit(photos, monkeypatch):
    images = oracle.to_batch(photos)
    rng = np.random.default_rng(3)
    orders = torch.from_numpy(np.stack([rng.permutation(4) for _ in photos]))
    factors = torch.from_numpy(rng.uniform([0.6, 0.6, 0.6, -0.1], [1.4, 1.4, 1.4, 0.1], (5, 4)).astype(np.float32))
    factors[0] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    factors[1, HUE] = 0.003  # less than one step of an 8-bit hue
    factors[2, :HUE] = 1.0
    one_by_one = jitter_colours(images, orders, factors)
    monkeypatch.setattr("detco.views.rows.is_on_cpu", lambda values: False)
    assert torch.equal(jitter_colours(images, orders, factors), one_by_one)


@pytest.mark.parametrize("shift", [-0.5, -0.1, -0.03, 0.06, 0.1, 0.33, 0.5])
def test_hue_equals_torchvision_on_pillow_images(photos, shift):
    ours = shift_hue(oracle.to_batch(photos), torch.full((len(photos),), shift))
    theirs = [oracle.jitter(photo, (HUE,), (0, 0, 0, shift)) for photo in photos]
    assert mean_difference(ours, theirs) < 0.1


def test_hue_leaves_grey_black_and_white_alone():
    images = torch.tensor([0.0, 1.0, 128.0, 255.0]).expand(1, 3, 2, 4)
    assert torch.equal(shift_hue(images, torch.tensor([0.3])), images)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.37, 2.0])
def test_blur_equals_pillow_up_to_the_border(photos, sigma):
    ours = blur(oracle.to_batch(photos), torch.full((len(photos),), sigma), max_sigma=2.0)
    theirs = [oracle.blur(photo, sigma) for photo in photos]
    # At 0.5 the weights are tenths, so halves are common, and 24-bit weights round them otherwise than float32 does.
    assert mean_difference(ours, theirs) < (0.2 if sigma == 0.5 else 0.05)
    assert (ours - oracle.to_batch(theirs)).abs().max() <= 3


def test_blur_does_not_depend_on_the_largest_sigma_allowed(photos):
    images, sigma = oracle.to_batch(photos), torch.linspace(0.1, 2.0, len(photos))
    assert torch.equal(blur(images, sigma, max_sigma=2.0), blur(images, sigma, max_sigma=5.0))


def test_sigma_zero_leaves_an_image_exactly_as_it_is(photos):
    images = oracle.to_batch(photos)
    blurred = blur(images, torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0]), max_sigma=2.0)
    assert torch.equal(blurred[::2], images[::2])
    assert not torch.equal(blurred[1], images[1])


def test_grey_equals_pillow_exactly(photos):
    ours = make_grey(oracle.to_batch(photos), torch.tensor([True, True, False, True, True]))
    theirs = oracle.to_batch([oracle.grey(photo) for photo in photos])
    theirs[2] = oracle.to_tensor(photos[2])
    assert torch.equal(ours, theirs)


def test_grey_is_exact_for_every_extreme_colour():
    colours = torch.cartesian_prod(*3 * [torch.tensor([0.0, 1.0, 127.0, 254.0, 255.0])]).T[None, :, None]
    red, green, blue = colours.long()[0]
    assert torch.equal(grey_values(colours)[0, 0].long(), (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16)


def test_mean_grey_is_rounded_half_up_and_exact_where_float32_is_not():
    # A plain float32 sum of this image is beyond 2**24, where it holds even numbers only.
    grey = torch.full((2, 1, 300, 301), 255.0)
    grey[1, :, :150] = 0.0
    assert mean_grey(grey).flatten().tolist() == [255.0, 128.0]
    grey[0, :, 0, :2] = 0.0
    assert mean_grey(grey - 254)[0].item() == 1.0


@pytest.mark.parametrize("threshold", [0, 1, 128, 255, 256])
def test_invert_from_equals_pillow_for_every_value(threshold):
    values = torch.arange(256).view(1, 1, 16, 16)
    picture = oracle.Image.fromarray(values[0, 0].byte().numpy())
    expected = torch.from_numpy(np.array(oracle.ImageOps.solarize(picture, threshold))).float()
    assert torch.equal(invert_from(values.float(), threshold)[0, 0], expected)


def test_flip_mirrors_the_marked_images_only(photos):
    images = oracle.to_batch(photos[:2])
    flipped = flip(images, torch.tensor([True, False]))
    assert torch.equal(flipped[0], images[0].flip(-1))
    assert torch.equal(flipped[1], images[1])


def test_normalise_is_that_of_imagenet():
    images = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1).repeat(2, 1, 1, 2)
    images[..., 1] += torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1)
    result = normalise(images, IMAGENET_RGB)
    assert torch.allclose(result[..., 0], torch.tensor(0.0), atol=1e-5)
    assert torch.allclose(result[..., 1], torch.tensor(1.0), atol=1e-5)


def test_both_ways_to_choose_rows_agree(photos):
    images, sigma = oracle.to_batch(photos), torch.linspace(0.2, 2.0, len(photos))

    def operation(chosen, sigmas):
        return blur(chosen, sigmas, max_sigma=2.0)

    for rows in ([1, 0, 1, 1, 0], [0] * 5, [1] * 5):
        chosen = torch.tensor(rows, dtype=torch.bool)
        masked = apply_to_all_rows(chosen, operation, images, sigma)
        assert torch.equal(apply_to_picked_rows(chosen, operation, images, sigma), masked)
        assert torch.equal(masked[~chosen], images[~chosen])


def test_jitter_grey_and_blur_happen_as_often_as_asked(drawn):
    assert_share(sum((sample.jitter_factors[:HUE] != 1).any().item() for sample in drawn), 0.8, DRAWS)
    assert_share(sum(sample.is_grey.item() for sample in drawn), 0.2, DRAWS)
    assert_share(sum(sample.blur_sigma.item() > 0 for sample in drawn), 0.5, DRAWS)


def test_flips_happen_as_often_as_asked():
    rng = np.random.default_rng(1)
    assert_share(sum(draw_flip(0.5, rng).item() for _ in range(DRAWS)), 0.5, DRAWS)
    assert not any(draw_flip(0.0, rng) for _ in range(100))
    assert all(draw_flip(1.0, rng) for _ in range(100))


def test_jitter_orders_are_uniform_over_all_24(drawn):
    orders = [tuple(sample.jitter_order.tolist()) for sample in drawn if (sample.jitter_factors[:HUE] != 1).any()]
    counts = Counter(orders)
    assert len(counts) == 24
    for count in counts.values():
        assert_share(count, 1 / 24, len(orders))


def test_jitter_factors_and_sigma_fill_their_ranges(drawn):
    factors = np.stack([sample.jitter_factors.numpy() for sample in drawn if sample.jitter_factors[0] != 1])
    least, most = np.array([0.6, 0.6, 0.6, -0.1]), np.array([1.4, 1.4, 1.4, 0.1])
    assert (factors >= least - 1e-6).all()
    assert (factors <= most + 1e-6).all()
    assert np.allclose(factors.min(0), least, atol=0.005)
    assert np.allclose(factors.max(0), most, atol=0.005)
    spread = (most - least) / math.sqrt(12 * len(factors))
    assert (np.abs(factors.mean(0) - (least + most) / 2) < 5 * spread).all()
    # The four factors are drawn independently.
    assert np.abs(np.corrcoef(factors.T) - np.eye(4)).max() < 5 / math.sqrt(len(factors))

    sigmas = np.array([sample.blur_sigma.item() for sample in drawn if sample.blur_sigma > 0])
    assert 0.1 <= sigmas.min() < 0.11
    assert 1.99 < sigmas.max() <= 2.0
    assert abs(sigmas.mean() - 1.05) < 5 * 1.9 / math.sqrt(12 * len(sigmas))


def test_strengths_above_one_do_not_draw_negative_factors():
    options = PhotometricOptions(**OPTIONS | {"jitter": (2.0, 2.0, 2.0, 0.5), "jitter_prob": 1.0})
    rng = np.random.default_rng(2)
    factors = torch.stack([draw_photometric(options, rng).jitter_factors for _ in range(500)])
    assert factors[:, :HUE].min() >= 0
    assert factors[:, :HUE].max() > 2.9


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"jitter_prob": 1.2}, "jitter_prob is 1.2; a probability lies between 0 and 1"),
        ({"grey_prob": -0.1}, "grey_prob is -0.1"),
        ({"blur_prob": float("nan")}, "blur_prob is nan"),
        ({"blur_sigma": (2.0, 0.1)}, r"blur_sigma is \(2, 0.1\); it must be \(least, most\) with both in \(0, 32\]"),
        ({"blur_sigma": (0.0, 2.0)}, r"blur_sigma is \(0, 2\)"),
        ({"jitter": (0.4, 0.4, 0.4)}, "it must be four strengths"),
        ({"jitter": (0.4, 0.4, 0.4, 0.6)}, "the last at most 0.5"),
    ],
)
def test_settings_outside_their_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        PhotometricOptions(**OPTIONS | wrong)
