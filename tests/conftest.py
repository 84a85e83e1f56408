"""Fixtures every test may use: real gloo processes, small real JPEGs."""

import importlib.util
import multiprocessing
import random
import sys
import tempfile
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image, ImageDraw
from torchvision.models.resnet import ResNet

TOOLS = Path(__file__).parents[1] / "tools"
PHOTO_COUNT = 24
PRELOADED_MODULES = ["pytest", "torch", "torchvision", "detco.methods", "pretrain.run", "pretrain.proposals.search"]
PRELOADED_MODULES += ["skimage.feature", "skimage.segmentation"]
"""What the fork server imports once: for gloo processes, and for the search for proposals, whose server it is too."""


def _process_main(rank: int, world_size: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        torch.save(fn(rank, world_size, *args), Path(folder) / f"result_{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def run_distributed() -> Callable[..., list[Any]]:
    """`run_distributed(fn, world_size, *args)` runs a module-level fn(rank, world_size, *args) in real gloo processes.

    Returns the results of all ranks, rank 0 first; an exception in any process fails the test with its traceback.
    The processes are forked from a server that has imported torch and has run nothing: as good as new, and seconds
    sooner there. Their environment is that of the first start.
    """
    multiprocessing.set_forkserver_preload(PRELOADED_MODULES)

    def run(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
        with tempfile.TemporaryDirectory() as folder:
            options = {"nprocs": world_size, "start_method": "forkserver"}
            mp.start_processes(_process_main, args=(world_size, folder, fn, args), **options)
            return [torch.load(Path(folder) / f"result_{rank}.pt", weights_only=False) for rank in range(world_size)]

    return run


def draw_photo(seed: int) -> Image.Image:
    """A small scene of coloured shapes, different for each seed."""
    rng = random.Random(seed)
    size = (rng.randrange(96, 161), rng.randrange(96, 161))
    photo = Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
    pen = ImageDraw.Draw(photo)
    for _ in range(12):
        x, y = rng.randrange(size[0]), rng.randrange(size[1])
        box = (x, y, x + rng.randrange(8, 60), y + rng.randrange(8, 60))
        colour = tuple(rng.randrange(256) for _ in range(3))
        (pen.ellipse if rng.random() < 0.5 else pen.rectangle)(box, fill=colour)
    return photo


@pytest.fixture(scope="session")
def photo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of 24 JPEGs. Read only: copy it before changing anything."""
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(PHOTO_COUNT):
        draw_photo(seed).save(folder / f"photo_{seed:03d}.jpg", quality=90)
    return folder


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """SoCo's networks in a tenth of the time: all layers, but narrow ones, and boxes pooled to fewer cells for res5."""
    monkeypatch.setattr(ResNet, "__init__", partialmethod(ResNet.__init__, width_per_group=8))
    monkeypatch.setattr("detco.models.fpn.WIDTH", 16)
    monkeypatch.setattr("detco.models.box_head.WIDTH", 16)
    monkeypatch.setattr("detco.models.object_encoder.C4_CELLS", 4)


@pytest.fixture(scope="session")
def load_tool() -> Callable[[str], ModuleType]:
    """`load_tool(name)` is the module tools/<name>.py, which lies in no package."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(TOOLS))  # where a script finds the modules beside it
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(TOOLS))
        return module

    return load
