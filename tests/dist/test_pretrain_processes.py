"""The trainer in two real gloo processes: they agree on everything, and each keeps what is its own."""

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from detco.methods import METHODS
from pretrain.checkpoint import CheckpointFolder, read
from pretrain.config import load_config
from pretrain.data import BadSampleLog, Batch
from pretrain.launch import RefusalError, StopRequest, World, agree, from_first
from pretrain.metrics import Window
from pretrain.optim import build_sgd
from pretrain.run import pretrain
from pretrain.trainer import NonFiniteError, Plan, Trainer

pytestmark = pytest.mark.dist

TOY_SCRIPT = Path(__file__).parents[1] / "pretrain/toy_run.py"


def load_toy() -> Any:
    """The toy method of the trainer's tests, in a process that pytest did not start."""
    spec = importlib.util.spec_from_file_location("toy_run", TOY_SCRIPT)
    assert spec
    assert spec.loader
    module = sys.modules["toy_run"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    METHODS["toy"] = module.Toy
    return module


def world_of(rank: int, world_size: int) -> World:
    return World(rank, world_size, rank, torch.device("cpu"))


def one_bad_loss(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Three good steps, then one in which rank 1 alone has a NaN loss."""
    toy_run, world = load_toy(), world_of(rank, world_size)
    torch.manual_seed(0)
    method = toy_run.Toy()
    optimizer = build_sgd(method, lr=0.1, momentum=0.9, weight_decay=0.0)
    plan = Plan(0, 8, 4, 6, 1, 0.1, lambda progress: 1.0, False, 1, 60.0)
    log = BadSampleLog(Path(folder) / "bad.jsonl", 24)
    trainer = Trainer(method, toy_run.ToyRecipe().render, optimizer, plan, world, log)

    def batch(step: int) -> Batch:
        generator = torch.Generator().manual_seed(10 * step + rank)
        crop = torch.randint(256, (3, 3, 16, 16), generator=generator, dtype=torch.uint8)
        return Batch(toy_run.ToySample(crop), torch.arange(3), [])

    for step in range(3):
        trainer.step(step, batch(step), StopRequest())
    before: dict[str, Any] = {}
    original = method.forward

    def spoiled(views: Any) -> Any:
        before.update(copy.deepcopy(lasting(trainer)))
        output = original(views)
        return output._replace(loss=output.loss * float("nan")) if rank == 1 else output

    method.forward = spoiled
    try:
        trainer.step(3, batch(3), StopRequest())
        message = "no error"
    except NonFiniteError as error:
        message = str(error)
    return {"message": message, "before": before, "after": lasting(trainer)}


def lasting(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Everything but BatchNorm statistics, which are not saved after a failed step either."""
    state = {name: tensor for name, tensor in trainer.method.state_dict().items() if ".1." not in name}
    for index, of_parameter in trainer.optimizer.state_dict()["state"].items():
        state[f"momentum/{index}"] = of_parameter["momentum_buffer"]
    return state


def test_one_bad_loss_stops_both_and_changes_neither(run_distributed: Callable[..., list[Any]], tmp_path: Path) -> None:
    first, second = run_distributed(one_bad_loss, 2, str(tmp_path))
    assert first["message"] == second["message"]
    assert first["message"].startswith("the loss of step 3 (epoch 0) is nan on rank 1; stopped before")
    for of_rank in (first, second):
        assert any(name.startswith("momentum/") for name in of_rank["before"])
        for name, tensor in of_rank["before"].items():
            assert torch.equal(tensor, of_rank["after"][name]), name


def accumulated(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Three steps of two micro-batches each, and the same steps of one process with all images at once."""
    toy_run = load_toy()
    exchanges: list[int] = []
    reduced: list[int] = []  # numbers of each all-reduce, those of gradients too

    class Counted(DistributedDataParallel):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.register_comm_hook(None, self.exchange)

        @staticmethod
        def exchange(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            exchanges.append(bucket.index())
            return allreduce_hook(dist.group.WORLD, bucket)

    def train(world: World, rows: slice, accumulate_steps: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        method = toy_run.Toy(batch_norm=False, dropout=0.0)
        optimizer = build_sgd(method, lr=0.1, momentum=0.9, weight_decay=0.0)
        plan = Plan(0, 8, 4, 12, accumulate_steps, 0.1, lambda progress: 1.0, False, 1, 60.0)
        log = BadSampleLog(Path(folder) / "bad.jsonl", 24)
        trainer = Trainer(method, toy_run.ToyRecipe().render, optimizer, plan, world, log)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            crop = torch.randint(256, (12, 3, 16, 16), generator=generator, dtype=torch.uint8)[rows]
            trainer.step(step, Batch(toy_run.ToySample(crop), torch.arange(len(crop)), []), StopRequest())
            method.queue.zero_()  # a toy's queue holds the images of its own process
        return copy.deepcopy(method.state_dict())

    patch = pytest.MonkeyPatch()
    patch.setattr("pretrain.trainer.DistributedDataParallel", Counted)
    original = dist.all_reduce
    patch.setattr(dist, "all_reduce", lambda t, *args, **kw: (reduced.append(t.numel()), original(t, *args, **kw))[1])
    joint = train(world_of(rank, world_size), slice(6 * rank, 6 * rank + 6), 2)
    patch.undo()
    alone = train(world_of(0, 1), slice(None), 1)
    return {"joint": joint, "alone": alone, "exchanges": len(exchanges), "reduced": reduced}


def test_two_processes_of_two_micro_batches_equal_one_of_all_images_and_exchange_gradients_once(
    run_distributed: Callable[..., list[Any]], tmp_path: Path
) -> None:
    first, second = run_distributed(accumulated, 2, str(tmp_path))
    assert first["exchanges"] == second["exchanges"] == 3, "once per step"
    num_weights = sum(tensor.numel() for name, tensor in first["alone"].items() if name.startswith("student"))
    assert first["reduced"] == [num_weights, 3] * 3, "and what all decide, in three numbers"
    for name, tensor in first["alone"].items():
        assert torch.equal(first["joint"][name], second["joint"][name]), name
        torch.testing.assert_close(first["joint"][name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def interrupted_and_whole(rank: int, world_size: int, folder: str, photos: str) -> list[int]:
    """A whole run, and one that a signal to rank 1 alone stops in mid-epoch and that is resumed."""
    load_toy()
    words = ["METHOD.NAME", "toy", "DATA.ROOT", photos, "SOLVER.BATCH_SIZE_TOTAL", "6", "SOLVER.EPOCHS", "2"]
    words += ["SOLVER.PRECISION", "fp32", "DATA.NUM_WORKERS", "0", "LOG.EVERY_STEPS", "2", "SOLVER.BASE_LR", "1.0"]

    def run(name: str, resume: bool, trouble: str) -> int:
        patch = pytest.MonkeyPatch()
        if trouble and rank == 1:
            patch.setenv("TOY_TROUBLE", trouble)
        cfg = load_config(None, [*words, "OUTPUT_DIR", str(Path(folder) / name)])
        try:
            return pretrain(world_of(rank, world_size), cfg, resume, False)
        finally:
            patch.undo()

    unlike = load_config(None, [*words, "SEED", str(rank), "OUTPUT_DIR", str(Path(folder) / "refused")])
    with pytest.raises(RefusalError, match="started with different configs"):
        pretrain(world_of(rank, world_size), unlike, False, False)
    return [run("whole", False, ""), run("cut", False, "15@0.25"), run("cut", True, "")]


def test_two_processes_resume_bit_equal_with_batchnorm_statistics_of_their_own(
    run_distributed: Callable[..., list[Any]], tmp_path: Path, photo_dir: Path
) -> None:
    codes = run_distributed(interrupted_and_whole, 2, str(tmp_path), str(photo_dir))
    assert codes == [[0, 143, 0]] * 2
    assert CheckpointFolder(tmp_path / "cut/checkpoints", 9).steps() == [3, 8]
    whole, cut = (read(tmp_path / name / "checkpoints/step_00000008.pth") for name in ("whole", "cut"))
    of_second = whole["ranks"][1]["buffers"]
    assert "student.0.1.running_mean" in of_second, "the ranks saw different images"
    assert "student.0.1.num_batches_tracked" not in of_second, "what is equal is saved once"
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, cut["model"][name]), name
    for name, tensor in of_second.items():
        assert torch.equal(tensor, cut["ranks"][1]["buffers"][name]), name
        assert not torch.equal(tensor, whole["model"][name]), name
    for index, state in whole["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], cut["optimizer"]["state"][index]["momentum_buffer"])
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "cut")


def untimed(run_dir: Path) -> list[str]:
    return [line.partition('"time"')[0] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def agreements(rank: int, world_size: int) -> dict[str, Any]:
    world = world_of(rank, world_size)
    done: dict[str, Any] = {}

    def refuse_on(bad_rank: int) -> str:
        if rank == bad_rank:
            raise ValueError(f"rank {rank} cannot")
        return f"done by {rank}"

    for name, work in {
        "agree": lambda: agree(lambda: refuse_on(1), world),
        "first alone": lambda: agree(lambda: refuse_on(1), world, first_alone=True),
        "from first": lambda: from_first(lambda: refuse_on(0), world),
        "good agree": lambda: agree(lambda: refuse_on(-1), world),
        "good from first": lambda: from_first(lambda: refuse_on(1), world),
    }.items():
        try:
            done[name] = work()
        except RefusalError as error:
            done[name] = f"refused: {error}"
    window = Window()
    window.add({"loss": float(rank)})
    done["mean"] = window.averages(world)["loss"]
    dist.barrier()
    return done


def test_a_refusal_of_one_rank_is_one_of_all(run_distributed: Callable[..., list[Any]]) -> None:
    first, second = run_distributed(agreements, 2)
    for name in ("agree", "first alone"):
        assert first[name] == second[name] == "refused: rank 1 cannot"
    assert first["from first"] == second["from first"] == "refused: rank 0 cannot"
    assert (first["good agree"], second["good agree"]) == ("done by 0", "done by 1")
    assert first["good from first"] == second["good from first"] == "done by 0"
    assert first["mean"] == second["mean"] == 0.5
