"""The training loop. It knows the contract of `detco.methods.base.Method` and no method by name.

The host waits for the device once per step, and meanwhile the device has work: a step's forward and backward passes are
queued, then its few numbers are sent on their way to the host, then the next batch is fetched and its views rendered,
and only then are the numbers read that decide whether the step counts. Rendering changes nothing that lasts.
"""

import itertools
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from detco.methods.base import Method, StepOutput
from detco.schedules import Schedule
from pretrain import STARTED
from pretrain.data import ENDS_THE_RUN, BadSampleLog, Batch, TooManyBadSamples
from pretrain.launch import RankFailedError, RunFailedError, StopRequest, World, gather
from pretrain.metrics import Pace, Reporter, Window
from pretrain.prefetch import OneAhead, ReadBack, SampleCopier, part_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How long and how a run trains.

    Attributes:
        seed: With step and rank, of everything drawn in a step.
        total_steps, steps_per_epoch: Optimiser steps.
        batch_size_total: Images per step over all processes.
        accumulate_steps: Micro-batches that each process makes of its images of a step; divides their number.
        lr: At factor 1 of `lr_schedule`.
        lr_schedule: Progress in [0, 1] to a factor.
        autocast_bf16: Whether the forward pass runs in bfloat16 where autocast allows.
        log_every_steps: Steps between reports.
        save_every_minutes: Wall clock of rank 0; 0 is after every step.
    """

    seed: int
    total_steps: int
    steps_per_epoch: int
    batch_size_total: int
    accumulate_steps: int
    lr: float
    lr_schedule: Schedule
    autocast_bf16: bool
    log_every_steps: int
    save_every_minutes: float


class NonFiniteError(RunFailedError):
    """A loss or gradient that is NaN or infinite; the optimiser, the queues and all files were left alone."""


class _ReadyBatch(NamedTuple):
    """A batch, and the views of its micro-batches: the first are made, the others will be when they are asked for."""

    batch: Batch
    views: Iterator[Any]


class _Launched(NamedTuple):
    """Forward and backward passes that the device may still be busy with."""

    names: list[str]  # "loss", the metrics, "gradient_norm"
    numbers: ReadBack  # the flags of `_Decision` over all ranks, then this rank's values of `names`
    bad_samples: str | None


class _Health(NamedTuple):
    """What a rank knows about its step before it may change anything."""

    loss: float
    gradient_norm: float
    bad_samples: str | None

    @property
    def is_good(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm) and self.bad_samples is None


class _Decision(NamedTuple):
    """What all ranks do after a step, alike."""

    fail: bool
    stop_signal: int
    save: bool


class Trainer:
    """One method on its way through the steps.

    Attributes:
        method: Unwrapped; what is saved and exported.
        optimizer: Over the method's trained parameters.
        window: Sums for the next report.
        last_saved_step: Step of the newest checkpoint, None if there is none.
    """

    def __init__(
        self,
        method: Method,
        render: Callable[[Any], Any],
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        world: World,
        bad_samples: BadSampleLog,
    ) -> None:
        """Wrap `method`, which lies on `world.device` already, for several processes. Collective.

        Args:
            method: What is trained.
            render: From a collated sample on the device to the method's views, a pure function: `ViewRecipe.render`.
            optimizer: Over the method's trained parameters.
            plan: How long and how.
            world: This process.
            bad_samples: Of this process.
        """
        self.method = method
        self.optimizer = optimizer
        self.window = Window()
        self.last_saved_step: int | None = None
        self._render = torch.no_grad()(render)
        self._copy = SampleCopier(world.device)
        self._plan = plan
        self._world = world
        self._bad_samples = bad_samples
        self._samples_seen = 0
        self._saved_at = time.monotonic()
        method.train()
        # Buffers are not broadcast: BatchNorm statistics belong to a rank, the queues are equal by construction.
        self._model: nn.Module = method
        if world.size > 1:
            with warnings.catch_warnings():
                # Newer torch prefers `forward_sync_buffers`, which torch 2.8 does not have.
                warnings.simplefilter("ignore", FutureWarning)
                # Not `static_graph`: it fails with `no_sync`, and saves nothing where all parameters take part.
                self._model = DistributedDataParallel(method, broadcast_buffers=False, gradient_as_bucket_view=True)

    def run(
        self,
        batches: Iterable[Batch],
        *,
        start_step: int,
        save: Callable[[int], None],
        reporter: Reporter | None,
        stop: StopRequest,
    ) -> int:
        """Train from `start_step` to the end, or until a signal.

        Args:
            batches: Of the steps from `start_step` on.
            start_step: Steps done.
            save: Called alike on every rank with the steps done.
            reporter: On rank 0.
            stop: Looked at once per step.

        Returns:
            The signal that stopped the run after a save, 0 if all steps are done (and saved).

        Raises:
            RunFailedError: On every rank alike; nothing of the failed step is kept.
            RankFailedError: On a rank whose loader cannot go on.
        """
        plan, pace = self._plan, Pace(self._plan.batch_size_total, self._world.device)
        ahead = OneAhead(self._ready(batch) for batch in _fetched(batches, pace))
        for step, ready in enumerate(ahead, start=start_step):
            if step == start_step:
                logger.info("first batch after %.1f s", time.perf_counter() - STARTED)
            decision = self._step(step, ready, stop, meanwhile=ahead.prepare)
            pace.stepped()
            done = step + 1
            if done % plan.log_every_steps == 0 or done == plan.total_steps:
                averages = self.window.averages(self._world)
                if reporter:
                    reporter.report(
                        step=done,
                        epoch=step // plan.steps_per_epoch,
                        lr=self._lr(step),
                        averages=averages,
                        timing=pace.lap(plan.total_steps - done),
                    )
            if decision.save or decision.stop_signal or done == plan.total_steps:
                save(done)
                self.last_saved_step, self._saved_at = done, time.monotonic()
            if decision.stop_signal and done < plan.total_steps:
                return decision.stop_signal
        return 0

    def step(self, step: int, batch: Batch, stop: StopRequest) -> None:
        """Make step number `step` (from 0) alone, as `run` makes it with others. Collective.

        Raises:
            RunFailedError: On every rank alike; nothing that lasts has changed.
        """
        self._step(step, self._ready(batch), stop, meanwhile=lambda: None)

    def _step(self, step: int, ready: _ReadyBatch, stop: StopRequest, meanwhile: Callable[[], None]) -> _Decision:
        """Make one step: nothing that lasts changes before all ranks found it finite. Collective.

        `meanwhile` runs while the device is busy with the step, and gives it more to do.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(step)
        seed_step(self._plan.seed, step, self._world.rank)
        self.method.before_step(step / self._plan.total_steps)

        launched = self._launch(ready, stop)
        meanwhile()
        decision, values = self._read(step, launched)

        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.commit()
        self.window.add(values)
        return decision

    def _ready(self, batch: Batch) -> _ReadyBatch:
        num_parts = self._plan.accumulate_steps
        views = (self._render(self._copy(part_of(batch.sample, part, num_parts))) for part in range(num_parts))
        return _ReadyBatch(batch, itertools.chain([next(views)], views))

    def _launch(self, ready: _ReadyBatch, stop: StopRequest) -> _Launched:
        """Queue what leaves the gradient of the batch's mean loss in the parameters, and a look at it. Collective."""
        num_parts = self._plan.accumulate_steps
        rows = []
        for part, views in enumerate(ready.views):
            with self._without_exchange() if part < num_parts - 1 else nullcontext():
                output = self._forward(views)
                torch.autograd.backward(output.loss / num_parts)
            rows.append(torch.stack([value.double() for value in (output.loss.detach(), *output.metrics.values())]))

        gradients = [parameter.grad for parameter in self.method.parameters() if parameter.grad is not None]
        gradient_norm = get_total_norm(gradients).double().reshape(1)
        values = torch.cat([torch.stack(rows).mean(dim=0), gradient_norm])
        is_finite = values[0].isfinite() & values[-1].isfinite()

        bad_samples = self._count_bad_samples(ready.batch)
        flags = self._agree(is_finite, self._wishes(bad_samples, stop))
        names = ["loss", *output.metrics, "gradient_norm"]
        return _Launched(names, ReadBack(torch.cat([flags, values])), bad_samples)

    def _wishes(self, bad_samples: str | None, stop: StopRequest) -> _Decision:
        """What this rank wants of all, as far as the host knows."""
        minutes = (time.monotonic() - self._saved_at) / 60
        is_time = self._world.rank == 0 and minutes >= self._plan.save_every_minutes
        return _Decision(fail=bad_samples is not None, stop_signal=stop.number, save=is_time)

    def _agree(self, is_finite: Tensor, wishes: _Decision) -> Tensor:
        """Let all ranks fail, stop or save together, by one small all-reduce on the device; shape (3,)."""
        is_cuda = self._world.device.type == "cuda"
        flags = torch.tensor(wishes, dtype=torch.float64, pin_memory=is_cuda)
        flags = flags.to(self._world.device, non_blocking=True)
        flags[0] += ~is_finite
        if self._world.size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return flags

    def _read(self, step: int, launched: _Launched) -> tuple[_Decision, dict[str, float]]:
        """Wait for the numbers of a step: what all ranks do, and this rank's loss, metrics and gradient norm."""
        fail, stop_signal, save, *numbers = launched.numbers.wait()
        values = dict(zip(launched.names, numbers, strict=True))
        if fail:
            health = _Health(values["loss"], values["gradient_norm"], launched.bad_samples)
            raise self._failure(step, gather(health, self._world))
        return _Decision(False, int(stop_signal), bool(save)), values

    def _without_exchange(self) -> AbstractContextManager[None]:
        """Keep gradients to this rank: they travel once per step, with its last part."""
        return self._model.no_sync() if isinstance(self._model, DistributedDataParallel) else nullcontext()

    def _forward(self, views: Any) -> StepOutput:
        with torch.autocast(self._world.device.type, torch.bfloat16, enabled=self._plan.autocast_bf16):
            output: StepOutput = self._model(views)
        return output

    def _lr(self, step: int) -> float:
        return self._plan.lr * self._plan.lr_schedule(step / self._plan.total_steps)

    def _count_bad_samples(self, batch: Batch) -> str | None:
        self._samples_seen += len(batch.indices)
        try:
            self._bad_samples.add(batch.bad, self._samples_seen)
        except TooManyBadSamples as error:
            return str(error)
        return None

    def _failure(self, step: int, healths: Sequence[_Health]) -> RunFailedError:
        for health in healths:
            if health.bad_samples:
                return RunFailedError(health.bad_samples)
        bad_losses = {rank: health.loss for rank, health in enumerate(healths) if not math.isfinite(health.loss)}
        # Gradients are averaged over the ranks, so one bad loss spoils them on all: then the losses tell where from.
        bad = bad_losses or {rank: health.gradient_norm for rank, health in enumerate(healths) if not health.is_good}
        what = "loss" if bad_losses else "gradient norm"
        where = ", ".join(f"{value} on rank {rank}" for rank, value in bad.items())
        saved = f"step {self.last_saved_step}" if self.last_saved_step is not None else "none yet"
        return NonFiniteError(
            f"the {what} of step {step} (epoch {step // self._plan.steps_per_epoch}) is {where}; stopped before the "
            f"optimiser and the queues saw it (newest checkpoint: {saved}). Lower SOLVER.BASE_LR, or try "
            f"SOLVER.PRECISION fp32, in a new run"
        )


def _fetched(batches: Iterable[Batch], pace: Pace) -> Iterator[Batch]:
    """The batches; what the loader says when it gives up needs no traceback."""
    fetching = iter(batches)
    try:
        while True:
            with pace.waiting():
                batch = next(fetching, None)
            if batch is None:
                return
            yield batch
    except ENDS_THE_RUN as error:
        raise RankFailedError(str(error)) from error


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators, so that what a step draws depends on (seed, step, rank) and not on what came before.

    The CPU's generator is seeded alike on every rank, as `detco.methods.base` promises to methods; that of CUDA
    depends on the rank.
    """
    alike, own = (
        int(np.random.SeedSequence((seed, step, of_rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))
        for of_rank in (0, rank)
    )
    torch.manual_seed(alike)
    torch.cuda.manual_seed(own)  # of this rank's device; nothing happens without one
