"""Runs `detco-pretrain` with the toy method of toy_run.py, in this process or in processes of its own."""

import importlib.util
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from detco.methods import METHODS
from detco.views.photo import decode
from pretrain.__main__ import main
from pretrain.images import list_images
from pretrain.proposals.columns import ImageProposals, stack
from pretrain.proposals.folder import ProposalFolder

REPOSITORY = Path(__file__).parents[2]
TOY_SCRIPT = Path(__file__).with_name("toy_run.py")

# 24 images in batches of 6 are 4 steps per epoch: 8 steps.
TOY_OPTIONS = {
    "METHOD.NAME": "toy",
    "SOLVER.BATCH_SIZE_TOTAL": "6",
    "SOLVER.EPOCHS": "2",
    "SOLVER.REFERENCE_BATCH_SIZE": "6",
    "SOLVER.PRECISION": "fp32",
    "DATA.NUM_WORKERS": "0",
    "CHECKPOINT.SAVE_EVERY_MINUTES": "0",
    "LOG.EVERY_STEPS": "2",
}


class Ended(NamedTuple):
    """How a run ended: exit codes of the ranks, and what all of them wrote."""

    codes: list[int]
    stdout: str
    stderr: str

    @property
    def code(self) -> int:
        return self.codes[0]


def _words(photo_dir: Path, output_dir: Path, flags: tuple[str, ...], options: dict[str, str]) -> list[str]:
    pairs = {"DATA.ROOT": str(photo_dir)} | TOY_OPTIONS | options
    return [
        "--num-gpus",
        "0",
        "--output-dir",
        str(output_dir),
        *flags,
        *(word for pair in pairs.items() for word in pair),
    ]


@pytest.fixture
def _toy_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("toy_run", TOY_SCRIPT)
    assert spec
    assert spec.loader
    sys.modules["toy_run"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["toy_run"])
    monkeypatch.setitem(METHODS, "toy", sys.modules["toy_run"].Toy)


@pytest.fixture
def one_thread_and_quiet_logs() -> Iterator[None]:
    """Sums depend on the number of threads; and the program replaces pytest's log handlers by its own."""
    root, threads = logging.getLogger(), torch.get_num_threads()
    handlers, level = list(root.handlers), root.level
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def run_here(
    photo_dir: Path,
    _toy_registered: None,
    one_thread_and_quiet_logs: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Ended]:
    """`run_here(output_dir, *flags, trouble="", **{"SECTION.KEY": value})`: one process, this one."""

    def run(output_dir: Path, *flags: str, trouble: str = "", **options: str) -> Ended:
        monkeypatch.setenv("TOY_TROUBLE", trouble or "none@9")
        code = main(_words(photo_dir, output_dir, flags, options))
        return Ended([code], *capsys.readouterr())

    return run


@pytest.fixture
def run_there(photo_dir: Path) -> Callable[..., Ended]:
    """As `run_here`, in `world_size` processes of their own, as torchrun starts them; trouble on `trouble_on` alone."""

    def run(
        output_dir: Path, *flags: str, world_size: int = 1, trouble: str = "", trouble_on: int = 0, **options: str
    ) -> Ended:
        command = [sys.executable, str(TOY_SCRIPT), *_words(photo_dir, output_dir, flags, options)]
        port = _free_port()
        processes = []
        for rank in range(world_size):
            environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
            if world_size > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            if trouble and rank == trouble_on:
                environment["TOY_TROUBLE"] = trouble
            pipe = subprocess.PIPE
            processes.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
        outputs = [process.communicate(timeout=300) for process in processes]
        stdout, stderr = ("".join(texts) for texts in zip(*outputs, strict=True))
        return Ended([process.returncode for process in processes], stdout, stderr)

    return run


@pytest.fixture
def make_proposals(tmp_path: Path) -> Callable[..., Path]:
    """`make_proposals(images, name, grow=0)`: a store for a folder of images, made without any search.

    Image i has the boxes of its left and its right half, the left one found i + 1 times. Files that cannot be read
    have size 0. `grow` px are added to all sizes, as if the images had been replaced since.
    """

    def make(photos: Path, name: str = "proposals", *, grow: int = 0) -> Path:
        images = list_images(photos)
        rows = []
        for index in range(len(images)):
            try:
                height, width = decode(images.path(index).read_bytes()).shape[1:]
            except ValueError:
                height, width = 0, 0
            middle = max(width // 2, 1)
            boxes = np.array([[0, 0, middle, height], [middle, 0, width, height]], dtype=np.uint16)
            whole = boxes[boxes[:, 2] > boxes[:, 0]]
            times = np.array([index + 1, 1], dtype=np.int32)[: len(whole)]
            rows.append(ImageProposals(width + grow, height + grow, whole, times, stage=0))
        folder = ProposalFolder(tmp_path / name, {"images": {"digest": images.digest, "count": len(images)}})
        folder.claim()
        return folder.write_store(stack(rows)).path

    return make


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
