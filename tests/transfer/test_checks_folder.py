"""The run directory of an earlier run, whole or as a kill left it."""

from pathlib import Path
from typing import Any

import pytest

from transfer import d2

if d2.info() is None:
    pytest.skip("needs Detectron2 (python tools/install_detectron2.py)", allow_module_level=True)

from transfer.checks.folder import check_earlier_run
from transfer.config import load_config

pytestmark = pytest.mark.d2

CONFIG = Path(__file__).parents[2] / "configs/transfer/quick/coco_retinanet_converted.yaml"


def started_from(folder: Path, weights: str, *more: str) -> Any:
    cfg = load_config(str(CONFIG), ["MODEL.WEIGHTS", weights, *more])
    cfg.OUTPUT_DIR = str(folder)
    return cfg


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run from /a/w.pkl that was killed after its first checkpoint."""
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    (tmp_path / "config.yaml").write_text(started_from(tmp_path, "/a/w.pkl").dump())
    return tmp_path


def test_the_same_run_is_resumed_without_a_note(folder: Path) -> None:
    assert check_earlier_run(started_from(folder, "/a/w.pkl"), resume=True) == []


def test_other_values_are_noted_and_other_weights_refused(folder: Path) -> None:
    (note,) = check_earlier_run(started_from(folder, "/a/w.pkl", "SOLVER.MAX_ITER", "7"), resume=True)
    assert "resuming with SOLVER.MAX_ITER 7; it was" in note
    for weights in ("/a/v.pkl", ""):
        with pytest.raises(ValueError, match="is a run that started from /a/w"):
            check_earlier_run(started_from(folder, weights), resume=True)


def test_a_config_cut_short_anywhere_counts_as_none(folder: Path) -> None:
    whole = (folder / "config.yaml").read_text()
    for kept in [0, 1, *range(2, whole.index("VERSION"), len(whole) // 20), whole.index("VERSION")]:
        (folder / "config.yaml").write_text(whole[:kept])
        (note,) = check_earlier_run(started_from(folder, "/b/other.pkl"), resume=True)
        assert note.startswith("WARNING: ")
        assert "was cut short by a kill" in note
    (folder / "config.yaml").unlink()
    (note,) = check_earlier_run(started_from(folder, "/a/w.pkl"), resume=True)
    assert "is missing" in note


def test_another_spelling_of_the_weights_is_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pkl").touch()
    (tmp_path / "link.pkl").symlink_to("w.pkl")
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    (tmp_path / "config.yaml").write_text(started_from(tmp_path, "w.pkl").dump())
    for weights in ("./w.pkl", str(tmp_path / "w.pkl"), "link.pkl"):
        assert check_earlier_run(started_from(tmp_path, weights), resume=True) == []
    with pytest.raises(ValueError, match="started from"):
        check_earlier_run(started_from(tmp_path, "sub/w.pkl"), resume=True)
