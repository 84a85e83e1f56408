"""--train-data and --val-data: a published recipe on data of the user's own."""

from typing import Any

from transfer.checks.heads import set_num_classes
from transfer.datasets import USER_VAL, register_user_dataset, register_user_datasets


def use_user_datasets(cfg: Any, train_data: str | None, val_data: str | None, *, eval_only: bool) -> list[str]:
    """Point a config at datasets of the user's own, and at their number of classes; nothing happens if none are given.

    Returns:
        Notes for the log: what was read, what was repaired, what changed in the config.

    Raises:
        ValueError: If only one of the two is given for training, or a dataset cannot be used.
    """
    if not train_data and not val_data:
        return []
    if not val_data or not (train_data or eval_only):
        raise ValueError("give --train-data and --val-data together (--eval-only: --val-data is enough)")
    _refuse_other_labels(cfg)
    with_masks = bool(cfg.MODEL.MASK_ON)
    if train_data:
        trained, val = register_user_datasets(train_data, val_data, with_masks=with_masks)
        used = [dataset for dataset in (trained, val) if dataset is not None]
        cfg.DATASETS.TRAIN = (trained.name,)
    else:
        used = [register_user_dataset(USER_VAL, val_data, with_masks=with_masks)]
    cfg.DATASETS.TEST = (used[-1].name,)
    classes = used[0].classes
    set_num_classes(cfg, len(classes))
    notes = [f"{data.name}: {data.num_images} images, {data.num_objects} objects from {data.source}" for data in used]
    notes += [f"{data.name}: {note}" for data in used for note in data.notes]
    notes.append(
        f"NUM_CLASSES is {len(classes)}, from the data: {', '.join(classes[:20])}{', ...' * (len(classes) > 20)}"
    )
    if with_masks and any(data.mask_format != "polygon" for data in used):
        cfg.INPUT.MASK_FORMAT = "bitmask"
        notes.append("INPUT.MASK_FORMAT is bitmask, because some masks are run-length encoded.")
    return notes


def _refuse_other_labels(cfg: Any) -> None:
    labels = {
        "keypoints": cfg.MODEL.KEYPOINT_ON,
        "a class for every pixel": "sem_seg" in cfg.TRANSFER.MAPPER,
        "DensePose's points": cfg.TRANSFER.MAPPER == "densepose",
    }
    if needed := [name for name, is_needed in labels.items() if is_needed]:
        raise ValueError(
            f"--train-data and --val-data read boxes and masks, but this config trains on {needed[0]}. Lay your data "
            "out as its dataset (the names in DATASETS.TRAIN and DATASETS.TEST) and give the folder to --datasets-root"
        )
