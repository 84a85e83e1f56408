"""The rows of a batch: apply an operation to some of them, or render them one by one.

Either is done in the way that suits the device, with the same result. On the CPU it pays to compute the chosen rows
alone, and one image at a time, because a single image stays in the cache from operation to operation. On a GPU the
whole batch is computed and the chosen rows are kept: asking which they are would make the host wait for the device.
So is it wherever torch.compile traces, because a compiled graph knows no values, and fuses what is computed in vain.

Shape legend:
    N  images in a batch
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

SampleT = TypeVar("SampleT", bound=NamedTuple)

Operation = Callable[..., Tensor]
"""(images, *parameters) -> images: every tensor has the N images first, and no image influences another."""


def is_on_cpu(values: Tensor) -> bool:
    """Whether reading the values makes nobody wait."""
    return values.device.type == "cpu"


def picks_rows(images: Tensor) -> bool:
    """Whether to work on chosen rows, image by image, instead of on the whole batch."""
    return is_on_cpu(images) and not torch.compiler.is_compiling()


def apply_to_rows(chosen: Tensor, operation: Operation, images: Tensor, *parameters: Tensor) -> Tensor:
    """The images, with `operation` applied to the chosen ones.

    Args:
        chosen: bool, shape (N,).
        operation: Must not change its arguments in place.
        images: Float, shape (N, C, H, W). Not changed.
        *parameters: Per-sample parameters of the operation, each with a leading N.
    """
    way = apply_to_picked_rows if picks_rows(images) else apply_to_all_rows
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


def apply_by_choice(choice: Tensor, operations: Mapping[int, Operation], images: Tensor, *parameters: Tensor) -> Tensor:
    """Every image with the operation of its choice applied, or as it is if there is none of that number.

    Args:
        choice: Keys of `operations` or other whole numbers, shape (N,).
        operations: Must not change their arguments in place.
        images: Float, shape (N, C, H, W). Not changed.
        *parameters: Per-sample parameters of every operation, each with a leading N.
    """
    if picks_rows(images):
        result = images
        for number in operations.keys() & set(choice.tolist()):
            result = apply_to_picked_rows(choice == number, operations[number], result, *parameters)
        return result
    result = images
    for number, operation in operations.items():
        # From the images, not from the result so far: so the operations share one reading of the images when fused.
        result = torch.where((choice == number)[:, None, None, None], operation(images, *parameters), result)
    return result


def known_maximum(values: Tensor, *, bound: float) -> float:
    """The largest of some parameters where reading it makes nobody wait, elsewhere what bounds them."""
    return float(values.max()) if picks_rows(values) else bound


def render_rows(render: Callable[[SampleT], Tensor], batch: SampleT) -> Tensor:
    """`render(batch)`; on the CPU image by image.

    Args:
        render: Returns one row for each row of its argument; no row influences another.
        batch: A (nested) NamedTuple of tensors, each with a leading N, the first of them the images.
    """
    images = batch[0]
    if not picks_rows(images) or len(images) == 1:
        return render(batch)
    # Copied at once into the result: keeping all rows to join them touches twice the memory, and none of it cached.
    first = render(_row(batch, 0))
    rendered = first.new_empty((len(images), *first.shape[1:]))
    rendered[0] = first[0]
    for index in range(1, len(images)):
        rendered[index] = render(_row(batch, index))[0]
    return rendered


def render_alike(render: Callable[[SampleT], Tensor], *batches: SampleT) -> list[Tensor]:
    """`render_rows` of every batch; where the whole batch is rendered at once, all of them are.

    So a compiled graph holds the operations once, and a GPU gets one large kernel in place of several smaller ones.

    Args:
        render: As that of `render_rows`.
        *batches: As that of `render_rows`, all with the same N and shapes.
    """
    if picks_rows(batches[0][0]):
        return [render_rows(render, batch) for batch in batches]
    return list(render(_join(batches)).chunk(len(batches)))


def _join(batches: Any) -> Any:
    if isinstance(batches[0], Tensor):
        return torch.cat(batches)
    return type(batches[0])(*map(_join, zip(*batches, strict=True)))


def _row(batch: Any, index: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[index : index + 1]
    return type(batch)(*(_row(field, index) for field in batch))
