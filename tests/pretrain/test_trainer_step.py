"""One step of the trainer: its order, its lr, its seeds, and what a bad number leaves untouched."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detco.artifact import read_artifact
from detco.methods.base import StepOutput
from pretrain.data import BadSample, BadSampleLog, Batch
from pretrain.launch import RunFailedError, StopRequest, World
from pretrain.optim import build_sgd, lr_schedule, scaled_lr
from pretrain.trainer import NonFiniteError, Plan, Trainer, seed_step

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
PLAN = Plan(
    seed=0,
    total_steps=8,
    steps_per_epoch=4,
    batch_size_total=6,
    accumulate_steps=1,
    lr=0.1,
    lr_schedule=lr_schedule("cosine", "epoch", 2),
    autocast_bf16=False,
    log_every_steps=1,
    save_every_minutes=60.0,
)


def make_batch(seed: int = 0, bad: tuple[BadSample, ...] = ()) -> Batch:
    crop = torch.randint(256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Batch(sys.modules["toy_run"].ToySample(crop), torch.arange(6), list(bad))


@pytest.fixture
def trainer(_toy_registered: None, tmp_path: Path) -> Trainer:
    toy_run = sys.modules["toy_run"]
    torch.manual_seed(0)
    method = toy_run.Toy()
    optimizer = build_sgd(method, lr=0.1, momentum=0.9, weight_decay=1e-4)
    return Trainer(method, toy_run.ToyRecipe().render, optimizer, PLAN, ALONE, BadSampleLog(tmp_path / "bad.jsonl", 24))


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in trainer.method.state_dict().items() if "running" not in name}
    for index, of_parameter in trainer.optimizer.state_dict()["state"].items():
        state[f"momentum/{index}"] = of_parameter["momentum_buffer"].clone()
    return {name: tensor for name, tensor in state.items() if "num_batches_tracked" not in name}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_a_bad_number_leaves_weights_teacher_queue_and_momentum_untouched(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, value: float, where: str
) -> None:
    for step in range(3):
        trainer.step(step, make_batch(step), StopRequest())
    original = trainer.method.forward

    def spoiled(views: Any) -> StepOutput:
        # What before_step did is a move towards good weights; what follows must not happen.
        before.update(snapshot(trainer))
        output = original(views)
        if where == "loss":
            return output._replace(loss=output.loss * value)
        output.loss.register_hook(lambda gradient: gradient * value)
        return output

    before: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(trainer.method, "forward", spoiled)
    with pytest.raises(NonFiniteError, match=rf"the {where} of step 3 \(epoch 0\) is (nan|inf|-inf) on rank 0"):
        trainer.step(3, make_batch(3), StopRequest())

    after = snapshot(trainer)
    assert before.keys() == after.keys()
    assert len([name for name in before if name.startswith(("momentum/", "teacher", "queue"))]) > 5
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_calls_come_in_the_order_of_the_contract(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    objects = {
        "before_step": trainer.method,
        "forward": trainer.method,
        "commit": trainer.method,
        "step": trainer.optimizer,
    }
    for name, owner in objects.items():
        original = getattr(owner, name)

        def recorded(*args: Any, _name: str = name, _original: Callable[..., Any] = original) -> Any:
            calls.append(_name)
            return _original(*args)

        monkeypatch.setattr(owner, name, recorded)
    trainer.step(0, make_batch(), StopRequest())
    assert calls == ["before_step", "forward", "step", "commit"]


def test_the_lr_is_held_for_an_epoch_and_reaches_the_optimiser(trainer: Trainer) -> None:
    rates = []
    for step in range(8):
        trainer.step(step, make_batch(step), StopRequest())
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == [0.1] * 4 + [pytest.approx(0.05)] * 4
    by_step = lr_schedule("cosine", "step", 2)
    assert by_step(3 / 8) < by_step(2 / 8) < 1
    assert lr_schedule("constant", "step", 2)(0.9) == 1


def test_the_lr_scales_with_the_total_batch() -> None:
    assert scaled_lr(0.03, 1024, 256) == 0.12
    assert scaled_lr(0.03, 128, 256) == 0.015


def test_weight_decay_is_on_everything_trained_and_on_nothing_else(trainer: Trainer) -> None:
    (group,) = trainer.optimizer.param_groups
    trained = {id(parameter) for parameter in trainer.method.student.parameters()}
    assert {id(parameter) for parameter in group["params"]} == trained
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)


@pytest.mark.usefixtures("_toy_registered")
def test_fused_sgd_is_plain_sgd_but_for_rounding() -> None:
    fused, plain = (sys.modules["toy_run"].Toy() for _ in range(2))
    plain.load_state_dict(fused.state_dict())
    ours = build_sgd(fused, lr=0.1, momentum=0.9, weight_decay=0.01)
    theirs = torch.optim.SGD(plain.student.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, foreach=False)
    for step in range(3):
        for left, right in zip(fused.student.parameters(), plain.student.parameters(), strict=True):
            left.grad = torch.randn(left.shape, generator=torch.Generator().manual_seed(step))
            right.grad = left.grad.clone()
        ours.step()
        theirs.step()
    for name, tensor in fused.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-6, atol=1e-6, msg=name)


def test_what_a_step_draws_on_the_cpu_depends_on_seed_and_step_and_is_alike_on_all_ranks() -> None:
    def draw(*key: int) -> list[float]:
        seed_step(*key)
        return torch.rand(3).tolist()

    first = draw(0, 5, 0)
    torch.rand(100)
    assert draw(0, 5, 0) == draw(0, 5, 1) == first
    assert len({tuple(draw(*key)) for key in [(0, 5, 0), (1, 5, 0), (0, 6, 0)]}) == 3


def test_what_a_step_draws_on_a_gpu_depends_on_the_rank_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: dict[tuple[int, int, int], int] = {}
    for key in [(0, 5, 0), (1, 5, 0), (0, 6, 0), (0, 5, 1)]:
        monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed, key=key: seeds.update({key: seed}))
        seed_step(*key)
    assert len(set(seeds.values())) == 4
    seed_step(0, 5, 0)
    assert seeds[0, 5, 0] == torch.initial_seed()  # alone, both generators have one seed


def test_too_many_unreadable_files_stop_the_run_before_the_step_counts(trainer: Trainer) -> None:
    bad = tuple(BadSample(f"{index}.jpg", "truncated", "ok.jpg") for index in range(30))
    before = snapshot(trainer)["queue"]
    with pytest.raises(RunFailedError, match="samples could not be read"):
        trainer.step(0, make_batch(bad=bad), StopRequest())
    assert torch.equal(snapshot(trainer)["queue"], before)


def test_unreadable_files_are_listed_or_end_the_run_with_their_names(
    run_here: Callable[..., Any], photo_dir: Path, tmp_path: Path
) -> None:
    photos = shutil.copytree(photo_dir, tmp_path / "photos")
    (photos / "photo_003.jpg").write_bytes(b"")
    assert run_here(tmp_path / "one", **{"DATA.ROOT": str(photos)}).code == 0
    listed = (tmp_path / "one/bad_samples.jsonl").read_text().splitlines()
    assert [Path(json.loads(line)["path"]).name for line in listed] == ["photo_003.jpg"]

    for file in photos.iterdir():
        file.write_bytes(b"")
    ended = run_here(tmp_path / "all", **{"DATA.ROOT": str(photos)})
    assert ended.code == 1
    assert ended.stderr.startswith("error: rank 0: 24 images in a row cannot be read")
    assert "Traceback" not in ended.stderr


def test_a_fourth_method_trains_and_leaves_its_artifact(run_here: Callable[..., Any], tmp_path: Path) -> None:
    done = run_here(tmp_path, **{"SOLVER.EPOCHS": "10", "SOLVER.BASE_LR": "0.05"})
    assert done.code == 0, done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5]), "it learns"
    artifact = read_artifact(tmp_path / "model.safetensors")
    assert set(artifact.parts) == {"backbone"}
    assert "0.weight" in artifact.parts["backbone"]
    assert artifact.provenance["steps"] == 40
    assert artifact.provenance["epochs"] == 10
    assert artifact.provenance["images_seen"] == 240
    assert artifact.provenance["method"] == "toy"
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["config_digest"] == artifact.provenance["config_digest"]
    saved = torch.load(tmp_path / "checkpoints/step_00000040.pth", weights_only=True)
    assert saved["transfer_parts"] == {"backbone": "student.0"}
    assert torch.equal(saved["model"]["student.0.0.weight"], artifact.parts["backbone"]["0.weight"])


def test_precise_bn_replaces_the_statistics_of_the_transferred_part_alone(
    run_here: Callable[..., Any], tmp_path: Path
) -> None:
    assert run_here(tmp_path, **{"SOLVER.PRECISE_BN_ITERS": "3"}).code == 0
    backbone = read_artifact(tmp_path / "model.safetensors").parts["backbone"]
    saved = torch.load(tmp_path / "checkpoints/step_00000008.pth", weights_only=True)["model"]
    assert torch.equal(saved["student.0.0.weight"], backbone["0.weight"])
    assert not torch.equal(saved["student.0.1.running_mean"], backbone["1.running_mean"])
