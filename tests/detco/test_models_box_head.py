"""The head on pooled boxes: an explicit reference, and the names that the converter reads."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detco.models.box_head import BoxHead
from transfer.naming import TABLES, account_for
from transfer.sources.parts import box_head_shapes


@pytest.fixture(scope="module")
def head():
    torch.manual_seed(0)
    head = BoxHead().eval()
    for norm in (head.bn1, head.bn2, head.bn3, head.bn4):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return head


def test_it_is_four_times_convolution_norm_relu_and_a_linear_layer_over_all_cells(head):
    torch.manual_seed(1)
    pooled = torch.randn(3, 256, 7, 7)
    x = pooled
    for n in range(1, 5):
        weights, norm = getattr(head, f"conv{n}").weight, getattr(head, f"bn{n}")
        x = F.conv2d(x, weights, padding=1)
        x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
        x = (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
    # The linear layer reads channel by channel, row by row, as a detector's does.
    per_cell = head.fc1.weight.view(1024, 256, 7, 7)
    expected = (torch.einsum("rcyx,fcyx->rf", x, per_cell) + head.fc1.bias).clamp(min=0)

    torch.testing.assert_close(head(pooled), expected, rtol=1e-4, atol=1e-4)
    assert expected.shape == (3, 1024)
    assert 0.05 < (expected > 0).float().mean() < 0.95


def test_names_and_shapes_are_those_the_converter_knows(head):
    state = head.state_dict()
    counters = {name for name in state if name.endswith("num_batches_tracked")}
    assert len(counters) == 4
    assert {name: tuple(state[name].shape) for name in state if name not in counters} == box_head_shapes()

    account = account_for((f"box_head/{name}" for name in state), TABLES)
    assert not account.unexplained
    assert set(account.dropped) == {f"box_head/{name}" for name in counters}
