"""Values that no run can have, refused before anything is computed from them. Needs no Detectron2."""

from typing import Any

from transfer.tasks import show, value_at

# The least value that makes sense.
LEAST = {
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.WARMUP_ITERS": 0,
    "TEST.DETECTIONS_PER_IMAGE": 1,
    "TEST.EVAL_PERIOD": 0,
    "DATALOADER.NUM_WORKERS": 0,
}
CHANNELS = ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")
# Those of Detectron2 that its builders know by name.
CHOICES = {
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"),
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
}


def check_values(cfg: Any) -> None:
    """Refuse numbers out of range and names that Detectron2 would look for in vain.

    Raises:
        ValueError: If there are some; names every key.
    """
    wrong = [
        f"{key} is {show(value_at(cfg, key))}; give {least} or more"
        for key, least in LEAST.items()
        if value_at(cfg, key) < least
    ]
    if cfg.SOLVER.BASE_LR < 0:
        wrong.append(f"SOLVER.BASE_LR is {show(cfg.SOLVER.BASE_LR)}; give 0 or more")
    if not 0 <= cfg.SOLVER.MOMENTUM < 1:
        wrong.append(f"SOLVER.MOMENTUM is {show(cfg.SOLVER.MOMENTUM)}; give 0 or more, below 1")
    wrong += [
        f"{key} is {show(list(value_at(cfg, key)))}; give three numbers, one for each channel"
        for key in CHANNELS
        if len(value_at(cfg, key)) != 3
    ]
    wrong += [
        f"{key} is {value_at(cfg, key)}; it must be one of {', '.join(names)}"
        for key, names in CHOICES.items()
        if value_at(cfg, key) not in names
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
