"""results.json: what a finished run reached, with which weights, how far from the published protocol.

Needs no Detectron2.
"""

import json
import math
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torchvision

from detco import __version__
from transfer.weights import WeightsRecord

FILE_NAME = "results.json"
SCHEMA = 1
# Detectron2's name of an evaluated task -> the published metrics' prefix. DensePose's AP is the geodesic one (GPS).
PREFIX_OF = {"bbox": "box", "segm": "mask", "keypoints": "keypoint", "densepose_gps": "dp"}
# Semantic segmentation has no prefix; Cityscapes' evaluator calls the mean over the classes IoU.
SEM_SEG_NAMES = {"IoU": "mIoU", "mIoU": "mIoU", "iIoU": "iIoU", "mACC": "mACC", "pACC": "pACC"}


@dataclass(frozen=True)
class Schedule:
    """How long and with what batch a run trained.

    Attributes:
        iterations: Optimiser steps.
        batch_size: Images per step, of all processes.
        base_lr: Learning rate after warm-up.
        num_gpus: GPUs of all machines; 0 on the CPU.
        auto_scaled: Whether --auto-scale changed the published values.
        weight_decay: Of all but the norm layers.
    """

    iterations: int
    batch_size: int
    base_lr: float
    num_gpus: int
    auto_scaled: bool
    weight_decay: float


@dataclass(frozen=True)
class RunRecord:
    """The contents of results.json but for what `write_results` adds itself.

    Attributes:
        task: Id of the published task; "" on data of the user's own.
        based_on: Protocol (a name in tasks.yaml) whose recipe the user's own data were trained with; "" otherwise.
        recipe: The task's recipe; "" if the config names no task.
        label: Name of the row.
        weights: What training started from.
        transferred: Parts of the detector that did: "backbone", "fpn", "box_head"; empty for random initialisation.
        metrics: Per cent by the names of the published numbers ("box_AP50"); None where it is not a number.
        departures: Where the config is not the published protocol, in sentences.
        schedule: See there.
        datasets: Names by "train" and "test".
        subsets: Of each part of COCO that was trained on its list, number of images and digest of the ids.
        config_digest: Equal for repeated runs.
        seed: SEED.
        hours: Wall-clock time, all parts of a resumed run together.
        detectron2: Version and, if known, commit.
    """

    task: str
    based_on: str
    recipe: str
    label: str
    weights: WeightsRecord
    transferred: Sequence[str]
    metrics: Mapping[str, float | None]
    departures: Sequence[str]
    schedule: Schedule
    datasets: Mapping[str, Sequence[str]]
    subsets: Mapping[str, Mapping[str, Any]]
    config_digest: str
    seed: int
    hours: float
    detectron2: str


def write_results(folder: Path, record: RunRecord) -> Path:
    """Write results.json into a run directory, atomically. Returns its path."""
    contents = {
        "schema": SCHEMA,
        **{name: getattr(record, name) for name in ("task", "based_on", "recipe", "label")},
        "weights": {**_weights(record.weights), "transferred": list(record.transferred)},
        "metrics": dict(record.metrics),
        "departures": list(record.departures),
        "schedule": asdict(record.schedule),
        "datasets": {name: list(values) for name, values in record.datasets.items()},
        "subsets": {name: dict(subset) for name, subset in record.subsets.items()},
        "config_digest": record.config_digest,
        "seed": record.seed,
        "versions": {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "detectron2": record.detectron2,
            "detco": __version__,
            "python": platform.python_version(),
        },
        "hardware": describe_hardware(record.schedule.num_gpus),
        "hours": round(record.hours, 4),
        "finished": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    path = folder / FILE_NAME
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(contents, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())  # or after a power failure the name may be there without the content
    Path(temporary).replace(path)
    path.chmod(0o644)  # mkstemp's files are private
    return path


def is_result(name: str) -> bool:
    """Whether a scalar of Detectron2's storage is a result of an evaluation ("bbox/AP50")."""
    return any(part in PREFIX_OF or part == "sem_seg" for part in name.split("/")[:-1])


def metric_names(scalars: Mapping[str, float]) -> dict[str, float | None]:
    """Detectron2's evaluation scalars by the names of the published numbers.

    Args:
        scalars: "bbox/AP", "segm/AP50", "sem_seg/IoU", ...; with several test sets "voc_2007_test/bbox/AP". Per cent.

    Returns:
        "box_AP", "mask_AP50", "mIoU", ..., with several test sets "voc_2007_test/box_AP". Per-class values
        ("bbox/AP-cat") are left out; None stands for what cannot be measured for want of objects, for which Detectron2
        gives NaN and the evaluators below it a negative number (lvis: -1, so -100 per cent).
    """
    named: dict[str, float | None] = {}
    for name, value in scalars.items():
        *dataset, task, metric = name.split("/")
        if task in PREFIX_OF and "-" not in metric:
            ours = f"{PREFIX_OF[task]}_{metric}"
        elif task == "sem_seg" and metric in SEM_SEG_NAMES:
            ours = SEM_SEG_NAMES[metric]
        else:
            continue
        named["/".join([*dataset, ours])] = value if math.isfinite(value) and value >= 0 else None
    return named


def with_heads(metrics: Mapping[str, float | None], *prefixes: str) -> dict[str, float | None]:
    """Metrics of a detector with further heads ("mask", "keypoint").

    Without any detection Detectron2 reports boxes only; the others are None then.
    """
    absent = {name.replace("box_", f"{prefix}_"): None for prefix in prefixes for name in metrics if "box_" in name}
    return {**absent, **metrics}


def label_of(given: str, init: str, weights: WeightsRecord) -> str:
    """Name of the row: the given one, else what the weights' provenance says, else the file's name."""
    if given:
        return given
    if init == "random":
        return "random init"
    method, epochs = weights.provenance.get("method"), weights.provenance.get("epochs")
    if method:
        return f"{method} {epochs:g}ep" if isinstance(epochs, int | float) else str(method)
    return "supervised" if "ImageNetPretrained" in weights.path else Path(weights.path).stem


def describe_hardware(num_gpus: int) -> str:
    """The machine in words."""
    if num_gpus:
        return f"{num_gpus} x {torch.cuda.get_device_name()}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU, {cores} cores ({_cpu_name()})"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _weights(record: WeightsRecord) -> dict[str, Any]:
    return {
        "path": record.path,
        "sha256": record.sha256,
        "provenance": record.provenance,
        "preprocess": record.preprocess.as_dict() if record.preprocess else None,
    }
