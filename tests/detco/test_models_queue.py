"""The ring buffer of keys."""

import pytest
import torch
from torch.nn import functional as F

from detco.models.queue import KeyQueue


def unit_keys(count, dim=4):
    return F.normalize(torch.randn(count, dim), dim=1)


def test_queue_starts_full_of_unit_directions_that_differ():
    keys = KeyQueue(dim=16, capacity=64).keys
    torch.testing.assert_close(keys.norm(dim=0), torch.ones(64))
    assert (keys.T @ keys - torch.eye(64)).abs().max() < 0.99


def test_queue_keeps_the_newest_keys_after_wrapping():
    queue = KeyQueue(dim=4, capacity=6)
    pushed = [unit_keys(2) for _ in range(5)]
    for keys in pushed:
        queue.push(keys)
    # Pushes 0 and 1 were overwritten by 3 and 4.
    assert torch.equal(queue.keys, torch.cat([pushed[3], pushed[4], pushed[2]]).T)
    assert queue.cursor.item() == 5 * 2 % 6


def test_push_touches_only_the_oldest_columns():
    queue = KeyQueue(dim=4, capacity=6)
    before = queue.keys.clone()
    queue.push(unit_keys(3))
    assert torch.equal(queue.keys[:, 3:], before[:, 3:])
    assert not torch.isclose(queue.keys[:, :3], before[:, :3]).all(dim=0).any()


def test_queue_resumed_at_another_batch_size_wraps_around_the_end():
    queue = KeyQueue(dim=4, capacity=6)
    queue.push(unit_keys(1))
    keys = [unit_keys(2) for _ in range(3)]
    for pushed in keys:
        queue.push(pushed)
    assert torch.equal(queue.keys, torch.cat([keys[2][1:], keys[0], keys[1], keys[2][:1]]).T)
    assert queue.cursor.item() == 1


def test_push_that_does_not_divide_the_capacity_is_refused_and_writes_nothing():
    queue = KeyQueue(dim=4, capacity=6)
    before = queue.keys.clone()
    with pytest.raises(ValueError, match=r"queue size 6 is not a multiple of the 4 keys .* change the queue size"):
        queue.push(unit_keys(4))
    assert torch.equal(queue.keys, before)
    assert queue.cursor.item() == 0


def test_queue_stays_float32_under_autocast():
    queue = KeyQueue(dim=4, capacity=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        queue.push(unit_keys(2).to(torch.bfloat16))
    assert queue.keys.dtype == torch.float32


def test_keys_and_cursor_are_saved_with_the_model():
    queue, restored = KeyQueue(dim=4, capacity=6), KeyQueue(dim=4, capacity=6)
    queue.push(unit_keys(2))
    restored.load_state_dict(queue.state_dict())
    assert torch.equal(restored.keys, queue.keys)
    assert restored.cursor.item() == 2


def test_a_key_lies_together_in_memory_also_after_a_resume():
    queue = KeyQueue(dim=4, capacity=6)
    assert queue.keys.stride() == (1, 4)
    resumed = KeyQueue(dim=4, capacity=6)
    resumed.load_state_dict({"keys": queue.keys.contiguous(), "cursor": queue.cursor})
    resumed.push(unit_keys(2))
    assert resumed.keys.stride() == (1, 4)
