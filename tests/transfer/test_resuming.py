"""What a kill leaves of Detectron2's checkpoints, and what a resumed run makes of it."""

import itertools
from pathlib import Path

import pytest
import torch

from transfer.resuming import continued_seed, mend_last_checkpoint


def save(folder: Path, name: str, bytes_kept: int | None = None) -> None:
    torch.save({"model": {"weight": torch.zeros(64)}}, folder / name)
    if bytes_kept is not None:
        (folder / name).write_bytes((folder / name).read_bytes()[:bytes_kept])


def tag(folder: Path, name: str) -> Path:
    path = folder / "last_checkpoint"
    path.write_text(name)
    return path


def test_a_whole_checkpoint_is_left_alone(tmp_path: Path) -> None:
    save(tmp_path, "model_0000003.pth")
    path = tag(tmp_path, "model_0000003.pth")
    assert mend_last_checkpoint(tmp_path) == []
    assert path.read_text() == "model_0000003.pth"


@pytest.mark.parametrize("name", ["", "model_final.pth", "model_0000003.pth\n"])
def test_the_newest_whole_checkpoint_replaces_one_that_is_cut_short(tmp_path: Path, name: str) -> None:
    save(tmp_path, "model_0000001.pth")
    save(tmp_path, "model_0000003.pth", bytes_kept=700)
    path = tag(tmp_path, name)
    (note,) = mend_last_checkpoint(tmp_path)
    assert path.read_text() == "model_0000001.pth"
    assert "Going on from model_0000001.pth" in note


def test_without_a_whole_checkpoint_the_run_starts_over_and_says_so(tmp_path: Path) -> None:
    save(tmp_path, "model_final.pth", bytes_kept=10)
    path = tag(tmp_path, "model_final.pth")
    (note,) = mend_last_checkpoint(tmp_path)
    assert not path.exists()
    assert "starts over" in note


def test_a_new_run_has_nothing_to_mend(tmp_path: Path) -> None:
    assert mend_last_checkpoint(tmp_path) == []


def test_every_start_and_every_process_has_its_own_random_numbers() -> None:
    seeds = [continued_seed(*case) for case in itertools.product(range(3), (1, 2, 24000), range(4))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert continued_seed(0, 1, 0) == continued_seed(0, 1, 0)
