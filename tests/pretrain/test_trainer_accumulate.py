"""A step in several micro-batches: the same gradient, one optimiser step, and BatchNorm as the stated exception."""

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detco.methods.base import StepOutput
from pretrain.data import BadSampleLog, Batch
from pretrain.launch import StopRequest, World
from pretrain.optim import build_sgd
from pretrain.prefetch import part_of
from pretrain.trainer import NonFiniteError, Plan, Trainer, seed_step

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
PLAN = Plan(
    seed=0,
    total_steps=8,
    steps_per_epoch=4,
    batch_size_total=12,
    accumulate_steps=1,
    lr=0.1,
    lr_schedule=lambda progress: 1.0,
    autocast_bf16=False,
    log_every_steps=1,
    save_every_minutes=60.0,
)
LINEAR_IN_THE_BATCH = {"batch_norm": False, "dropout": 0.0}


def make_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    crop = torch.randint(256, (12, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Batch(sys.modules["toy_run"].ToySample(crop), torch.arange(12), [])


@pytest.fixture
def make_trainer(_toy_registered: None, tmp_path: Path) -> Callable[..., Trainer]:
    def make(accumulate_steps: int, **options: Any) -> Trainer:
        toy_run = sys.modules["toy_run"]
        torch.manual_seed(0)
        method = toy_run.Toy(**options)
        optimizer = build_sgd(method, lr=0.1, momentum=0.9, weight_decay=1e-4)
        plan = dataclasses.replace(PLAN, accumulate_steps=accumulate_steps)
        log = BadSampleLog(tmp_path / "bad.jsonl", 24)
        return Trainer(method, toy_run.ToyRecipe().render, optimizer, plan, ALONE, log)

    return make


def train(trainer: Trainer, steps: int = 4) -> dict[str, torch.Tensor]:
    for step in range(steps):
        trainer.step(step, make_batch(step), StopRequest())
    return trainer.method.state_dict()


@pytest.mark.parametrize("accumulate_steps", [2, 3, 12])
def test_without_batchnorm_micro_batches_make_the_step_of_the_whole_batch(
    make_trainer: Callable[..., Trainer], accumulate_steps: int
) -> None:
    whole, parts = make_trainer(1, **LINEAR_IN_THE_BATCH), make_trainer(accumulate_steps, **LINEAR_IN_THE_BATCH)
    expected = train(whole)
    for name, tensor in train(parts).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert parts.window.sums.keys() == whole.window.sums.keys() == {"loss", "loss_toy/only", "gradient_norm"}
    assert parts.window.sums == pytest.approx(whole.window.sums, rel=1e-5)


def test_one_micro_batch_is_the_plain_loop_to_the_bit(make_trainer: Callable[..., Trainer]) -> None:
    trainer, by_hand = make_trainer(1), make_trainer(1)
    method, optimizer = by_hand.method, by_hand.optimizer
    for step in range(4):
        seed_step(0, step, 0)
        method.before_step(step / 8)
        output = method(sys.modules["toy_run"].ToyRecipe().render(make_batch(step).sample))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.commit()
    expected = method.state_dict()
    for name, tensor in train(trainer).items():
        assert torch.equal(tensor, expected[name]), name


def test_batchnorm_sees_micro_batches(make_trainer: Callable[..., Trainer]) -> None:
    trained = train(make_trainer(3), steps=2)
    assert trained["student.0.1.num_batches_tracked"] == 2 * 3
    whole = train(make_trainer(1), steps=2)
    assert not torch.allclose(trained["student.0.1.running_var"], whole["student.0.1.running_var"], rtol=1e-3)


def test_a_step_updates_the_teacher_the_weights_and_the_queue_once(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, calls = make_trainer(3), []
    for owner, name in ((trainer.method, "before_step"), (trainer.method, "forward"), (trainer.method, "commit")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, n=name, o=original: (calls.append(n), o(*a))[1])
    trainer.optimizer.register_step_pre_hook(lambda *_: calls.append("step"))
    train(trainer, steps=1)
    assert calls == ["before_step", "forward", "forward", "forward", "step", "commit"]


@pytest.mark.parametrize("bad_part", [0, 1, 2])
def test_one_bad_micro_batch_stops_the_step(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, bad_part: int
) -> None:
    trainer = make_trainer(3)
    original, parts = trainer.method.forward, iter(range(3))
    before = trainer.method.student[4].weight.clone()

    def spoiled(views: Any) -> StepOutput:
        output: StepOutput = original(views)
        return output._replace(loss=output.loss * math.nan) if next(parts) == bad_part else output

    monkeypatch.setattr(trainer.method, "forward", spoiled)
    with pytest.raises(NonFiniteError, match="the loss of step 0"):
        trainer.step(0, make_batch(0), StopRequest())
    assert torch.equal(trainer.method.student[4].weight, before)
    assert not trainer.method.queue.any()


@pytest.mark.usefixtures("_toy_registered")
def test_parts_are_stretches_of_all_tensors_and_together_the_whole() -> None:
    sample = (make_batch(0).sample, make_batch(1).sample)
    nested = type(make_batch(0))(sample[0], torch.arange(12), sample[1])
    parts = [part_of(nested, part, 3) for part in range(3)]
    assert [part.indices.tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert torch.equal(torch.cat([part.bad.crop for part in parts]), sample[1].crop)


def test_the_command_accumulates_says_what_departs_and_resumes_bit_equal(
    run_here: Callable[..., Any], tmp_path: Path
) -> None:
    thirds = {"SOLVER.ACCUMULATE_STEPS": "3"}
    done = run_here(tmp_path / "whole", **thirds)
    assert done.code == 0, done.stderr
    assert "runs its images of a step as 3 micro-batches of 2. A departure" in done.stdout
    assert run_here(tmp_path / "cut", trouble="15@0.25", **thirds).code == 143
    refused = run_here(tmp_path / "cut", "--resume")
    assert "SOLVER.ACCUMULATE_STEPS: 3 in the checkpoint, 1 now" in refused.stderr
    assert run_here(tmp_path / "cut", "--resume", **thirds).code == 0
    left, right = (
        torch.load(tmp_path / name / "checkpoints/step_00000008.pth", weights_only=True)["model"]
        for name in ("whole", "cut")
    )
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_the_method_is_asked_about_a_micro_batch(run_here: Callable[..., Any], tmp_path: Path) -> None:
    batch_of_10 = {"SOLVER.BATCH_SIZE_TOTAL": "10"}
    refused = run_here(tmp_path, "--dry-run", **batch_of_10)
    assert (refused.code, "queue_size 12 is not a multiple of 10" in refused.stderr) == (2, True)
    assert run_here(tmp_path, "--dry-run", **batch_of_10, **{"SOLVER.ACCUMULATE_STEPS": "5"}).code == 0


def test_a_batch_that_does_not_divide_into_micro_batches_is_refused(
    run_here: Callable[..., Any], tmp_path: Path
) -> None:
    refused = run_here(tmp_path / "run", **{"SOLVER.ACCUMULATE_STEPS": "4"})
    assert refused.code == 2
    assert (
        "SOLVER.BATCH_SIZE_TOTAL 6 does not divide among 1 processes with SOLVER.ACCUMULATE_STEPS 4 each; "
        "make it a multiple of 4" in refused.stderr
    )
