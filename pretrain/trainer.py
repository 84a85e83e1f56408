"""The training loop. It knows the contract of `detco.methods.base.Method` and no method by name."""

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
from detco.views.base import ViewRecipe
from pretrain.data import ENDS_THE_RUN, BadSampleLog, Batch, TooManyBadSamples
from pretrain.launch import RankFailedError, RunFailedError, StopRequest, World, gather
from pretrain.metrics import Pace, Reporter, Window


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
        recipe: ViewRecipe[Any, Any],
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        world: World,
        bad_samples: BadSampleLog,
    ) -> None:
        """Wrap `method`, which lies on `world.device` already, for several processes. Collective."""
        self.method = method
        self.optimizer = optimizer
        self.window = Window()
        self.last_saved_step: int | None = None
        self._recipe = recipe
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
                self._model = DistributedDataParallel(method, broadcast_buffers=False)

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
        plan, pace = self._plan, Pace(self._plan.batch_size_total)
        asked_for_batch = time.perf_counter()
        for step, batch in enumerate(_fetched(batches), start=start_step):
            pace.waited(time.perf_counter() - asked_for_batch)
            decision = self.step(step, batch, stop)
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
            asked_for_batch = time.perf_counter()
        return 0

    def step(self, step: int, batch: Batch, stop: StopRequest) -> _Decision:
        """Make step number `step` (from 0): nothing that lasts changes before all ranks found it finite. Collective."""
        progress = step / self._plan.total_steps
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(step)
        seed_step(self._plan.seed, step, self._world.rank)
        self.method.before_step(progress)

        values = self._accumulate_gradients(batch)

        health = _Health(values["loss"], values["gradient_norm"], self._count_bad_samples(batch))
        decision = self._agree(step, health, stop)

        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.commit()
        self.window.add(values)
        return decision

    def _accumulate_gradients(self, batch: Batch) -> dict[str, float]:
        """Leave the gradient of the batch's mean loss in the parameters; return loss, metrics and gradient norm."""
        num_parts = self._plan.accumulate_steps
        rows = []
        for part in range(num_parts):
            with self._without_exchange() if part < num_parts - 1 else nullcontext():
                sample = to_device(part_of(batch.sample, part, num_parts), self._world.device)
                output = self._forward(sample)
                torch.autograd.backward(output.loss / num_parts)
            rows.append([output.loss.detach(), *output.metrics.values()])

        gradients = [parameter.grad for parameter in self.method.parameters() if parameter.grad is not None]
        # One transfer to the host for all numbers of the step.
        means = torch.stack([torch.stack([value.double() for value in row]) for row in rows]).mean(dim=0)
        values = torch.cat([means, get_total_norm(gradients).double().reshape(1)]).tolist()
        return dict(zip(["loss", *output.metrics, "gradient_norm"], values, strict=True))

    def _without_exchange(self) -> AbstractContextManager[None]:
        """Keep gradients to this rank: they travel once per step, with its last part."""
        return self._model.no_sync() if isinstance(self._model, DistributedDataParallel) else nullcontext()

    def _forward(self, sample: Any) -> StepOutput:
        with torch.no_grad():
            views = self._recipe.render(sample)
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

    def _agree(self, step: int, health: _Health, stop: StopRequest) -> _Decision:
        """Let all ranks fail, stop or save together, by one small all-reduce."""
        is_first = self._world.rank == 0
        minutes = (time.monotonic() - self._saved_at) / 60
        flags = [int(not health.is_good), stop.number, int(is_first and minutes >= self._plan.save_every_minutes)]
        if self._world.size > 1:
            shared = torch.tensor(flags, device=self._world.device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            flags = shared.tolist()
        if flags[0]:
            raise self._failure(step, gather(health, self._world))
        return _Decision(stop_signal=flags[1], save=bool(flags[2]))

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


def _fetched(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches; what the loader says when it gives up needs no traceback."""
    try:
        yield from batches
    except ENDS_THE_RUN as error:
        raise RankFailedError(str(error)) from error


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators, so that what a step draws depends on (seed, step, rank) and not on what came before."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def to_device(sample: Any, device: torch.device) -> Any:
    """Move the tensors of a (nested) NamedTuple, without waiting for the copies."""
    if isinstance(sample, Tensor):
        return sample.to(device, non_blocking=True)
    return type(sample)(*(to_device(item, device) for item in sample))


def part_of(sample: Any, part: int, num_parts: int) -> Any:
    """Return rows of all tensors of a collated (nested) NamedTuple: part `part` (from 0) of `num_parts` equal ones."""
    if isinstance(sample, Tensor):
        rows = len(sample) // num_parts
        return sample[part * rows : (part + 1) * rows]
    return type(sample)(*(part_of(item, part, num_parts) for item in sample))
