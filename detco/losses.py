"""Losses between embeddings: pure functions of tensors, the same on every device and in every method.

Shape legend:
    N  images in this process
    D  embedding dimension
    K  negatives, or boxes per image

Source: InfoNCE as in MoCo, arXiv:1911.05722, Eq. 1; similarity of objects as in SoCo, arXiv:2106.02637, Eq. 5, and
hologerry/SoCo@624a70d contrast/models/SoCo_FPN.py.
"""

from typing import Any, NamedTuple

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
    the negatives - positive). No N x K matrix outlives the call: neither labels nor logits are kept for the backward
    pass.

    Args:
        query: Unit length, shape (N, D).
        positive: Unit length, shape (N, D): row n belongs to the same image as row n of `query`.
        negatives: Unit length columns, shape (D, K), fastest with each together in memory. They take no gradient.
        temperature: Above 0; cosines are divided by it.

    Raises:
        ValueError: If `negatives` want a gradient, which they would not get.
    """
    if negatives.requires_grad and torch.is_grad_enabled():
        raise ValueError("info_nce has no gradient for its negatives, but they require one; detach() them")
    with torch.autocast(query.device.type, enabled=False):
        query = full_precision(query) / temperature
        positive_logit = (query * full_precision(positive)).sum(dim=1)
        log_sum, highest = _LogSumExpOfProduct.apply(query, full_precision(negatives))
        loss = F.softplus(log_sum - positive_logit).mean()
    return Contrast(loss, (positive_logit.detach() > highest).to(torch.float32).mean())


class _LogSumExpOfProduct(torch.autograd.Function):
    """Logsumexp and maximum of each row of query @ negatives, shape (N,) each; the maximum has no gradient.

    The gradient of a row's logsumexp, its softmax @ negatives transposed, is of the size of the query. It is computed
    with the value, in the place of the logits, so that what is kept is that and not a matrix per term of the loss.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        logits = (negatives.T @ query.T).T  # faster on CPUs with the larger matrix first
        highest = logits.amax(dim=1)
        exponentials = logits.sub_(highest.unsqueeze(1)).exp_()
        total = exponentials.sum(dim=1)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((exponentials @ negatives.T) / total.unsqueeze(1))
        ctx.mark_non_differentiable(highest)
        return total.log() + highest, highest

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # only where this is to be differentiated again, and what is kept is a constant
            raise RuntimeError("info_nce can be differentiated once only, without create_graph")
        (per_query,) = ctx.saved_tensors
        return gradients[0].unsqueeze(1) * per_query, None


def is_same_object(ids_a: Tensor, levels_a: Tensor, ids_b: Tensor, levels_b: Tensor) -> Tensor:
    """Say which boxes of view a and view b show one object: those with one id, if both have a level.

    Args:
        ids_a: Shape (N, K). An id may repeat within a view; every repetition counts.
        levels_a: -1 for a box without a level, shape (N, K).
        ids_b: Shape (N, K).
        levels_b: Shape (N, K).

    Returns:
        Bool, shape (N, K, K): entry (n, i, j) is about box i of a and box j of b.
    """
    same_id = ids_a.unsqueeze(2) == ids_b.unsqueeze(1)
    return same_id & (levels_a >= 0).unsqueeze(2) & (levels_b >= 0).unsqueeze(1)


def object_similarity(prediction: Tensor, target: Tensor, is_match: Tensor) -> Tensor:
    """Pull matching boxes of two views together: -2 times their mean cosine. Computed in float32 even under autocast.

    The mean is over an image's matches first and over the images then. An image without a match counts as 0.

    Args:
        prediction: Any length, shape (N, K, D).
        target: Any length, shape (N, K, D).
        is_match: From `is_same_object`, with the boxes of `prediction` first; bool, shape (N, K, K).

    Returns:
        Scalar in [-2, 2], -2 for equal directions.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        prediction, target = (F.normalize(full_precision(x), dim=2) for x in (prediction, target))
        cosines = (prediction @ target.transpose(1, 2)).masked_fill(~is_match, 0)
        matches = is_match.sum(dim=(1, 2))
        return -2 * (cosines.sum(dim=(1, 2)) / matches.clamp(min=1)).mean()
