"""LARS: SGD with momentum whose step on a weight is proportional to the norm of that weight.

Source: arXiv:1708.03888; in the details hologerry/SoCo@624a70d, contrast/lars.py, which large-batch methods share.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_EPS = 1e-8  # added to the norm of a gradient


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling around SGD with momentum, without Nesterov and without dampening.

    For a weight w with gradient g, in this order::

        g = g + weight_decay * w
        g = g * trust_coefficient * |w| / (|g| + 1e-8)       (not if one of the norms is 0)
        m = momentum * m + g
        w = w - lr * m

    A parameter of one dimension (every bias, gamma and beta of a normalisation) is neither decayed nor adapted: plain
    SGD with momentum. No number is sent to the host.

    Departures: none known.
    """

    def __init__(
        self, model: nn.Module, *, lr: float, momentum: float, weight_decay: float, trust_coefficient: float
    ) -> None:
        """Optimise every parameter of `model` that takes a gradient, in one group per rule.

        Args:
            model: Its parameters may be moved or changed in layout before the call, not after.
            lr: Of both groups; about a thousand times SGD's, because of the trust coefficient.
            momentum: In [0, 1).
            weight_decay: Of the adapted parameters.
            trust_coefficient: Norm of the adapted gradient relative to its weight's.
        """
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        adapted = [parameter for parameter in trained if parameter.ndim > 1]
        plain = [parameter for parameter in trained if parameter.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": adapted, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient},
            {"params": plain, "weight_decay": 0.0, "trust_coefficient": None},
        ]
        super().__init__([group for group in groups if group["params"]], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Make one step with the gradients of now. `closure` is there for torch's sake and must be None."""
        assert closure is None
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not params:
                continue
            gradients = [parameter.grad for parameter in params]
            if group["trust_coefficient"] is not None:
                gradients = list(torch._foreach_add(gradients, params, alpha=group["weight_decay"]))
                torch._foreach_mul_(gradients, _trust(params, gradients, group["trust_coefficient"]))
            momenta = [self._momentum_of(parameter) for parameter in params]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, gradients)
            torch._foreach_add_(params, momenta, alpha=-group["lr"])

    def _momentum_of(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def _trust(weights: list[Tensor], gradients: list[Tensor], coefficient: float) -> list[Tensor]:
    """The factor of each gradient, as scalars on its device."""
    of_weights = torch.stack(torch._foreach_norm(weights))
    of_gradients = torch.stack(torch._foreach_norm(gradients))
    factors = coefficient * of_weights / (of_gradients + _EPS)
    return list(factors.where((of_weights > 0) & (of_gradients > 0), 1.0).unbind())
