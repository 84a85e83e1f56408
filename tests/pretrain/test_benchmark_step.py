"""Figures S1, S2, S3 and M1: the step that is measured is the trainer's, and its bound is that step's passes."""

import functools
import importlib.util
import json
import operator
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from detco.models.resnet import ResNetTrunk
from detco.views.detco import DetCoRecipe, DetCoViews
from detco.views.moco import MoCoRecipe
from pretrain.bad_samples import BadSampleLog
from pretrain.data import Batch
from pretrain.launch import StopRequest, World
from pretrain.trainer import Plan, Trainer, seed_step

CPU = torch.device("cpu")
TOOLS = Path(__file__).parents[2] / "tools"
SMALL = ["--cpu", "--batch-size", "2", "--memory-batch-size", "2", "--queue-size", "16", "--global-size", "32"]
SMALL += ["--patch-size", "16", "--rounds", "2", "--min-seconds", "0"]
PARTS = ["EMA", "shuffle and unshuffle", "pooling and heads", "losses", "finite check", "optimiser", "queues"]

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("benchmark_step")


@pytest.fixture
def setting(tool):
    return tool.Setting(
        device=CPU, batch_size=2, global_size=32, patch_size=16, queue_size=16, is_bf16=False, is_compiled=False
    )


def figures(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def module_of(tool, name):
    """What the tool took `name` from."""
    return sys.modules[getattr(tool, name).__module__]


def watch_passes(monkeypatch):
    """The passes through trunks from now on: shape of the images, with gradient or without, BatchNorm groups."""
    passes, forward = [], ResNetTrunk.forward

    def watched(trunk, images):
        passes.append((tuple(images.shape), trunk.conv1.weight.requires_grad, len(trunk.bn1.group_momenta)))
        return forward(trunk, images)

    monkeypatch.setattr(ResNetTrunk, "forward", watched)
    return passes


@pytest.mark.parametrize(("name", "batch_size", "num_groups"), [("detco", 2, 1), ("moco_v2", 64, 2)])
def test_the_bound_makes_the_very_passes_of_the_step(tool, setting, monkeypatch, name, batch_size, num_groups):
    setting = setting._replace(batch_size=batch_size, queue_size=64)
    step, bound = tool.Step(name, setting), tool.Passes(name, setting)
    passes = watch_passes(monkeypatch)
    step()
    of_step = passes.copy()
    passes.clear()
    bound()
    assert passes == of_step
    assert {groups for _, _, groups in passes} == {num_groups}
    expected = {"detco": [2, 2, 18, 18], "moco_v2": [64, 64]}
    assert sorted(shape[0] for shape, _, _ in passes) == expected[name]


def test_the_bound_reaches_every_weight_of_the_trunk_and_leaves_no_gradient_behind(tool, setting, monkeypatch):
    reached = []
    backward = torch.autograd.backward

    def watched(outputs, gradients):
        backward(outputs, gradients)
        reached.append([parameter.grad is not None for parameter in trunk.parameters()])

    bound = tool.Passes("moco_v2", setting)
    (trunk,) = (
        part for part in vars(bound).values() if isinstance(part, nn.Module) and part.conv1.weight.requires_grad
    )
    monkeypatch.setattr(torch.autograd, "backward", watched)
    bound()
    assert all(reached[0])
    assert all(parameter.grad is None for parameter in trunk.parameters())


def test_the_measured_step_changes_what_a_step_of_the_trainer_changes(tool, setting, tmp_path):
    """Same weights, views and shuffling: then the same weights, running averages, momenta and queues come out."""
    measured, trained = tool.Step("moco_v2", setting), tool.Step("moco_v2", setting)
    for step in (measured, trained):
        step.optimizer.param_groups[0]["lr"] = 0.1
    plan = Plan(
        seed=0,
        total_steps=10,
        steps_per_epoch=10,
        batch_size_total=2,
        accumulate_steps=1,
        lr=0.1,
        lr_schedule=lambda progress: 1.0,
        autocast_bf16=False,
        log_every_steps=1,
        save_every_minutes=1e9,
    )
    world = World(rank=0, size=1, local_rank=0, device=CPU)
    bad_samples = BadSampleLog(tmp_path / "bad.jsonl", 2)
    trainer = Trainer(trained.method, lambda views: views, trained.optimizer, plan, world, bad_samples)
    for number in range(2):  # in the second, the key encoder has something to follow
        trainer.step(number, Batch(trained.views, torch.arange(2), []), StopRequest())
        seed_step(0, number, 0)  # the same permutation
        measured()

    results, expected = (
        {**step.method.state_dict(), **dict(enumerate(step.optimizer.state.values()))} for step in (measured, trained)
    )
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


def test_the_step_refuses_numbers_that_are_not_finite(tool, setting):
    step = tool.Step("moco_v2", setting)
    step.views.global_query.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        step()


def test_repeating_a_step_or_its_parts_moves_no_weight(tool, setting):
    step = tool.Step("moco_v2", setting)
    before = [parameter.clone() for parameter in step.method.parameters()]
    step()
    for work in tool.parts_of(step, setting).values():
        work()
    assert all(torch.equal(*pair) for pair in zip(before, step.method.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in step.method.parameters())


@pytest.mark.parametrize(("name", "recipe"), [("detco", DetCoRecipe), ("moco_v2", MoCoRecipe)])
def test_views_have_the_shapes_of_the_methods_recipe(tool, setting, name, recipe):
    views = module_of(tool, "Step").make_views(name, setting)
    assert isinstance(views, DetCoViews) == (recipe is DetCoRecipe)
    assert views.global_query.shape == views.global_key.shape == (2, 3, 32, 32)
    assert not torch.equal(views.global_query, views.global_key)
    if isinstance(views, DetCoViews):
        assert views.local_query.shape == views.local_key.shape == (2, 9, 3, 16, 16)


def test_features_in_place_of_a_trunk_have_the_shapes_of_the_trunks(tool, setting):
    module = module_of(tool, "Step")
    for side in (32, 50):
        images = torch.rand(2, 3, side, side)
        expected = ResNetTrunk()(images)
        features = module.FixedFeatures([images], torch.float32)(images)
        assert [feature.shape for feature in features] == [feature.shape for feature in expected]


def test_step_bound_and_parts_are_printed_as_lines_and_the_rest_is_what_is_left(tool, capsys):
    assert tool.main([*SMALL, "--methods", "moco_v2", "--parts", "bound", "--rounds", "1"]) == 0
    lines = {line["name"].removesuffix(", fp32, batch 2"): line for line in figures(capsys)}
    assert list(lines) == ["step / bound", "step", "bound", *PARTS, "rest"]
    assert [line["figure"] for line in lines.values()] == ["S1"] * 3 + ["S2"] * 8
    assert lines["step / bound"]["bar"] == "<= 1.10"
    ms = {name: line["value"] for name, line in lines.items()}
    assert ms["step / bound"] == pytest.approx(ms["step"] / ms["bound"], rel=1e-3)
    parts = sum(ms[part] for part in ("bound", *PARTS))
    assert ms["rest"] == pytest.approx(ms["step"] - parts, abs=0.001 * ms["step"])


def test_peak_memory_is_that_of_the_work_at_its_height(tool, monkeypatch):
    module = module_of(tool, "peak_mebibytes")
    if not module.can_measure(CPU):
        pytest.skip("needs Linux")
    monkeypatch.syspath_prepend(TOOLS)  # for the new process
    # The work makes 40 MiB of text and drops them at once.
    peak = module.peak_mebibytes(functools.partial, operator.mul, "x", 40 * 2**20, device=CPU)
    assert peak == pytest.approx(40, abs=4)


def test_peak_memory_of_step_and_bound_is_printed_as_a_ratio(tool, capsys, monkeypatch):
    def peak(make, method, setting, *, device):
        assert (method, setting.batch_size, device) == ("detco", 4, CPU)
        return {"Step": 30.0, "Passes": 20.0}[make.__name__]

    monkeypatch.setattr(tool, "can_measure", lambda device: True)
    monkeypatch.setattr(tool, "peak_mebibytes", peak)
    assert tool.main([*SMALL, "--memory-batch-size", "4", "--parts", "memory"]) == 0
    ratio, *peaks = figures(capsys)
    assert (ratio["figure"], ratio["value"], ratio["bar"]) == ("M1", 1.5, "<= 1.5")
    assert ratio["name"] == "peak memory of step / bound, fp32, batch 4"
    assert [(line["value"], line["unit"]) for line in peaks] == [(30, "MiB"), (20, "MiB")]


def test_without_lightly_a_line_says_what_is_left_out(tool, capsys, monkeypatch):
    monkeypatch.setattr(tool, "is_available", lambda: False)
    assert tool.main([*SMALL, "--parts", "lightly"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "S3 is left out: lightly is not installed" in printed.err


@pytest.mark.skipif(importlib.util.find_spec("lightly") is None, reason="needs lightly")
def test_lightly_makes_the_same_step(tool, capsys):
    assert tool.main([*SMALL, "--parts", "lightly"]) == 0
    lines = figures(capsys)
    assert [line["name"] for line in lines] == [
        f"{name}, fp32, batch 2" for name in ("lightly / ours", "ours", "lightly")
    ]
    assert lines[0]["bar"] == ">= 1.0"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", ["on", "off"])
def test_a_gpu_is_measured_with_the_same_figures(tool, capsys, monkeypatch, compiled):
    monkeypatch.syspath_prepend(TOOLS)  # for the new processes
    sizes = [*SMALL, "--batch-size", "64", "--queue-size", "64", "--compile", compiled]
    sizes.remove("--cpu")
    assert tool.main([*sizes, "--parts", "bound", "memory", "--methods", "detco"]) == 0
    lines = figures(capsys)
    assert sum("one group" in line["name"] for line in lines) == 2
    assert all(line["value"] > 0 for line in lines if not line["name"].startswith("rest"))
    assert all(("compiled" in line["name"]) == (compiled == "on") for line in lines)
    assert {line["figure"] for line in lines} == {"S1", "S2", "M1"}


def test_a_gpu_without_a_compiler_is_measured_uncompiled_and_a_line_says_why(tool, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tool, "compiler_trouble", lambda device: "no Triton here")
    assert tool.parse([]).compile == "off"
    assert "no Triton here" in capsys.readouterr().err
    assert tool.parse(["--compile", "on"]).compile == "on"
    monkeypatch.setattr(tool, "compiler_trouble", lambda device: None)
    assert tool.parse([]).compile == "on"
    assert tool.parse(["--cpu"]).compile == "off"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--queue-size", "20", "--batch-size", "8"], "20 is not a multiple of the batch of 8"),
        (["--rounds", "0"], "--rounds is 0; at least one"),
        (["--methods", "soco_fpn"], "invalid choice"),
    ],
)
def test_arguments_that_cannot_be_measured_are_refused(tool, capsys, arguments, message):
    with pytest.raises(SystemExit):
        tool.main(arguments)
    assert message in capsys.readouterr().err
