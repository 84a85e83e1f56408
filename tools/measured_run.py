"""What the benchmarks of whole runs measure: the real loader and trainer of a published config, over drawn files."""

import argparse
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

# Run as a file, Python looks for packages beside it; those of the suite lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "oracles"))

import numpy as np
import torch
from fvcore.common.config import CfgNode
from PIL import Image
from reference_views import reference_of
from torch.utils.data import DataLoader, Dataset, RandomSampler

from detco.methods import METHODS
from detco.schedules import constant
from detco.views.base import ProposalRecipe, ViewRecipe
from pretrain.bad_samples import BadSampleLog
from pretrain.compile import choose_compiler, compile_trunks, compiled
from pretrain.config import build_method, load_config, method_options, view_options
from pretrain.data import Batch, build_loader
from pretrain.images import ImageList, list_images
from pretrain.launch import World
from pretrain.optim import build_optimizer
from pretrain.proposals.columns import ImageProposals, stack
from pretrain.proposals.folder import ProposalFolder
from pretrain.proposals.store import ProposalStore
from pretrain.trainer import Plan, Trainer

ROOT = Path(__file__).resolve().parents[1]

WITHOUT_END = 10**9
"""Steps of a run that is measured: more than anybody waits for."""

BATCHES_OF_FILES = 4
"""Files in the folder, in batches."""

BOXES_PER_IMAGE = 20
"""As the search finds in ImageNet's photos."""

REFERENCE_BATCH = 32
"""Images: few, so that many batches arrive while the clock runs."""


def config_of(method: str, args: argparse.Namespace) -> CfgNode:
    """The published config of a method with the sizes of this measurement; those on the command line win.

    Args:
        method: A name of `detco.methods.METHODS`.
        args: With `batch_size`, `workers`, `device` and `overrides` (KEY, VALUE, KEY, ...).

    Raises:
        ValueError: If there is none for the method, a key is unknown, or its value of no use.
    """
    files = sorted((ROOT / "configs/pretrain").glob(f"{method}_r50_*ep.yaml"))
    if not files:
        raise ValueError(f"there is no configs/pretrain/{method}_r50_*ep.yaml: give another of --methods")
    sizes = {"SOLVER.BATCH_SIZE_TOTAL": args.batch_size, "DATA.NUM_WORKERS": args.workers}
    if args.device.type == "cpu":
        sizes["SOLVER.PRECISION"] = "fp32"
        if "BN_GROUP" in load_config(files[0]).METHOD:
            sizes |= {"METHOD.QUEUE_SIZE": 512 * args.batch_size, "METHOD.BN_GROUP": args.batch_size}
    return load_config(files[0], [*(str(word) for pair in sizes.items() for word in pair), *args.overrides])


def write_files(folder: Path, photos: Sequence[bytes], count: int) -> None:
    """Make files of these photos, `count` or as many as there are photos if that is more; the others are links."""
    folder.mkdir(parents=True)
    for index, photo in enumerate(photos):
        (folder / f"photo_{index:05d}.jpg").write_bytes(photo)
    for index in range(len(photos), count):
        (folder / f"photo_{index:05d}.jpg").hardlink_to(folder / f"photo_{index % len(photos):05d}.jpg")


def make_proposals(images: ImageList, folder: Path) -> ProposalStore:
    """A store of random boxes, each of a sixteenth to a sixth of its image; drawing from them costs what it costs.

    Args:
        images: What they are proposals of.
        folder: Where the store goes.
    """
    rng, rows = np.random.default_rng(0), []
    for index in range(len(images)):
        width, height = Image.open(BytesIO(images.read(index))).size
        corners = rng.uniform(0, 0.6, (BOXES_PER_IMAGE, 2))
        edges = np.concatenate([corners, corners + rng.uniform(0.25, 0.4, corners.shape)], axis=1)
        boxes = (edges * [width, height, width, height]).astype(np.uint16)
        rows.append(ImageProposals(width, height, boxes, np.ones(len(boxes), dtype=np.int32), stage=0))
    store = ProposalFolder(folder, {"images": {"digest": images.digest, "count": len(images)}})
    store.claim()
    return store.write_store(stack(rows))


def make_loader(cfg: CfgNode, recipe: ViewRecipe[Any, Any], images: ImageList, scratch: Path) -> DataLoader[Batch]:
    """The real loader, without end; proposals are made in `scratch` if the recipe wants some."""
    proposals = None
    if isinstance(recipe, ProposalRecipe):
        folder = scratch / "proposals"
        proposals = ProposalStore.open(folder) if folder.exists() else make_proposals(images, folder)
    return build_loader(
        images,
        recipe,
        proposals=proposals,
        batch_size_total=cfg.SOLVER.BATCH_SIZE_TOTAL,
        rank=0,
        world_size=1,
        seed=cfg.SEED,
        start_step=0,
        total_steps=WITHOUT_END,
        num_workers=cfg.DATA.NUM_WORKERS,
    )


def make_trainer(cfg: CfgNode, recipe: ViewRecipe[Any, Any], scratch: Path, device: torch.device) -> Trainer:
    """The real trainer, compiled as the config says. Its lr is 0, so that the weights cannot diverge."""
    solver = cfg.SOLVER
    torch.manual_seed(cfg.SEED)
    method = build_method(cfg)
    method.check_batch(solver.BATCH_SIZE_TOTAL // solver.ACCUMULATE_STEPS)
    memory_format = torch.channels_last if solver.CHANNELS_LAST else torch.preserve_format
    method.to(device, memory_format=memory_format)
    optimizer = build_optimizer(
        solver.OPTIMIZER,
        method,
        lr=0.0,
        momentum=solver.MOMENTUM,
        weight_decay=solver.WEIGHT_DECAY,
        trust_coefficient=solver.TRUST_COEFFICIENT,
    )
    plan = Plan(
        seed=cfg.SEED,
        total_steps=WITHOUT_END,
        steps_per_epoch=BATCHES_OF_FILES,
        batch_size_total=solver.BATCH_SIZE_TOTAL,
        accumulate_steps=solver.ACCUMULATE_STEPS,
        lr=0.0,
        lr_schedule=constant,
        autocast_bf16=solver.PRECISION == "bf16",
        log_every_steps=cfg.LOG.EVERY_STEPS,
        save_every_minutes=float(WITHOUT_END),
    )
    world, render = World(0, 1, 0, device), recipe.render
    if choose_compiler(solver.COMPILE, world):
        compile_trunks(method, world, falls_back=solver.COMPILE == "auto")
        render = compiled(render)
    bad_samples = BadSampleLog(scratch / "bad_samples.jsonl", WITHOUT_END)
    return Trainer(method, render, optimizer, plan, world, bad_samples)


class ReferenceDataset(Dataset[Any]):
    """The views of files as the pipeline makes them that others train with: Pillow and torchvision, in the worker."""

    def __init__(self, images: ImageList, recipe: ViewRecipe[Any, Any]) -> None:
        """Read `images` and make the views of `recipe`."""
        self._images = images
        self._make_views = reference_of(recipe)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Any:
        return self._make_views(self._images.read(index))


def make_reference_loader(cfg: CfgNode, images: ImageList, *, pin_memory: bool) -> DataLoader[Any]:
    """The reference pipeline with as many workers, without end."""
    options = view_options(cfg)
    if "cutout_prob" in options:
        options["cutout_prob"] = 0.0  # which the reference does not have, and so need not do
    recipe = METHODS[cfg.METHOD.NAME].recipe_for(**method_options(cfg))(**options)
    dataset = ReferenceDataset(images, recipe)
    return DataLoader(
        dataset,
        batch_size=REFERENCE_BATCH,
        sampler=RandomSampler(dataset, replacement=True, num_samples=WITHOUT_END),
        num_workers=cfg.DATA.NUM_WORKERS,
        pin_memory=pin_memory,
        worker_init_fn=_use_one_thread,
        multiprocessing_context="forkserver" if cfg.DATA.NUM_WORKERS else None,
    )


def _use_one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def photos_of(scratch: Path) -> ImageList:
    """The files that `write_files` made in `scratch`/photos."""
    return list_images(scratch / "photos", scratch / "cache")
