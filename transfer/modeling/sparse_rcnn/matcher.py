"""One-to-one matching of proposals and objects.

Shape legend:
    N  proposals of one image
    M  objects of one image, maybe none
    K  classes

Boxes are x1, y1, x2, y2 in pixels of the network's input, without its padding.
Source: Sparse R-CNN, arXiv:2011.12450, Sec. 3.4, after DETR (arXiv:2005.12872, Sec. 3.1); the terms of the cost and
their forms are those of PeizeSun/SparseR-CNN@0e5028d, sparsercnn/loss.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_TINY = 1e-7  # keeps the IoU of two boxes without area finite


class Target(NamedTuple):
    """The objects of one image.

    Attributes:
        classes: In [0, K), shape (M,), int64.
        boxes: Shape (M, 4).
        size: Width, height, width, height of the image in pixels, shape (4,).
    """

    classes: Tensor
    boxes: Tensor
    size: Tensor


@dataclass(frozen=True)
class Terms:
    """Weights of the three terms and the focal loss's parameters; matching and loss share them."""

    class_weight: float
    l1_weight: float
    giou_weight: float
    focal_alpha: float
    focal_gamma: float


def giou(left: Tensor, right: Tensor) -> Tensor:
    """Generalised IoU (arXiv:1902.09630) of boxes; broadcasts.

    Args:
        left: Shape (..., 4), x1 <= x2 and y1 <= y2.
        right: Likewise; the leading shapes must broadcast.

    Returns:
        In [-1, 1], of the broadcast leading shape; IoU minus the share of the hull that neither box covers.
    """
    inner = _area(torch.maximum(left[..., :2], right[..., :2]), torch.minimum(left[..., 2:], right[..., 2:]))
    hull = _area(torch.minimum(left[..., :2], right[..., :2]), torch.maximum(left[..., 2:], right[..., 2:]))
    union = _area(left[..., :2], left[..., 2:]) + _area(right[..., :2], right[..., 2:]) - inner
    return inner / (union + _TINY) - (hull - union) / (hull + _TINY)


def _area(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).clamp(min=0).prod(dim=-1)


def matching_costs(logits: Tensor, boxes: Tensor, target: Target, terms: Terms) -> Tensor:
    """What each pair would cost: focal class term, L1 of the boxes relative to the image's size, minus their GIoU.

    Args:
        logits: Class scores before the sigmoid, shape (N, K).
        boxes: Shape (N, 4).
        target: The image's objects.
        terms: Weights and focal parameters.

    Returns:
        Shape (N, M), float32.
    """
    chosen = logits.float()[:, target.classes]  # (N, M): each object's own class
    probability = chosen.sigmoid()
    # softplus(-x) is -log(sigmoid(x)), without its underflow.
    if_object = terms.focal_alpha * (1 - probability) ** terms.focal_gamma * F.softplus(-chosen)
    if_background = (1 - terms.focal_alpha) * probability**terms.focal_gamma * F.softplus(chosen)
    distance = ((boxes[:, None] - target.boxes[None]) / target.size).abs().sum(dim=-1)
    return (
        terms.class_weight * (if_object - if_background)
        + terms.l1_weight * distance
        - terms.giou_weight * giou(boxes[:, None], target.boxes[None])
    )


class HungarianMatcher:
    """Finds the matching of least total cost.

    Raises:
        ImportError: If SciPy is not installed.
    """

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self._solve = _linear_sum_assignment()

    @torch.no_grad()
    def __call__(self, logits: Tensor, boxes: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Match one image.

        Args:
            logits: Shape (N, K).
            boxes: Shape (N, 4).
            target: The image's objects.

        Returns:
            Indices of proposals and of their objects, each of shape (min(N, M),), int64, on the device of `logits`.

        Raises:
            FloatingPointError: If a cost is not finite, that is, the training has diverged.
        """
        costs = matching_costs(logits, boxes, target, self.terms).cpu()
        if not costs.isfinite().all():
            raise FloatingPointError("Sparse R-CNN predicts boxes or scores that are not finite; lower SOLVER.BASE_LR")
        proposals, objects = self._solve(costs.numpy())
        return torch.as_tensor(proposals, device=logits.device), torch.as_tensor(objects, device=logits.device)


def _linear_sum_assignment() -> Callable[[Any], tuple[Any, Any]]:
    # Lazy: every detector of the suite imports this module, only this one needs SciPy.
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("Sparse R-CNN matches with SciPy, which is not installed: pip install scipy") from error
    solver: Callable[[Any], tuple[Any, Any]] = linear_sum_assignment
    return solver
