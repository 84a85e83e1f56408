"""The next batch is fetched and rendered while a step is computed, and nothing but the time can tell."""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from detco.methods.base import StepOutput
from pretrain.data import BadSampleLog, Batch, WorkerDied
from pretrain.launch import RankFailedError, StopRequest, World
from pretrain.metrics import Pace, Timing
from pretrain.optim import build_sgd
from pretrain.prefetch import OneAhead, ReadBack, SampleCopier
from pretrain.trainer import NonFiniteError, Plan, Trainer

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
PLAN = Plan(
    seed=0,
    total_steps=4,
    steps_per_epoch=2,
    batch_size_total=6,
    accumulate_steps=1,
    lr=0.1,
    lr_schedule=lambda progress: 1.0,
    autocast_bf16=False,
    log_every_steps=1,
    save_every_minutes=60.0,
)


class Course(NamedTuple):
    """What happened in a run, in order."""

    events: list[str]
    trainer: Trainer
    run: Callable[..., int]


def make_batch(step: int) -> Batch:
    crop = torch.randint(256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(step), dtype=torch.uint8)
    return Batch(sys.modules["toy_run"].ToySample(crop), torch.arange(6), [])


@pytest.fixture
def make_course(_toy_registered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Course]:
    """`make_course(**plan)`: a trainer that writes down what it does; `run(batches)` runs it."""

    def make(**changes: Any) -> Course:
        torch.manual_seed(0)
        events: list[str] = []
        toy_run = sys.modules["toy_run"]
        method, recipe = toy_run.Toy(), toy_run.ToyRecipe()
        optimizer = build_sgd(method, lr=0.1, momentum=0.9, weight_decay=1e-4)

        def noted(event: str, function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args: (events.append(event), function(*args))[1]

        for owner, name in ((method, "forward"), (method, "commit"), (optimizer, "step"), (ReadBack, "wait")):
            monkeypatch.setattr(owner, name, noted(name, getattr(owner, name)))
        plan = dataclasses.replace(PLAN, **changes)
        log = BadSampleLog(tmp_path / "bad.jsonl", 24)
        trainer = Trainer(method, noted("render", recipe.render), optimizer, plan, ALONE, log)

        def fetched(batches: Any) -> Iterator[Batch]:
            for batch in batches:
                events.append("fetch")
                yield batch

        def run(batches: Any, stop: StopRequest | None = None, reporter: Any = None) -> int:
            return trainer.run(
                fetched(batches),
                start_step=0,
                save=lambda done: events.append(f"save {done}"),
                reporter=reporter,
                stop=stop or StopRequest(),
            )

        return Course(events, trainer, run)

    return make


def test_the_next_batch_is_ready_before_the_host_waits_and_nothing_lasting_changes_before_that(
    make_course: Callable[..., Course],
) -> None:
    course = make_course(total_steps=3, log_every_steps=9)
    course.run(map(make_batch, range(3)))
    step = ["wait", "step", "commit"]
    assert course.events == [
        *("fetch", "render"),
        *("forward", "fetch", "render", *step),
        *("forward", "fetch", "render", *step),
        *("forward", *step, "save 3"),
    ]


def test_of_micro_batches_one_is_rendered_ahead_and_the_host_waits_once_per_step(
    make_course: Callable[..., Course],
) -> None:
    course = make_course(total_steps=2, accumulate_steps=3)
    course.run(map(make_batch, range(2)))
    own_parts = ["forward", "render", "forward", "render", "forward"]
    assert course.events == [
        *("fetch", "render"),
        *(*own_parts, "fetch", "render", "wait", "step", "commit"),
        *(*own_parts, "wait", "step", "commit", "save 2"),
    ]


@pytest.mark.parametrize("accumulate_steps", [1, 3])
def test_a_run_is_its_steps_one_by_one_to_the_bit(make_course: Callable[..., Course], accumulate_steps: int) -> None:
    ahead, one_by_one = (make_course(accumulate_steps=accumulate_steps) for _ in range(2))
    ahead.run(map(make_batch, range(4)))
    for step in range(4):
        one_by_one.trainer.step(step, make_batch(step), StopRequest())
    expected = one_by_one.trainer.method.state_dict()
    for name, tensor in ahead.trainer.method.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def broken_after(good: int) -> Iterator[Batch]:
    yield from map(make_batch, range(good))
    raise WorkerDied("a data worker ended")


def test_a_loader_that_breaks_lets_the_step_before_be_finished_and_saved(make_course: Callable[..., Course]) -> None:
    course = make_course(save_every_minutes=0.0)
    with pytest.raises(RankFailedError, match="a data worker ended"):
        course.run(broken_after(2))
    assert course.events[-4:] == ["wait", "step", "commit", "save 2"]
    assert course.trainer.last_saved_step == 2


def test_a_bad_loss_is_told_even_if_the_loader_breaks_meanwhile(
    make_course: Callable[..., Course], monkeypatch: pytest.MonkeyPatch
) -> None:
    course = make_course()
    original = course.trainer.method.forward

    def spoiled(views: Any) -> StepOutput:
        output: StepOutput = original(views)
        return output._replace(loss=output.loss * math.nan)

    monkeypatch.setattr(course.trainer.method, "forward", spoiled)
    with pytest.raises(NonFiniteError, match="the loss of step 0"):
        course.run(broken_after(1))
    assert not {"step", "commit"} & set(course.events)


def test_a_signal_stops_after_its_step_though_the_next_batch_is_broken(make_course: Callable[..., Course]) -> None:
    stop = StopRequest()
    stop.number = 15
    course = make_course()
    assert course.run(broken_after(1), stop=stop) == 15
    assert course.events[-1] == "save 1"


class Timings:
    """In the place of a reporter."""

    def __init__(self) -> None:
        self.of_laps: list[Timing] = []

    def report(self, *, timing: Timing, **others: Any) -> None:
        self.of_laps.append(timing)


def test_the_share_of_waiting_is_that_of_the_loader(make_course: Callable[..., Course]) -> None:
    def slowly() -> Iterator[Batch]:
        for step in range(4):
            time.sleep(0.2)
            yield make_batch(step)

    slow, quick = Timings(), Timings()
    course = make_course(log_every_steps=2)
    course.run(slowly(), reporter=slow)
    course.run([make_batch(step) for step in range(4)], reporter=quick)
    assert slow.of_laps[0].data_wait_share > 0.6, "of the first batches, and of the third that is fetched ahead"
    assert all(timing.data_wait_share < 0.3 for timing in quick.of_laps)


def test_an_item_made_ahead_is_made_once_and_its_error_comes_in_its_turn() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(2):
            made.append(number)
            yield number
        raise ValueError("no third")

    ahead = OneAhead(items())
    assert made == []
    ahead.prepare()
    ahead.prepare()
    assert made == [0]
    assert next(ahead) == 0
    assert next(ahead) == 1
    ahead.prepare()
    with pytest.raises(ValueError, match="no third"):
        next(ahead)
    with pytest.raises(StopIteration):
        next(ahead)


def test_numbers_come_back_as_they_are() -> None:
    assert ReadBack(torch.tensor([1.5, math.inf, -0.25], dtype=torch.float64)).wait() == [1.5, math.inf, -0.25]


@pytest.mark.gpu
def test_on_a_gpu_copies_and_numbers_arrive_whole_and_a_busy_device_does_not_wait(make_course: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", 0)
    copy, weight = SampleCopier(device), torch.randn(4096, 4096, device=device)
    for step in range(20):  # the same memory is used again and again
        batch = make_batch(step)
        copied = copy(type(batch.sample)(batch.sample.crop.pin_memory()))
        product = weight @ weight
        numbers = ReadBack(copied.crop.double().sum(dim=(1, 2, 3)))
        assert numbers.wait() == batch.sample.crop.double().sum(dim=(1, 2, 3)).tolist()

    pace = Pace(6, device)
    for _ in range(50):
        product = weight @ product / 4096
    with pace.waiting():
        time.sleep(0.001)
    pace.stepped()
    busy = pace.lap(1)
    with pace.waiting():
        time.sleep(0.2)
    pace.stepped()
    assert busy.data_wait_share < 0.2
    assert pace.lap(1).data_wait_share > 0.8
