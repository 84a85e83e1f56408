"""Compiling changes speed alone, and a compiler that does not work changes nothing. No compiler is needed here."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._functorch import config as AUTOGRAD
from torch._functorch.aot_autograd import make_boxed_func

from detco.methods.moco import MoCoV2
from detco.methods.soco import SoCoFPN
from detco.models.ema import frozen_copy
from detco.models.norm import to_sync_batch_norm
from detco.models.resnet import ResNetTrunk
from pretrain.compile import STAGES, choose_compiler, compile_trunks, compiled, compiler_trouble
from pretrain.launch import RefusalError, World

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, local_rank=0, device=CPU)
ONE_OF_TWO = World(rank=0, size=2, local_rank=0, device=CPU)
EAGER_BACKWARD = "force_non_lazy_backward_lowering"  # absent from torch 2.8
ON_A_GPU = World(rank=0, size=1, local_rank=0, device=torch.device("cuda", 0))


def broken(graph: Any, examples: Any) -> Any:
    raise RuntimeError("g++ not found\nand more lines")


@pytest.fixture(autouse=True)
def _settings_are_restored() -> Iterator[None]:
    settings = torch._dynamo.config
    names = ("recompile_limit", "accumulated_recompile_limit", "optimize_ddp", "suppress_errors")
    with (
        settings.patch({name: getattr(settings, name) for name in names}),
        AUTOGRAD.patch({name: getattr(AUTOGRAD, name) for name in [EAGER_BACKWARD] if hasattr(AUTOGRAD, name)}),
    ):
        yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is compiled, by a backend that runs it as it is."""
    found: list[Any] = []
    monkeypatch.setattr("pretrain.compile.BACKEND", lambda graph, examples: (found.append(graph), graph)[1])
    return found


class TwoTrunks(nn.Module):
    """An online network and its copy, with the first block of each stage."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query = nn.ModuleDict({"trunk": ResNetTrunk()})
        for name in STAGES:
            setattr(self.query["trunk"], name, self.query["trunk"].get_submodule(name)[:1])
        self.key = frozen_copy(self.query)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = self.key["trunk"](images).res5
        loss: torch.Tensor = (self.query["trunk"](images).res5 - 0.5 * target).square().mean()
        return loss


def views(size: int = 32) -> torch.Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(size))


def test_every_stage_is_compiled_once_per_shape_and_computes_the_same(narrow: None, graphs: list[Any]) -> None:
    plain = TwoTrunks()
    network = copy.deepcopy(plain)
    assert compile_trunks(network, ALONE, falls_back=False) == 8
    for size, num_graphs in ((32, 8), (48, 16), (32, 16), (48, 16)):  # views of two sizes, and more than 8 graphs
        losses = [module(views(size)) for module in (plain, network)]
        for loss in losses:
            loss.backward()
        assert len(graphs) == num_graphs, "a graph per stage and size, with nothing left between"
        assert torch.equal(*losses)
    expected = dict(plain.named_parameters())
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, plain.get_buffer(name)), name


def test_names_copies_and_checkpoints_are_those_of_the_plain_network(narrow: None, graphs: list[Any]) -> None:
    plain = TwoTrunks()
    network = copy.deepcopy(plain)
    compile_trunks(network, ALONE, falls_back=False)
    network(views())
    assert list(network.state_dict()) == list(plain.state_dict())
    assert [type(module) for module in network.modules()] == [type(module) for module in plain.modules()]
    copied, num_graphs = copy.deepcopy(network), len(graphs)
    copied.load_state_dict(plain.state_dict())
    copied(views())
    assert len(graphs) == num_graphs, "a copy is not compiled"


def test_trunks_are_found_in_any_method(narrow: None) -> None:
    assert compile_trunks(MoCoV2(queue_size=8, dim=4), ALONE, falls_back=False) == 8
    assert compile_trunks(SoCoFPN(dim=4, hidden=4), ALONE, falls_back=False) == 8
    assert compile_trunks(nn.Linear(2, 2), ALONE, falls_back=False) == 0


def test_stages_that_talk_to_other_processes_are_left_alone(narrow: None) -> None:
    soco = to_sync_batch_norm(SoCoFPN(dim=4, hidden=4))
    assert compile_trunks(soco, ONE_OF_TWO, falls_back=False) == 0
    assert compile_trunks(soco, ALONE, falls_back=False) == 8
    assert compile_trunks(SoCoFPN(dim=4, hidden=4, sync_bn=False), ONE_OF_TWO, falls_back=False) == 8


def test_a_graph_that_cannot_be_compiled_is_run_as_it_is_or_ends_the_run(
    narrow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.compile.BACKEND", broken)
    plain = TwoTrunks()
    falling_back, strict = copy.deepcopy(plain), copy.deepcopy(plain)
    compile_trunks(falling_back, ALONE, falls_back=True)
    assert torch.equal(falling_back(views()), plain(views()))
    torch._dynamo.reset()
    compile_trunks(strict, ALONE, falls_back=False)
    with pytest.raises(BackendCompilerFailed):
        strict(views())


@pytest.mark.skipif(not hasattr(AUTOGRAD, EAGER_BACKWARD), reason="this torch compiles backward graphs when they run")
def test_a_backward_graph_that_cannot_be_compiled_does_not_end_the_run_either(
    narrow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = aot_autograd(fw_compiler=lambda graph, examples: make_boxed_func(graph.forward), bw_compiler=broken)
    monkeypatch.setattr("pretrain.compile.BACKEND", backend)
    plain = TwoTrunks()
    network = copy.deepcopy(plain)
    compile_trunks(network, ALONE, falls_back=True)
    for module in (plain, network):
        module(views()).backward()
    expected = dict(plain.named_parameters())
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)
    torch.testing.assert_close(network.state_dict(), plain.state_dict())


def test_a_compiler_is_tried_before_it_is_relied_on(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler_trouble(CPU) is None
    assert len(graphs) == 1
    torch._dynamo.reset()
    monkeypatch.setattr("pretrain.compile.BACKEND", broken)
    torch._dynamo.config.suppress_errors = True  # as an earlier run in this process may have left it
    trouble = compiler_trouble(CPU)
    assert trouble is not None
    assert "g++ not found" in trouble
    assert "\n" not in trouble


def test_auto_compiles_on_gpus_if_it_can_and_says_once_if_it_cannot(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[torch.device] = []

    def trouble(device: torch.device) -> str | None:
        tried.append(device)
        return "ImportError: no triton" if len(tried) > 1 else None

    monkeypatch.setattr("pretrain.compile.compiler_trouble", trouble)
    assert not choose_compiler("auto", ALONE)
    assert not choose_compiler("off", ON_A_GPU)
    assert tried == []
    assert choose_compiler("auto", ON_A_GPU)
    assert caplog.messages == []
    assert not choose_compiler("auto", ON_A_GPU)
    (message,) = caplog.messages
    assert "(ImportError: no triton), so this run is not compiled, and slower; install what is missing" in message
    with pytest.raises(RefusalError, match=r"SOLVER.COMPILE is on, but .*no triton.*or set SOLVER.COMPILE auto or off"):
        choose_compiler("on", ALONE)


def test_views_are_rendered_by_the_compiled_function(graphs: list[Any]) -> None:
    render = compiled(lambda images: images.float() / 255)
    images = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)
    assert torch.equal(render(images), images.float() / 255)
    render(images.flip(0))
    assert len(graphs) == 1


def test_the_command_compiles_resumes_uncompiled_and_refuses_what_does_not_work(
    run_here: Callable[..., Any], graphs: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = {"SOLVER.COMPILE": "on"}
    stopped = run_here(tmp_path / "compiled", trouble="15@0.5", **on)
    assert stopped.code == 143, stopped.stderr
    assert "compiling the views and 0 stages" in stopped.stdout
    assert len(graphs) == 2, "what is tried, and the views"
    assert run_here(tmp_path / "compiled", "--resume").code == 0, "speed is no other config"
    assert run_here(tmp_path / "plain").code == 0
    left, right = (
        torch.load(tmp_path / name / "checkpoints/step_00000008.pth", weights_only=True)["model"]
        for name in ("compiled", "plain")
    )
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name

    torch._dynamo.reset()
    monkeypatch.setattr("pretrain.compile.BACKEND", broken)
    refused = run_here(tmp_path / "refused", **on)
    assert (refused.code, "SOLVER.COMPILE is on, but torch.compile does not work" in refused.stderr) == (2, True)
    assert not (tmp_path / "refused").exists()
