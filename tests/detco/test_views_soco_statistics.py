"""How often each thing happens in SoCo's views, over thousands of draws, against the published frequencies."""

import math

import numpy as np
import pytest
import torch

from detco.views import Photo, Proposals, SoCoStarRecipe, sample_generator

DRAWS = 1500
BOXES = Proposals(
    np.array([(x, y, x + 40, y + 30) for x in range(0, 60, 10) for y in range(0, 70, 10)], np.float32), np.ones(42, int)
)
NAMES = ("whole", "crop", "small", "medium")


@pytest.fixture(scope="module")
def samples():
    """Drawn samples without their pixels, which are not what is tested."""
    recipe = SoCoStarRecipe(cutout_prob=0.5)
    image = Photo.of(torch.zeros(3, 100, 100, dtype=torch.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detco.views.soco.shrink", lambda pixels, size: pixels)
        patch.setattr(Photo, "crops", lambda photo, wanted: [photo.pixels()[:, :1, :1] for _ in wanted])
        return [
            recipe.draw_with_proposals(image, BOXES, sample_generator(seed=0, epoch=0, index=index))
            for index in range(DRAWS)
        ]


def views(samples, name):
    return [sample.whole if name == "whole" else getattr(sample, name).view for sample in samples]


def assert_share(flags, prob):
    """Within five standard deviations of a binomial: a right program fails once in two million."""
    share = np.mean([bool(flag) for flag in flags])
    assert abs(share - prob) <= 5 * math.sqrt(prob * (1 - prob) / len(flags)), share


@pytest.mark.parametrize("name", NAMES)
def test_colours_and_flips_happen_as_often_as_published(samples, name):
    drawn = views(samples, name)
    colours = [view.photometric for view in drawn]
    assert_share([view.is_flipped for view in drawn], 0.5)
    assert_share([(params.jitter_factors[:3] != 1).any() for params in colours], 0.8)
    assert_share([params.is_grey for params in colours], 0.2)
    assert_share([params.blur_sigma > 0 for params in colours], 1.0 if name == "whole" else 0.1)
    assert_share([view.is_solarised for view in drawn], 0.0 if name == "whole" else 0.2)


def test_jitter_strengths_and_sigmas_are_those_published(samples):
    factors = torch.stack([view.photometric.jitter_factors for view in views(samples, "whole")])
    most = (factors - torch.tensor([1.0, 1.0, 1.0, 0.0])).abs().amax(0)
    assert torch.allclose(most, torch.tensor([0.4, 0.4, 0.2, 0.1]), rtol=0.02)
    sigmas = torch.stack([view.photometric.blur_sigma for view in views(samples, "whole")])
    assert 0.1 <= sigmas.min() < 0.12
    assert 1.98 < sigmas.max() <= 2.0


@pytest.mark.parametrize("name", NAMES)
def test_cutouts_happen_as_often_as_asked(samples, name):
    cut = [square for view in views(samples, name) for square in (view.cutout_view != 0).any(1)]
    assert_share(cut, 0.5 if name in ("crop", "small") else 0.0)


def test_views_are_flipped_and_coloured_independently(samples):
    flips, greys = (
        np.array([[bool(of(view)) for view in views(samples, name)] for name in NAMES], dtype=float)
        for of in (lambda view: view.is_flipped, lambda view: view.photometric.is_grey)
    )
    correlation = np.corrcoef(np.concatenate((flips, greys))) - np.eye(8)
    assert np.abs(correlation).max() < 5 / math.sqrt(DRAWS)


def test_boxes_of_the_whole_view_are_jittered_half_of_the_time_and_those_of_crops_never(samples):
    """Seen by their width: proposals are 40 of 100 pixels wide, and jitter stretches by up to a tenth."""
    widths = torch.cat([sample.crop.boxes_in_whole.boxes_view for sample in samples])
    widths = widths[:, 2] - widths[:, 0]
    is_raw = (widths - 0.4).abs() < 1e-6
    assert_share(~is_raw, 0.5)
    assert widths.max() <= 0.44 + 1e-6


def test_every_proposal_is_drawn_equally_often(samples):
    """Of those that lie around the middle, which nearly every crop shows."""
    ids = torch.cat([sample.crop.boxes.ids for sample in samples])
    counts = torch.bincount(ids, minlength=43)[1:].double().view(6, 7)
    middle = counts[2:4, 2:5]
    assert (middle / middle.mean() - 1).abs().max() < 5 / math.sqrt(middle.mean())
