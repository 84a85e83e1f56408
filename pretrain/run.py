"""One pretraining run, from a config to an artifact. The only module that reads the config."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from fvcore.common.config import CfgNode

from detco.artifact import open_atomically
from detco.methods.base import Method
from detco.views.base import ViewRecipe
from pretrain import config
from pretrain.checkpoint import CheckpointError, CheckpointFolder, load_model, own_buffers, read
from pretrain.compile import choose_compiler, compile_trunks, compiled
from pretrain.data import BadSampleLog, BatchSampler, build_loader
from pretrain.export import export_artifact, reestimate_bn
from pretrain.images import ImageList, list_images
from pretrain.launch import DONE, RefusalError, StopRequest, World, agree, from_first, gather
from pretrain.manifest import git_commit, hardware, versions, write_manifest
from pretrain.metrics import Reporter
from pretrain.optim import build_optimizer, lr_schedule, scaled_lr
from pretrain.proposals.store import ProposalStore
from pretrain.proposals.wanted import check_proposals_wanted, open_proposals_of
from pretrain.trainer import Plan, Trainer

logger = logging.getLogger(__name__)

ARTIFACT_NAME = "model.safetensors"


@dataclass(frozen=True)
class _Run:
    """What is known before any work, the same on every rank."""

    cfg: CfgNode
    method: Method
    recipe: ViewRecipe[Any, Any]
    images: ImageList
    proposals: ProposalStore | None
    proposals_digest: str | None  # kept here, because it costs a pass over the file
    plan: Plan
    is_compiled: bool
    directory: Path

    @property
    def checkpoints(self) -> CheckpointFolder:
        return CheckpointFolder(self.directory / "checkpoints", self.cfg.CHECKPOINT.KEEP_LAST)


def pretrain(world: World, cfg: CfgNode, resume: bool, dry_run: bool) -> int:
    """Train `cfg`; the target of `pretrain.launch.launch`. Collective.

    Args:
        world: This process.
        cfg: Frozen.
        resume: Continue what `cfg.OUTPUT_DIR` holds.
        dry_run: Check everything, print the plan and stop.

    Returns:
        0 when finished, 128 + signal when a signal stopped the run after a save.

    Raises:
        RefusalError: Before any work, on every rank.
        RunFailedError: When the run cannot go on.
    """
    directory = Path(cfg.OUTPUT_DIR)
    if not dry_run and from_first(lambda: _is_finished(directory, cfg, resume), world):
        logger.info("this run is finished: %s", directory / ARTIFACT_NAME)
        return DONE
    run = _prepare(world, cfg, directory)
    _announce(run, world, in_full=dry_run)
    if dry_run:
        return DONE
    newest = from_first(lambda: run.checkpoints.newest_intact(), world) if resume else None
    saved = agree(lambda: _read_for(run, newest), world) if newest else None
    if resume and not saved:
        logger.warning("--resume: %s holds no checkpoint, so this starts from scratch", directory)
    from_first(lambda: _claim(run, world, saved["step"] if saved else 0), world)
    return _train_and_export(run, world, saved)


def _is_finished(directory: Path, cfg: CfgNode, resume: bool) -> bool:
    """Refuse a directory that the user did not mean to continue; say whether there is nothing left to do."""
    if not cfg.OUTPUT_DIR:
        raise ValueError("no run directory: give --output-dir")
    written = directory / "config.yaml"
    if not resume:
        if written.exists():
            raise ValueError(f"{directory} already holds a run: add --resume, or choose another --output-dir")
        return False
    if not (directory / ARTIFACT_NAME).exists():
        return False
    _refuse_differences(config.differences(written.read_text(encoding="utf-8"), cfg), directory)
    return True


def _refuse_differences(differences: list[str], source: Path) -> None:
    if differences:
        raise ValueError(
            f"{source} was trained with another config, so it cannot be resumed with this one: "
            f"{'; '.join(differences)}. Undo the change, or choose another --output-dir"
        )


def _prepare(world: World, cfg: CfgNode, directory: Path) -> _Run:
    """Build everything whose building can refuse, cheapest first."""
    batch = cfg.SOLVER.BATCH_SIZE_TOTAL
    if len(set(gather(config.digest(cfg), world))) > 1:
        # Each would draw other random numbers, begin with other weights or wait for the others for ever.
        raise RefusalError("the processes were started with different configs; give all the same file and options")

    def build() -> tuple[ViewRecipe[Any, Any], Method]:
        micro_batch = _micro_batch(batch, world.size, cfg.SOLVER.ACCUMULATE_STEPS)
        recipe = config.build_recipe(cfg)
        torch.manual_seed(cfg.SEED)
        method = config.build_method(cfg)
        method.check_batch(micro_batch)
        return recipe, method

    recipe, method = agree(build, world)
    data = cfg.DATA
    agree(
        lambda: check_proposals_wanted(data.PROPOSALS, recipe, method=cfg.METHOD.NAME, root=data.ROOT),
        world,
    )
    images = agree(lambda: list_images(cfg.DATA.ROOT), world, first_alone=True)
    if len(set(gather(images.digest, world))) > 1:
        raise RefusalError(f"the processes see different images under DATA.ROOT {cfg.DATA.ROOT}; copy the same to all")
    steps_per_epoch = agree(
        lambda: BatchSampler(len(images), batch, world.rank, world.size, cfg.SEED, 0, 0).steps_per_epoch, world
    )
    proposals = agree(lambda: open_proposals_of(data.PROPOSALS, images, root=data.ROOT), world)
    proposals_digest = agree(lambda: proposals.digest if proposals else None, world)
    if len(set(gather(proposals_digest, world))) > 1:
        raise RefusalError(
            f"the processes see different proposals under DATA.PROPOSALS {cfg.DATA.PROPOSALS}; copy the same to all"
        )
    plan = agree(lambda: _plan(cfg, steps_per_epoch), world)
    is_compiled = choose_compiler(cfg.SOLVER.COMPILE, world)
    return _Run(cfg, method, recipe, images, proposals, proposals_digest, plan, is_compiled, directory)


def _micro_batch(batch_size_total: int, world_size: int, accumulate_steps: int) -> int:
    """Images of one forward pass of one process; refuse what does not divide."""
    pieces = world_size * accumulate_steps
    if batch_size_total % pieces:
        each = f" with SOLVER.ACCUMULATE_STEPS {accumulate_steps} each" if accumulate_steps > 1 else ""
        raise ValueError(
            f"SOLVER.BATCH_SIZE_TOTAL {batch_size_total} does not divide among {world_size} processes{each}; "
            f"make it a multiple of {pieces}"
        )
    return batch_size_total // pieces


def _plan(cfg: CfgNode, steps_per_epoch: int) -> Plan:
    """Turn the SOLVER section into numbers of this run; refuse a warm-up or a final lr that does not fit."""
    solver = cfg.SOLVER
    lr = scaled_lr(solver.BASE_LR, solver.BATCH_SIZE_TOTAL, solver.REFERENCE_BATCH_SIZE)
    if lr < solver.FINAL_LR:
        raise ValueError(f"SOLVER.FINAL_LR {solver.FINAL_LR:g} is above the peak lr {lr:g}; lower it")
    return Plan(
        seed=cfg.SEED,
        total_steps=steps_per_epoch * solver.EPOCHS,
        steps_per_epoch=steps_per_epoch,
        batch_size_total=solver.BATCH_SIZE_TOTAL,
        accumulate_steps=solver.ACCUMULATE_STEPS,
        lr=lr,
        lr_schedule=lr_schedule(
            solver.SCHEDULE,
            solver.SCHEDULE_UNIT,
            solver.EPOCHS,
            warmup_epochs=solver.WARMUP_EPOCHS,
            warmup_start=solver.WARMUP_START,
            final_factor=solver.FINAL_LR / lr if lr else 0.0,
        ),
        autocast_bf16=solver.PRECISION == "bf16",
        log_every_steps=cfg.LOG.EVERY_STEPS,
        save_every_minutes=cfg.CHECKPOINT.SAVE_EVERY_MINUTES,
    )


def _announce(run: _Run, world: World, *, in_full: bool) -> None:
    solver, plan = run.cfg.SOLVER, run.plan
    if in_full:
        logger.info("resolved config:\n%s", run.cfg.dump())
    where = "GPU" if world.device.type == "cuda" else "CPU"
    logger.info(
        "%s: %s images, %s epochs of %s steps = %s steps of %s images on %s %s process(es)",
        *(run.cfg.METHOD.NAME, f"{len(run.images):,}", solver.EPOCHS, plan.steps_per_epoch, plan.total_steps),
        *(plan.batch_size_total, world.size, where),
    )
    logger.info(
        "lr %g = SOLVER.BASE_LR %g * batch %s / SOLVER.REFERENCE_BATCH_SIZE %s; %s, moved every %s",
        *(plan.lr, solver.BASE_LR, plan.batch_size_total, solver.REFERENCE_BATCH_SIZE),
        *(solver.SCHEDULE, solver.SCHEDULE_UNIT),
    )
    if solver.WARMUP_EPOCHS:
        logger.info(
            "warm-up of SOLVER.WARMUP_EPOCHS %g, every step, from lr %g; at the end lr %g",
            *(solver.WARMUP_EPOCHS, plan.lr * solver.WARMUP_START, solver.FINAL_LR),
        )
    if plan.accumulate_steps > 1:
        micro_batch = _micro_batch(plan.batch_size_total, world.size, plan.accumulate_steps)
        logger.info(
            "SOLVER.ACCUMULATE_STEPS %s: each process runs its images of a step as %s micro-batches of %s. A departure "
            "from one batch: BatchNorm sees one micro-batch (of all processes where it is synchronised)",
            *(plan.accumulate_steps, plan.accumulate_steps, micro_batch),
        )
    if run.proposals_digest:
        logger.info("proposals: %s, sha256 %s", run.cfg.DATA.PROPOSALS, run.proposals_digest)


def _read_for(run: _Run, file: Path) -> dict[str, Any]:
    """Read a checkpoint and refuse it if it is of another config, other images or other proposals."""
    saved = read(file)
    _refuse_differences(config.differences(saved["config"], run.cfg), file)
    dataset = saved["provenance"]["dataset"]
    if dataset["digest"] != run.images.digest:
        raise CheckpointError(
            f"{file} was trained on {dataset['images']:,} images of {dataset['root']}, but DATA.ROOT "
            f"{run.cfg.DATA.ROOT} lists {len(run.images):,} and not the same names: use the same images, or another "
            f"--output-dir"
        )
    if dataset.get("proposals") != run.proposals_digest:  # absent in checkpoints from before there were any
        raise CheckpointError(
            f"{file} was trained with the proposals of sha256 {dataset.get('proposals')}, but DATA.PROPOSALS "
            f"{run.cfg.DATA.PROPOSALS} has {run.proposals_digest}: use the same file, or another --output-dir"
        )
    return saved


def _claim(run: _Run, world: World, step: int) -> None:
    """Make the run directory and write what is known at the start."""
    run.directory.mkdir(parents=True, exist_ok=True)
    resolved = run.cfg.dump()
    with open_atomically(run.directory / "config.yaml") as stream:
        stream.write(resolved.encode())
    record = {
        "config": yaml.safe_load(resolved),
        "config_digest": config.digest(run.cfg),
        "commit": git_commit(),
        "versions": versions(),
        "hardware": hardware(world.device),
        "seed": run.cfg.SEED,
        "world_size": world.size,
    }
    write_manifest(run.directory / "manifest.json", record, step=step)


def _train_and_export(run: _Run, world: World, saved: dict[str, Any] | None) -> int:
    solver, plan = run.cfg.SOLVER, run.plan
    start_step = saved["step"] if saved else 0
    memory_format = torch.channels_last if solver.CHANNELS_LAST else torch.preserve_format
    run.method.to(world.device, memory_format=memory_format)  # type: ignore[call-overload]  # absent from torch's stubs
    optimizer = build_optimizer(
        solver.OPTIMIZER,
        run.method,
        lr=plan.lr,
        momentum=solver.MOMENTUM,
        weight_decay=solver.WEIGHT_DECAY,
        trust_coefficient=solver.TRUST_COEFFICIENT,
    )
    bad_samples = BadSampleLog(run.directory / "bad_samples.jsonl", len(run.images))
    render = _compile(run, world) if run.is_compiled else run.recipe.render
    trainer = Trainer(run.method, render, optimizer, plan, world, bad_samples)
    if saved:
        agree(lambda: _restore(trainer, saved, world), world)
        logger.info("resumed at step %s of %s", start_step, plan.total_steps)

    reporter = None
    if world.rank == 0:
        reporter = Reporter(run.directory, start_step=start_step, total_steps=plan.total_steps)
    with StopRequest() as stop:
        number = trainer.run(
            _loader(run, world, start_step, plan.total_steps),
            start_step=start_step,
            save=lambda step: _save(run, world, trainer, step),
            reporter=reporter,
            stop=stop,
        )
    if reporter:
        reporter.close()
    if number:
        logger.warning("stopped by signal %s after a save; --resume continues", number)
        return 128 + number
    if solver.PRECISE_BN_ITERS:
        batches = _loader(run, world, 0, solver.PRECISE_BN_ITERS)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=plan.autocast_bf16):
            reestimate_bn(run.method, run.recipe, batches, solver.PRECISE_BN_ITERS, world.device)
    if world.rank == 0:
        artifact = run.directory / ARTIFACT_NAME
        export_artifact(artifact, run.method, run.recipe.preprocess, _provenance(run, plan.total_steps))
        logger.info("finished: %s", artifact)
    return DONE


def _compile(run: _Run, world: World) -> Callable[[Any], Any]:
    """Compile what can be, and return the views' device half."""
    num_stages = compile_trunks(run.method, world, falls_back=run.cfg.SOLVER.COMPILE == "auto")
    logger.info(
        "compiling the views and %s stages of trunks: the first steps take minutes (SOLVER.COMPILE off starts at once)",
        num_stages,
    )
    return compiled(run.recipe.render)


def _loader(run: _Run, world: World, start_step: int, total_steps: int) -> Any:
    return build_loader(
        run.images,
        run.recipe,
        proposals=run.proposals,
        batch_size_total=run.plan.batch_size_total,
        rank=world.rank,
        world_size=world.size,
        seed=run.plan.seed,
        start_step=start_step,
        total_steps=total_steps,
        num_workers=run.cfg.DATA.NUM_WORKERS,
    )


def _save(run: _Run, world: World, trainer: Trainer, step: int) -> None:
    """Write what a resume needs. Collective; rank 0 writes."""
    mine = {"buffers": own_buffers(run.method, world), "window": trainer.window.state_dict()}
    of_ranks = gather(mine, world)
    if world.rank:
        return
    run.checkpoints.save(
        step,
        {
            "model": run.method.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "ranks": of_ranks,
            "config": run.cfg.dump(),
            "config_digest": config.digest(run.cfg),
            "preprocess": run.recipe.preprocess.as_dict(),
            "transfer_parts": dict(run.method.transfer_parts),
            "provenance": _provenance(run, step),
        },
    )


def _restore(trainer: Trainer, saved: dict[str, Any], world: World) -> None:
    ranks = saved["ranks"]
    if len(ranks) != world.size:
        logger.warning(
            "the checkpoint is of %s process(es) and this run has %s: all take the BatchNorm statistics of rank 0, "
            "and the interval of the next report is not complete",
            *(len(ranks), world.size),
        )
    mine = ranks[world.rank] if len(ranks) == world.size else {"buffers": {}, "window": trainer.window.state_dict()}
    load_model(trainer.method, saved["model"], mine["buffers"])
    trainer.optimizer.load_state_dict(saved["optimizer"])
    trainer.window.load_state_dict(mine["window"])
    trainer.last_saved_step = saved["step"]


def _provenance(run: _Run, step: int) -> dict[str, Any]:
    """Where weights of `step` come from, as JSON."""
    return {
        "method": run.cfg.METHOD.NAME,
        "method_options": _plain(config.method_options(run.cfg)),
        "view_options": _plain(config.view_options(run.cfg)),
        "epochs": step / run.plan.steps_per_epoch,
        "steps": step,
        "images_seen": step * run.plan.batch_size_total,
        "seed": run.plan.seed,
        "commit": git_commit(),
        "config_digest": config.digest(run.cfg),
        "dataset": {
            "root": str(run.images.root),
            "images": len(run.images),
            "digest": run.images.digest,
            "proposals": run.proposals_digest,
        },
        "versions": versions(),
    }


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """The same with tuples as lists, as JSON has them."""
    return cast(dict[str, Any], yaml.safe_load(yaml.safe_dump(options)))
