"""DetCo with both switches off against an independent restatement of MoCo v2 (tests/oracles/moco_oracle.py)."""

import importlib.util
import inspect
from pathlib import Path

import pytest
import torch

from detco.methods import METHODS
from detco.methods.detco import DetCo
from detco.methods.moco import MoCoV2
from detco.views.moco import MoCoRecipe, MoCoViews

DIM, QUEUE_SIZE, STEPS = 16, 32, 5


def load_oracle():
    path = Path(__file__).parents[1] / "oracles" / "moco_oracle.py"
    spec = importlib.util.spec_from_file_location("moco_oracle", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def network_of(oracle, encoder):
    """The oracle's network with the weights of one of our encoders."""
    head = {f"fc.{name}": value for name, value in encoder.global_heads["res5"].state_dict().items()}
    network = oracle.resnet50_with_mlp(DIM).double()
    network.load_state_dict(encoder.trunk.state_dict() | head, strict=True)
    return network


def test_mode_none_takes_the_steps_of_moco_v2():
    torch.manual_seed(0)
    method = DetCo(multi_level=False, local=False, dim=DIM, queue_size=QUEUE_SIZE, ema_decay=0.9).double()
    oracle_module = load_oracle()
    oracle = oracle_module.MoCoOracle(
        network_of(oracle_module, method.query),
        network_of(oracle_module, method.key),
        method.queues_global["res5"].keys.clone(),
        m=0.9,
        t=0.2,
    )
    optimiser = torch.optim.SGD(
        [p for p in method.parameters() if p.requires_grad], lr=0.03, momentum=0.9, weight_decay=1e-4
    )

    losses = []
    for step in range(STEPS):
        views = MoCoViews(torch.randn(4, 3, 32, 32).double(), torch.randn(4, 3, 32, 32).double())
        method.before_step(step / STEPS)
        output = method(views)
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
        method.commit()
        losses.append((output.loss.item(), oracle.step(*views)))

    for ours, theirs in losses:
        assert ours == pytest.approx(theirs, rel=1e-7)
    assert len({round(ours, 6) for ours, _ in losses}) == STEPS
    for ours, theirs in ((method.query, oracle.f_q), (method.key, oracle.f_k)):
        expected = theirs.state_dict()
        head = {f"fc.{name}": value for name, value in ours.global_heads["res5"].state_dict().items()}
        for name, value in (ours.trunk.state_dict() | head).items():  # weights and BatchNorm buffers
            torch.testing.assert_close(
                value, expected[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
    torch.testing.assert_close(method.queues_global["res5"].keys, oracle.queue, rtol=1e-5, atol=1e-6)


def test_moco_v2_is_mode_none():
    views = MoCoViews(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32))
    outputs = []
    for build, switches in ((MoCoV2, {}), (DetCo, {"multi_level": False, "local": False})):
        torch.manual_seed(0)
        method = build(**switches, dim=DIM, head_hidden=8, queue_size=QUEUE_SIZE, temperature=0.1, bn_group=2)
        outputs.append((method.ema_decay, method.state_dict().keys(), method(views)))
    assert outputs[0] == outputs[1]


def test_moco_v2_takes_detco_s_arguments_except_the_switches_at_the_same_defaults():
    def options(method):
        return {name: p.default for name, p in inspect.signature(method.__init__).parameters.items() if name != "self"}

    of_detco = options(DetCo)
    for switch in ("multi_level", "local", "stage_weights"):
        del of_detco[switch]
    assert options(MoCoV2) == of_detco


def test_moco_v2_has_one_head_one_queue_and_two_views():
    method = MoCoV2(queue_size=8)
    assert list(method.query.global_heads) == list(method.queues_global) == ["res5"]
    assert len(method.query.local_heads) == len(method.queues_local) == 0
    assert method.weights == {"res5": 1.0}
    assert MoCoV2.recipe_for(queue_size=8) is MoCoRecipe


def test_methods_are_found_by_name():
    assert METHODS["detco"] is DetCo
    assert METHODS["moco_v2"] is MoCoV2
