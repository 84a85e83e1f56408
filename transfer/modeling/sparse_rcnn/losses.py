"""The losses of one head of Sparse R-CNN, on the pairs that the matcher found.

Shape legend:
    B  images
    N  proposals of one image
    M  matched pairs of all B images
    K  classes

Source: Sparse R-CNN, arXiv:2011.12450, Sec. 3.4, Eq. 1: focal loss, L1 and GIoU, normalised by the number of objects.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from detco.distributed import is_distributed, world_size
from transfer import d2
from transfer.modeling.sparse_rcnn.matcher import HungarianMatcher, Target, giou

d2.require()  # before fvcore, which warns on import of what nobody can change here

from fvcore.nn import sigmoid_focal_loss  # noqa: E402


def objects_per_process(targets: Sequence[Target]) -> float:
    """Number of objects in the batch, averaged over the processes; at least 1. Collective.

    The gradients are averaged over processes, too; so each object weighs the same, wherever it is.
    """
    count = torch.tensor(float(sum(len(target.classes) for target in targets)), device=targets[0].size.device)
    if is_distributed():
        dist.all_reduce(count)
    return max(count.item() / world_size(), 1.0)


def set_losses(
    logits: Tensor, boxes: Tensor, targets: Sequence[Target], matcher: HungarianMatcher, num_objects: float
) -> dict[str, Tensor]:
    """Weighted losses of one head's predictions.

    Args:
        logits: Class scores before the sigmoid, shape (B, N, K).
        boxes: x1, y1, x2, y2 in pixels, shape (B, N, 4).
        targets: The objects of the B images.
        matcher: Finds the pairs; its weights are the losses'.
        num_objects: What the sums are divided by.

    Returns:
        "cls", "l1" and "giou": scalars with gradients, finite also when no image has an object.
    """
    terms = matcher.terms
    logits, boxes = logits.float(), boxes.float()  # under mixed precision the sums would overflow
    pairs = [matcher(*image) for image in zip(logits, boxes, targets, strict=True)]
    wanted = torch.zeros_like(logits)
    for image, (target, (proposals, objects)) in enumerate(zip(targets, pairs, strict=True)):
        wanted[image, proposals, target.classes[objects]] = 1
    found = torch.cat([boxes[image, proposals] for image, (proposals, _) in enumerate(pairs)])  # (M, 4)
    true = torch.cat([target.boxes[objects] for target, (_, objects) in zip(targets, pairs, strict=True)])
    sizes = torch.cat(
        [target.size.expand(len(objects), 4) for target, (_, objects) in zip(targets, pairs, strict=True)]
    )
    focal = sigmoid_focal_loss(logits, wanted, alpha=terms.focal_alpha, gamma=terms.focal_gamma, reduction="sum")
    return {
        "cls": terms.class_weight * focal / num_objects,
        "l1": terms.l1_weight * F.l1_loss(found / sizes, true / sizes, reduction="sum") / num_objects,
        "giou": terms.giou_weight * (1 - giou(found, true)).sum() / num_objects,
    }
