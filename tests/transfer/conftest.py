"""Finished runs written by hand and the tables that `detco-results` makes of them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from transfer.results.cli import main
from transfer.results.paper_layout import build_paper_table
from transfer.results.paper_tables import load_paper_tables
from transfer.results.reference import load_reference
from transfer.results.repeats import group_repeats
from transfer.results.runs import find_runs
from transfer.results.table import Table


def _write_run(
    folder: Path,
    metrics: dict[str, float],
    *,
    task: str = "voc0712_fasterrcnn_c4_24k",
    recipe: str = "c4_extra_norm",
    label: str = "ours",
    method: str = "moco_v2",
    epochs: int = 200,
    path: str = "weights.pkl",
    seed: int = 0,
    departures: Sequence[str] = (),
    **provenance: Any,
) -> None:
    options = {"rand_augment": False, **provenance}
    known = {"method": method, "epochs": epochs, "dataset": {"images": 1281167}, "view_options": options}
    content = {
        "schema": 1,
        "task": task,
        "recipe": recipe,
        "label": label,
        "weights": {"path": path, "sha256": None if "://" in path or not path else "ab" * 32, "provenance": known},
        "metrics": metrics,
        "departures": list(departures),
        "schedule": {"iterations": 48000, "batch_size": 8, "base_lr": 0.01, "num_gpus": 4, "auto_scaled": True},
        "datasets": {"train": ["voc_2007_trainval"], "test": ["voc_2007_test"]},
        "config_digest": "d1",
        "seed": seed,
        "versions": {"detectron2": "0.6"},
        "hardware": "4x V100",
        "hours": 6.0,
        "finished": "2026-01-01T00:00:00Z",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content))


@pytest.fixture(scope="session")
def write_run() -> Callable[..., None]:
    """`write_run(folder, metrics, **changes)` writes results.json of a run on VOC; unknown names are view options."""
    return _write_run


@pytest.fixture(scope="session")
def paper_table() -> Callable[..., Table]:
    """`paper_table(id, folder, **options)` is a paper's table with the runs below the folder."""

    def build(name: str, folder: Path, **options: bool) -> Table:
        measurements, _ = group_repeats(find_runs([folder])[0])
        return build_paper_table(load_paper_tables()[name], load_reference(), measurements, **options)

    return build


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`printed(*arguments)` is the standard output of `detco-results`, which must succeed."""

    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    return run
