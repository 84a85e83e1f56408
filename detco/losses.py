"""Contrastive loss: a pure function of tensors, the same on every device and in every method.

Shape legend:
    N  images in this process
    D  embedding dimension
    K  negatives

Source: InfoNCE as in MoCo, arXiv:1911.05722, Eq. 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Contrast(NamedTuple):
    """One contrastive term."""

    loss: Tensor
    """Scalar, mean over the images, with gradient."""

    top1: Tensor
    """Scalar in [0, 1], no gradient: share of images whose positive scores above every negative."""


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32, or unchanged if it is float64 already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def info_nce(query: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> Contrast:
    """Classify, for every image, its positive key among K + 1 keys. Computed in float32 even under autocast.

    Equal to the cross-entropy of the N x (K + 1) logits with the positive as class 0, but as softplus(logsumexp of
    the negatives - positive), so that the logits are neither concatenated nor copied: autograd keeps one N x K matrix.

    Args:
        query: Unit length, shape (N, D).
        positive: Unit length, shape (N, D): row n belongs to the same image as row n of `query`.
        negatives: Unit length columns, shape (D, K). Must not be written to before the backward pass.
        temperature: Above 0; cosines are divided by it.
    """
    with torch.autocast(query.device.type, enabled=False):
        query = full_precision(query) / temperature
        positive_logit = (query * full_precision(positive)).sum(dim=1)
        negative_logits = query @ full_precision(negatives)
        loss = F.softplus(negative_logits.logsumexp(dim=1) - positive_logit).mean()
    with torch.no_grad():
        top1 = (positive_logit > negative_logits.amax(dim=1)).to(torch.float32).mean()
    return Contrast(loss, top1)
