"""What must be right before the first iteration, and the refusal of what is not. Needs no Detectron2.

A wrong channel order, std or stride does not crash: the run trains and loses AP (detectron2 issues 450 and 778). Nor
does Detectron2 stop at weights that it could not place; it warns and trains from random values. So both are checked
here.
"""

import math
from collections.abc import Collection
from typing import Any

from detco.artifact import Preprocess
from transfer.checks.pretrained_parts import is_part, lost_parts
from transfer.tasks import is_same, show
from transfer.weights import WeightsRecord

PUBLISHED_GPUS = 8
# A config and a record agree if they do so to this: 1/100 of one of 255 grey levels.
PIXEL_TOLERANCE = 0.01


class WeightsDoNotFit(ValueError):
    """The weights file does not hold the tensors that the model needs from it."""


def check_init(cfg: Any) -> None:
    """Refuse a MODEL.WEIGHTS that is not what TRANSFER.INIT announces.

    Raises:
        ValueError: If weights are missing, or given to a random-init config.
    """
    init, weights = cfg.TRANSFER.INIT, cfg.MODEL.WEIGHTS
    if init == "random" and weights:
        raise ValueError(
            f"TRANSFER.INIT is random, but MODEL.WEIGHTS is {weights}. Take the config that ends in _converted.yaml, "
            'or set MODEL.WEIGHTS ""'
        )
    if init != "random" and not weights:
        raise ValueError(
            f"TRANSFER.INIT is {init}, but MODEL.WEIGHTS is empty: this would train from random weights. Append "
            "MODEL.WEIGHTS FILE.pkl (made by convert-to-d2), or take the config that ends in _random.yaml"
        )


def preprocess_values(preprocess: Preprocess) -> dict[str, Any]:
    """The Detectron2 keys that must agree with a record of the weights, and their values."""
    return {
        "INPUT.FORMAT": preprocess.channel_order,
        "MODEL.PIXEL_MEAN": list(preprocess.mean_255),
        "MODEL.PIXEL_STD": list(preprocess.std_255),
        "MODEL.RESNETS.STRIDE_IN_1X1": preprocess.stride_in_1x1,
    }


def check_preprocess(cfg: Any, record: WeightsRecord) -> list[str]:
    """Refuse a config whose input is not what the weights were trained with.

    Returns:
        Notes for the log: that the two agree, or that the file carries no record to compare with.

    Raises:
        ValueError: If the channel order, mean, std or stride contradict the record; names keys and both values.
    """
    if not record.path:
        return []
    if record.preprocess is None:
        return [
            f"WARNING: {record.path} does not say what input it was trained with, so INPUT.FORMAT {cfg.INPUT.FORMAT}, "
            f"PIXEL_MEAN {show(cfg.MODEL.PIXEL_MEAN)}, PIXEL_STD {show(cfg.MODEL.PIXEL_STD)} and STRIDE_IN_1X1 "
            f"{cfg.MODEL.RESNETS.STRIDE_IN_1X1} are unchecked. Files made by convert-to-d2 do say it."
        ]
    actual = {
        "INPUT.FORMAT": cfg.INPUT.FORMAT,
        "MODEL.PIXEL_MEAN": list(cfg.MODEL.PIXEL_MEAN),
        "MODEL.PIXEL_STD": list(cfg.MODEL.PIXEL_STD),
        "MODEL.RESNETS.STRIDE_IN_1X1": cfg.MODEL.RESNETS.STRIDE_IN_1X1,
    }
    needed = preprocess_values(record.preprocess)
    wrong = [key for key in needed if not _agree(actual[key], needed[key])]
    if not wrong:
        return [f"Input settings agree with what {record.path} was trained with."]
    lines = [f"  {key} is {show(actual[key])}, the weights need {show(needed[key])}" for key in wrong]
    if cfg.TRANSFER.INIT == "supervised":
        lines.append("Take the config that ends in _converted.yaml, or")
    remedy = " ".join(f'{key} "{show(needed[key])}"' for key in wrong)
    raise ValueError(
        f"the config contradicts what the weights {record.path} were trained with; the run would train and quietly "
        "lose AP:\n" + "\n".join(lines) + f"\nAppend to the command: {remedy}"
    )


def check_processes(
    cfg: Any, *, num_gpus: int, num_machines: int, cuda_gpus: int, eval_only: bool = False
) -> list[str]:
    """Refuse a number of processes that this machine or the batch cannot have.

    Args:
        cfg: The resolved config, after any scaling; its MODEL.DEVICE is set.
        num_gpus: Processes per machine; 0 is one process on the CPU.
        num_machines: Machines.
        cuda_gpus: CUDA devices of this machine.
        eval_only: Whether nothing is trained: the batch of the training is not shared then, test images are.

    Returns:
        Notes for the log.

    Raises:
        ValueError: If there are fewer GPUs, several processes without GPUs, or a batch that they cannot share.
    """
    if num_gpus > max(cuda_gpus, 1):
        raise ValueError(
            f"--num-gpus is {num_gpus}, but this machine has {cuda_gpus} CUDA devices; "
            f"use {f'--num-gpus {cuda_gpus}' if cuda_gpus else '--num-gpus 0 for one process on the CPU'}"
        )
    if num_machines > 1 and (num_gpus == 0 or cuda_gpus == 0):
        raise ValueError(
            f"--num-machines is {num_machines} without GPUs: SyncBN needs CUDA in more than one process; use one "
            "machine"
        )
    processes = max(num_gpus, 1) * num_machines
    batch = cfg.SOLVER.IMS_PER_BATCH
    if batch % processes and not eval_only:
        raise ValueError(f"SOLVER.IMS_PER_BATCH {batch} cannot be divided among {processes} processes")
    if not cuda_gpus and num_gpus == 1:
        return ["No CUDA device: training on the CPU."]
    return []


def backbone_tensors(model_names: Collection[str]) -> list[str]:
    """Names of the model's tensors that ImageNet-style weights must provide: 265 for a ResNet-50.

    With FPN they are under `backbone.bottom_up.`, in a C4 detector under `backbone.` and `roi_heads.res5.` (without the
    extra norm). BN's batch counters are not weights and do not count.
    """
    body = "backbone.bottom_up." if any(name.startswith("backbone.bottom_up.") for name in model_names) else "backbone."
    return [
        name
        for name in model_names
        if name.startswith((body, "roi_heads.res5."))
        and not name.startswith("roi_heads.res5.norm.")
        and not name.endswith(".num_batches_tracked")
    ]


def check_backbone_loaded(model_names: Collection[str], missing: Collection[str], record: WeightsRecord) -> str:
    """Refuse to train if the weights file did not fill the whole backbone, or a part that it has as well.

    Args:
        model_names: Names in the model's state dict.
        missing: Those of them that the file did not provide.
        record: Of the file.

    Returns:
        A note for the log with the count.

    Raises:
        WeightsDoNotFit: If a backbone tensor was not found, or one of FPN or box head has another shape in the file.
    """
    expected = backbone_tensors(model_names)
    lost = sorted(set(expected) & set(missing))
    if record.preprocess is not None and record.preprocess.std_255 == (1.0, 1.0, 1.0):
        # MSRA's file has the running statistics folded into BN's scale and shift: the initial 0 and 1 are right.
        lost = [name for name in lost if not name.endswith((".running_mean", ".running_var"))]
    if lost:
        raise WeightsDoNotFit(
            f"{len(lost)} of the backbone's {len(expected)} tensors are not in {record.path} (first: "
            f"{', '.join(lost[:3])}); they would be trained from random values. Make a file that fits with: "
            "convert-to-d2 IN OUT.pkl"
        )
    if misshapen := lost_parts(missing, record):
        raise WeightsDoNotFit(
            f"{len(misshapen)} tensors of the detector have another shape in {record.path} (first: "
            f"{', '.join(misshapen[:3])}); they would be trained from random values. Set FPN and box head as they were "
            "pretrained, or leave them out: convert-to-d2 IN OUT.pkl --only backbone"
        )
    parts = sum(is_part(name) for name in set(model_names) - set(missing))
    beside = f", and {parts} of FPN and box head" if parts else ""
    others = len(set(missing) - set(expected))
    return (
        f"Backbone: all {len(expected)} tensors found in {record.path}{beside}; {others} others (heads) start from "
        "random."
    )


def _agree(left: Any, right: Any) -> bool:
    if isinstance(left, list):
        return all(math.isclose(a, b, abs_tol=PIXEL_TOLERANCE) for a, b in zip(left, right, strict=True))
    return is_same(left, right)
