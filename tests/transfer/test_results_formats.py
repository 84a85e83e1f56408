"""Tables as text, Markdown, LaTeX, csv and json, and the command line."""

import csv
import io
import json
import re
import subprocess
import sys

import pytest

from transfer.results.cli import main
from transfer.results.markup import escape_latex, escape_markdown
from transfer.results.reference import load_reference

VOC = "voc0712_fasterrcnn_c4_24k"
MSRA = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
DEPARTURE = "SOLVER.MAX_ITER is 30, the task's is 24000"


@pytest.fixture
def runs(tmp_path, write_run):
    for seed in range(3):
        metrics = {"box_AP": 55.0 + seed / 10, "box_AP50": 82.0}
        write_run(tmp_path / f"s{seed}", metrics, seed=seed, label="50%_a|b & [c]")
    write_run(tmp_path / "sup", {"box_AP": 53.4, "box_AP50": 81.2}, path=MSRA, label="supervised")
    write_run(tmp_path / "quick", {"box_AP": 0.4}, departures=[DEPARTURE], label="[quick]")
    return tmp_path


def test_text_is_aligned_and_fits_the_terminal(printed, runs):
    text = printed(runs)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    ours = next(line for line in lines if line.startswith("> 50%_a|b & [c]"))
    below = lines[lines.index(ours) + 1]
    published = next(line for line in lines if line.startswith("  DetCo  ") and " 200 " in line)
    assert ours.index("55.1*(+1.7)") == published.index("57.8 (+4.3)")
    assert "3 runs" in below
    assert below.index("\u00b10.1") == ours.index("55.1")
    assert next(line for line in lines if line.startswith("~ [quick]"))


@pytest.mark.parametrize("task", dict.fromkeys(row.task for row in load_reference().results))
def test_the_published_rows_of_every_task_fit_the_terminal(task, printed):
    text = printed("--task", task)
    assert max(map(len, text.splitlines())) <= 120


def test_markdown_has_equal_columns_in_every_line(printed, runs):
    text = printed(runs, "--format", "md")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    columns = [len(re.split(r"(?<!\\)\|", line)) for line in rows]
    assert set(columns) == {len(["pretraining", "epochs", "AP", "AP50", "AP75", "notes"]) + 2}
    assert re.fullmatch(r"(\| :?-+:? )+\|", rows[1])
    assert any(line.startswith(r"| **50%\_a\|b & \[c\] (3 runs)** (ours) | 200 | **55.1") for line in rows)


def test_latex_is_escaped_and_balanced(printed, runs):
    text = printed(runs, "--format", "latex")
    assert r"\textbf{50\%\_a\textbar{}b \& [c] (3 runs)}" in text
    assert r"{[quick]} &" in text  # else LaTeX reads the bracket as an argument of the line end
    body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
    rows = [line for line in body.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {6}
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}")
    assert "\u00b1" not in text
    assert text.isascii()


def test_escapes():
    assert escape_latex(r"a_b%&#{}~^\$") == (r"a\_b\%\&\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}\$")
    assert escape_markdown("a_b*c|d[e]") == r"a\_b\*c\|d\[e\]"


def test_csv_has_one_row_per_number(printed, runs):
    rows = list(csv.DictReader(io.StringIO(printed(runs, "--format", "csv"))))
    ours = [row for row in rows if row["kind"] == "ours" and row["pretraining"].startswith("50%")]
    assert [row["metric"] for row in ours] == ["box_AP", "box_AP50"]
    assert float(ours[0]["value"]) == pytest.approx(55.1)
    assert float(ours[0]["std"]) == pytest.approx(0.1)
    assert ours[0]["seeds"] == "0; 1; 2"
    assert float(ours[0]["difference_to_supervised"]) == pytest.approx(1.7)
    assert ours[0]["outside_noise"] == "true"
    published = [row for row in rows if row["kind"] == "published"]
    assert {(row["paper"], row["table"]) for row in published} >= {("DetCo", "Table 9")}
    assert [row["departures"] for row in rows if row["kind"] == "departed"] == [DEPARTURE]


def test_json_holds_the_same_and_what_was_left_out(tmp_path, printed, runs):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{")
    content = json.loads(printed(runs, "--format", "json"))
    assert (content["format"], content["schema"]) == ("detco-results", 1)
    (table,) = content["tables"]
    ours = next(row for row in table["rows"] if row["kind"] == "ours" and row["epochs"] == 200)
    assert ours["cells"]["box_AP"]["value"] == pytest.approx(55.1)
    assert ours["cells"]["box_AP"]["outside_noise"] is True
    assert [run["seed"] for run in ours["runs"]] == [0, 1, 2]
    assert set(ours["notes"]) <= set(table["notes"])
    assert all(str(number) in table["citations"] for row in table["rows"] for number in row["citations"])
    assert "not JSON" in content["left_out"][0]["reason"]


def test_what_is_left_out_is_named_on_standard_error(tmp_path, capsys, write_run):
    write_run(tmp_path / "good", {"box_AP": 50.0})
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "results.json").write_text("{}")
    assert main([str(tmp_path)]) == 0
    error = capsys.readouterr().err
    assert "bad" in error
    assert "schema is None" in error


def test_nothing_usable_is_exit_code_two(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "error: none of the given paths holds a finished run" in capsys.readouterr().err
    assert main([]) == 2
    assert "name run directories" in capsys.readouterr().err


def test_a_task_that_nobody_published_needs_runs_and_then_tells_what_comes_near(tmp_path, capsys, write_run, printed):
    assert main(["--task", "coco_fcos_1x"]) == 2
    assert "nothing is published for coco_fcos_1x" in capsys.readouterr().err
    write_run(tmp_path, {"box_AP": 39.0}, task="coco_fcos_1x", recipe="moco")
    text = printed(tmp_path)
    assert "No published numbers" in text
    assert "coco_fcos_1x_mmdet" in text


def test_the_width_of_the_text_is_a_choice(printed, runs):
    text = printed(runs, "--width", "70")
    assert max(map(len, text.splitlines())) <= 70
    assert "55.1*(+1.7)" in text


def test_an_unknown_task_gets_the_nearest_one(capsys):
    assert main(["--task", "coco_retinanet_1xx"]) == 2
    assert "did you mean coco_retinanet_1x?" in capsys.readouterr().err


def test_a_task_without_our_runs_is_told_apart_from_an_unknown_one(tmp_path, capsys, write_run):
    write_run(tmp_path, {"box_AP": 50.0})
    assert main([str(tmp_path), "--recipe", "moco"]) == 2
    assert f"{VOC} (c4_extra_norm)" in capsys.readouterr().err


def test_no_reference_leaves_the_published_rows_out(printed, runs):
    text = printed(runs, "--no-reference")
    assert "published --" not in text
    assert "InsDis" not in text
    assert "55.1 (+1.7)" in text


def test_the_suffix_of_the_file_chooses_the_format(tmp_path, capsys, write_run):
    write_run(tmp_path / "run", {"box_AP": 50.0})
    for suffix, start in ((".md", "###"), (".tex", "% needs"), (".csv", "task,"), (".json", "{"), (".txt", "VOC")):
        file = tmp_path / f"out{suffix}"
        assert main([str(tmp_path / "run"), "-o", str(file)]) == 0
        assert file.read_text(encoding="utf-8").startswith(start)
    assert main([str(tmp_path / "run"), "-o", str(tmp_path / "out.pdf")]) == 2
    assert "add --format" in capsys.readouterr().err


def test_list_tasks_counts_the_published_rows(printed):
    lines = printed("--list-tasks").splitlines()[1:]
    assert sum(int(line.split()[1]) for line in lines) == 471


def test_a_console_without_the_sign_gets_another_one(runs):
    command = [sys.executable, "-m", "transfer.results.cli", str(runs)]
    result = subprocess.run(
        command, capture_output=True, check=True, env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)}
    )
    assert b"+-0.1" in result.stdout


def test_the_program_starts_without_torch_and_detectron2():
    code = "import sys, transfer.results.cli; print([name for name in ('torch', 'detectron2') if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert result.stdout.strip() == "[]"
