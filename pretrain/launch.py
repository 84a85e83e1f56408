"""One process or many: who am I, on which device, in which group, and how does it all end.

Processes come from torchrun (RANK, WORLD_SIZE, ... in the environment), from SLURM (`srun`), or from `--num-gpus`,
which starts one per GPU here. CUDA processes talk over NCCL, CPU ones over gloo. Exit codes: 0 done, 1 failed while
running, 2 refused before any work, 128 + signal when a signal stopped the run after a save (SIGTERM 143, SIGINT 130,
SIGUSR1 138).
"""

import logging
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from types import FrameType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

DONE, FAILED, REFUSED = 0, 1, 2
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_GROUP_TIMEOUT = timedelta(minutes=30)  # a first listing of a million files on a slow disk fits in
_SECONDS_TO_FOLLOW = 10.0  # how long the others may take to end by themselves after one process failed

ResultT = TypeVar("ResultT")


class RefusalError(Exception):
    """What the user asked for cannot be run. Raised alike on every rank, before any work."""


class RunFailedError(RuntimeError):
    """The run cannot go on. Raised alike on every rank; its message is all the user needs."""


class RankFailedError(RuntimeError):
    """This rank alone cannot go on, which ends all; its message is all the user needs."""


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    Attributes:
        rank: In [0, size); rank 0 writes the files.
        size: Number of processes.
        local_rank: Rank within this machine, which is the index of its GPU.
        device: Where this process computes.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device


def environment_world(environ: Mapping[str, str]) -> tuple[int, int, int] | None:
    """Return (rank, size, local rank) if torchrun or srun started this process, else None.

    Only processes of a SLURM job *step* count: in a batch script SLURM_NTASKS is set, but one process runs.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_RANK", "0"))
    if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        rank, size, local_rank = (int(environ[name]) for name in names)
        return rank, size, local_rank
    return None


def is_first_process() -> bool:
    """Whether this process may speak for all before there is a group."""
    placed = environment_world(os.environ)
    return placed is None or placed[0] == 0


def first_host(slurm_nodelist: str) -> str:
    """Return the first host of a SLURM node list: "gpu[007-012,020],cpu1" gives "gpu007"."""
    return re.sub(r"^([^\[,]*)\[(\w+).*", r"\1\2", slurm_nodelist).split(",")[0]


def launch(run: Callable[..., int], *args: Any, num_gpus: int | None) -> int:
    """Run `run(world, *args)` in every process and return the exit code.

    Args:
        run: Importable by name, because new processes are started afresh. Returns its exit code.
        args: Picklable.
        num_gpus: GPUs of this machine; 0 is the CPU, None is all there are. Under torchrun and srun, whose processes
            are there already, it only chooses between GPU and CPU.
    """
    present = torch.cuda.device_count()
    num_gpus = present if num_gpus is None else num_gpus
    placed = environment_world(os.environ)
    needed = placed[2] + 1 if placed and num_gpus else num_gpus
    if num_gpus < 0:
        print(f"error: --num-gpus is {num_gpus}; give 0 for the CPU, or leave it out for all GPUs", file=sys.stderr)
        return REFUSED
    if needed > present:
        print(
            f"error: {needed} GPUs are needed and {present} are visible; --num-gpus 0 runs on the CPU", file=sys.stderr
        )
        return REFUSED
    if placed:
        if "RANK" not in os.environ:
            os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
            os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000))
        return _run_process(run, args, *placed, use_cuda=num_gpus > 0, init_method="env://")
    if num_gpus <= 1:
        return _run_process(run, args, 0, 1, 0, use_cuda=num_gpus > 0, init_method=None)
    return spawn(run, *args, size=num_gpus, use_cuda=True)


def spawn(run: Callable[..., int], *args: Any, size: int, use_cuda: bool) -> int:
    """Start `size` processes on this machine, wait for them, and return the first exit code that is not 0.

    Signals are passed on. When a process fails, the others get some seconds to end by themselves, then are killed.
    """
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="detco_rendezvous_") as folder:
        init_method = f"file://{folder}/store"
        processes = [
            context.Process(target=_process_main, args=(run, args, rank, size, use_cuda, init_method))
            for rank in range(size)
        ]
        for process in processes:
            process.start()

        def pass_on(number: int, frame: FrameType | None) -> None:
            for process in processes:
                if process.is_alive() and process.pid:
                    os.kill(process.pid, number)

        previous = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
        try:
            return _join(processes)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _join(processes: list[Any]) -> int:
    failed_at: float | None = None
    code = DONE
    running = list(processes)
    while running:
        wait([process.sentinel for process in running], timeout=1.0)
        for process in [process for process in running if process.exitcode is not None]:
            running.remove(process)
            if process.exitcode and failed_at is None:
                # A negative code is the signal that killed it, such as SIGKILL when memory ran out.
                code = process.exitcode if process.exitcode > 0 else 128 - process.exitcode
                failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > _SECONDS_TO_FOLLOW:
            for process in running:
                process.kill()
    return code


def _process_main(
    run: Callable[..., int], args: tuple[Any, ...], rank: int, size: int, use_cuda: bool, init_method: str
) -> None:
    sys.exit(_run_process(run, args, rank, size, rank, use_cuda=use_cuda, init_method=init_method))


def _run_process(
    run: Callable[..., int],
    args: tuple[Any, ...],
    rank: int,
    size: int,
    local_rank: int,
    *,
    use_cuda: bool,
    init_method: str | None,
) -> int:
    """Join the group, run, leave the group; turn every ending into one message and an exit code."""
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(asctime)s %(message)s" if rank == 0 else f"%(asctime)s rank {rank}: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stdout,
        force=True,
    )
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    try:
        if use_cuda:
            torch.cuda.set_device(device)
        if size > 1:
            backend = "nccl" if use_cuda else "gloo"
            device_id = device if use_cuda else None
            dist.init_process_group(
                backend,
                init_method=init_method,
                rank=rank,
                world_size=size,
                timeout=_GROUP_TIMEOUT,
                device_id=device_id,
            )
        code = run(World(rank, size, local_rank, device), *args)
        if size > 1:
            dist.destroy_process_group()
        return code
    except (RefusalError, RunFailedError) as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            dist.destroy_process_group()
        return REFUSED if isinstance(error, RefusalError) else FAILED
    except Exception as error:
        return _end_abruptly(rank, size, error)


def _end_abruptly(rank: int, size: int, error: Exception) -> int:
    """An error of this rank alone. The others may wait in a collective for ever, so nothing here waits for them."""
    if size > 1 and (isinstance(error, dist.DistBackendError) or "gloo" in str(error)):
        # Most often because another process ended, which says why itself.
        print(f"rank {rank}: lost the other processes: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
    elif isinstance(error, RankFailedError):
        print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exc()
        print(f"error: rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if size > 1:
        sys.stdout.flush()
        os._exit(FAILED)
    return FAILED


def agree(work: Callable[[], ResultT], world: World, *, first_alone: bool = False) -> ResultT:
    """Run `work` on every rank; a refusal of any rank becomes one of all. Collective.

    Args:
        work: Builds or checks something. Not a collective itself.
        world: This process.
        first_alone: Whether rank 0 goes first, so that what it caches is there for the others.

    Raises:
        RefusalError: If `work` raised ValueError or OSError on some rank; the message is the first such rank's.
    """
    refusal = None
    if world.rank == 0 or not first_alone:
        result, refusal = _attempt(work)
    if first_alone:
        _raise_refusal(refusal, world)
        if world.rank:
            result, refusal = _attempt(work)
    _raise_refusal(refusal, world)
    return cast(ResultT, result)


def from_first(work: Callable[[], ResultT], world: World) -> ResultT:
    """Run `work` on rank 0 alone and return its (picklable) result on every rank. Collective.

    Raises:
        RefusalError: On every rank, if `work` raised ValueError or OSError.
    """
    result, refusal = (None, None) if world.rank else _attempt(work)
    _raise_refusal(refusal, world)
    return cast(ResultT, gather(result, world)[0])


def _attempt(work: Callable[[], ResultT]) -> tuple[ResultT | None, str | None]:
    try:
        return work(), None
    except (ValueError, OSError) as error:
        return None, str(error)


def _raise_refusal(mine: str | None, world: World) -> None:
    refusals = [message for message in gather(mine, world) if message]
    if refusals:
        raise RefusalError(refusals[0])


def gather(value: Any, world: World) -> list[Any]:
    """Return the picklable `value` of every rank, rank 0 first. Collective."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


class StopRequest:
    """Remembers the first of STOP_SIGNALS, so that the loop can end after a whole step.

    Attributes:
        number: The signal, 0 while there is none.
    """

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> "StopRequest":
        """Listen, instead of dying at once."""
        self._previous = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        """Restore what signals did before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # No logging here: a handler may interrupt the logger itself.
        self.number = self.number or number
