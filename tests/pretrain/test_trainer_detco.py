"""The real thing, small: DetCo on ResNet-50, interrupted in mid-epoch, as a user would run it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from detco.artifact import read_artifact

SMALL = {
    "METHOD.QUEUE_SIZE": "8",
    "METHOD.BN_GROUP": "2",
    "METHOD.HEAD_HIDDEN": "16",
    "VIEWS.GLOBAL_SIZE": "32",
    "VIEWS.LOCAL_SIZE": "72",
    "VIEWS.PATCH_SIZE": "24",  # with 16, oneDNN in bf16 makes NaN gradients in 3x3 convolutions of 1x1 maps
    "METHOD.NAME": "detco",
    "SOLVER.BATCH_SIZE_TOTAL": "8",
    "SOLVER.EPOCHS": "1",
    "SOLVER.PRECISION": "bf16",
    "LOG.EVERY_STEPS": "1",
}


def test_detco_resumes_bit_equal_and_exports_its_trunk(run_here: Callable[..., Any], tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_here(whole, **SMALL, **{"CHECKPOINT.SAVE_EVERY_MINUTES": "60"}).code == 0
    # As if killed after the second of three steps: what came later is gone.
    assert run_here(cut, **SMALL).code == 0
    (cut / "model.safetensors").unlink()
    (cut / "checkpoints/step_00000003.pth").unlink()

    assert run_here(cut, "--resume", **SMALL).code == 0

    left, right = (torch.load(run / "checkpoints/step_00000003.pth", weights_only=True) for run in (whole, cut))
    for name, tensor in left["model"].items():
        assert torch.equal(tensor, right["model"][name]), name
    for index, state in left["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], right["optimizer"]["state"][index]["momentum_buffer"])

    terms = {f"{kind}_{pair}/res{s}" for kind in ("loss", "top1") for pair in ("gg", "ll", "gl") for s in (2, 3, 4, 5)}
    last = json.loads((cut / "metrics.jsonl").read_text().splitlines()[-1])
    assert terms <= last.keys()

    backbone = read_artifact(cut / "model.safetensors").parts["backbone"]
    assert backbone["layer4.2.conv3.weight"].shape == (2048, 512, 1, 1)
    assert torch.equal(backbone["conv1.weight"], right["model"]["query.trunk.conv1.weight"])
