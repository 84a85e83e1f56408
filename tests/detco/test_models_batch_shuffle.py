"""Shuffling and BatchNorm groups in one process; tests/dist has the same on two."""

import pytest
import torch
from torch import nn

from detco.models.batch_shuffle import draw_permutation, in_groups, shuffle_rows, unshuffle_rows

CPU = torch.device("cpu")


def test_unshuffle_undoes_shuffle():
    torch.manual_seed(0)
    rows = torch.randn(8, 3, 5)
    permutation = draw_permutation(8, CPU)
    shuffled = shuffle_rows(rows, permutation)
    assert not torch.equal(shuffled, rows)
    assert torch.equal(unshuffle_rows(shuffled, permutation), rows)


def test_every_image_is_equally_likely_at_every_place():
    torch.manual_seed(0)
    draws = torch.stack([draw_permutation(4, CPU) for _ in range(4000)])
    for image in range(4):
        share = (draws == image).float().mean(dim=0)  # per place; standard deviation 0.0068
        torch.testing.assert_close(share, torch.full((4,), 0.25), atol=0.035, rtol=0)


def test_permutation_is_a_function_of_torch_s_global_generator():
    torch.manual_seed(3)
    first = draw_permutation(64, CPU)
    torch.manual_seed(3)
    assert torch.equal(draw_permutation(64, CPU), first)
    assert not torch.equal(draw_permutation(64, CPU), first)


def test_under_autocast_rows_travel_in_the_autocast_type():
    rows = torch.randn(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shuffled = shuffle_rows(rows, torch.tensor([3, 1, 0, 2]))
    assert torch.equal(shuffled, rows[[3, 1, 0, 2]].to(torch.bfloat16))


def test_groups_are_normalised_apart():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3)
    rows = torch.randn(8, 3)
    grouped = in_groups(norm, 4, rows)
    torch.testing.assert_close(grouped, torch.cat([norm(rows[:4]), norm(rows[4:])]))
    assert not torch.allclose(grouped, norm(rows))


def test_batch_within_the_group_size_is_one_group():
    rows = torch.randn(5, 3)
    sizes = []

    def forward(group):
        sizes.append(len(group))
        return group

    assert torch.equal(in_groups(forward, 32, rows), rows)
    assert sizes == [5]


def test_views_of_an_image_stay_in_the_same_group():
    images, patches = torch.arange(6), torch.arange(6) * 10
    pairs = in_groups(lambda image, patch: torch.stack([image, patch], dim=1), 2, images, patches)
    assert torch.equal(pairs[:, 1], 10 * pairs[:, 0])


def test_batch_that_does_not_split_into_equal_groups_is_refused():
    with pytest.raises(ValueError, match=r"48 images per process do not split into BatchNorm groups of 32; change"):
        in_groups(lambda rows: rows, 32, torch.zeros(48, 1))
