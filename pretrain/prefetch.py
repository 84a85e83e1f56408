"""What travels between host and device without either waiting: samples on their way in, numbers on their way out."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
from torch import Tensor

ItemT = TypeVar("ItemT")


class OneAhead(Iterator[ItemT]):
    """An iterator whose next item can be made before it is asked for, at a moment that suits.

    What making it raises is raised when it is asked for, and not before.
    """

    def __init__(self, items: Iterable[ItemT]) -> None:
        """Make nothing yet."""
        self._items = iter(items)
        self._made: Future[ItemT] | None = None

    def prepare(self) -> None:
        """Make the next item, unless it is made already."""
        if self._made is None:
            self._made = Future()
            try:
                self._made.set_result(next(self._items))
            except Exception as error:  # StopIteration too
                self._made.set_exception(error)

    def __next__(self) -> ItemT:
        self.prepare()
        assert self._made is not None
        made, self._made = self._made, None
        return made.result()


class SampleCopier:
    """Copies samples to a device; on CUDA on a stream of their own, beside what the device computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, sample: Any) -> Any:
        """Start copying the tensors of a (nested) NamedTuple; what the caller does with the copies waits for them.

        Args:
            sample: In pinned memory, or the host waits after all.
        """
        if self._stream is None:
            return to_device(sample, self._device)
        with torch.cuda.stream(self._stream):
            copied = to_device(sample, self._device)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        # Their memory belongs to the copying stream, which must not reuse it while the computing one still reads it.
        _for_each(copied, lambda tensor: tensor.record_stream(computing))
        return copied


class ReadBack:
    """The values of a tensor on their way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        """Start copying; nothing waits."""
        self._values = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self._values.copy_(tensor, non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            # Waiting for it sleeps: the cores are for the loader's workers.
            self._arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> list[float]:
        """Return the values, once the device has computed and sent them."""
        if self._arrived:
            self._arrived.synchronize()
        values: list[float] = self._values.tolist()
        return values


def to_device(sample: Any, device: torch.device) -> Any:
    """Move the tensors of a (nested) NamedTuple, without waiting for the copies."""
    return _for_each(sample, lambda tensor: tensor.to(device, non_blocking=True))


def part_of(sample: Any, part: int, num_parts: int) -> Any:
    """Return rows of all tensors of a collated (nested) NamedTuple: part `part` (from 0) of `num_parts` equal ones."""

    def rows_of(tensor: Tensor) -> Tensor:
        rows = len(tensor) // num_parts
        return tensor[part * rows : (part + 1) * rows]

    return _for_each(sample, rows_of)


def _for_each(sample: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same (nested) NamedTuple with `change(tensor)` in the place of every tensor."""
    if isinstance(sample, Tensor):
        return change(sample)
    return type(sample)(*(_for_each(item, change) for item in sample))
