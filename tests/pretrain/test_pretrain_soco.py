"""SoCo as a user runs it, small: from images and proposals to an artifact, interrupted after its first step."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detco.artifact import read_artifact
from detco.methods import METHODS
from pretrain.proposals.store import ProposalStore

QUICK = Path(__file__).parents[2] / "configs/pretrain/quick"
# 8 images in batches of 4 are 2 steps; warm-up lies within the first.
SMALL = {
    "METHOD.HIDDEN": "16",
    "VIEWS.VIEW_SIZE": "32",
    "VIEWS.NUM_BOXES": "1",
    "SOLVER.BATCH_SIZE_TOTAL": "4",
    "SOLVER.REFERENCE_BATCH_SIZE": "4",
    "SOLVER.EPOCHS": "1",
    "CHECKPOINT.SAVE_EVERY_MINUTES": "60",
    "LOG.EVERY_STEPS": "1",
}
PARTS = {"backbone": "layer4.2.conv3.weight", "fpn": "lateral_convs.3.conv.weight", "box_head": "fc1.weight"}
PAIRS = {
    "soco_c4": {"crop"},
    "soco_fpn": {"crop", "small"},
    "soco_fpn_star": {"crop", "small", "medium"},
}


@pytest.fixture
def eight_photos(photo_dir: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "eight"
    folder.mkdir()
    for photo in sorted(photo_dir.iterdir())[:8]:
        shutil.copy(photo, folder)
    return folder


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(("method", "pairs"), PAIRS.items())
def test_soco_resumes_bit_equal_and_exports_what_a_detector_takes(
    method: str,
    pairs: set[str],
    run_here: Callable[..., Any],
    make_proposals: Callable[..., Path],
    eight_photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)  # files that are thrown away need not reach the disk
    store = make_proposals(eight_photos)
    options = SMALL | {"METHOD.NAME": method, "DATA.ROOT": str(eight_photos), "DATA.PROPOSALS": str(store)}

    def run(output_dir: str, *flags: str) -> Any:
        return run_here(tmp_path / output_dir, "--config-file", str(QUICK / f"{method}.yaml"), *flags, **options)

    whole = run("whole")
    assert whole.code == 0, whole.stderr
    with monkeypatch.context() as patch:
        original = METHODS[method].before_step

        def stopped(method: Any, progress: float) -> None:
            original(method, progress)
            os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(METHODS[method], "before_step", stopped)
        assert run("cut").code == 143
    resumed = run("cut", "--resume")
    assert resumed.code == 0, resumed.stderr
    assert "resumed at step 1 of 2" in resumed.stdout

    assert_equal_checkpoints(*(tmp_path / run / "checkpoints/step_00000002.pth" for run in ("whole", "cut")))
    lines = [json.loads(line) for line in (tmp_path / "cut/metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == [0.01, 1.0], "warm-up of half an epoch, which is one step"
    assert {key for key in lines[-1] if "/" in key} == {
        f"{f}/{p}" for f in ("loss_pair", "embedding_std") for p in pairs
    }
    assert all(line[f"embedding_std/{pair}"] > 0 for line in lines for pair in pairs)

    artifact = read_artifact(tmp_path / "cut/model.safetensors")
    assert artifact.parts.keys() == ({"backbone"} if method == "soco_c4" else PARTS.keys())
    trained = torch.load(tmp_path / "cut/checkpoints/step_00000002.pth", weights_only=True, mmap=True)["model"]
    for role, part in artifact.parts.items():
        name = PARTS[role]
        assert torch.equal(part[name], trained[f"online.{role}.{name}"])
        assert not torch.equal(part[name], trained[f"target.{role}.{name}"])
    assert artifact.provenance["dataset"]["proposals"] == ProposalStore.open(store).digest


def assert_equal_checkpoints(left_file: Path, right_file: Path) -> None:
    left, right = (torch.load(file, weights_only=True, mmap=True) for file in (left_file, right_file))
    assert left["model"].keys() == right["model"].keys()
    for key, tensor in left["model"].items():
        assert torch.equal(tensor, right["model"][key]), key
    assert left["optimizer"]["param_groups"] == right["optimizer"]["param_groups"]
    for index, state in left["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], right["optimizer"]["state"][index]["momentum_buffer"])


def test_a_dry_run_says_what_is_asked_of_it(
    run_here: Callable[..., Any], make_proposals: Callable[..., Path], eight_photos: Path, tmp_path: Path
) -> None:
    options = SMALL | {"METHOD.NAME": "soco_fpn_star", "DATA.ROOT": str(eight_photos), "SOLVER.ACCUMULATE_STEPS": "2"}
    flags = ("--dry-run", "--config-file", str(QUICK / "soco_fpn_star.yaml"))
    refused = run_here(tmp_path / "run", *flags, **options)
    assert (refused.code, "METHOD.NAME soco_fpn_star draws its views around objects" in refused.stderr) == (2, True)
    shown = run_here(tmp_path / "run", *flags, **options, **{"DATA.PROPOSALS": str(make_proposals(eight_photos))})
    assert shown.code == 0, shown.stderr
    for words in (
        "warm-up of SOLVER.WARMUP_EPOCHS 0.5, every step, from lr 0.01; at the end lr 1e-06",
        "SOLVER.ACCUMULATE_STEPS 2: each process runs its images of a step as 2 micro-batches of 2. A departure",
        "OPTIMIZER: lars",
        "proposals: ",
    ):
        assert words in shown.stdout
    assert not (tmp_path / "run").exists()
