"""How much memory a piece of work needs, measured in a process of its own."""

import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
"""Linux tells there how much memory the process has now (VmRSS) and had at most since it was started (VmHWM)."""

CALLS = 2
"""Of the work: in the first, buffers that last (those of an optimiser) come into being late; the second has all."""


def can_measure(device: torch.device) -> bool:
    """Whether the peak on this device can be known: on CUDA always, on a CPU under Linux."""
    return device.type == "cuda" or STATUS.exists()


def peak_mebibytes(make: Callable[..., Callable[[], object]], *args: object, device: torch.device) -> float:
    """What making and doing some work takes at most, everything that it works on included.

    Args:
        make: Makes the work from `args`. It is imported by the new process, so it must lie in a module.
        args: Of `make`; pickled.
        device: Where the work is done. On CUDA, what torch has allocated there at most while the work was done, after
            a first call that is not looked at (compilation, trials of algorithms). On a CPU, the greatest resident
            size of the process less that before the work was made, when everything had been imported.
    """
    # A forked process would begin with the pages, and the record, of this one.
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, make, args, device).result() / 2**20


def _measure(make: Callable[..., Callable[[], object]], args: tuple[object, ...], device: torch.device) -> int:
    if device.type == "cuda":
        work = make(*args)
        work()
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(CALLS):
            work()
        return torch.cuda.max_memory_allocated(device)

    before = _status_bytes("VmRSS")
    work = make(*args)
    for _ in range(CALLS):
        work()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert found is not None, f"{STATUS} has no {field}"
    return int(found[1]) * 1024
