"""Ring buffer of negative keys, shared by MoCo v2 and DetCo.

Shape legend:
    G  keys computed by all processes in one step
    D  embedding dimension
    K  capacity of the queue, in keys

Source: MoCo, arXiv:1911.05722, Sec. 3.2, "Dictionary as a queue".
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KeyQueue(nn.Module):
    """The most recent K unit-length keys, identical on every process; Gaussian directions until it has filled.

    Both buffers are saved with the model, so a resumed run meets the negatives it would have met without the
    interruption. Processes hold the same keys because they start from the same seed and push the same keys:
    DistributedDataParallel with broadcast_buffers=False does not make buffers equal, not even when it wraps a model.

    Attributes:
        keys: Unit-length columns, shape (D, K), float32 even under autocast.
        cursor: Column that the next push overwrites first, scalar int64 in [0, K).

    Departures: none known.
    """

    keys: Tensor
    cursor: Tensor

    def __init__(self, dim: int, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        # Column by column in memory, as keys are pushed and as products with them read them fastest.
        self.register_buffer("keys", F.normalize(torch.randn(dim, capacity), dim=0).T.contiguous().T)
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Overwrite the G oldest columns.

        Args:
            keys: Unit-length keys of all processes, already gathered, the same on every process, shape (G, D).

        Raises:
            ValueError: If K is not a multiple of G. Nothing has been written then.
        """
        check_capacity(self.capacity, len(keys))
        # The cursor stays on the device: a slice from it would make the host wait for its value.
        columns = (self.cursor + torch.arange(len(keys), device=keys.device)).remainder_(self.capacity)
        self.keys.index_copy_(1, columns, keys.T.to(self.keys.dtype))
        self.cursor.add_(len(keys)).remainder_(self.capacity)


def check_capacity(capacity: int, keys_per_step: int) -> None:
    """Refuse a batch that does not go evenly into the queue.

    Raises:
        ValueError: If `capacity` is not a multiple of `keys_per_step`.
    """
    if capacity % keys_per_step:
        raise ValueError(
            f"queue size {capacity} is not a multiple of the {keys_per_step} keys pushed per step, one per image of "
            f"the total batch; change the queue size or the total batch size"
        )
