"""`tools/benchmark.py`: the table says of every bar whether it is reached, and why if nothing was measured."""

import json
import time
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(load_tool, monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return load_tool("benchmark")


@pytest.fixture
def figure(tool):
    def make(**changes):
        about = {"figure": "V2", "method": "detco", "name": "ours / reference", "value": 7.0, "unit": "x"}
        about |= {"min": 6.8, "max": 7.2, "runs": 3, "machine": "A, 2 cores", "torch": "2", "date": "2026-01-01"}
        return tool.Figure(**(about | {"bar": ">= 6"} | changes))

    return make


def row(tool, figures, *, what, method, troubles=None):
    """Measured, bar and verdict of the only row of that beginning and method."""
    lines = [line.strip("| ").split(" | ") for line in tool.table(figures, troubles or {}).splitlines()[2:]]
    (found,) = [cells[2:] for cells in lines if cells[0].startswith(what) and cells[1] == method]
    return found


def test_a_figure_that_reaches_its_bar_passes(tool, figure):
    measured, bar, verdict = row(tool, [figure()], what="V2", method="detco")
    assert measured == "7 x (6.8 to 7.2, 3 runs): ours / reference"
    assert (bar, verdict) == (">= 6", "pass")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"value": 5.4, "min": 5.0, "max": 5.9}, "MISSED by 10.0 %"),
        ({"value": 5.4, "min": 5.0, "max": 6.1}, "MISSED by 10.0 %, but the range crosses the bar"),
        ({"value": 6.1, "min": 5.9, "max": 6.3}, "pass, but the range crosses the bar"),
        ({"value": 1.38, "min": 1.3, "max": 1.4, "bar": "<= 1.15"}, "MISSED by 20.0 %"),
    ],
)
def test_a_figure_that_does_not_says_by_how_much(tool, figure, changes, expected):
    assert tool.verdict(figure(**changes)) == expected


def test_what_needs_a_gpu_says_so_on_a_machine_without(tool, figure):
    assert row(tool, [figure()], what="E1 images/s", method="detco")[2] == "needs a GPU"
    name, machine = "from JPEG files; batch 256", "NVIDIA H200; A, 16 cores"
    on_gpu = figure(figure="E1", name=name, value=1500, min=1490, max=1510, bar=">= 1400", machine=machine)
    assert row(tool, [on_gpu], what="E1 images/s", method="detco")[2] == "pass"
    assert row(tool, [on_gpu], what="E1 images/s", method="moco_v2")[2].startswith("not measured")


def test_a_figure_of_a_gpu_does_not_count_where_the_cpu_is_meant(tool, figure):
    on_gpu = figure(figure="S1", name="step / bound", value=1.1, bar="<= 1.15", machine="NVIDIA H200; A, 16 cores")
    assert row(tool, [on_gpu], what="S1 step / its bound, GPU", method="detco")[0] != "-"
    assert row(tool, [on_gpu], what="S1 step / its bound, CPU", method="detco")[0] == "-"


def test_what_was_not_measured_says_why(tool):
    troubles = {"step": "was ended after 260 s", "soco_fpn": "failed with exit code 1"}
    for what, method, expected in (
        ("S1 step / its bound, CPU", "detco", "step was ended after 260 s"),
        ("V2", "detco", "benchmark_views.py has no such figure"),
        ("E1 / min", "detco", "benchmark_run.py has no such figure"),
    ):
        assert row(tool, [], what=what, method=method, troubles=troubles)[2] == f"not measured: {expected}"


def test_a_gpu_machine_on_which_everything_failed_is_not_told_to_get_a_gpu(tool):
    troubles = {"step": "failed with exit code 1"}
    reason = row(tool, [], what="S1 step / its bound, GPU", method="detco", troubles=troubles)[2]
    assert reason == "not measured: step failed with exit code 1"


def test_a_place_that_cannot_be_written_to_is_refused_before_the_measurements(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "measure_all", lambda names, troubles: pytest.fail("has measured"))
    with pytest.raises(SystemExit, match="2"):
        tool.main(["--json", str(tmp_path / "nowhere" / "bench.jsonl")])
    assert "bench.jsonl: No such file or directory" in capsys.readouterr().err


def test_every_bar_of_the_scripts_has_a_row(tool, load_tool, figure):
    views, step, rates, start = map(
        load_tool, ("benchmark_views", "benchmark_step", "benchmark_rates", "benchmark_start")
    )
    on_gpu = {"machine": "NVIDIA H200; A, 16 cores"}
    printed = [figure(figure="V2", method=method, bar=bar) for method, bar in views.HOST_BARS.items()]
    printed += [figure(figure="V3", method=method, bar=views.BOTH_HALVES_BAR) for method in ("detco", "moco_v2")]
    for method, bar in step.STEP_BARS.items():
        printed += [figure(figure="S1", method=method, bar=bar, **machine) for machine in ({}, on_gpu)]
    printed += [figure(figure="M1", method=method, bar=bar) for method, bar in step.MEMORY_BARS.items()]
    printed.append(figure(figure="S3", method="moco_v2", bar=step.LIGHTLY_BARS["cpu"]))
    printed.append(figure(figure="S3", method="moco_v2", bar=step.LIGHTLY_BARS["cuda"], **on_gpu))
    for method, bar in rates.GPU_BARS.items():
        printed.append(figure(figure="E1", method=method, name="from JPEG files", bar=bar, **on_gpu))
        printed.append(figure(figure="E1", method=method, name="E1 / reference loader", bar=">= 3", **on_gpu))
    for method in ("detco", "moco_v2"):
        printed.append(figure(figure="E1", method=method, name="E1 / min(E2, E3)", bar=">= 0.95"))
        printed.append(figure(figure="E1", method=method, name="E1 / E2", bar=">= 0.90", **on_gpu))
    printed.append(figure(figure="start", method="moco_v2", bar="<= 10"))
    printed.append(figure(figure="memory", method="all", name="growth", bar=f"<= {start.FLAT_MB}"))
    for one in printed:
        assert sum(tool.meets(one, goal) for goal in tool.GOALS) == 1, one
    for goal in tool.GOALS:
        assert any(tool.meets(one, goal) for one in printed), goal


def test_a_script_that_hangs_is_ended_with_its_children_and_its_figures_count(tool, figure, tmp_path, monkeypatch):
    pid_file = tmp_path / "pid"
    (tmp_path / "benchmark_slow.py").write_text(
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen(['sleep', '60']); open({str(pid_file)!r}, 'w').write(str(child.pid))\n"
        f"print({figure().to_json()!r}); print('{{not a figure'); print('anything'); sys.stdout.flush(); time.sleep(60)"
    )
    monkeypatch.setattr(tool, "TOOLS", tmp_path)
    started = time.monotonic()
    found, trouble = tool.run_script(tool.Script("slow", 1, (), ()), [])
    assert found == [figure()]
    assert trouble == "was ended after 1 s"
    assert time.monotonic() - started < 30
    assert _is_gone(int(pid_file.read_text()))


def _is_gone(pid):
    for _ in range(50):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_all_scripts_run_one_after_the_other_and_the_table_comes_last(tool, figure, tmp_path, monkeypatch, capsys):
    for name, ending in (("views", ""), ("step", "sys.exit(3)"), ("run", "")):
        line = figure(figure=name, name=name).to_json()
        (tmp_path / f"benchmark_{name}.py").write_text(f"import sys\nprint({line!r})\n{ending}\n")
    monkeypatch.setattr(tool, "TOOLS", tmp_path)
    assert tool.main(["--json", str(tmp_path / "all.jsonl")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["figure"] for line in printed[:3]] == ["views", "step", "run"]
    assert (tmp_path / "all.jsonl").read_text().splitlines() == printed[:3]
    table = "\n".join(printed[printed.index("What must come out") :])
    assert "not measured: step failed with exit code 3" in table

    assert tool.main(["--table", str(tmp_path / "all.jsonl"), "--trouble", "step", "failed with exit code 3"]) == 0
    assert capsys.readouterr().out.splitlines() == printed[3:]


def test_a_file_that_is_missing_is_named(tool, capsys):
    with pytest.raises(SystemExit):
        tool.main(["--table", "missing.jsonl"])
    assert "there is no file missing.jsonl" in capsys.readouterr().err
