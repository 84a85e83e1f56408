"""ShuffleBN: keys are normalised in other company than their queries, so that BatchNorm gives no positive away.

The unit that is shuffled is the image: one permutation serves all views of a step, and an image's patches stay
together. What is shuffled back is the final embedding of every head.

Besides the processes, `detco.models.norm.GroupedBatchNorm` splits each process's batch into BatchNorm groups of a fixed
number of images. So one process with 256 images normalises exactly like eight processes with 32 each, and shuffling
is of use there too.

The permutation lies on the CPU, where every process draws the same one. So each knows without asking which of its
images go where, and without waiting for its GPU how many; an image travels once, to the one process that needs it.

Shape legend:
    N  images of this process
    G  images of all processes, ordered by rank: G = N * processes
    T  key embeddings per image (8 in DetCo)
    D  embedding dimension

Source: MoCo, arXiv:1911.05722, Sec. 3.3, "Shuffling BN". Patches are not mentioned there or in DetCo.
"""

import torch
from torch import Tensor

from detco.distributed import all_gather_rows, exchange_rows, is_distributed, rank, world_size


def draw_permutation(num_images: int) -> Tensor:
    """A random order of all images of the step: one draw from torch's global CPU generator.

    It is the same on every process if their CPU generators are alike, which `detco.methods.base` asks of the trainer.

    Args:
        num_images: G.

    Returns:
        On the CPU, shape (G,), int64: a permutation of 0..G-1.
    """
    return torch.randperm(num_images)


@torch.no_grad()
def shuffle_rows(rows: Tensor, permutation: Tensor) -> Tensor:
    """This process's share of the shuffled images: row n is image permutation[rank * N + n] of all.

    Collective: every process must call it, with the same permutation. Under autocast the rows travel in the autocast
    type, in which the first convolution would read them anyway. Every process sends and receives at most N rows.

    Args:
        rows: One entry per image, shape (N, ...).
        permutation: From `draw_permutation`, shape (G,).

    Returns:
        Shape (N, ...).
    """
    if torch.is_autocast_enabled(rows.device.type):
        rows = rows.to(torch.get_autocast_dtype(rows.device.type))
    if not is_distributed():
        return rows[_to_device(permutation, rows.device)]

    num_images = len(rows)
    wanted = permutation.view(world_size(), num_images)  # row r: the images that process r is to get, in its order
    owner = wanted // num_images
    is_ours = owner == rank()
    sent = wanted[is_ours] - rank() * num_images  # receiver by receiver
    received = exchange_rows(
        rows[_to_device(sent, rows.device)],
        sent=is_ours.sum(dim=1).tolist(),
        received=owner[rank()].bincount(minlength=world_size()).tolist(),
    )
    # They come sender by sender, from each in our order, which is how a stable sort by sender lists our order.
    arrived_at = owner[rank()].argsort(stable=True).argsort()
    return received[_to_device(arrived_at, rows.device)]


@torch.no_grad()
def unshuffle_rows(shuffled: Tensor, permutation: Tensor) -> Tensor:
    """The rows of all processes, back in the order of the images.

    Collective: every process must call it.

    Args:
        shuffled: What was computed from the rows `shuffle_rows` returned, shape (N, T, D).
        permutation: The one given to `shuffle_rows`.

    Returns:
        Shape (G, T, D): row g belongs to image g of all, on every process.
    """
    return all_gather_rows(shuffled)[_to_device(permutation.argsort(), shuffled.device)]


def own_rows(gathered: Tensor, num_images: int) -> Tensor:
    """This process's N = `num_images` rows of a tensor of all G rows."""
    return gathered[rank() * num_images : (rank() + 1) * num_images]


def _to_device(indices: Tensor, device: torch.device) -> Tensor:
    """Indices from the CPU to where the rows are, without waiting for the work that is queued there."""
    # From memory that is not pinned, a copy to a GPU may wait.
    source = indices.pin_memory() if device.type == "cuda" else indices
    return source.to(device, non_blocking=True)
