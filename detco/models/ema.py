"""The slowly moving copy of a network: exponential moving average of its parameters.

Buffers are not averaged: the copy's BatchNorm statistics come from the copy's own batches, as in MoCo's code.

Source: MoCo, arXiv:1911.05722, Eq. 2.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def frozen_copy(source: ModuleT) -> ModuleT:
    """An exact copy, parameters and buffers, whose parameters take no gradient."""
    return copy.deepcopy(source).requires_grad_(False)


@torch.no_grad()
def update_ema(average: nn.Module, source: nn.Module, decay: float) -> None:
    """Set every parameter of `average` to decay * itself + (1 - decay) * that of `source`, in place.

    Args:
        average: A `frozen_copy` of `source`.
        source: The network being trained; unchanged.
        decay: In [0, 1]: 1 leaves the average as it is, 0 copies.
    """
    averages: list[Tensor] = list(average.parameters())
    sources: list[Tensor] = list(source.parameters())
    # One call for all parameters: a few kernel launches instead of several hundred, one pass instead of two.
    torch._foreach_lerp_(averages, sources, 1.0 - decay)
