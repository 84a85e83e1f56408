"""`tools/benchmark_gpu.sh`: no part takes the others with it, and the table comes last. A script stands for Python."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "benchmark_gpu.sh"
FIGURE = '{"figure": "%s", "method": "%s", "name": "%s", "value": 1.0, "unit": "x", "min": 1.0, "max": 1.0, "runs": 1, '
FIGURE += '"machine": "A", "torch": "2", "date": "2026-01-01", "bar": "%s"}'

STAND_IN = f"""#!/bin/sh
echo "$*" >> "$(dirname "$0")/commands"
case "$*" in
    *tools/benchmark.py*) exec {sys.executable} "$@" ;;
    *benchmark_step.py*) echo '{FIGURE % ("S1", "detco", "step / bound", "<= 1.15")}'; sleep 60 ;;
    *"--methods detco --parts train"*) echo 'on the way'; echo trouble >&2; exit 3 ;;
    *"--methods moco_v2 --parts train"*) echo '{FIGURE % ("E1", "moco_v2", "E1 / min(E2, E3)", ">= 0.95")}' ;;
    *importlib.metadata*installed_one*) exit 0 ;;
    *importlib.metadata*) exit 1 ;;
esac
"""


@pytest.fixture
def run_script(tmp_path):
    """`run_script(*words, **environment)` with a stand-in for Python: what it printed, the results, the commands."""
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    results = tmp_path / "results"

    def run(*words, **environment):
        done = subprocess.run(
            ["bash", SCRIPT, "--small", results, *words],
            env={**os.environ, "PYTHON": str(stand_in), **environment},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=120,
        )
        return done.stdout, results, (tmp_path / "commands").read_text().splitlines()

    return run


def rows_of(table, what, method):
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return [cells for cells in lines if cells[0].startswith(what) and cells[1] == method and len(cells) == 5]


def test_a_part_that_fails_or_hangs_costs_its_own_figures_only(run_script):
    printed, results, commands = run_script(PARTS="detco moco_v2 step start", TOTAL_S="14")
    table = (results / "table.md").read_text()
    assert table in printed
    assert printed.rstrip().splitlines()[-1].endswith(f"figures, table and log are in {results}")
    assert printed.rstrip().splitlines()[-2].startswith("| growth of a loader worker")

    assert len((results / "figures.jsonl").read_text().splitlines()) == 3
    assert rows_of(table, "S1 step / its bound, CPU", "detco")[0][4] == "pass"  # said before it hung
    assert rows_of(table, "S1 step / its bound, CPU", "moco_v2")[0][4].startswith("not measured: step was ended after")
    assert rows_of(table, "E1 / min", "moco_v2")[0][4] == "pass"
    assert rows_of(table, "E1 / min", "detco")[0][4].startswith("not measured: detco failed with exit code 3")
    assert "trouble" in (results / "log.txt").read_text()
    assert rows_of(table, "start to", "all")[0][4] == "not measured: start no time was left"
    assert not [command for command in commands if "--parts start" in command]


def test_only_what_is_missing_is_installed_and_never_torch(run_script, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("torch", "torchvision", "nvidia_nccl_cu13", "triton", "installed_one", "missing_one"):
        (wheels / f"{name}-1.0-py3-none-any.whl").touch()
    printed, _, commands = run_script(wheels, PARTS="views", TOTAL_S="1040")
    assert "views, at most 120 s" in printed, "twice the time for all is twice the time for each"
    (pip,) = [command for command in commands if "-m pip install" in command]
    assert pip.endswith("missing_one-1.0-py3-none-any.whl")
    assert "--no-index --no-deps" in pip


@pytest.mark.parametrize(
    ("words", "environment", "reason"),
    [
        (["--smal"], {}, "there is no option --smal"),
        (["a", "b", "c"], {}, "more words than RESULTS and WHEELS: a b c"),
        (["{out}", "{out}/wheels"], {}, "there is no folder .*wheels of wheels"),
        (["{out}"], {"PARTS": "detco steps"}, "PARTS has steps, which is none of: tests detco"),
        (["{out}"], {"TOTAL_S": "9m"}, "TOTAL_S is 9m"),
        (["{out}"], {"PYTHON": "no_such_python"}, "there is no program no_such_python: set PYTHON"),
    ],
)
def test_wrong_words_are_refused_before_any_work(words, environment, reason, tmp_path):
    words = [word.format(out=tmp_path / "out") for word in words]
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    done = subprocess.run(["bash", SCRIPT, *words], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(f"error: .*{reason}.*--help\n", done.stderr)
    assert not list(tmp_path.iterdir())


def test_help_tells_all_parts_and_variables(tmp_path):
    done = subprocess.run(["bash", SCRIPT, "--help"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert all(word in done.stdout for word in ("--small", "RESULTS", "WHEELS", "PYTHON", "PARTS", "TOTAL_S"))
    assert "set -u" not in done.stdout
    assert not list(tmp_path.iterdir())


def test_it_is_bash_without_mistakes():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
