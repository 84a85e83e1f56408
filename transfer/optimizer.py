"""The optimiser, by the name in TRANSFER.OPTIMIZER: Detectron2's SGD."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from transfer import d2

d2.require()

from detectron2.solver import build_optimizer as build_sgd  # noqa: E402


def build_optimizer(cfg: Any, model: nn.Module) -> Optimizer:
    """The optimiser of a config.

    Raises:
        ValueError: If TRANSFER.OPTIMIZER is not known.
    """
    if cfg.TRANSFER.OPTIMIZER == "sgd":
        optimizer: Optimizer = build_sgd(cfg, model)
        return optimizer
    raise ValueError(f"TRANSFER.OPTIMIZER is {cfg.TRANSFER.OPTIMIZER}; it must be sgd")
