"""Iterations, steps, learning rate and batch: schedules that cannot work, or no longer belong together.

Needs no Detectron2.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transfer.preflight import PUBLISHED_GPUS
from transfer.tasks import show

# Learning rates within this factor of linear scaling are a matter of taste; the 8-GPU rate on one GPU is off by 8.
LR_TOLERANCE = 2.0


def check_schedule(cfg: Any, published: Mapping[str, Any]) -> list[str]:
    """Refuse drops of the learning rate that never happen.

    Args:
        cfg: The resolved config, after any scaling.
        published: Values of its task; may be empty (a task of the user's own).

    Returns:
        Notes for the log.

    Raises:
        ValueError: If STEPS are not ascending numbers below MAX_ITER.
    """
    iterations, steps = cfg.SOLVER.MAX_ITER, list(cfg.SOLVER.STEPS)
    notes = []
    warm_up = cfg.SOLVER.WARMUP_ITERS
    if warm_up >= iterations:
        notes.append(
            f"WARNING: SOLVER.WARMUP_ITERS {warm_up} is not below SOLVER.MAX_ITER {iterations}: the "
            "learning rate never reaches SOLVER.BASE_LR."
        )
    if cfg.SOLVER.LR_SCHEDULER_NAME != "WarmupMultiStepLR":
        return notes
    if not steps:
        return [*notes, "WARNING: SOLVER.STEPS is empty: the learning rate never drops."]
    if steps != sorted(set(steps)) or steps[0] < 1:
        raise ValueError(f"SOLVER.STEPS is {show(steps)}; it must be positive iterations in ascending order")
    if steps[-1] >= iterations:
        raise ValueError(
            f"SOLVER.STEPS is {show(steps)}, but training ends at SOLVER.MAX_ITER {iterations}: the learning rate "
            f"would not drop as meant. {_steps_remedy(iterations, published)}"
        )
    return notes


def check_batch(cfg: Any, published: Mapping[str, Any], processes: int) -> list[str]:
    """Warn where learning rate, batch and iterations no longer belong together: a loss of NaN is usually that.

    Args:
        cfg: The resolved config.
        published: Values of its task; may lack the keys (a task of the user's own).
        processes: GPUs of all machines together, at least 1.

    Returns:
        Notes for the log.
    """
    batch, lr = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR
    task_batch, task_lr = published.get("SOLVER.IMS_PER_BATCH"), published.get("SOLVER.BASE_LR")
    if task_batch is None or task_lr is None:
        return []
    linear = task_lr * batch / task_batch
    if batch == task_batch and processes != PUBLISHED_GPUS and math.isclose(lr, task_lr):
        return [
            f"WARNING: the 8-GPU batch of {batch} images on {processes} GPU{'s' * (processes > 1)} "
            f"({batch // processes} on each). With SyncBN this equals the published setting if it fits into memory; if "
            "it does not, --auto-scale keeps the images per GPU and scales batch, lr and iterations together."
        ]
    notes = []
    # AdamW's lr does not go with the batch.
    if cfg.TRANSFER.OPTIMIZER == "sgd" and not linear / LR_TOLERANCE <= lr <= linear * LR_TOLERANCE:
        notes.append(
            f"WARNING: SOLVER.BASE_LR {lr:g} with {batch} images per step; linear scaling of the task's {task_lr:g} "
            f"with {task_batch} gives {linear:g}."
        )
    iterations = cfg.SOLVER.MAX_ITER
    if batch != task_batch and iterations == published.get("SOLVER.MAX_ITER"):
        notes.append(
            f"WARNING: {iterations} iterations are the task's for {task_batch} images per step; with {batch} the same "
            f"number of images takes {iterations * task_batch // batch} (--auto-scale does that)."
        )
    return notes


def _steps_remedy(iterations: int, published: Mapping[str, Any]) -> str:
    task_steps: Sequence[int] = published.get("SOLVER.STEPS", ())
    if not task_steps:
        return f"Append SOLVER.STEPS with iterations below {iterations}"
    scaled = sorted({max(1, step * iterations // published["SOLVER.MAX_ITER"]) for step in task_steps})
    return f'At the same parts of the training: SOLVER.STEPS "({", ".join(map(str, scaled))},)"'
