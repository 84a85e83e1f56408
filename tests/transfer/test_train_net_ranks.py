import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from transfer import d2, train_net

pytestmark = [pytest.mark.d2, pytest.mark.dist]
needs_d2 = pytest.mark.skipif(d2.info() is None, reason="needs Detectron2 (python tools/install_detectron2.py)")


def _means_after_step(rank: int, world_size: int, iteration: int, period: int) -> list[float]:
    from transfer.trainer import EqualBuffers  # imports Detectron2, which may be missing where tests are collected

    model = torch.nn.BatchNorm1d(2)
    model.running_mean.fill_(10.0 + rank)
    hook = EqualBuffers(period)
    hook.trainer = SimpleNamespace(iter=iteration, max_iter=10, model=model)
    hook.after_step()
    return model.running_mean.tolist()


@needs_d2
def test_all_ranks_evaluate_with_the_statistics_that_rank_0_saves(run_distributed: Any) -> None:
    assert run_distributed(_means_after_step, 2, 9, 0) == [[10.0, 10.0], [10.0, 10.0]]


def _last_checkpoints(rank: int, world_size: int, cases: list[list[str]], blind_in: str) -> list[str]:
    from transfer.trainer import DetectionCheckpointer, FolderNotShared, last_checkpoint

    found = [last_checkpoint(DetectionCheckpointer(torch.nn.Linear(1, 1), folders[rank])) for folders in cases]
    if rank == 1:  # another machine: the same path, not the same folder
        Path.is_file = lambda path: False  # type: ignore[method-assign, assignment]
    try:
        last_checkpoint(DetectionCheckpointer(torch.nn.Linear(1, 1), blind_in))
    except FolderNotShared as error:
        found.append(str(error))
    return found


@needs_d2
def test_rank_0_decides_what_is_resumed_and_all_must_see_it(run_distributed: Any, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
    torch.save({}, run / "model_0000001.pth")
    (run / "last_checkpoint").write_text("model_0000001.pth")
    # In the second and third case one rank's tag is stale: what rank 0 sees holds for both.
    cases = [[str(run), str(run)], [str(run), str(other)], [str(other), str(run)]]
    ranks = run_distributed(_last_checkpoints, 2, cases, str(run))
    path = str(run / "model_0000001.pth")
    for *found, refusal in ranks:
        assert found == [path, path, ""]
        assert refusal.startswith(f"OUTPUT_DIR must be shared by all machines: rank 0 resumes from {path}")
        assert refusal.endswith("no file on rank 1")


def _rank_main(rank: int, rendezvous: str, fn: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    fn(*args)


@needs_d2
def test_wrong_weights_are_one_line_on_several_processes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], photo_dir: Path
) -> None:
    def launch(fn: Callable[..., None], num_gpus: int, *, args: tuple[Any, ...], **rest: Any) -> None:
        # What Detectron2's does where there are two GPUs; 0.5's needs them.
        mp.spawn(_rank_main, args=(str(tmp_path / "rendezvous"), fn, args), nprocs=2, join=True)

    monkeypatch.setattr("detectron2.engine.launch", launch)
    size = dict(zip(("width", "height"), Image.open(photo_dir / "photo_000.jpg").size, strict=True))
    content = {
        "images": [{"id": 1, "file_name": "photo_000.jpg", **size}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "shape"}],
    }
    (tmp_path / "val.json").write_text(json.dumps(content))
    weights = tmp_path / "no_detector.pkl"
    weights.write_bytes(pickle.dumps({"model": {"anything": np.zeros(3)}, "__author__": "test"}))
    config = Path(__file__).parents[2] / "configs/transfer/quick/coco_retinanet_random.yaml"
    data = ["--val-data", f"{tmp_path}/val.json:{photo_dir}", "--num-gpus", "0"]
    argv = ["--config-file", str(config), "--eval-only", *data, "--output-dir", str(tmp_path / "run")]
    assert train_net.main([*argv, "MODEL.WEIGHTS", str(weights)]) == 2
    printed = capfd.readouterr().err
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {weights} is not a trained detector of this config")
    assert "Traceback" not in printed


def test_other_failures_of_a_process_keep_their_traceback() -> None:
    trace = "-- Process 1 terminated with the following error:\nTraceback (most recent call last):\n  x\n"
    assert train_net.message_in(f"{trace}RuntimeError: CUDA\n", (OSError,)) is None
    assert train_net.message_in(f"{trace}builtins.OSError: one\ntwo\n", (OSError,)) == "one\ntwo"
