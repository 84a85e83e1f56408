"""What cannot be run is refused before any work, with exit code 2 and a message that says what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.__main__ import main


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"DATA.ROOT": ""}, "set DATA.ROOT to a folder of images"),
        ({"DATA.ROOT": "/nowhere/at/all"}, "DATA.ROOT /nowhere/at/all does not exist"),
        ({"SOLVER.BATCH_SIZE_TOTAL": "36", "METHOD.QUEUE_SIZE": "36"}, "24 images do not fill one batch of"),
        ({"METHOD.QUEUE_SIZE": "13"}, "queue_size 13 is not a multiple of 6"),
        ({"SOLVER.LR": "1"}, "unknown config key SOLVER.LR; did you mean SOLVER.BASE_LR?"),
        ({"VIEWS.SIZE": "big"}, "VIEWS.SIZE is 'big'; it must be an integer"),
    ],
)
def test_refusals(run_here: Callable[..., Any], tmp_path: Path, options: dict[str, str], message: str) -> None:
    refused = run_here(tmp_path / "run", **options)
    assert refused.code == 2
    assert refused.stderr.startswith("error: ")
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists(), "nothing was written"


def test_an_empty_folder_is_refused(run_here: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused = run_here(tmp_path / "run", **{"DATA.ROOT": str(tmp_path / "empty")})
    assert refused.code == 2
    assert "no images in" in refused.stderr


def test_detco_refuses_a_queue_that_the_batch_does_not_divide(
    photo_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread_and_quiet_logs: None
) -> None:
    options = ["METHOD.QUEUE_SIZE", "10", "SOLVER.BATCH_SIZE_TOTAL", "4", "METHOD.BN_GROUP", "4"]
    code = main(["--num-gpus", "0", "--output-dir", str(tmp_path), "DATA.ROOT", str(photo_dir), *options])
    assert code == 2
    message = capsys.readouterr().err
    assert "10" in message
    assert "4" in message
    assert "multiple" in message


def test_a_directory_with_a_run_is_not_overwritten(run_here: Callable[..., Any], tmp_path: Path) -> None:
    assert run_here(tmp_path).code == 0
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    refused = run_here(tmp_path)
    assert refused.code == 2
    assert "already holds a run: add --resume, or choose another --output-dir" in refused.stderr
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()} == before


def test_an_output_directory_is_asked_for(
    photo_dir: Path, capsys: pytest.CaptureFixture[str], one_thread_and_quiet_logs: None
) -> None:
    assert main(["--num-gpus", "0", "DATA.ROOT", str(photo_dir), "SOLVER.BATCH_SIZE_TOTAL", "8"]) == 2
    assert "give --output-dir" in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_writes_nothing(run_here: Callable[..., Any], tmp_path: Path) -> None:
    shown = run_here(tmp_path / "run", "--dry-run", **{"SOLVER.REFERENCE_BATCH_SIZE": "256"})
    assert shown.code == 0
    assert "24 images, 2 epochs of 4 steps = 8 steps of 6 images on 1 CPU process(es)" in shown.stdout
    assert "lr 0.000703125 = SOLVER.BASE_LR 0.03 * batch 6 / SOLVER.REFERENCE_BATCH_SIZE 256" in shown.stdout
    assert "BASE_LR: 0.03" in shown.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.dist
def test_a_batch_that_does_not_divide_among_the_processes_is_refused_by_all(
    run_there: Callable[..., Any], tmp_path: Path
) -> None:
    refused = run_there(tmp_path / "run", world_size=2, **{"SOLVER.BATCH_SIZE_TOTAL": "3"})
    assert refused.codes == [2, 2]
    assert refused.stderr.count("error: ") == 1
    assert "SOLVER.BATCH_SIZE_TOTAL 3 does not divide among 2 processes; make it a multiple of 2" in refused.stderr
