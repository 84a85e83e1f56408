"""RandAugment: parity of every operation with Pillow, and the distribution of what is drawn."""

import importlib.util
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from detco.artifact import IMAGENET_RGB
from detco.views.rand_augment import (
    FILL,
    OPERATIONS,
    SKIPPED,
    RandAugmentOptions,
    RandAugmentParams,
    argument_at_level,
    draw_rand_augment,
    rand_augment,
)

OPTIONS = {"num_ops": 2, "magnitude": 10.0, "magnitude_std": 0.5, "prob": 0.5}
DRAWS = 4000
ARGUMENTS = {
    "auto_contrast": (0,),
    "equalize": (0,),
    "invert": (0,),
    "posterize": (1, 3, 4),
    "solarize": (0, 100, 250, 256),
    "solarize_add": (0, 57, 110),
    "color": (0.1, 0.73, 1.9),
    "contrast": (0.1, 0.73, 1.9),
    "brightness": (0.1, 0.73, 1.9),
    "sharpness": (0.1, 0.73, 1.9),
    "rotate": (-30, -7.3, 30),
    "shear_x": (-0.3, 0.13, 0.3),
    "shear_y": (-0.3, 0.13, 0.3),
    "translate_x": (-50, 17.4, 50),
    "translate_y": (-50, 17.4, 50),
}
IS_WARP = {name: name.startswith(("rotate", "shear", "translate")) for name in OPERATIONS}


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
    return [draw_rand_augment(RandAugmentOptions(**OPTIONS), 224, rng) for _ in range(DRAWS)]


def params(*rows):
    """One tuple of (name or None, argument) pairs per image."""
    index = [[SKIPPED if name is None else OPERATIONS.index(name) for name, _ in row] for row in rows]
    return RandAugmentParams(torch.tensor(index), torch.tensor([[float(value) for _, value in row] for row in rows]))


@pytest.mark.parametrize(("name", "argument"), [(name, value) for name in OPERATIONS for value in ARGUMENTS[name]])
def test_each_operation_equals_pillow(photos, name, argument):
    ours = rand_augment(oracle.to_batch(photos), params(*[[(name, argument)]] * len(photos)))
    theirs = oracle.to_batch([oracle.RAND_AUGMENT[name](photo, argument) for photo in photos])
    # Bounds far inside those promised (1 for colour, 3 for geometry), and the border is included.
    assert (ours - theirs).abs().mean() < (0.1 if IS_WARP[name] else 0.005)
    assert torch.equal(ours, ours.round())
    assert ours.min() >= 0
    assert ours.max() <= 255


@pytest.mark.parametrize("name", ["auto_contrast", "equalize"])
def test_histogram_operations_equal_pillow_on_flat_and_two_valued_images(name):
    images = torch.full((2, 3, 20, 30), 77.0)
    images[1, :, 5] = 200.0
    images[1, 0, 7, 3] = 3.0
    ours = rand_augment(images, params([(name, 0)], [(name, 0)]))
    pictures = [oracle.Image.fromarray(image.permute(1, 2, 0).byte().numpy()) for image in images]
    assert torch.equal(ours, oracle.to_batch([oracle.RAND_AUGMENT[name](picture, 0) for picture in pictures]))


def test_posterize_to_no_bits_is_black(photos):
    """What Pillow did with 0 bits while it still accepted them."""
    assert rand_augment(oracle.to_batch(photos[:1]), params([("posterize", 0)])).max() == 0


def test_every_image_of_a_batch_gets_its_own_operations_in_order(photos):
    images = [oracle.photo(seed) for seed in range(15)]
    rows = [
        [(name, ARGUMENTS[name][-1]), (OPERATIONS[index - 4], ARGUMENTS[OPERATIONS[index - 4]][0])]
        for index, name in enumerate(OPERATIONS)
    ]
    ours = rand_augment(oracle.to_batch(images), params(*rows))
    for image, row, result in zip(images, rows, ours, strict=True):
        for name, argument in row:
            image = oracle.RAND_AUGMENT[name](image, argument)
        assert (result - oracle.to_tensor(image)).abs().mean() < 1


def test_skipped_operations_change_nothing(photos):
    images = oracle.to_batch(photos)
    assert torch.equal(rand_augment(images, params(*[[(None, 0), (None, 0)]] * len(photos))), images)


def test_warps_draw_in_the_mean_colour_of_imagenet(photos):
    warped = rand_augment(oracle.to_batch(photos[:1]), params([("translate_x", 50)]))
    assert tuple(round(value) for value in IMAGENET_RGB.mean_255) == FILL
    assert warped[0, :, 60, 140].tolist() == list(FILL)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_run_on_one_pixel(name):
    result = rand_augment(torch.full((1, 3, 1, 1), 9.0), params([(name, ARGUMENTS[name][-1])]))
    assert result.shape == (1, 3, 1, 1)


def test_levels_give_the_arguments_of_the_recipe():
    at_ten = {name: argument_at_level(name, 10.0, 224) for name in OPERATIONS}
    assert at_ten == {
        "auto_contrast": 0,
        "equalize": 0,
        "invert": 0,
        "posterize": 4,
        "solarize": 256,
        "solarize_add": 110,
        "color": pytest.approx(1.9),
        "contrast": pytest.approx(1.9),
        "brightness": pytest.approx(1.9),
        "sharpness": pytest.approx(1.9),
        "rotate": 30,
        "shear_x": 0.3,
        "shear_y": 0.3,
        "translate_x": 100,
        "translate_y": 100,
    }
    assert argument_at_level("posterize", 9.9, 224) == 3
    assert argument_at_level("solarize", 9.9, 224) == 253
    assert argument_at_level("color", 0.0, 224) == pytest.approx(0.1)


def assert_share(count, prob, draws):
    assert abs(count / draws - prob) < 5 * math.sqrt(prob * (1 - prob) / draws)


def test_a_quarter_of_the_views_is_left_alone(drawn):
    untouched = sum((sample.operation == SKIPPED).all().item() for sample in drawn)
    assert_share(untouched, 0.25, DRAWS)


def test_the_share_of_unchanged_pixels_is_a_little_above_a_quarter():
    """Some operations can do nothing, solarize at level 10 first of all."""
    rng = np.random.default_rng(5)
    options = RandAugmentOptions(**OPTIONS)
    images = oracle.to_batch([oracle.photo(seed, (48, 48)) for seed in range(8)])
    unchanged = 0
    for _ in range(100):
        samples = [draw_rand_augment(options, 48, rng) for _ in range(8)]
        batch = RandAugmentParams(*(torch.stack(values) for values in zip(*samples, strict=True)))
        unchanged += (rand_augment(images, batch) == images).flatten(1).all(1).sum().item()
    assert 0.25 - 5 * math.sqrt(0.25 * 0.75 / 800) < unchanged / 800 < 0.40


def test_operations_are_uniform_and_drawn_with_replacement(drawn):
    pairs = torch.stack([sample.operation for sample in drawn])
    applied = pairs[pairs != SKIPPED].tolist()
    counts = Counter(applied)
    assert set(counts) == set(range(15))
    for count in counts.values():
        assert_share(count, 1 / 15, len(applied))
    both = pairs[(pairs != SKIPPED).all(1)]
    assert_share((both[:, 0] == both[:, 1]).sum().item(), 1 / 15, len(both))


def test_levels_are_normal_about_the_magnitude_and_cut_at_ten(drawn):
    index = OPERATIONS.index("rotate")
    degrees = torch.cat([sample.argument[sample.operation == index] for sample in drawn])
    assert_share((degrees > 0).sum().item(), 0.5, len(degrees))
    assert_share((degrees.abs() == 30).sum().item(), 0.5, len(degrees))
    below = 10 - degrees.abs()[degrees.abs() < 30] / 3
    # A half-normal of standard deviation 0.5.
    assert below.mean().item() == pytest.approx(0.5 * math.sqrt(2 / math.pi), abs=5 * 0.302 / math.sqrt(len(below)))


def test_nothing_is_drawn_when_it_is_off():
    rng = np.random.default_rng(3)
    sample = draw_rand_augment(None, 224, rng)
    assert sample.operation.shape == sample.argument.shape == (0,)
    assert rng.random() == np.random.default_rng(3).random()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_ops": 0}, "rand_augment_num_ops is 0; it must be a whole number of at least 1"),
        ({"magnitude": 10.5}, r"rand_augment_magnitude is 10.5; it must be in \[0, 10\]"),
        ({"magnitude_std": -1}, "rand_augment_magnitude_std is -1"),
        ({"prob": 1.5}, "rand_augment_prob is 1.5; a probability lies between 0 and 1"),
    ],
)
def test_settings_outside_their_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        RandAugmentOptions(**OPTIONS | wrong)
