"""The moving average against one multiply-add per parameter."""

import torch
from torch import nn

from detco.models.ema import frozen_copy, update_ema


def small_network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_copy_is_exact_takes_no_gradient_and_shares_no_memory():
    source = small_network()
    source(torch.randn(8, 3))
    copied = frozen_copy(source)
    for ours, theirs in zip(source.state_dict().values(), copied.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert all(parameter.requires_grad for parameter in source.parameters())


def test_average_after_several_steps_is_the_textbook_recursion():
    torch.manual_seed(0)
    source = small_network()
    average = frozen_copy(source)
    expected = [parameter.detach().clone() for parameter in average.parameters()]
    for _ in range(5):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(torch.randn_like(parameter))
        update_ema(average, source, 0.9)
        expected = [0.9 * old + (1 - 0.9) * new for old, new in zip(expected, source.parameters(), strict=True)]
    for ours, theirs in zip(average.parameters(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_decay_one_freezes_and_decay_zero_copies():
    source, average = small_network(), frozen_copy(small_network())
    before = [parameter.clone() for parameter in average.parameters()]
    update_ema(average, source, 1.0)
    assert all(torch.equal(old, new) for old, new in zip(before, average.parameters(), strict=True))
    update_ema(average, source, 0.0)
    assert all(torch.equal(old, new) for old, new in zip(source.parameters(), average.parameters(), strict=True))


def test_buffers_are_not_averaged():
    source = small_network()
    average = frozen_copy(source)
    source(torch.randn(8, 3) + 5)
    update_ema(average, source, 0.5)
    assert torch.equal(average[1].running_mean, torch.zeros(4))
    assert average[1].num_batches_tracked.item() == 0


def test_source_is_left_alone():
    source = small_network()
    before = [parameter.clone() for parameter in source.parameters()]
    update_ema(frozen_copy(small_network()), source, 0.5)
    assert all(torch.equal(old, new) for old, new in zip(before, source.parameters(), strict=True))
