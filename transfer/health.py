"""Weights that cannot be right, and weights that hardly can, told from their values alone."""

import math
from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor

# Kernels' root mean square over that of the distribution that a convolution of its size is initialised with (He et al.,
# arXiv:1502.01852): beyond these the median over all convolutions of a trained network is no longer ordinary.
USUAL_SCALE = (0.05, 5.0)


def damage_in(tensors: Mapping[str, Tensor]) -> str:
    """Say what makes weights useless: values that are NaN or infinite, negative running variances; "" if nothing."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        return (
            f"{len(broken)} tensors hold NaN or infinite values: {', '.join(broken[:4])}. The pretraining diverged or "
            f"the file is damaged; take an earlier checkpoint"
        )
    negative = [name for name, variance in _variances(tensors).items() if variance.min() < 0]
    return f"{len(negative)} running variances are negative: {', '.join(negative[:4])}" if negative else ""


def oddities_in(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Warn of running variances with zeros, of ones that are the same for every channel, and of an unusual scale.

    Args:
        tensors: Weights without damage.
    """
    variances = _variances(tensors)
    constant = [name for name, variance in variances.items() if variance.min() == variance.max()]
    zero = [name for name, variance in variances.items() if variance.min() == 0 and name not in constant]
    statistics = tuple(
        f"{len(names)} of {len(variances)} running variances {problem}: {', '.join(names[:4])}"
        for names, problem in (
            (constant, "are the same for every channel, as before any training"),
            (zero, "hold zeros, so these channels never varied"),
        )
        if names
    )
    return (*statistics, *_unusual_scale(tensors))


def _variances(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.endswith(".running_var")}


def _unusual_scale(tensors: Mapping[str, Tensor]) -> list[str]:
    """Compare the size of the kernels with what they are initialised with."""
    kernels = [tensor for tensor in tensors.values() if tensor.dim() == 4]
    scales = [float(kernel.square().mean().sqrt()) / math.sqrt(2 / kernel[0].numel()) for kernel in kernels]
    scale = median(scales) if scales else 1.0
    if USUAL_SCALE[0] <= scale <= USUAL_SCALE[1]:
        return []
    largest = max(float(kernel.abs().max()) for kernel in kernels)
    return [
        f"the kernels' scale is unusual: {scale:.3g} times that of an initialised network, largest weight "
        f"{largest:.3g}; the published learning rates may not fit"
    ]
