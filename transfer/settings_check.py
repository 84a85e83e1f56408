"""The settings check: everything that is compared before the first iteration, and alone by --check.

Errors stop the run: what cannot work, what cannot be meant, and what would quietly lose AP. Departures do not: settings
that are legitimate but not the published ones; they are logged, and results.json lists them. All else is a note.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transfer import d2, densepose
from transfer.checks.data import check_annotations, check_classes, check_overlap, count_voc0712
from transfer.checks.findings import Findings
from transfer.checks.folder import check_earlier_run
from transfer.checks.network import (
    check_depth,
    check_extra_norm,
    check_frozen_layers,
    check_norms,
    check_parts,
    check_pixel_statistics,
    check_precise_bn,
)
from transfer.checks.pretrained_parts import check_pretrained_parts, transferred_parts
from transfer.checks.protocol import check_task_is_meant, departures_of, published_of
from transfer.checks.report import describe_settings
from transfer.checks.schedule import check_batch, check_schedule
from transfer.checks.values import check_values
from transfer.checks.weights import check_weights_file
from transfer.config import load_config
from transfer.datasets import check_datasets, register_datasets
from transfer.evaluation import check_evaluator, check_machines
from transfer.modeling import check_model_available
from transfer.preflight import check_init, check_preprocess, check_processes
from transfer.scaling import auto_scale, refuse_silent_scaling
from transfer.subsets import register_subsets
from transfer.tasks import is_same, pairs
from transfer.trainer import device_of
from transfer.user_data import use_user_datasets
from transfer.weights import WeightsRecord, read_record

d2.require()

from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402


class SettingsError(ValueError):
    """A run is refused; one line per reason.

    Attributes:
        errors: The reasons.
    """

    def __init__(self, errors: list[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = errors


@dataclass(frozen=True)
class Prepared:
    """A run whose settings have been checked, as far as that needs no model.

    Attributes:
        cfg: Frozen config.
        weights: Record of MODEL.WEIGHTS.
        transferred: Parts of the detector that start from them: "backbone", "fpn", "box_head".
        num_gpus: GPUs of all machines; 0 on the CPU.
        auto_scaled: Whether --auto-scale changed the config.
        datasets: What was trained and tested on: Detectron2's names, or where the user's own data lie.
        based_on: Name of the protocol whose recipe the user's own data are trained with; "" on a task's own data.
        settings: The settings that decide about comparability, a line each.
        departures: Where the config is not the published protocol, in sentences.
        notes: For the log; those that start with WARNING are logged as such.
        errors: Why it must not be started; empty if it may.
    """

    cfg: Any
    weights: WeightsRecord
    transferred: tuple[str, ...]
    num_gpus: int
    auto_scaled: bool
    datasets: dict[str, list[str]]
    based_on: str
    settings: str
    departures: list[str]
    notes: list[str]
    errors: list[str]


def prepare(args: argparse.Namespace) -> Prepared:
    """`examine`, and refuse what must not be started.

    Raises:
        SettingsError: If there are errors.
        ValueError, FileNotFoundError: As `examine`.
    """
    prepared = examine(args)
    if prepared.errors:
        raise SettingsError(prepared.errors)
    return prepared


def examine(args: argparse.Namespace) -> Prepared:
    """Resolve the config, register the datasets and check all settings. Writes nothing; the same on all ranks.

    Raises:
        ValueError: If there is nothing to check: the config or the user's own data cannot be read.
        FileNotFoundError: If there is no config file.
    """
    cfg = load_config(args.config_file, args.opts)
    check_values(cfg)
    cfg.OUTPUT_DIR = args.output_dir or cfg.OUTPUT_DIR
    processes = max(args.num_gpus, 1) * args.num_machines
    findings = Findings()
    batch_before = cfg.SOLVER.IMS_PER_BATCH
    unscaled: dict[str, Any] = {}
    if args.auto_scale:
        before, (cfg, table) = dict(pairs(cfg)), auto_scale(cfg, processes)
        unscaled = {key: before[key] for key, value in pairs(cfg) if not is_same(value, before[key])}
        findings.notes.append(table)
    if not args.eval_only:
        findings.take(refuse_silent_scaling, cfg, processes)
    _check_machine(findings, cfg, args)
    cfg.MODEL.DEVICE = device_of(cfg, num_gpus=args.num_gpus)
    _register(findings, cfg, args)
    evaluators = _check_data(findings, cfg, eval_only=args.eval_only, num_machines=args.num_machines)
    based_on = cfg.TRANSFER.TASK if args.val_data else ""
    weights = WeightsRecord("", None, None, {})
    departures: list[str] = []
    if not args.eval_only:
        weights = _check_training(findings, cfg, based_on=based_on, processes=processes)
        departures = departures_of(cfg, weights, unscaled)
        findings.take(check_earlier_run, cfg, resume=args.resume)
    cfg.freeze()
    return Prepared(
        cfg=cfg,
        weights=weights,
        transferred=transferred_parts(cfg, weights),
        num_gpus=0 if cfg.MODEL.DEVICE == "cpu" else processes,
        auto_scaled=batch_before != cfg.SOLVER.IMS_PER_BATCH,
        datasets={
            "train": [args.train_data] if args.train_data else list(cfg.DATASETS.TRAIN),
            "test": [args.val_data] if args.val_data else list(cfg.DATASETS.TEST),
        },
        based_on=based_on,
        settings=describe_settings(cfg, weights, based_on=based_on, processes=processes, evaluators=evaluators),
        departures=departures,
        notes=findings.notes,
        errors=findings.errors,
    )


def _register(findings: Findings, cfg: Any, args: argparse.Namespace) -> None:
    """Let the names of datasets mean what lies under --datasets-root, or the user's own data."""
    root = Path(args.datasets_root).expanduser()
    register_datasets(root)
    register_subsets(root, cfg.SEED)
    if cfg.TRANSFER.MAPPER == densepose.MAPPER:
        densepose.register_datasets(root)
        findings.take(densepose.check_geometry if args.check else _fetch_geometry)  # --check writes nothing
    findings.notes += use_user_datasets(cfg, args.train_data, args.val_data, eval_only=args.eval_only)


def _fetch_geometry() -> list[str]:
    paths = densepose.fetch_geometry()
    return [f"DensePose's {len(paths)} files of body geometry are in {Path(paths[0]).parent}."]


def _check_machine(findings: Findings, cfg: Any, args: argparse.Namespace) -> None:
    cuda_gpus = torch.cuda.device_count()
    needed = args.num_gpus if args.num_gpus > 1 or args.num_machines > 1 else 0
    if args.check and cuda_gpus < needed:
        # --check belongs on the login node too, which has no GPU.
        findings.notes.append(f"This machine has {cuda_gpus} CUDA devices; the one that trains needs {needed}.")
        cuda_gpus = needed
    findings.take(
        check_processes,
        cfg,
        num_gpus=args.num_gpus,
        num_machines=args.num_machines,
        cuda_gpus=cuda_gpus,
        eval_only=args.eval_only,
    )


def _check_data(findings: Findings, cfg: Any, *, eval_only: bool, num_machines: int) -> dict[str, str]:
    """Returns the evaluator_type of every test set."""
    train = () if eval_only else tuple(cfg.DATASETS.TRAIN)
    names = [*train, *cfg.DATASETS.TEST]
    if not cfg.DATASETS.TEST or not (train or eval_only):
        findings.errors.append("DATASETS.TRAIN or DATASETS.TEST is empty; name at least one dataset in each")
    findings.take(check_datasets, names)
    # check_datasets has refused the others, and asking for their metadata would make them exist.
    known = [name for name in names if name in DatasetCatalog]
    findings.take(check_model_available, cfg)
    findings.take(check_classes, cfg, known)
    findings.take(check_annotations, cfg, known)
    for name in cfg.DATASETS.TEST:
        if name in known:
            findings.take(check_evaluator, name)
            findings.take(check_machines, name, num_machines)
    findings.take(check_overlap, train, cfg.DATASETS.TEST)
    findings.take(count_voc0712, train)
    tested = [name for name in cfg.DATASETS.TEST if name in known]
    return {name: str(MetadataCatalog.get(name).get("evaluator_type")) for name in tested}


def _check_training(findings: Findings, cfg: Any, *, based_on: str, processes: int) -> WeightsRecord:
    """Returns the record of the weights."""
    # The recipe's numbers hold for the user's own data as well, so they are taken before the task's name goes.
    weights = _check_weights(findings, cfg, has_task=bool(cfg.TRANSFER.TASK) and not based_on)
    published = published_of(cfg, weights)
    findings.take(check_schedule, cfg, published)
    findings.take(check_batch, cfg, published, processes)
    if based_on:
        cfg.TRANSFER.TASK = ""
        findings.notes.append(
            f"On data of your own the results are those of no published task; the recipe is {based_on}'s."
        )
    _check_network(findings, cfg, weights, processes)
    findings.take(check_task_is_meant, cfg, weights)
    return weights


def _check_weights(findings: Findings, cfg: Any, *, has_task: bool) -> WeightsRecord:
    findings.take(check_init, cfg)
    try:
        weights = read_record(cfg.MODEL.WEIGHTS)
    except (ValueError, FileNotFoundError) as error:
        findings.errors.append(str(error))
        return WeightsRecord(cfg.MODEL.WEIGHTS, None, None, {})
    findings.take(check_preprocess, cfg, weights)
    findings.take(check_weights_file, cfg, has_task=has_task)
    findings.take(check_pretrained_parts, cfg, weights)
    return weights


def _check_network(findings: Findings, cfg: Any, weights: WeightsRecord, processes: int) -> None:
    findings.take(check_depth, cfg, weights)
    findings.take(check_pixel_statistics, cfg, weights)
    findings.take(check_norms, cfg, processes)
    for check in (check_frozen_layers, check_extra_norm, check_precise_bn, check_parts):
        findings.take(check, cfg)
