"""One transfer run: config and checks, training, evaluation, results.json. What train_net starts on every rank."""

import argparse
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from transfer import d2
from transfer.config import config_digest, load_config
from transfer.datasets import USER_VAL, check_datasets, register_datasets, register_user_dataset, register_user_datasets
from transfer.modeling import register_models
from transfer.preflight import batch_notes, check_init, check_preprocess, check_processes
from transfer.run_record import RunRecord, Schedule, label_of, metric_names, with_heads, write_results
from transfer.scaling import auto_scale, refuse_silent_scaling
from transfer.subsets import describe_subsets, register_subsets
from transfer.tasks import departures, is_same, load_init_values, load_tasks, pairs, show, value_at
from transfer.trainer import TransferTrainer, device_of, load_detector
from transfer.weights import WeightsRecord, read_record

d2.require()

from detectron2.data import MetadataCatalog  # noqa: E402
from detectron2.engine import default_setup  # noqa: E402
from detectron2.utils import comm  # noqa: E402
from detectron2.utils.logger import setup_logger  # noqa: E402

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A run that has passed every check that needs no model.

    Attributes:
        cfg: Frozen config.
        weights: Record of MODEL.WEIGHTS.
        num_gpus: GPUs of all machines; 0 on the CPU.
        auto_scaled: Whether --auto-scale changed the config.
        datasets: What was trained and tested on: Detectron2's names, or where the user's own data lie.
        based_on: Id of the task whose recipe the user's own data are trained with; "" on a task's own data.
        notes: For the log; those that start with WARNING are logged as such.
    """

    cfg: Any
    weights: WeightsRecord
    num_gpus: int
    auto_scaled: bool
    datasets: dict[str, list[str]]
    based_on: str
    notes: list[str]


def prepare(args: argparse.Namespace) -> Prepared:
    """Resolve the config, register the datasets and refuse whatever cannot work. Writes nothing; the same on all ranks.

    Raises:
        ValueError: If the config, the weights, the number of processes or the data do not fit together.
        FileNotFoundError: If the config, the weights or the data do not exist.
    """
    cfg = load_config(args.config_file, args.opts)
    cfg.OUTPUT_DIR = args.output_dir or cfg.OUTPUT_DIR
    processes = max(args.num_gpus, 1) * args.num_machines
    notes: list[str] = []
    batch_before = cfg.SOLVER.IMS_PER_BATCH
    if args.auto_scale:
        cfg, table = auto_scale(cfg, processes)
        notes.append(table)
    refuse_silent_scaling(cfg, processes)
    auto_scaled = batch_before != cfg.SOLVER.IMS_PER_BATCH
    cuda_gpus = torch.cuda.device_count()
    notes += check_processes(cfg, num_gpus=args.num_gpus, num_machines=args.num_machines, cuda_gpus=cuda_gpus)
    cfg.MODEL.DEVICE = device_of(cfg, num_gpus=args.num_gpus)
    register_datasets(args.datasets_root)
    register_subsets(Path(args.datasets_root).expanduser(), cfg.SEED)
    notes += use_user_datasets(cfg, args.train_data, args.val_data, eval_only=args.eval_only)
    check_datasets([*(() if args.eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST])
    check_classes_of_model(cfg)
    weights = WeightsRecord("", None, None, {})
    based_on = cfg.TRANSFER.TASK if args.val_data else ""
    if not args.eval_only:
        check_init(cfg)
        weights = read_record(cfg.MODEL.WEIGHTS)
        notes += check_preprocess(cfg, weights)
        notes += batch_notes(cfg, _published(cfg, weights), processes)
        if based_on:
            cfg.TRANSFER.TASK = ""
            notes.append(f"On data of your own the results are those of no published task; the recipe is {based_on}'s.")
        notes += check_earlier_run(cfg, resume=args.resume)
    register_models()
    cfg.freeze()
    num_gpus = 0 if cfg.MODEL.DEVICE == "cpu" else processes
    datasets = {
        "train": [args.train_data] if args.train_data else list(cfg.DATASETS.TRAIN),
        "test": [args.val_data] if args.val_data else list(cfg.DATASETS.TEST),
    }
    return Prepared(cfg, weights, num_gpus, auto_scaled, datasets, based_on, notes)


def run(args: argparse.Namespace) -> None:
    """Train and evaluate, or only evaluate. Collective: runs on every rank.

    Raises:
        ValueError: As `prepare`, and if weights do not fill the backbone.
        FileNotFoundError: As `prepare`.
    """
    prepared = prepare(args)
    cfg = prepared.cfg
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="transfer")  # ours into the same log.txt
    for note in prepared.notes:
        is_warning = note.startswith("WARNING: ")
        logger.log(logging.WARNING if is_warning else logging.INFO, note.removeprefix("WARNING: "))
    if args.eval_only:
        model = TransferTrainer.build_model(cfg)
        load_detector(model, cfg, resume=args.resume)
        TransferTrainer.test(cfg, model)
        return
    trainer = TransferTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()
    if comm.is_main_process():
        record = build_record(prepared, trainer.last_metrics(), trainer.seconds / 3600)
        path = write_results(Path(cfg.OUTPUT_DIR), record)
        logger.info("%s: %s. Written to %s", record.label, _summary(record.metrics), path)


def build_record(prepared: Prepared, scalars: Mapping[str, float], hours: float) -> RunRecord:
    """What results.json will say about a finished run."""
    cfg = prepared.cfg
    task = load_tasks().get(cfg.TRANSFER.TASK or prepared.based_on)
    metrics, installed = metric_names(scalars), d2.require()
    heads = [name for name, on in (("mask", cfg.MODEL.MASK_ON), ("keypoint", cfg.MODEL.KEYPOINT_ON)) if on]
    return RunRecord(
        task=cfg.TRANSFER.TASK,
        based_on=prepared.based_on,
        recipe=task.recipe if task else "",
        label=label_of(cfg.TRANSFER.LABEL, cfg.TRANSFER.INIT, prepared.weights),
        weights=prepared.weights,
        metrics=with_heads(metrics, *heads),
        departures=departures(_published(cfg, prepared.weights), cfg),
        schedule=Schedule(
            iterations=cfg.SOLVER.MAX_ITER,
            batch_size=cfg.SOLVER.IMS_PER_BATCH,
            base_lr=cfg.SOLVER.BASE_LR,
            num_gpus=prepared.num_gpus,
            auto_scaled=prepared.auto_scaled,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        ),
        datasets=prepared.datasets,
        subsets=describe_subsets(cfg.DATASETS.TRAIN),
        config_digest=config_digest(cfg, prepared.datasets),
        seed=cfg.SEED,
        hours=hours,
        detectron2=installed.version + (f" ({installed.commit})" if installed.commit else ""),
    )


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
    with_masks = bool(cfg.MODEL.MASK_ON)
    if train_data:
        trained, val = register_user_datasets(train_data, val_data, with_masks=with_masks)
        used = [dataset for dataset in (trained, val) if dataset is not None]
        cfg.DATASETS.TRAIN = (trained.name,)
    else:
        used = [register_user_dataset(USER_VAL, val_data, with_masks=with_masks)]
    cfg.DATASETS.TEST = (used[-1].name,)
    classes = used[0].classes
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = len(classes)
    notes = [f"{data.name}: {data.num_images} images, {data.num_objects} objects from {data.source}" for data in used]
    notes += [f"{data.name}: {note}" for data in used for note in data.notes]
    notes.append(
        f"NUM_CLASSES is {len(classes)}, from the data: {', '.join(classes[:20])}{', ...' * (len(classes) > 20)}"
    )
    if with_masks and any(data.mask_format != "polygon" for data in used):
        cfg.INPUT.MASK_FORMAT = "bitmask"
        notes.append("INPUT.MASK_FORMAT is bitmask, because some masks are run-length encoded.")
    return notes


def check_classes_of_model(cfg: Any) -> None:
    """Refuse a head that has another number of classes than the datasets.

    Raises:
        ValueError: If so; names the key to change.
    """
    key = "RETINANET" if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else "ROI_HEADS"
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes is not None and len(classes) != cfg.MODEL[key].NUM_CLASSES:
            raise ValueError(
                f"MODEL.{key}.NUM_CLASSES is {cfg.MODEL[key].NUM_CLASSES}, but {name} has {len(classes)} classes; "
                f"append MODEL.{key}.NUM_CLASSES {len(classes)}"
            )


def check_earlier_run(cfg: Any, *, resume: bool) -> list[str]:
    """Refuse to mix a new run into the directory of an earlier one, or to resume one that started from other weights.

    Returns:
        Notes for the log: values that a resumed run changes.

    Raises:
        ValueError: If OUTPUT_DIR holds checkpoints and `resume` is False, or MODEL.WEIGHTS changed.
    """
    folder = Path(cfg.OUTPUT_DIR)
    if not (folder / "last_checkpoint").exists():
        return []
    if not resume:
        raise ValueError(
            f"{folder} holds the checkpoints of an earlier run; add --resume to continue it, or give another "
            "--output-dir"
        )
    if not (folder / "config.yaml").exists():
        return []
    earlier = dict(pairs(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))))
    changed = [key for key, value in pairs(cfg) if key in earlier and not is_same(value, earlier[key])]
    if "MODEL.WEIGHTS" in changed:
        raise ValueError(
            f"{folder} is a run that started from {show(earlier['MODEL.WEIGHTS'])}, but MODEL.WEIGHTS is now "
            f"{show(cfg.MODEL.WEIGHTS)}; give another --output-dir"
        )
    return [
        f"WARNING: resuming with {key} {show(value_at(cfg, key))}; it was {show(earlier[key])}."
        for key in changed
        if key not in ("OUTPUT_DIR", "MODEL.DEVICE")
    ]


def _published(cfg: Any, weights: WeightsRecord) -> dict[str, Any]:
    """What the task and the kind of weights ask for, by dotted key; empty for a task of the user's own."""
    task = load_tasks().get(cfg.TRANSFER.TASK)
    if task is None:
        return {}
    init = load_init_values()[cfg.TRANSFER.INIT]
    if cfg.TRANSFER.INIT == "converted" and weights.preprocess is not None:
        init = {}  # the input belongs to the weights, and check_preprocess has compared it with them
    return {**task.values, **init}


def _summary(metrics: Mapping[str, float | None]) -> str:
    main = {name: value for name, value in metrics.items() if name.endswith(("_AP", "_AP50", "_AP75"))}
    return ", ".join(f"{name} {'-' if value is None else f'{value:.1f}'}" for name, value in main.items())
