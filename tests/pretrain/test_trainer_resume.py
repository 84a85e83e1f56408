"""An interrupted run equals an uninterrupted one, bit for bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detco.artifact import read_artifact


def final_state(run_dir: Path) -> dict[str, Any]:
    newest = max((run_dir / "checkpoints").glob("step_*.pth"))
    saved = torch.load(newest, weights_only=True)
    return {key: saved[key] for key in ("step", "model", "optimizer", "ranks")}


def reports(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def assert_bit_equal(left: Any, right: Any, where: str = "") -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_bit_equal(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_bit_equal(*pair, f"{where}/{index}")
    else:
        assert left == right, where


def assert_same_run(run_dir: Path, reference: Path) -> None:
    assert_bit_equal(final_state(run_dir), final_state(reference))
    assert reports(run_dir) == reports(reference)


@pytest.fixture
def whole(run_here: Callable[..., Any], tmp_path: Path) -> Path:
    """An uninterrupted run."""
    assert run_here(tmp_path / "whole").code == 0
    return tmp_path / "whole"


def test_a_killed_and_resumed_run_is_bit_equal(run_there: Callable[..., Any], whole: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    assert run_there(cut, trouble="9@0.375").code == -9
    assert final_state(cut)["step"] == 3, "in the middle of an epoch"

    # Loader workers instead of none: their number changes nothing.
    resumed = run_there(cut, "--resume", **{"DATA.NUM_WORKERS": "2"})

    assert resumed.code == 0, resumed.stderr
    assert "resumed at step 3 of 8" in resumed.stdout
    assert_same_run(cut, whole)


def test_a_run_stopped_between_two_epochs_is_bit_equal(
    run_here: Callable[..., Any], whole: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    assert run_here(cut, trouble="15@0.375").code == 143
    assert final_state(cut)["step"] == 4, "at the end of an epoch"
    assert run_here(cut, "--resume").code == 0
    assert_same_run(cut, whole)


def test_steps_after_the_last_save_are_made_again_with_the_same_reports(
    run_here: Callable[..., Any], whole: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    rarely = {"CHECKPOINT.SAVE_EVERY_MINUTES": "60"}
    assert run_here(cut, trouble="15@0.25", **rarely).code == 143
    assert run_here(cut, "--resume", trouble="nan@0.75", **rarely).code == 1
    assert [report["step"] for report in reports(cut)] == [2, 4, 6]
    assert final_state(cut)["step"] == 3
    assert run_here(cut, "--resume", **rarely).code == 0
    assert_same_run(cut, whole)


@pytest.mark.parametrize(("number", "code"), [(15, 143), (2, 130), (10, 138)])
def test_a_signal_ends_the_run_after_a_save_with_128_plus_its_number(
    run_here: Callable[..., Any], tmp_path: Path, number: int, code: int
) -> None:
    stopped = run_here(tmp_path, trouble=f"{number}@0.25", **{"CHECKPOINT.SAVE_EVERY_MINUTES": "60"})
    assert stopped.code == code
    assert final_state(tmp_path)["step"] == 3, "the step that was under way is finished"
    assert f"stopped by signal {number} after a save" in stopped.stdout


def test_a_finished_run_says_so_and_exits_0(run_here: Callable[..., Any], whole: Path) -> None:
    before = (whole / "model.safetensors").stat().st_mtime_ns
    again = run_here(whole, "--resume")
    assert again.code == 0
    assert "this run is finished" in again.stdout
    assert (whole / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_killed_while_exporting_only_exports(run_here: Callable[..., Any], whole: Path) -> None:
    exported = read_artifact(whole / "model.safetensors")
    (whole / "model.safetensors").unlink()
    assert run_here(whole, "--resume").code == 0
    again = read_artifact(whole / "model.safetensors")
    assert (again.preprocess, again.provenance) == (exported.preprocess, exported.provenance)
    assert_bit_equal(again.parts, exported.parts)


def test_resume_without_a_checkpoint_starts_from_scratch_and_says_so(
    run_here: Callable[..., Any], tmp_path: Path
) -> None:
    finished = run_here(tmp_path, "--resume")
    assert finished.code == 0
    assert "holds no checkpoint, so this starts from scratch" in finished.stdout


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    run_here: Callable[..., Any], whole: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    run_here(cut, trouble="15@0.375")
    newest = cut / "checkpoints/step_00000004.pth"
    newest.write_bytes(newest.read_bytes()[:-100])

    resumed = run_here(cut, "--resume")

    assert resumed.code == 0
    assert "step_00000004.pth is damaged" in resumed.stdout
    assert "resumed at step 3 of 8" in resumed.stdout
    assert_same_run(cut, whole)


def test_a_change_that_matters_is_refused_with_both_values(run_here: Callable[..., Any], tmp_path: Path) -> None:
    run_here(tmp_path, trouble="15@0.25")
    refused = run_here(tmp_path, "--resume", **{"SOLVER.BASE_LR": "0.5", "LOG.EVERY_STEPS": "1"})
    assert refused.code == 2
    assert "SOLVER.BASE_LR: 0.03 in the checkpoint, 0.5 now" in refused.stderr
    assert "LOG.EVERY_STEPS" not in refused.stderr


def test_other_images_are_refused_on_resume_and_a_moved_folder_is_not(
    run_here: Callable[..., Any], photo_dir: Path, tmp_path: Path
) -> None:
    run_here(tmp_path / "run", trouble="15@0.25")
    moved = shutil.copytree(photo_dir, tmp_path / "moved")
    (moved / "photo_000.jpg").rename(moved / "renamed.jpg")
    refused = run_here(tmp_path / "run", "--resume", **{"DATA.ROOT": str(moved)})
    assert refused.code == 2
    assert "was trained on 24 images" in refused.stderr
    (moved / "renamed.jpg").rename(moved / "photo_000.jpg")
    assert run_here(tmp_path / "run", "--resume", **{"DATA.ROOT": str(moved)}).code == 0
