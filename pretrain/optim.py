"""The optimiser of MoCo v2 and DetCo, its lr scaling rule and its lr schedule.

Source: MoCo v2, arXiv:2003.04297, and facebookresearch/moco main_moco.py: SGD 0.03 at 256 images, momentum 0.9, no
Nesterov, weight decay 1e-4 on all parameters including BN and biases, cosine to 0 stepped once per epoch.
"""

from torch import nn
from torch.optim import SGD

from detco.schedules import Schedule, constant, cosine, quantised

SCHEDULES: dict[str, Schedule] = {"cosine": cosine, "constant": constant}


def scaled_lr(base_lr: float, batch_size_total: int, reference_batch_size: int) -> float:
    """Return the peak lr for a batch: linear in its size."""
    return base_lr * batch_size_total / reference_batch_size


def lr_schedule(name: str, unit: str, epochs: int) -> Schedule:
    """Return the factor of the peak lr as a function of progress.

    Args:
        name: A key of SCHEDULES.
        unit: "epoch" holds the lr constant within an epoch, as MoCo does; "step" moves it every step.
        epochs: Of the whole run.
    """
    return quantised(SCHEDULES[name], epochs) if unit == "epoch" else SCHEDULES[name]


def build_sgd(model: nn.Module, *, lr: float, momentum: float, weight_decay: float) -> SGD:
    """Build SGD over every parameter that takes a gradient (so not over a teacher's), in one group."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return SGD(trained, lr=lr, momentum=momentum, weight_decay=weight_decay)
