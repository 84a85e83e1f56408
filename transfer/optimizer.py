"""The optimiser, by the name in TRANSFER.OPTIMIZER: Detectron2's SGD, or AdamW."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

from transfer import d2

d2.require()

from detectron2.solver import build_optimizer as build_sgd  # noqa: E402
from detectron2.solver import get_default_optimizer_params  # noqa: E402
from detectron2.solver.build import maybe_add_gradient_clipping  # noqa: E402

# SOLVER.CLIP_GRADIENTS.CLIP_TYPE that Detectron2 lacks: its "norm" clips each parameter's gradient by itself.
FULL_MODEL = "full_model"
CLIP_TYPES = ("value", "norm", FULL_MODEL)


def build_adamw(cfg: Any, model: nn.Module) -> Optimizer:
    """AdamW with PyTorch's betas 0.9 and 0.999, reading the keys that Detectron2's SGD reads.

    CLIP_TYPE "full_model" scales all gradients so that the norm of all of them together is at most CLIP_VALUE.
    """
    solver = cfg.SOLVER
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    values = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    if not _clips_full_model(cfg):
        kind: type[Optimizer] = maybe_add_gradient_clipping(cfg, AdamW)
        return kind(groups, **values)
    optimizer = AdamW(groups, **values)

    def clip(of: Optimizer, _args: Any, _kwargs: Any) -> None:
        parameters = [parameter for group in of.param_groups for parameter in group["params"]]
        clip_grad_norm_(parameters, solver.CLIP_GRADIENTS.CLIP_VALUE, solver.CLIP_GRADIENTS.NORM_TYPE)

    # A hook rather than a subclass: the state that is saved is AdamW's, and under mixed precision the gradients that
    # it sees are unscaled.
    optimizer.register_step_pre_hook(clip)
    return optimizer


# One line per optimiser: name -> builder from the config and the model.
OPTIMIZERS: dict[str, Callable[[Any, nn.Module], Optimizer]] = {"sgd": build_sgd, "adamw": build_adamw}


def build_optimizer(cfg: Any, model: nn.Module) -> Optimizer:
    """The optimiser of a config.

    Raises:
        ValueError: As `check_optimizer`.
    """
    check_optimizer(cfg)
    return OPTIMIZERS[cfg.TRANSFER.OPTIMIZER](cfg, model)


def check_optimizer(cfg: Any) -> None:
    """Refuse a config whose optimiser could not be built.

    Raises:
        ValueError: If TRANSFER.OPTIMIZER is not known, or does not know the kind of gradient clipping.
    """
    name, clip = cfg.TRANSFER.OPTIMIZER, cfg.SOLVER.CLIP_GRADIENTS
    if name not in OPTIMIZERS:
        raise ValueError(f"TRANSFER.OPTIMIZER is {name}; it must be one of {', '.join(OPTIMIZERS)}")
    if name == "sgd" and _clips_full_model(cfg):
        raise ValueError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {FULL_MODEL}, which Detectron2's SGD does not know; give value or "
            "norm, or set TRANSFER.OPTIMIZER to adamw"
        )
    if clip.ENABLED and clip.CLIP_TYPE not in CLIP_TYPES:
        raise ValueError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE}; it must be one of {', '.join(CLIP_TYPES)}"
        )


def _clips_full_model(cfg: Any) -> bool:
    return bool(cfg.SOLVER.CLIP_GRADIENTS.ENABLED and cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == FULL_MODEL)
