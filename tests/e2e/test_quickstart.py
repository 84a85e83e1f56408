"""The quickstart's own behaviour: what it runs, what it skips, how it fails and how it is interrupted."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "tools/quickstart.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quickstart", module)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def stage_that(quickstart: ModuleType, code: str, result: Path) -> object:
    return quickstart.Stage("a stage", result, ("-c", code))


def test_it_takes_every_method_to_every_task_and_all_its_configs_exist(quickstart: ModuleType, tmp_path: Path) -> None:
    stages = quickstart.plan(tmp_path, num_gpus=0)
    transfers = [stage for stage in stages if "transfer.train_net" in stage.command]
    assert len(transfers) == len(quickstart.TASKS) * (len(quickstart.METHODS) + 1)
    for stage in stages:
        if "--config-file" in stage.command:
            assert (ROOT / stage.command[stage.command.index("--config-file") + 1]).is_file()


def test_every_stage_uses_what_an_earlier_one_makes(quickstart: ModuleType, tmp_path: Path) -> None:
    made: set[str] = set()
    for stage in quickstart.plan(tmp_path, num_gpus=0):
        for word in stage.command:
            if word.endswith((".pkl", ".safetensors")) and Path(word) != stage.result:
                assert word in made
        made.add(str(stage.result))


def test_finished_stages_are_skipped_and_the_others_run(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished, missing = tmp_path / "finished", tmp_path / "missing"
    finished.touch()
    stages = [
        stage_that(quickstart, "raise SystemExit('ran again')", finished),
        stage_that(quickstart, f"open({str(missing)!r}, 'w')", missing),
    ]
    monkeypatch.setattr(quickstart, "plan", lambda out, num_gpus: stages)
    monkeypatch.setattr(quickstart, "print_table", lambda out: None)
    assert quickstart.main(["--output-dir", str(tmp_path)]) == 0
    assert missing.exists()
    assert "done before" in capsys.readouterr().out


def test_a_failing_stage_stops_the_chain_with_its_last_lines_and_its_log(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [
        stage_that(quickstart, "print('the reason'); raise SystemExit(7)", tmp_path / "never"),
        stage_that(quickstart, f"open({str(tmp_path / 'later')!r}, 'w')", tmp_path / "later"),
    ]
    monkeypatch.setattr(quickstart, "plan", lambda out, num_gpus: stages)
    assert quickstart.main(["--output-dir", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "exit code 7" in printed
    assert "the reason" in printed
    assert "the reason" in (tmp_path / "logs/a_stage.txt").read_text()
    assert not (tmp_path / "later").exists()


@pytest.mark.e2e
def test_interrupted_it_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/quickstart.py"), "--output-dir", str(tmp_path)]
    # A session of its own: like a terminal, the signal goes to the whole foreground group.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "drawing" in line:
            os.killpg(process.pid, signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 130
    assert "go on from here" in rest
