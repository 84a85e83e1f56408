"""The random numbers of a sample: which they are and in which order they are drawn, so that runs can be replayed."""

import numpy as np
import pytest
import torch

from detco.views import DetCoRecipe, Photo, sample_generator
from detco.views.host import draw_crop_box
from detco.views.photometric import PhotometricOptions, draw_flip, draw_photometric
from detco.views.rand_augment import draw_rand_augment


def rng_of(index):
    return sample_generator(seed=0, epoch=0, index=index)


def leaves(sample):
    return [sample] if torch.is_tensor(sample) else [leaf for field in sample for leaf in leaves(field)]


@pytest.mark.parametrize("settings", [{}, {"rand_augment": True}, {"patch_color": "patch"}])
def test_random_numbers_are_drawn_view_by_view(settings):
    """In this order and no other, or a resumed run would not go on as it began: box, cells, flip, colours, offsets."""
    recipe = DetCoRecipe(global_size=32, local_size=48, patch_size=12, **settings)
    options, crop_ratio = recipe.global_views.photometric, recipe.global_views.crop_ratio
    for index in range(20):
        rng = rng_of(index)
        image = Photo.of(torch.from_numpy(rng_of(index).integers(256, size=(3, 120, 150), dtype=np.uint8)))
        crops, expected = [], []
        for _ in range(2):
            crops.append((draw_crop_box(120, 150, recipe.global_views.global_scale, crop_ratio, rng), 32))
            expected += [draw_flip(0.5, rng), *draw_photometric(options, rng)]
            expected += draw_rand_augment(recipe.global_views.rand_augment, 32, rng)
        for _ in range(2):
            crops.append((draw_crop_box(120, 150, recipe.local_scale, crop_ratio, rng), 48))
            cell = torch.from_numpy(rng.permutation(9))
            expected.append(draw_flip(0.5, rng))
            colours = [draw_photometric(options, rng) for _ in range(9 if recipe.patch_color == "patch" else 1)]
            expected += [torch.stack(values).squeeze() for values in zip(*colours, strict=True)]
            expected += [cell, torch.from_numpy(rng.integers(16 - 12 + 1, size=(9, 2)))]
        drawn = recipe.draw(image, rng_of(index))
        assert all(torch.equal(*pair) for pair in zip([view.crop for view in drawn], image.crops(crops), strict=True))
        params = [leaf for view in drawn for leaf in leaves(view._replace(crop=()))]
        assert all(torch.equal(*pair) for pair in zip(params, expected, strict=True))


def test_jitter_factors_are_what_numpy_draws_between_their_limits():
    """Bit for bit, however they are computed; a strength above 1 is cut at 0, where the image would be inverted."""
    options = PhotometricOptions(
        jitter=(0.4, 1.5, 0.3, 0.1), jitter_prob=1.0, grey_prob=0.2, blur_prob=0.5, blur_sigma=(0.1, 2.0)
    )
    for index in range(500):
        drawn, rng = draw_photometric(options, rng_of(index)), rng_of(index)
        assert rng.random() < 1.0  # jittered
        assert drawn.jitter_order.tolist() == rng.permutation(4).tolist()
        factors = rng.uniform([0.6, 0.0, 0.7, -0.1], [1.4, 2.5, 1.3, 0.1])
        assert torch.equal(drawn.jitter_factors, torch.from_numpy(factors.astype(np.float32)))
