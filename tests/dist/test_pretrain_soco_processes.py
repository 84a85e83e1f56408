"""SoCo's training in two real gloo processes: the numbers of one process with all images, and refusals of both."""

import json
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models.resnet import ResNet

from detco.artifact import read_artifact
from detco.views.photo import decode
from pretrain.checkpoint import read
from pretrain.config import load_config
from pretrain.images import list_images
from pretrain.launch import RefusalError, World
from pretrain.proposals.columns import ImageProposals, stack
from pretrain.proposals.folder import ProposalFolder
from pretrain.run import pretrain

pytestmark = pytest.mark.dist

QUICK = Path(__file__).parents[2] / "configs/pretrain/quick/soco_c4.yaml"
# The only batch is all four photos. One step: a second one amplifies rounding.
OPTIONS = {
    "METHOD.HIDDEN": "16",
    "VIEWS.VIEW_SIZE": "32",
    "VIEWS.NUM_BOXES": "1",
    "SOLVER.BATCH_SIZE_TOTAL": "4",
    "SOLVER.EPOCHS": "1",
    "SOLVER.WARMUP_EPOCHS": "0",
    "CHECKPOINT.SAVE_EVERY_MINUTES": "60",
    "LOG.EVERY_STEPS": "1",
    "DATA.NUM_WORKERS": "0",
}


def make_store(listing: Path, out: Path, *, times: int) -> Path:
    """A store in which every image is one box around its middle, found `times` times."""
    images = list_images(listing)
    rows = []
    for index in range(len(images)):
        height, width = decode(images.path(index).read_bytes()).shape[1:]
        box = np.array([[width // 4, height // 4, 3 * width // 4, 3 * height // 4]], dtype=np.uint16)
        rows.append(ImageProposals(width, height, box, np.array([times], dtype=np.int32), stage=0))
    folder = ProposalFolder(out, {"images": {"digest": images.digest, "count": len(images)}})
    folder.claim()
    return folder.write_store(stack(rows)).path


def train(world: World, listing: Path, store: Path, output_dir: Path) -> str:
    """Run to the end, or return why it was refused."""
    named = {"DATA.ROOT": str(listing), "DATA.PROPOSALS": str(store), "OUTPUT_DIR": str(output_dir)}
    cfg = load_config(QUICK, [word for pair in (OPTIONS | named).items() for word in pair])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResNet, "__init__", partialmethod(ResNet.__init__, width_per_group=8))  # all layers, but narrow
        patch.setattr("detco.models.object_encoder.C4_CELLS", 4)
        patch.setattr("os.fsync", lambda file: None)  # files that are thrown away need not reach the disk
        try:
            return f"code {pretrain(world, cfg, False, False)}"
        except RefusalError as error:
            return f"refused: {error}"


def in_two_processes(rank: int, world_size: int, folder: str) -> list[str]:
    world, out = World(rank, world_size, rank, torch.device("cpu")), Path(folder)
    listing = out / "four.txt"
    other = out / ("proposals", "others")[rank] / "proposals.safetensors"
    absent = out / ("proposals", "nowhere")[rank] / "proposals.safetensors"
    stores = {"other": other, "absent": absent, "joint": out / "proposals"}
    return [train(world, listing, store, out / name) for name, store in stores.items()]


def test_two_processes_make_the_step_of_one_and_refuse_alike(
    run_distributed: Callable[..., list[Any]], photo_dir: Path, tmp_path: Path
) -> None:
    listing = tmp_path / "four.txt"
    listing.write_text("".join(f"{photo}\n" for photo in sorted(photo_dir.iterdir())[:4]))
    make_store(listing, tmp_path / "proposals", times=1)
    make_store(listing, tmp_path / "others", times=2)

    first, second = run_distributed(in_two_processes, 2, str(tmp_path))

    for of_rank in (first, second):
        assert of_rank[0].startswith("refused: the processes see different proposals")
        assert of_rank[1].startswith("refused: ")
        assert "does not exist" in of_rank[1], "on the rank that has them too"
        assert of_rank[2] == "code 0"

    assert train(World(0, 1, 0, torch.device("cpu")), listing, tmp_path / "proposals", tmp_path / "alone") == "code 0"
    joint, alone = (read(tmp_path / name / "checkpoints/step_00000001.pth") for name in ("joint", "alone"))
    of_joint, of_alone = (json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("joint", "alone"))
    assert of_joint["loss"] == pytest.approx(of_alone["loss"], abs=1e-4)
    assert read_artifact(tmp_path / "joint/model.safetensors").parts.keys() == {"backbone"}
    assert {key for key in of_joint if "/" in key} == {"loss_pair/crop", "embedding_std/crop"}
    assert joint["ranks"][1]["buffers"] == {}, "synchronised statistics are the same on all"
    for index, state in alone["optimizer"]["state"].items():
        wanted, found = (s["momentum_buffer"] for s in (state, joint["optimizer"]["state"][index]))
        assert (found - wanted).norm() <= 1e-2 * wanted.norm() + 1e-6, index
    for key, wanted in alone["model"].items():
        if "running" in key:
            assert (joint["model"][key] - wanted).norm() <= 1e-3 * wanted.norm() + 1e-6, key
