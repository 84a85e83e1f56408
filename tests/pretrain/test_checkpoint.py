"""A checkpoint folder after kills, bit flips and full disks."""

import multiprocessing
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import CheckpointError, CheckpointFolder, load_model, own_buffers, read
from pretrain.launch import World

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def content(value: float) -> dict[str, Any]:
    return {"model": {"weight": torch.full((1000,), value)}, "config": "SEED: 0\n"}


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep_last=2)
    folder.save(1, content(1.0))
    folder.save(2, content(2.0))
    return folder


def test_what_was_saved_is_read(folder: CheckpointFolder) -> None:
    newest = folder.newest_intact()
    assert newest == folder.file(2)
    saved = read(newest)
    assert (saved["format"], saved["schema"], saved["step"]) == ("detco-checkpoint", 1, 2)
    assert torch.equal(saved["model"]["weight"], torch.full((1000,), 2.0))


def test_the_last_k_are_kept(folder: CheckpointFolder) -> None:
    folder.save(30, content(3.0))
    assert folder.steps() == [2, 30]
    assert len(list(folder.path.iterdir())) == 4, "two checkpoints with their digests"


def test_the_digest_file_is_one_that_sha256sum_checks(folder: CheckpointFolder) -> None:
    subprocess.run(["sha256sum", "-c", "step_00000002.pth.sha256"], cwd=folder.path, check=True, capture_output=True)


@pytest.mark.parametrize("how", ["truncate", "flip", "no digest", "empty"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    folder: CheckpointFolder, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = folder.file(2)
    data = bytearray(newest.read_bytes())
    if how == "truncate":
        newest.write_bytes(data[: len(data) // 2])
    elif how == "flip":
        data[random.Random(0).randrange(len(data))] ^= 1
        newest.write_bytes(data)
    elif how == "empty":
        newest.write_bytes(b"")
    else:
        newest.with_name(f"{newest.name}.sha256").unlink()

    with caplog.at_level("WARNING"):
        assert folder.newest_intact() == folder.file(1)

    assert "step_00000002.pth is damaged" in caplog.text
    assert folder.steps() == [1]
    assert (folder.path / "step_00000002.pth.damaged").exists(), "nothing is deleted"


def test_any_flipped_byte_is_found(folder: CheckpointFolder) -> None:
    whole = folder.file(2).read_bytes()
    for offset in random.Random(1).sample(range(len(whole)), 100):
        data = bytearray(whole)
        data[offset] ^= 0x40
        folder.file(2).write_bytes(data)
        assert folder.newest_intact() == folder.file(1)
        (folder.path / "step_00000002.pth.damaged").replace(folder.file(2))
    folder.file(2).write_bytes(whole)
    assert folder.newest_intact() == folder.file(2)


def test_a_folder_with_damaged_checkpoints_only_is_refused_again_and_again(folder: CheckpointFolder) -> None:
    for step in folder.steps():
        folder.file(step).write_bytes(b"")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is intact .*choose another --output-dir"):
            folder.newest_intact()


def test_an_absent_or_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path / "absent", 1).newest_intact() is None
    assert CheckpointFolder(tmp_path, 1).newest_intact() is None


def test_a_failed_save_leaves_the_older_ones_and_no_litter(folder: CheckpointFolder) -> None:
    before = sorted(folder.path.iterdir())

    class DiskFull:
        def __reduce__(self) -> Any:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        folder.save(3, {"model": {"first": torch.zeros(10**6), "second": DiskFull()}})
    assert sorted(folder.path.iterdir()) == before
    assert folder.newest_intact() == folder.file(2)


def _save_for_ever(path: Path) -> None:
    folder = CheckpointFolder(path, keep_last=2)
    for step in range(3, 10**6):
        folder.save(step, content(float(step)))


def test_a_kill_during_a_save_leaves_a_readable_checkpoint(folder: CheckpointFolder) -> None:
    # Forked: a fresh process would import torch for seconds each time. Nothing in it uses threads.
    context = multiprocessing.get_context("fork")
    waits = random.Random(2)
    littered = 0
    for _ in range(20):
        process = context.Process(target=_save_for_ever, args=(folder.path,))
        process.start()
        time.sleep(0.05 + 0.05 * waits.random())
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        littered += bool(list(folder.path.glob(".*.partial")))

        newest = folder.newest_intact()

        assert newest is not None
        assert not list(folder.path.glob("*.damaged"))
        assert not list(folder.path.glob(".*.partial")), "leftovers are cleared"
        saved = read(newest)
        assert torch.equal(saved["model"]["weight"], torch.full((1000,), float(saved["step"])))  # or the first two
    assert littered, "no kill fell into a save: this test proved nothing"


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="is not a training checkpoint"):
        read(tmp_path / "other.pth")


def test_loading_is_strict() -> None:
    module = torch.nn.BatchNorm1d(2)
    state = module.state_dict()
    state["extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"(?s)does not fit this version of the code.*extra"):
        load_model(module, state, {})


def test_buffers_of_a_rank_come_after_those_of_rank_0() -> None:
    module = torch.nn.BatchNorm1d(2)
    load_model(module, module.state_dict(), {"running_mean": torch.tensor([5.0, 6.0])})
    assert module.running_mean is not None
    assert module.running_mean.tolist() == [5.0, 6.0]
    assert own_buffers(module, ALONE) == {}
