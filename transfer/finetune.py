"""One transfer run: training, evaluation, results.json. What train_net starts on every rank."""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path

from transfer import d2
from transfer.checks.findings import WARNING
from transfer.checks.protocol import departure_notes
from transfer.config import config_digest
from transfer.run_record import RunRecord, Schedule, label_of, metric_names, with_heads, write_results
from transfer.settings_check import Prepared, prepare
from transfer.subsets import describe_subsets
from transfer.tasks import load_tasks
from transfer.trainer import TransferTrainer, load_detector

d2.require()

from detectron2.engine import default_setup  # noqa: E402
from detectron2.utils import comm  # noqa: E402
from detectron2.utils.logger import setup_logger  # noqa: E402

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> None:
    """Train and evaluate, or only evaluate. Collective: runs on every rank.

    An evaluation writes into the folder `evaluation` of the run directory: what it wrote beside a run's own files would
    replace its config.yaml, which a later --resume reads, and its predictions.

    Raises:
        ValueError: As `prepare`, if weights do not fill the backbone, and if OUTPUT_DIR is not shared by all machines.
        FileNotFoundError: As `prepare`.
    """
    prepared = prepare(args)
    cfg = prepared.cfg
    run_dir = Path(cfg.OUTPUT_DIR)
    if args.eval_only:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = str(run_dir / "evaluation")
        cfg.freeze()
    comm.synchronize()  # all have read an earlier run's config.yaml before rank 0 writes this run's
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="transfer")  # ours into the same log.txt
    logger.info(prepared.settings)
    for note in [*prepared.notes, *departure_notes(cfg.TRANSFER.TASK, prepared.departures)]:
        logger.log(logging.WARNING if note.startswith(WARNING) else logging.INFO, note.removeprefix(WARNING))
    if args.eval_only:
        model = TransferTrainer.build_model(cfg)
        load_detector(model, cfg, run_dir=run_dir if args.resume else None)
        TransferTrainer.test(cfg, model)
        return
    trainer = TransferTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()
    if comm.is_main_process():
        record = build_record(prepared, trainer.last_metrics(), trainer.seconds / 3600)
        path = write_results(Path(cfg.OUTPUT_DIR), record)
        logger.info("%s: %s. Written to %s", record.label, summarize(record.metrics), path)


def build_record(prepared: Prepared, scalars: Mapping[str, float], hours: float) -> RunRecord:
    """What results.json will say about a finished run."""
    cfg = prepared.cfg
    task = load_tasks().get(cfg.TRANSFER.TASK or prepared.based_on)
    metrics, installed = metric_names(scalars), d2.require()
    heads = [name for name, on in (("mask", cfg.MODEL.MASK_ON), ("keypoint", cfg.MODEL.KEYPOINT_ON)) if on]
    return RunRecord(
        task=task.id if task and not prepared.based_on else "",
        based_on=prepared.based_on,
        recipe=task.recipe if task else "",
        label=label_of(cfg.TRANSFER.LABEL, cfg.TRANSFER.INIT, prepared.weights),
        weights=prepared.weights,
        transferred=prepared.transferred,
        metrics=with_heads(metrics, *heads),
        departures=prepared.departures,
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


def summarize(metrics: Mapping[str, float | None]) -> str:
    """The metrics that papers report, in one line, per cent."""
    main = {name: value for name, value in metrics.items() if name.endswith(("_AP", "_AP50", "_AP75", "mIoU"))}
    return ", ".join(f"{name} {'-' if value is None else f'{value:.1f}'}" for name, value in main.items())
