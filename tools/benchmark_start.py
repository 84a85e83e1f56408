"""What long lists of images cost: the time until `detco-pretrain` begins its first step, and memory of a loader worker.

The lists repeat a few real files under names as long as ImageNet's, so that a million paths need no million files.
"""

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from multiprocessing import active_children
from pathlib import Path

# Run as a file, Python looks for packages beside it; those of the suite lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from benchmarking import summarise
from drawn_photos import draw_photo
from measured_run import config_of

from detco.views import MoCoRecipe
from pretrain.data import build_loader
from pretrain.images import ImageList, list_images

ROOT = Path(__file__).resolve().parents[1]
FIRST_STEP_BEGINS = "first batch after"
FIRST_STEP_DONE = "step 1/"
"""What `detco-pretrain` prints then, with LOG.EVERY_STEPS 1."""

PATHS_WITH_A_BAR = 1_300_000
"""Length of the list for which the start has a bar: ImageNet's."""

FILES = 16
MEMORY_WORKERS = 2
MEMORY_BATCH = 64
IMAGES_PX = 32
"""Side of the images and views of memory figures: the smaller, the more samples per second."""

FLAT_MB = 8
"""Growth of a worker that counts as none: what the allocator holds back goes up and down by some MB."""

GIVE_UP_S = 300


def write_listing(folder: Path, num_paths: int, photo: bytes) -> Path:
    """Make FILES files of a photo and a listing that names them over and over, `num_paths` in all."""
    names = [f"n{index:08d}/n{index:08d}_{index:05d}.JPEG" for index in range(FILES)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(photo)
    listing = folder / "images.txt"
    rounds, rest = divmod(num_paths, FILES)
    with listing.open("w") as file:
        everything = "".join(f"{name}\n" for name in names)
        for _ in range(rounds):
            file.write(everything)
        file.writelines(f"{name}\n" for name in names[:rest])
    an_hour_ago = time.time() - 3600  # a listing that has just been written is not cached
    os.utime(listing, (an_hour_ago, an_hour_ago))
    return listing


def measure_start(num_paths: int, scratch: Path, args: argparse.Namespace) -> None:
    """Print the time from starting `detco-pretrain` on a list of `num_paths` images to its first step.

    The first start reads the listing and leaves it in the cache; the others find it there: `args.rounds` of them for a
    length that has a bar, else one. The last one is followed to the end of its first step.

    Args:
        num_paths: Length of the list.
        scratch: An empty folder or one with other things, for files.
        args: Of benchmark_run.py.
    """
    folder = scratch / f"start_{num_paths}"
    listing = write_listing(folder, num_paths, draw_photo(500, 375, np.random.default_rng(0)))
    has_bar = num_paths == PATHS_WITH_A_BAR
    cold_s = start_once(listing, args, FIRST_STEP_BEGINS)[0]
    warm_s = [start_once(listing, args, FIRST_STEP_BEGINS)[0] for _ in range(args.rounds - 1 if has_bar else 0)]
    last_s, done_s = start_once(listing, args, FIRST_STEP_BEGINS, FIRST_STEP_DONE)
    what = f"{num_paths / 1e6:g} million paths, {args.workers} workers"
    for name, values, bar in (
        ("to the first step, warm cache", [*warm_s, last_s], "<= 10" if has_bar else None),
        ("to the end of the first step, warm cache", [done_s], None),
        ("to the first step, list read for the first time", [cold_s], None),
    ):
        method = args.methods[0]
        summarise(
            values, figure="start", method=method, name=f"{name}; {what}", unit="s", device=args.device, bar=bar
        ).print()
    shutil.rmtree(folder)


def start_once(listing: Path, args: argparse.Namespace, *words: str) -> list[float]:
    """Start `detco-pretrain` on a listing and end it when it has said all of `words`.

    Args:
        listing: The cache of its list is kept beside it.
        args: Of benchmark_run.py; the first of its methods.
        words: In the order in which they are said.

    Returns:
        Seconds from the start until each was said.

    Raises:
        RuntimeError: If the run ends before that, or takes too long.
    """
    output, config_file = listing.parent / "run", listing.parent / "config.yaml"
    config_file.write_text(config_of(args.methods[0], args).dump())
    command = [sys.executable, "-u", "-m", "pretrain", "--config-file", str(config_file), "--output-dir", str(output)]
    command += ["--num-gpus", "1" if args.device.type == "cuda" else "0"]
    command += ["DATA.ROOT", str(listing), "LOG.EVERY_STEPS", "1", "SOLVER.EPOCHS", "1"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "DETCO_CACHE": str(listing.parent / "cache")}
    said, times = [], []
    started = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        too_long = threading.Timer(GIVE_UP_S, process.kill)
        too_long.start()
        try:
            for line in process.stdout:
                said.append(line)
                if words[len(times)] in line:
                    times.append(time.perf_counter() - started)
                if len(times) == len(words):
                    return times
        finally:
            too_long.cancel()
            process.kill()  # its workers end with it, and there is nothing to save
            process.wait()
            shutil.rmtree(output, ignore_errors=True)
    raise RuntimeError(f"detco-pretrain did not say {words[len(times)]!r}, but:\n{''.join(said[-20:])}")


def measure_memory(num_paths: int, scratch: Path, args: argparse.Namespace) -> None:
    """Print the memory that each loader worker has for itself with a list of `num_paths`, and how much it grows.

    The views and images are tiny, so that an epoch's worth of samples goes by in a short time.

    Args:
        num_paths: Length of the list.
        scratch: For files.
        args: Of benchmark_run.py.
    """
    folder = scratch / f"memory_{num_paths}"
    listing = write_listing(folder, num_paths, draw_photo(IMAGES_PX, IMAGES_PX, np.random.default_rng(0)))
    images = list_images(listing, folder / "cache")
    early, late = worker_memory(images, args.samples)
    what = f"{num_paths / 1e6:g} million paths"
    over = f"{args.samples - args.samples // 4:,} samples"
    for name, value, bar in (
        (f"a worker's own; {what}", late, None),
        (f"growth of a worker over {over}; {what}", late - early, f"<= {FLAT_MB}"),
    ):
        summarise([value], figure="memory", name=name, unit="MB", device=args.device, bar=bar).print()
    shutil.rmtree(folder)


def worker_memory(images: ImageList, num_samples: int) -> tuple[float, float]:
    """MB that the largest loader worker has for itself after a quarter of the samples, and after all.

    Args:
        images: Small ones.
        num_samples: Read in all.
    """
    steps = max(num_samples // MEMORY_BATCH, 4 * MEMORY_WORKERS)
    loader = build_loader(
        images,
        MoCoRecipe(global_size=IMAGES_PX),
        batch_size_total=MEMORY_BATCH,
        rank=0,
        world_size=1,
        seed=0,
        start_step=0,
        total_steps=steps,
        num_workers=MEMORY_WORKERS,
    )
    earlier = set(active_children())
    early = late = 0.0
    for step, _ in enumerate(loader, start=1):
        if step == steps // 4:
            early = _largest_private_mb(earlier)
        if step == steps - 2 * MEMORY_WORKERS:  # workers end when there is nothing left to fetch
            late = _largest_private_mb(earlier)
    return early, late


def _largest_private_mb(without: set[object]) -> float:
    """Of the child processes of this one but those of `without`."""
    workers = [child for child in active_children() if child not in without]
    return max(_private_mb(worker.pid) for worker in workers if worker.pid)


def _private_mb(pid: int) -> float:
    """What a process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("Private_")]
    return sum(kilobytes) * 1024 / 1e6
