"""torch.compile for what is the same in every step: the stages of the trunks and the device half of the views.

Compiled or not, it is the same computation but for the last bits, and the state dict has the same names. A stage is
what is compiled, and not the whole network: several methods run the stages apart, and a stage's gradients are complete,
and so may travel to the other processes, while the stages before it are still at work.
"""

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch._functorch.config
from torch import nn

from detco.models.norm import SyncBatchNorm
from detco.models.resnet import ResNetTrunk
from pretrain.launch import RefusalError, World, gather

logger = logging.getLogger(__name__)

BACKEND = "inductor"
STAGES = ("layer1", "layer2", "layer3", "layer4")
VARIANTS_PER_STAGE = 8
"""How many graphs one stage may have: of whole images and of patches, of training and of precise BN."""

CompileMode = Literal["auto", "on", "off"]


def choose_compiler(mode: CompileMode, world: World) -> bool:
    """Whether to compile: "on", or "auto" on CUDA, if the compilers of all processes work. Collective.

    Raises:
        RefusalError: On every rank, if the mode is "on" and a compiler does not work.
    """
    if mode == "off" or (mode == "auto" and world.device.type != "cuda"):
        return False
    troubles = [trouble for trouble in gather(compiler_trouble(world.device), world) if trouble]
    if not troubles:
        return True
    reason = f"torch.compile does not work here ({troubles[0]})"
    remedy = "install what is missing (a C++ compiler; Triton for GPUs)"
    if mode == "on":
        raise RefusalError(f"SOLVER.COMPILE is on, but {reason}; {remedy}, or set SOLVER.COMPILE auto or off")
    logger.warning("%s, so this run is not compiled, and slower; %s, or set SOLVER.COMPILE off", reason, remedy)
    return False


def compiler_trouble(device: torch.device) -> str | None:
    """Compile something small for `device` and run it forwards and backwards.

    Returns:
        What went wrong, in one line; None if nothing did.
    """

    def small(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() * x).sum()

    try:
        x = torch.ones(16, device=device, requires_grad=True)
        with torch._dynamo.config.patch(suppress_errors=False):
            torch.autograd.backward(torch.compile(small, backend=BACKEND, fullgraph=True)(x))
    except Exception as error:  # of any kind: a compiler is several programs
        reason = " ".join(str(error).split("\n")[:2])  # the second line has the compiler's own words
        return f"{type(error).__name__}: {reason}"
    return None


def compile_trunks(method: nn.Module, world: World, *, falls_back: bool) -> int:
    """Let every stage of every `ResNetTrunk` below `method` compile itself when it is first run, in place.

    A stage in which processes exchange BatchNorm statistics is left alone: a collective ends a graph.

    Args:
        method: On its device, in its memory layout.
        world: This process.
        falls_back: Whether a graph that cannot be compiled is run uncompiled, with a warning of torch's, instead of
            ending the run.

    Returns:
        How many stages there are.
    """
    trunks = [module for module in method.modules() if isinstance(module, ResNetTrunk)]
    stages = [trunk.get_submodule(name) for trunk in trunks for name in STAGES]
    stages = [stage for stage in stages if world.size == 1 or not _communicates(stage)]
    # All modules share one cache, since they share the code of `nn.Module.__call__`. By default it holds 8 graphs.
    num_graphs = VARIANTS_PER_STAGE * max(len(stages), 1)
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, num_graphs)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, num_graphs)
    # Cutting graphs at DistributedDataParallel's buckets is for a network that is one graph.
    settings.optimize_ddp = False
    settings.suppress_errors = falls_back
    _compile_backward_with_forward()
    for stage in stages:
        stage.compile(backend=BACKEND, dynamic=False)
    return len(stages)


def compiled(render: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`render`, compiled when it is first run; every batch has the same shapes."""
    return torch.compile(render, backend=BACKEND, dynamic=False)


def _compile_backward_with_forward() -> None:
    """Compile a backward graph when its forward graph is, where one that fails can still be run uncompiled.

    By default it is compiled when it is first run, and then there is nothing to fall back on: the run would end.
    """
    settings = torch._functorch.config
    if hasattr(settings, "force_non_lazy_backward_lowering"):
        settings.force_non_lazy_backward_lowering = True
    else:  # torch 2.8
        logger.warning("with this torch, a backward graph that cannot be compiled ends the run: SOLVER.COMPILE off")


def _communicates(stage: nn.Module) -> bool:
    return any(isinstance(module, SyncBatchNorm) for module in stage.modules())
