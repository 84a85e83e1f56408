"""ShuffleBN: keys are normalised in other company than their queries, so that BatchNorm gives no positive away.

The unit that is shuffled is the image: one permutation serves all views of a step, and an image's patches stay
together. What is shuffled back is the final embedding of every head.

Besides the processes, `in_groups` splits each process's batch into BatchNorm groups of a fixed number of images. So
one process with 256 images normalises exactly like eight processes with 32 each, and shuffling is of use there too.

Shape legend:
    N  images of this process
    G  images of all processes, ordered by rank: G = N * processes
    T  key embeddings per image (8 in DetCo)
    D  embedding dimension

Source: MoCo, arXiv:1911.05722, Sec. 3.3, "Shuffling BN". Patches are not mentioned there or in DetCo.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from detco.distributed import all_gather_rows, broadcast_from_first, rank


def draw_permutation(num_images: int, device: torch.device) -> Tensor:
    """A random order of all images of the step, the same on every process.

    Collective: every process must call it. Drawn from torch's global CPU generator on every process, so that the
    generators stay in step; rank 0's draw is used.

    Args:
        num_images: G.
        device: Where the views are.

    Returns:
        Shape (G,), int64: a permutation of 0..G-1.
    """
    return broadcast_from_first(torch.randperm(num_images).to(device))


@torch.no_grad()
def shuffle_rows(rows: Tensor, permutation: Tensor) -> Tensor:
    """This process's share of the shuffled images: row n is image permutation[rank * N + n] of all.

    Collective: every process must call it. Under autocast the rows travel in the autocast type, in which the first
    convolution would read them anyway.

    Args:
        rows: One entry per image, shape (N, ...).
        permutation: From `draw_permutation`, shape (G,).

    Returns:
        Shape (N, ...).
    """
    if torch.is_autocast_enabled(rows.device.type):
        rows = rows.to(torch.get_autocast_dtype(rows.device.type))
    return all_gather_rows(rows)[own_rows(permutation, len(rows))]


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
    gathered = all_gather_rows(shuffled)
    ordered = torch.empty_like(gathered)
    ordered[permutation] = gathered
    return ordered


def own_rows(gathered: Tensor, num_images: int) -> Tensor:
    """This process's N = `num_images` rows of a tensor of all G rows."""
    return gathered[rank() * num_images : (rank() + 1) * num_images]


def in_groups(forward: Callable[..., Tensor], group_size: int, *views: Tensor) -> Tensor:
    """Run `forward` on BatchNorm groups of `group_size` images, one after the other.

    A batch of at most `group_size` is one group.

    Args:
        forward: Takes the views of some images, returns one row per image.
        group_size: Images normalised together.
        views: Each with one entry per image, shape (N, ...).

    Returns:
        The rows of all groups in order, shape (N, ...).

    Raises:
        ValueError: If N is above `group_size` and not a multiple of it.
    """
    check_groups(len(views[0]), group_size)
    groups = zip(*(torch.split(view, group_size) for view in views), strict=True)
    return torch.cat([forward(*group) for group in groups])


def check_groups(num_images: int, group_size: int) -> None:
    """Refuse a batch that does not split into equal BatchNorm groups.

    Raises:
        ValueError: If `num_images` is above `group_size` and not a multiple of it.
    """
    if num_images > group_size and num_images % group_size:
        raise ValueError(
            f"{num_images} images per process do not split into BatchNorm groups of {group_size}; change the total "
            f"batch size, the number of processes or the BatchNorm group"
        )
