"""Tables and the command line: comparisons, separation of recipes and protocols, and every output format."""

import csv
import io
import json
import re
import subprocess
import sys

import pytest

from transfer.results.cells import difference, whole
from transfer.results.cli import main
from transfer.results.markup import escape_latex, escape_markdown
from transfer.results.reference import load_reference
from transfer.results.repeats import group_repeats
from transfer.results.runs import find_runs
from transfer.results.table import Cell, Legend
from transfer.results.tables import build_tables

VOC = "voc0712_fasterrcnn_c4_24k"
FPN = "coco_maskrcnn_fpn_1x"
MSRA = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
DEPARTURE = "SOLVER.MAX_ITER is 30, the task's is 24000"


def _write(
    folder,
    metrics,
    *,
    task=VOC,
    recipe="c4_extra_norm",
    label="ours",
    method="moco_v2",
    epochs=200,
    path="weights.pkl",
    seed=0,
    departures=(),
    **provenance,
):
    folder.mkdir(parents=True, exist_ok=True)
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
    (folder / "results.json").write_text(json.dumps(content))


def _tables(folder, **options):
    measurements, _ = group_repeats(find_runs([folder])[0])
    return build_tables(load_reference(), measurements, **options)


def _only_row(folder, kind="ours"):
    (table,) = _tables(folder)
    (row,) = table.rows_of(kind)
    return row


@pytest.mark.parametrize(("box_ap", "outside"), [(38.6, False), (38.59, True), (39.2, False), (39.21, True)])
def test_the_mark_of_a_known_difference_switches_at_its_border(tmp_path, box_ap, outside):
    # MoCo v2, 200 epochs, is published as 38.9 under the moco recipe; 0.3 is called noise.
    _write(tmp_path, {"box_AP": box_ap}, task=FPN, recipe="moco")
    cell = _only_row(tmp_path).cells["box_AP"]
    assert (cell.published, cell.allowed) == (38.9, 0.3)
    assert cell.is_outside is outside


@pytest.mark.parametrize(("away", "outside"), [(0.437, False), (0.439, True), (-0.437, False), (-0.439, True)])
def test_the_mark_of_a_known_deviation_uses_the_number_of_runs(tmp_path, away, outside):
    # 2 * 0.2 * sqrt(1/1 + 1/5) = 0.43818: one run of ours against a published mean of five.
    _write(tmp_path, {"box_AP": 57.0 + away})
    cell = _only_row(tmp_path).cells["box_AP"]
    assert cell.allowed == pytest.approx(0.4381780)
    assert cell.is_outside is outside


def test_metrics_of_unknown_noise_are_never_marked(tmp_path):
    _write(tmp_path, {"box_AP50": 20.0}, task=FPN, recipe="moco")
    row = _only_row(tmp_path)
    assert row.cells["box_AP50"].published == 59.4
    assert row.cells["box_AP50"].is_outside is None


@pytest.mark.parametrize("epochs", [300, 199.5])
def test_no_number_is_marked_where_other_epochs_are_published(tmp_path, epochs):
    _write(tmp_path, {"box_AP": 20.0}, epochs=epochs)
    assert _only_row(tmp_path).cells["box_AP"].published is None


def test_plain_detco_is_compared_with_the_plain_row_and_the_other_with_aa(tmp_path):
    _write(tmp_path / "plain", {"box_AP": 39.5}, task=FPN, recipe="moco", method="detco", label="plain")
    _write(tmp_path / "aa", {"box_AP": 40.1}, task=FPN, recipe="moco", method="detco", label="aa", rand_augment=True)
    # Same weights digest in the fixture: the configuration differs, so give the second another one.
    content = json.loads((tmp_path / "aa" / "results.json").read_text())
    content["weights"]["sha256"] = "cd" * 32
    (tmp_path / "aa" / "results.json").write_text(json.dumps(content))
    (table,) = _tables(tmp_path)
    assert {row.name: row.cells["box_AP"].published for row in table.rows_of("ours")} == {"plain": 39.5, "aa": 40.1}


def test_our_rows_are_measured_against_our_own_supervised_row(tmp_path):
    _write(tmp_path / "a", {"box_AP": 56.5})
    _write(tmp_path / "b", {"box_AP": 53.0}, path=MSRA, label="supervised")
    (table,) = _tables(tmp_path)
    rows = {row.name: row for row in table.rows_of("ours")}
    assert difference(rows["ours"].cells["box_AP"]) == "(+3.5)"  # 53.0 is ours; the published one is 53.5
    assert rows["supervised"].cells["box_AP"].difference is None


def test_without_a_supervised_run_of_ours_there_is_no_difference_and_that_is_said(tmp_path):
    _write(tmp_path, {"box_AP": 56.5})
    (table,) = _tables(tmp_path)
    assert table.rows_of("ours")[0].cells["box_AP"].difference is None
    assert any("no supervised run of ours" in remark for remark in table.remarks)


def test_a_supervised_run_of_another_protocol_is_no_baseline(tmp_path):
    _write(tmp_path / "a", {"box_AP": 56.5})
    _write(tmp_path / "b", {"box_AP": 5.0}, path=MSRA, departures=[DEPARTURE])
    (table,) = _tables(tmp_path)
    assert table.rows_of("ours")[0].cells["box_AP"].difference is None


def test_a_supervised_run_of_another_length_is_no_baseline_on_own_data(tmp_path):
    _write(tmp_path / "a", {"box_AP": 56.5}, task="", recipe="moco")
    _write(tmp_path / "b", {"box_AP": 5.0}, task="", recipe="moco", path=MSRA)
    file = tmp_path / "b/results.json"
    (table,) = _tables(tmp_path)
    assert any(row.cells["box_AP"].difference is not None for row in table.rows_of("ours"))
    shorter = json.loads(file.read_text())
    shorter["schedule"]["iterations"] //= 2
    file.write_text(json.dumps(shorter))
    (table,) = _tables(tmp_path)
    assert all(row.cells["box_AP"].difference is None for row in table.rows_of("ours"))


def test_two_data_sets_of_the_users_own_never_share_a_table(tmp_path):
    for name in ("cats", "dogs"):
        _write(tmp_path / name, {"box_AP": 10.0}, task="", recipe="", label=name)
        file = tmp_path / name / "results.json"
        file.write_text(file.read_text().replace("voc_2007_test", name))
    assert [table.task for table in _tables(tmp_path)] == ["own data: cats", "own data: dogs"]


def test_two_detectors_on_the_same_own_data_never_share_a_table(tmp_path):
    for name in ("coco_maskrcnn_fpn_1x", "coco_retinanet_1x"):
        _write(tmp_path / name, {"box_AP": 10.0}, task="", recipe="moco")
        file = tmp_path / name / "results.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"based_on": name}))
    titles = [table.task for table in _tables(tmp_path)]
    assert titles == [
        "own data: voc_2007_test, trained as coco_maskrcnn_fpn_1x",
        "own data: voc_2007_test, trained as coco_retinanet_1x",
    ]


def test_departures_of_two_supervised_runs_are_kept_apart(tmp_path):
    other = "SOLVER.MAX_ITER is 60, the task's is 24000"
    _write(tmp_path / "a", {"box_AP": 1.0}, departures=[DEPARTURE])
    _write(tmp_path / "b", {"box_AP": 3.0}, path=MSRA, departures=[other])
    (table,) = _tables(tmp_path)
    assert all(row.cells["box_AP"].difference is None for row in table.rows_of("departed"))


def test_weights_from_other_images_are_shown_but_not_compared(tmp_path):
    _write(tmp_path, {"box_AP": 20.0})
    file = tmp_path / "results.json"
    file.write_text(file.read_text().replace("1281167", "600"))
    (table,) = _tables(tmp_path)
    (row,) = table.rows_of("ours")
    assert row.cells["box_AP"].published is None
    assert "pretrained on 600 images" in dict(table.notes)[row.notes[0]]


def test_runs_that_depart_stand_apart_and_are_compared_with_nothing_published(tmp_path):
    _write(tmp_path / "quick", {"box_AP": 1.0}, departures=[DEPARTURE])
    _write(tmp_path / "supervised", {"box_AP": 2.5}, path=MSRA, departures=[DEPARTURE])
    (table,) = _tables(tmp_path)
    assert table.rows_of("ours") == []
    quick = next(row for row in table.rows_of("departed") if row.name == "ours" and row.epochs == 200)
    assert quick.cells["box_AP"].published is None
    assert difference(quick.cells["box_AP"]) == "(-1.5)"  # ours under the same departures
    notes = dict(table.notes)
    assert any(DEPARTURE in notes[letter] for letter in quick.notes)
    assert {entry.paper for row in table.rows_of("published") for entry in row.entries} == {"DetCo"}


def test_two_recipes_never_share_a_table(tmp_path):
    _write(tmp_path / "a", {"box_AP": 38.9}, task=FPN, recipe="moco")
    _write(tmp_path / "b", {"box_AP": 39.8}, task=FPN, recipe="4conv1fc")
    tables = _tables(tmp_path)
    assert [(table.task, table.recipe) for table in tables] == [(FPN, "moco"), (FPN, "4conv1fc")]
    for table in tables:
        assert len(table.rows_of("ours")) == 1
        entries = [entry for row in table.rows for entry in row.entries]
        assert entries
        assert {entry.recipe for entry in entries} == {table.recipe}
        supervised = {row.cells["box_AP"].value for row in table.rows if row.name == "supervised"}
        assert supervised == ({38.9} if table.recipe == "moco" else {39.7})


def test_notes_tell_gpus_scaling_hours_and_the_traps(tmp_path):
    _write(tmp_path, {"box_AP": 56.9})
    (table,) = _tables(tmp_path)
    text = " ".join(text for _, text in table.notes)
    assert "4 GPUs" in text
    assert "auto-scaled" in text
    assert "6.0 h" in text
    assert any("two released checkpoints share one name" in remark for remark in table.remarks)


def test_a_task_of_the_users_own_gets_a_table_without_published_rows(tmp_path):
    _write(tmp_path, {"box_AP": 10.0, "box_APs": 1.0, "box_AP-cat": 3.0}, task="", recipe="")
    (table,) = _tables(tmp_path)
    assert (table.task, table.recipe) == ("own data: voc_2007_test", None)
    assert table.metrics == ("box_AP",)
    assert any("No published numbers" in remark for remark in table.remarks)
    assert "trained on voc_2007_trainval" in table.notes[0][1]


def test_numbers_look_as_in_the_papers():
    assert whole(Cell(39.8, supervised=38.9)) == "39.8 (+0.9)"
    assert whole(Cell(25.7, supervised=25.7)) == "25.7 (0.0)"
    assert whole(Cell(16.5, supervised=27.1)) == "16.5 (-10.6)"
    assert whole(Cell(57.8, std=0.158, num_runs=5, supervised=53.5, published=57.0, allowed=0.3)) == (
        "57.8 \u00b1 0.2* (+4.3)"
    )
    assert whole(None) == "-"


def test_letters_go_on_after_z():
    legend = Legend()
    letters = [legend.note(str(index)) for index in range(54)]
    assert [letters[0], letters[25], letters[26], letters[51], letters[52]] == ["a", "z", "aa", "az", "ba"]
    assert legend.note("3") == "d"


def _runs(tmp_path):
    for seed in range(3):
        _write(tmp_path / f"s{seed}", {"box_AP": 55.0 + seed / 10, "box_AP50": 82.0}, seed=seed, label="50%_a|b & [c]")
    _write(tmp_path / "sup", {"box_AP": 53.4, "box_AP50": 81.2}, path=MSRA, label="supervised")
    _write(tmp_path / "quick", {"box_AP": 0.4}, departures=[DEPARTURE], label="[quick]")
    return tmp_path


def _printed(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_text_is_aligned_and_fits_the_terminal(tmp_path, capsys):
    text = _printed(capsys, _runs(tmp_path))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    ours = next(line for line in lines if line.startswith("> 50%_a|b & [c]"))
    below = lines[lines.index(ours) + 1]
    published = next(line for line in lines if line.startswith("  DetCo  ") and " 200 " in line)
    assert ours.index("55.1*(+1.7)") == published.index("57.8 (+4.3)")
    assert "3 runs" in below
    assert below.index("\u00b10.1") == ours.index("55.1")
    assert next(line for line in lines if line.startswith("~ [quick]"))


@pytest.mark.parametrize("task", load_reference().tasks)
def test_the_published_rows_of_every_task_fit_the_terminal(task, capsys):
    text = _printed(capsys, "--task", task)
    assert max(map(len, text.splitlines())) <= 120


def test_markdown_has_equal_columns_in_every_line(tmp_path, capsys):
    text = _printed(capsys, _runs(tmp_path), "--format", "md")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    columns = [len(re.split(r"(?<!\\)\|", line)) for line in rows]
    assert set(columns) == {len(["pretraining", "epochs", "AP", "AP50", "AP75", "notes"]) + 2}
    assert re.fullmatch(r"(\| :?-+:? )+\|", rows[1])
    assert any(line.startswith(r"| **50%\_a\|b & \[c\] (3 runs)** (ours) | 200 | **55.1") for line in rows)


def test_latex_is_escaped_and_balanced(tmp_path, capsys):
    text = _printed(capsys, _runs(tmp_path), "--format", "latex")
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


def test_csv_has_one_row_per_number(tmp_path, capsys):
    rows = list(csv.DictReader(io.StringIO(_printed(capsys, _runs(tmp_path), "--format", "csv"))))
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


def test_json_holds_the_same_and_what_was_left_out(tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{")
    content = json.loads(_printed(capsys, _runs(tmp_path), "--format", "json"))
    assert (content["format"], content["schema"]) == ("detco-results", 1)
    (table,) = content["tables"]
    ours = next(row for row in table["rows"] if row["kind"] == "ours" and row["epochs"] == 200)
    assert ours["cells"]["box_AP"]["value"] == pytest.approx(55.1)
    assert ours["cells"]["box_AP"]["outside_noise"] is True
    assert [run["seed"] for run in ours["runs"]] == [0, 1, 2]
    assert set(ours["notes"]) <= set(table["notes"])
    assert all(str(number) in table["citations"] for row in table["rows"] for number in row["citations"])
    assert "not JSON" in content["left_out"][0]["reason"]


def test_what_is_left_out_is_named_on_standard_error(tmp_path, capsys):
    _write(tmp_path / "good", {"box_AP": 50.0})
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


def test_an_unknown_task_gets_the_nearest_one(capsys):
    assert main(["--task", "coco_retinanet_1xx"]) == 2
    assert "did you mean coco_retinanet_1x?" in capsys.readouterr().err


def test_a_task_without_our_runs_is_told_apart_from_an_unknown_one(tmp_path, capsys):
    _write(tmp_path, {"box_AP": 50.0})
    assert main([str(tmp_path), "--recipe", "moco"]) == 2
    assert f"{VOC} (c4_extra_norm)" in capsys.readouterr().err


def test_no_reference_leaves_the_published_rows_out(tmp_path, capsys):
    text = _printed(capsys, _runs(tmp_path), "--no-reference")
    assert "published --" not in text
    assert "InsDis" not in text
    assert "55.1 (+1.7)" in text


def test_the_suffix_of_the_file_chooses_the_format(tmp_path, capsys):
    _write(tmp_path / "run", {"box_AP": 50.0})
    for suffix, start in ((".md", "###"), (".tex", "% needs"), (".csv", "task,"), (".json", "{"), (".txt", "VOC")):
        file = tmp_path / f"out{suffix}"
        assert main([str(tmp_path / "run"), "-o", str(file)]) == 0
        assert file.read_text(encoding="utf-8").startswith(start)
    assert main([str(tmp_path / "run"), "-o", str(tmp_path / "out.pdf")]) == 2
    assert "add --format" in capsys.readouterr().err


def test_list_tasks_counts_the_published_rows(capsys):
    lines = _printed(capsys, "--list-tasks").splitlines()[1:]
    assert sum(int(line.split()[1]) for line in lines) == 471


def test_a_console_without_the_sign_gets_another_one(tmp_path):
    _runs(tmp_path)
    command = [sys.executable, "-m", "transfer.results.cli", str(tmp_path)]
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
