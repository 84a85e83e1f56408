"""The doctor: says what is broken instead of breaking."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from transfer import doctor
from transfer.doctor import BROKEN, LIMITED, OK, Check

ROOT = Path(__file__).parents[2]


def run_doctor(before: str = "", path: Path | None = None) -> tuple[int, dict[str, Any]]:
    code = f"import sys\n{before}\nfrom transfer import doctor\nsys.exit(doctor.main(['--json']))"
    inherited = [os.environ[key] for key in ("PYTHONPATH",) if key in os.environ]
    environment = {**os.environ, "PYTHONPATH": ":".join([*([str(path)] if path else []), str(ROOT), *inherited])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    report["checks"] = {check["name"]: check for check in report["checks"]}
    return done.returncode, report


def test_this_environment_is_examined_for_real() -> None:
    status, report = run_doctor()
    marks = {name: check["mark"] for name, check in report["checks"].items()}
    assert list(marks) == [name for name, _, _ in doctor.CHECKS]
    assert marks["torch"] in (OK, LIMITED)
    assert marks["torchvision"] == OK
    assert "nms and roi_align run on cpu" in report["checks"]["torchvision"]["text"]
    assert report["ok"] == (BROKEN not in marks.values())
    assert status == (0 if report["ok"] else 1)


def test_a_missing_torch_is_a_finding() -> None:
    status, report = run_doctor("sys.modules['torch'] = None")
    assert status == 1
    assert report["checks"]["torch"]["mark"] == BROKEN
    assert report["checks"]["torch"]["fix"] == "pip install torch torchvision"
    assert report["checks"]["machine"]["mark"] in (OK, LIMITED)


def test_a_torchvision_built_for_another_torch_is_a_finding_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    status, report = run_doctor(path=tmp_path)
    assert status == 1
    assert report["checks"]["torchvision"]["text"] == "RuntimeError: operator torchvision::nms does not exist"
    assert report["checks"]["torchvision"]["fix"] == doctor.REINSTALL_TORCH


def test_a_torch_that_kills_the_process_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os; os.abort()")
    status, report = run_doctor(path=tmp_path)
    assert status == 1
    assert list(report["checks"]) == ["Python", "torch"]
    assert report["checks"]["torch"]["text"].startswith("ends the process (signal SIGABRT)")


def test_a_missing_detectron2_names_the_installer() -> None:
    status, report = run_doctor("sys.modules['detectron2'] = None")
    assert status == 1
    assert report["checks"]["Detectron2"]["fix"] == "python tools/install_detectron2.py"


def test_the_text_lists_what_to_repair_in_order() -> None:
    text = doctor.report(
        [Check("a", OK, "1.0"), Check("b", BROKEN, "gone", "fix b"), Check("c", BROKEN, "bad", "fix c")]
    )
    lines = text.splitlines()
    assert lines[0].startswith("[ok] a")
    assert lines[1].startswith("[!!] b")
    assert [line.strip() for line in lines[-2:]] == ["fix b", "fix c"]
    assert "cannot run" in lines[3]


def test_something_limited_does_not_stop_the_main_job() -> None:
    assert "can run" in doctor.report([Check("a", LIMITED, "slow", "speed it up")])


def test_an_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "__version__", "2.7.1")
    assert doctor.check_torch().mark == BROKEN
