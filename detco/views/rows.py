"""The rows of a batch: apply an operation to some of them, or render them one by one.

Either is done in the way that suits the device, with the same result. On the CPU it pays to compute the chosen rows
alone, and one image at a time, because a single image stays in the cache from operation to operation. On a GPU the
whole batch is computed and the chosen rows are kept: asking which they are would make the host wait for the device.

Shape legend:
    N  images in a batch
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

SampleT = TypeVar("SampleT", bound=NamedTuple)

Operation = Callable[..., Tensor]
"""(images, *parameters) -> images: every tensor has the N images first, and no image influences another."""


def is_on_cpu(images: Tensor) -> bool:
    """Whether to work image by image instead of on the whole batch."""
    return images.device.type == "cpu"


def apply_to_rows(chosen: Tensor, operation: Operation, images: Tensor, *parameters: Tensor) -> Tensor:
    """The images, with `operation` applied to the chosen ones.

    Args:
        chosen: bool, shape (N,).
        operation: Must not change its arguments in place.
        images: Float, shape (N, C, H, W). Not changed.
        *parameters: Per-sample parameters of the operation, each with a leading N.
    """
    way = apply_to_picked_rows if is_on_cpu(images) else apply_to_all_rows
    return way(chosen, operation, images, *parameters)


def apply_to_all_rows(chosen: Tensor, operation: Operation, images: Tensor, *parameters: Tensor) -> Tensor:
    """`apply_to_rows` that computes all rows and keeps the chosen ones: never waits for the device."""
    return torch.where(chosen[:, None, None, None], operation(images, *parameters), images)


def apply_to_picked_rows(chosen: Tensor, operation: Operation, images: Tensor, *parameters: Tensor) -> Tensor:
    """`apply_to_rows` that computes the chosen rows only."""
    rows = chosen.nonzero().flatten()
    if len(rows) == 0:
        return images
    if len(rows) == len(images):
        return operation(images, *parameters)
    return images.index_copy(0, rows, operation(images[rows], *(values[rows] for values in parameters)))


def render_rows(render: Callable[[SampleT], Tensor], batch: SampleT) -> Tensor:
    """`render(batch)`; on the CPU image by image.

    Args:
        render: Returns one row for each row of its argument; no row influences another.
        batch: A (nested) NamedTuple of tensors, each with a leading N, the first of them the images.
    """
    images = batch[0]
    if not is_on_cpu(images) or len(images) == 1:
        return render(batch)
    return torch.cat([render(_row(batch, index)) for index in range(len(images))])


def _row(batch: Any, index: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[index : index + 1]
    return type(batch)(*(_row(field, index) for field in batch))
