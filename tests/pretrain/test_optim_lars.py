"""LARS against its formula, one parameter at a time, and against a step worked out by hand."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.lars import LARS
from pretrain.optim import build_optimizer

TRUST, WEIGHT_DECAY, MOMENTUM = 0.001, 0.1, 0.9


def make_model() -> nn.Module:
    """Weights of 4, 2 and 1 axes, one of zeros, one that is frozen and one that never has a gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 2))
    model.register_parameter("zeros", nn.Parameter(torch.zeros(2, 2)))
    model.register_parameter("unused", nn.Parameter(torch.ones(3, 3)))
    model.register_parameter("frozen", nn.Parameter(torch.ones(2, 2), requires_grad=False))
    return model.double()


def build(model: nn.Module, lr: float = 1.0) -> LARS:
    return LARS(model, lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, trust_coefficient=TRUST)


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=generator)
    loss = model(images).square().sum() + (model.get_parameter("zeros") * (step + 1)).sum()
    loss.backward()


def oracle_step(weights: list[float], gradient: list[float], momenta: list[float], axes: int, lr: float) -> None:
    """The formula in loops over numbers, in place."""
    if axes > 1:
        gradient = [g + WEIGHT_DECAY * w for g, w in zip(gradient, weights, strict=True)]
        of_weight, of_gradient = (math.sqrt(sum(v * v for v in values)) for values in (weights, gradient))
        factor = TRUST * of_weight / (of_gradient + 1e-8) if of_weight and of_gradient else 1.0
        gradient = [factor * g for g in gradient]
    for index, g in enumerate(gradient):
        momenta[index] = MOMENTUM * momenta[index] + g
        weights[index] -= lr * momenta[index]


def test_every_parameter_moves_by_the_formula() -> None:
    model = make_model()
    optimizer = build(model)
    expected = {name: parameter.flatten().tolist() for name, parameter in model.named_parameters()}
    momenta = {name: [0.0] * len(values) for name, values in expected.items()}
    for step, lr in enumerate([1.0, 3.0, 0.5, 2.0]):  # an lr inside the momentum would show
        backward(model, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad.flatten().tolist()
                oracle_step(expected[name], gradient, momenta[name], parameter.ndim, lr)
        optimizer.step()
    for name, parameter in model.named_parameters():
        wanted = torch.tensor(expected[name], dtype=torch.float64).reshape(parameter.shape)
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-12, atol=1e-13, msg=name)
    for name in ("unused", "frozen"):
        assert (model.get_parameter(name) == 1).all(), name
    assert (model.get_parameter("zeros") != 0).all(), "a weight of norm 0 takes its gradient as it is"


def test_a_step_worked_out_by_hand() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    model.weight.grad = torch.tensor([[0.0, 1.2], [0.0, 0.0]])
    # Decayed: [[0.3, 1.2], [0, 0.4]], of norm 1.3; the weight's is 5, so the factor is 0.001 * 5 / 1.3 = 0.01 / 2.6.
    build(model, lr=2.6).step()
    assert torch.allclose(model.weight, torch.tensor([[2.997, -0.012], [0.0, 3.996]]), rtol=0, atol=1e-6)


def test_vectors_get_plain_sgd_with_momentum_to_the_bit() -> None:
    ours, theirs = make_model(), make_model()
    vectors = [name for name, parameter in ours.named_parameters() if parameter.ndim == 1]
    assert {"0.bias", "1.weight", "1.bias", "3.bias"} <= set(vectors)
    optimizer = build(ours, lr=0.01)
    sgd = torch.optim.SGD([theirs.get_parameter(name) for name in vectors], lr=0.01, momentum=MOMENTUM)
    for step in range(3):
        backward(ours, step)
        for name in vectors:
            theirs.get_parameter(name).grad = ours.get_parameter(name).grad.clone()
        optimizer.step()
        sgd.step()
    for name in vectors:
        assert torch.equal(ours.get_parameter(name), theirs.get_parameter(name)), name


def test_gradients_are_left_as_they_were() -> None:
    model = make_model()
    backward(model, 0)
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    build(model).step()
    for name, gradient in before.items():
        assert torch.equal(model.get_parameter(name).grad, gradient), name


def test_a_weight_without_decay_and_gradient_stands_still() -> None:
    model = nn.Linear(2, 2, bias=False)
    before = model.weight.detach().clone()
    model.weight.grad = torch.zeros(2, 2)
    LARS(model, lr=1.0, momentum=0.9, weight_decay=0.0, trust_coefficient=TRUST).step()
    assert torch.equal(model.weight, before), "and is not NaN"


def test_momentum_survives_a_checkpoint() -> None:
    def train(model: nn.Module, optimizer: LARS, steps: range) -> dict[str, Tensor]:
        for step in steps:
            backward(model, step)
            optimizer.step()
        return model.state_dict()

    whole = make_model()
    expected = train(whole, build(whole), range(4))
    first = make_model()
    optimizer = build(first)
    train(first, optimizer, range(2))
    second, saved = copy.deepcopy(first), copy.deepcopy(optimizer.state_dict())
    resumed = build(second)
    resumed.load_state_dict(saved)
    for name, tensor in train(second, resumed, range(2, 4)).items():
        assert torch.equal(tensor, expected[name]), name


def test_no_number_is_sent_to_the_host() -> None:
    model = make_model().to("meta")  # a tensor without numbers: reading one raises
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    build(model).step()
    with pytest.raises((RuntimeError, NotImplementedError)):
        model.get_parameter("zeros").sum().item()


@pytest.mark.parametrize(("name", "kind", "num_groups"), [("sgd", torch.optim.SGD, 1), ("lars", LARS, 2)])
def test_the_config_names_the_optimiser(name: str, kind: type, num_groups: int) -> None:
    options: dict[str, Any] = {"lr": 1.0, "momentum": 0.9, "weight_decay": 1e-5, "trust_coefficient": TRUST}
    optimizer = build_optimizer(name, make_model(), **options)
    assert type(optimizer) is kind
    assert len(optimizer.param_groups) == num_groups
