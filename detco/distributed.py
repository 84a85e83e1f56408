"""Rank, world size and three collectives that are the identity in one process.

Shape legend:
    N  rows of this process
    G  rows of all processes, ordered by rank; every process holds the same N
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether a process group with more than one process is running."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Index of this process, in [0, world_size)."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if is_distributed() else 1


@torch.no_grad()
def all_gather_rows(rows: Tensor) -> Tensor:
    """Stack the rows of all processes, rank 0 first. Carries no gradient.

    Collective: every process must call it, with the same shape and dtype.

    Args:
        rows: Shape (N, ...).

    Returns:
        Shape (G, ...); `rows` itself in one process.
    """
    if not is_distributed():
        return rows
    gathered = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


@torch.no_grad()
def exchange_rows(rows: Tensor, *, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """Hand every process some of the rows and take some from every process. Carries no gradient.

    Collective: every process must call it, with the same dtype and shape of a row. Nobody gets what is not for him.

    Args:
        rows: Receiver by receiver, shape (sum(sent), ...).
        sent: Rows for each process, this one included.
        received: Rows from each process, this one included.

    Returns:
        Sender by sender, shape (sum(received), ...); `rows` itself in one process.
    """
    if not is_distributed():
        return rows
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), list(received), list(sent))
    return arrived


@torch.no_grad()
def broadcast_from_first(tensor: Tensor) -> Tensor:
    """Overwrite `tensor` with rank 0's values, in place, and return it.

    Collective: every process must call it, with the same shape and dtype.
    """
    if is_distributed():
        dist.broadcast(tensor, src=0)
    return tensor
