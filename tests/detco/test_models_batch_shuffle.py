"""Shuffling in one process; tests/dist has the same on two."""

import torch

from detco.models.batch_shuffle import draw_permutation, shuffle_rows, unshuffle_rows


def test_unshuffle_undoes_shuffle():
    torch.manual_seed(0)
    rows = torch.randn(8, 3, 5)
    permutation = draw_permutation(8)
    shuffled = shuffle_rows(rows, permutation)
    assert not torch.equal(shuffled, rows)
    assert torch.equal(unshuffle_rows(shuffled, permutation), rows)


def test_every_image_is_equally_likely_at_every_place():
    torch.manual_seed(0)
    draws = torch.stack([draw_permutation(4) for _ in range(4000)])
    for image in range(4):
        share = (draws == image).float().mean(dim=0)  # per place; standard deviation 0.0068
        torch.testing.assert_close(share, torch.full((4,), 0.25), atol=0.035, rtol=0)


def test_permutation_is_a_function_of_torch_s_global_generator():
    torch.manual_seed(3)
    first = draw_permutation(64)
    torch.manual_seed(3)
    assert torch.equal(draw_permutation(64), first)
    assert not torch.equal(draw_permutation(64), first)


def test_under_autocast_rows_travel_in_the_autocast_type():
    rows = torch.randn(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shuffled = shuffle_rows(rows, torch.tensor([3, 1, 0, 2]))
    assert torch.equal(shuffled, rows[[3, 1, 0, 2]].to(torch.bfloat16))
