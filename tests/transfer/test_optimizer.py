"""The optimisers: AdamW, its clipping over the full model, its schedule and its resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from transfer import d2

if d2.info() is None:
    pytest.skip("needs Detectron2 (python tools/install_detectron2.py)", allow_module_level=True)

from detectron2.solver import build_lr_scheduler

from transfer.config import load_config
from transfer.optimizer import build_optimizer

pytestmark = pytest.mark.d2

BASE = Path(__file__).parents[2] / "configs/transfer/base/sparse_rcnn.yaml"


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 1))


def set_gradients(model: nn.Module, scale: float) -> None:
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, scale * (index + 1))


def total_norm(model: nn.Module) -> float:
    return float(torch.cat([value.grad.flatten() for value in model.parameters() if value.grad is not None]).norm())


def test_adamw_has_the_published_rate_and_decays_norm_layers_and_biases_too() -> None:
    model = network()
    optimizer = build_optimizer(load_config(BASE), model)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(2.5e-5, 1e-4)}
    assert {id(value) for group in optimizer.param_groups for value in group["params"]} == set(
        map(id, model.parameters())
    )


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = build_optimizer(load_config(BASE), model)
    assert all(value is not model[0].weight for group in optimizer.param_groups for value in group["params"])


def test_the_norm_of_all_gradients_together_is_clipped_before_the_step() -> None:
    model = network()
    optimizer = build_optimizer(load_config(BASE), model)
    set_gradients(model, 100.0)
    before = {name: value.grad.clone() for name, value in model.named_parameters()}
    factor = 1 / total_norm(model)
    optimizer.step()
    assert total_norm(model) == pytest.approx(1.0, rel=1e-4)
    for name, value in model.named_parameters():
        # Same direction; and the first moment, (1 - beta1) x gradient, shows that the step has seen the clipped one.
        assert torch.allclose(value.grad, before[name] * factor, rtol=1e-4)
        assert torch.allclose(optimizer.state[value]["exp_avg"], 0.1 * before[name] * factor, rtol=1e-4)


def test_gradients_below_the_limit_stay_as_they_are() -> None:
    model = network()
    optimizer = build_optimizer(load_config(BASE), model)
    set_gradients(model, 1e-3)
    before = [value.grad.clone() for value in model.parameters()]
    optimizer.step()
    assert all(torch.equal(value.grad, old) for value, old in zip(model.parameters(), before, strict=True))


def test_detectron2s_clipping_of_each_parameter_is_available_too() -> None:
    model = network()
    optimizer = build_optimizer(load_config(BASE, ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"]), model)
    set_gradients(model, 100.0)
    optimizer.step()
    assert [float(value.grad.norm()) for value in model.parameters()] == pytest.approx([1.0] * 6, rel=1e-4)


def test_the_schedule_moves_the_rate_and_clipping_goes_on() -> None:
    keys = "SOLVER.MAX_ITER 8 SOLVER.STEPS (4,6) SOLVER.WARMUP_ITERS 2 SOLVER.IMS_PER_BATCH 1"
    cfg, model = load_config(BASE, keys.split()), network()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"] / 2.5e-5)
        set_gradients(model, 100.0)
        optimizer.step()
        assert total_norm(model) == pytest.approx(1.0, rel=1e-4)
        scheduler.step()
    assert rates == pytest.approx([0.01, 0.505, 1, 1, 0.1, 0.1, 0.01, 0.01])


def steps(model: nn.Module, optimizer: Any, count: int, start: int) -> None:
    for index in range(start, start + count):
        optimizer.zero_grad()
        inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(index))
        (1000 * model(inputs).square().mean()).backward()
        optimizer.step()


def test_an_interrupted_run_goes_on_bit_by_bit() -> None:
    cfg = load_config(BASE, ["SOLVER.BASE_LR", "0.01"])
    whole, part = network(), network()
    steps(whole, build_optimizer(cfg, whole), 6, start=0)
    first = build_optimizer(cfg, part)
    steps(part, first, 3, start=0)
    resumed = network()
    resumed.load_state_dict(part.state_dict())
    second = build_optimizer(cfg, resumed)
    second.load_state_dict(first.state_dict())
    steps(resumed, second, 3, start=3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_sgd_is_detectron2s() -> None:
    cfg = load_config(BASE.with_name("coco_1x.yaml"))
    optimizer = build_optimizer(cfg, network())
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}


@pytest.mark.parametrize(
    ("name", "message"),
    [("adam", "TRANSFER.OPTIMIZER is adam; it must be one of sgd, adamw"), ("sgd", "CLIP_TYPE is full_model")],
)
def test_an_optimizer_that_cannot_be_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_optimizer(load_config(BASE, ["TRANSFER.OPTIMIZER", name]), network())
