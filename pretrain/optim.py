"""The optimisers, the lr scaling rule and the lr schedule.

Sources: MoCo v2, arXiv:2003.04297, and facebookresearch/moco main_moco.py: SGD 0.03 at 256 images, momentum 0.9, no
Nesterov, weight decay 1e-4 on all parameters including BN and biases, cosine to 0 stepped once per epoch. SoCo,
arXiv:2106.02637, and hologerry/SoCo@624a70d, contrast/lr_scheduler.py: linear warm-up from a hundredth of the peak,
then cosine to 1e-6, both per step.
"""

from torch import nn
from torch.optim import SGD, Optimizer

from detco.schedules import Schedule, constant, cosine, quantised, warmed_up
from pretrain.lars import LARS

SCHEDULES: dict[str, Schedule] = {"cosine": cosine, "constant": constant}


def scaled_lr(base_lr: float, batch_size_total: int, reference_batch_size: int) -> float:
    """Return the peak lr for a batch: linear in its size."""
    return base_lr * batch_size_total / reference_batch_size


def lr_schedule(
    name: str,
    unit: str,
    epochs: int,
    *,
    warmup_epochs: float = 0.0,
    warmup_start: float = 0.0,
    final_factor: float = 0.0,
) -> Schedule:
    """Return the factor of the peak lr as a function of progress.

    Args:
        name: A key of SCHEDULES.
        unit: "epoch" holds the lr constant within an epoch, as MoCo does; "step" moves it every step.
        epochs: Of the whole run.
        warmup_epochs: At its beginning, in which the factor rises with every step, whatever the unit. 0 is none.
        warmup_start: Factor at the first step of the warm-up.
        final_factor: Factor where the schedule is 0, at the end of a cosine.

    Raises:
        ValueError: If the warm-up leaves no epoch to the schedule, or ends within an epoch that is to have one lr.
    """
    if warmup_epochs >= epochs:
        raise ValueError(
            f"SOLVER.WARMUP_EPOCHS {warmup_epochs:g} leaves nothing of SOLVER.EPOCHS {epochs} to the schedule; "
            f"warm up for less, or train for longer"
        )
    after = _floored(SCHEDULES[name], final_factor)
    if unit == "epoch":
        if warmup_epochs % 1:
            raise ValueError(
                f"SOLVER.WARMUP_EPOCHS {warmup_epochs:g} ends within an epoch, and SOLVER.SCHEDULE_UNIT epoch holds "
                f"the lr for a whole one; make it a whole number, or set SOLVER.SCHEDULE_UNIT step"
            )
        after = quantised(after, epochs - int(warmup_epochs))
    return warmed_up(after, warmup_epochs / epochs, warmup_start)


def _floored(schedule: Schedule, floor: float) -> Schedule:
    """`schedule` between 1 and `floor` instead of 1 and 0."""
    return lambda progress: floor + (1.0 - floor) * schedule(progress)


def build_optimizer(
    name: str, model: nn.Module, *, lr: float, momentum: float, weight_decay: float, trust_coefficient: float
) -> Optimizer:
    """Build "sgd" or "lars" over every parameter that takes a gradient; the last argument is LARS's alone."""
    if name == "lars":
        return LARS(model, lr=lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust_coefficient)
    return build_sgd(model, lr=lr, momentum=momentum, weight_decay=weight_decay)


def build_sgd(model: nn.Module, *, lr: float, momentum: float, weight_decay: float) -> SGD:
    """Build SGD over every parameter that takes a gradient (so not over a teacher's), in one group.

    It is fused: one pass over weights, gradients and momenta.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return SGD(trained, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
