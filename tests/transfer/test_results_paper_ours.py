"""Our rows in the papers' tables: joined over the columns by their weights, recipes kept apart, in every format."""

import csv
import io
import json
import re
import time

import pytest

from transfer.results.cli import main
from transfer.results.paper_tables import load_paper_tables

MSRA = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
C4 = ("coco_maskrcnn_c4_1x", "c4_extra_norm")
FPN = ("coco_maskrcnn_fpn_1x", "moco")
SOCO = ("coco_maskrcnn_fpn_1x", "4conv1fc")


def _write(folder, protocol, box_ap, *, label="ours", path="weights.pkl", sha="ab", seed=0, decay=None, **changes):
    folder.mkdir(parents=True)
    task, recipe = protocol
    known = {"method": "detco", "epochs": 200, "rand_augment": True, "dataset": {"images": 1281167}}
    schedule = {"iterations": 90000, "batch_size": 16, "base_lr": 0.02, "num_gpus": 8, "auto_scaled": False}
    content = {
        "schema": 1,
        "task": task,
        "recipe": recipe,
        "label": label,
        "weights": {"path": path, "sha256": sha * 32 if path == "weights.pkl" else None, "provenance": known},
        "metrics": {"box_AP": box_ap, "mask_AP": box_ap - 5},
        "departures": [],
        "schedule": schedule if decay is None else {**schedule, "weight_decay": decay},
        "datasets": {"train": ["coco_2017_train"], "test": ["coco_2017_val"]},
        "config_digest": f"{protocol}{decay}",
        "seed": seed,
        **changes,
    }
    (folder / "results.json").write_text(json.dumps(content))


def test_our_row_joins_the_columns_by_its_weights(tmp_path, paper_table):
    for seed in range(3):
        _write(tmp_path / f"c4-{seed}", C4, 39.7 + seed / 10, seed=seed)
    _write(tmp_path / "fpn", FPN, 40.6)
    _write(tmp_path / "other", FPN, 30.0, sha="cd")
    _write(tmp_path / "supervised", C4, 38.0, label="supervised", path=MSRA)
    table = paper_table("detco/3", tmp_path)
    supervised, ours, other = table.rows_of("ours")
    assert [row.name for row in (supervised, ours, other)] == ["supervised", "ours", "ours"]
    assert ours.cells["0/box_AP"].value == pytest.approx(39.8)
    assert ours.cells["0/box_AP"].std == pytest.approx(0.1)
    assert ours.cells["0/box_AP"].difference == pytest.approx(1.8)
    assert ours.cells["1/box_AP"].value == 40.6
    assert ours.cells["1/box_AP"].difference is None  # the supervised run has no FPN
    assert (ours.cells["1/box_AP"].published, ours.cells["1/box_AP"].is_outside) == (40.1, True)
    assert set(other.cells) == {"1/box_AP", "1/mask_AP"}
    notes = dict(table.notes)
    assert [notes[letter].split(":")[0] for letter in ours.notes] == ["R50-C4, 1x", "R50-FPN, 1x"]
    assert "mean of 3 runs (seeds 0, 1, 2)" in notes[ours.notes[0]]


def test_another_label_of_the_same_weights_is_another_row(tmp_path, paper_table):
    _write(tmp_path / "c4", C4, 39.7, label="first")
    _write(tmp_path / "fpn", FPN, 40.6, label="second")
    assert [row.name for row in paper_table("detco/3", tmp_path).rows_of("ours")] == ["first", "second"]


def test_other_weights_of_the_same_label_are_another_row(tmp_path, paper_table):
    _write(tmp_path / "c4", C4, 39.7, sha="ab")
    _write(tmp_path / "fpn", FPN, 40.6, sha="cd")
    rows = paper_table("detco/3", tmp_path).rows_of("ours")
    assert [sorted(row.cells) for row in rows] == [["0/box_AP", "0/mask_AP"], ["1/box_AP", "1/mask_AP"]]


def test_what_departs_has_a_row_of_its_own_below_the_rest(tmp_path, paper_table):
    departure = "SOLVER.MAX_ITER is 30, the task's is 90000"
    _write(tmp_path / "c4", C4, 39.7)
    _write(tmp_path / "fpn", FPN, 8.0, departures=[departure])
    table = paper_table("detco/3", tmp_path)
    (ours,), (departed,) = table.rows_of("ours"), table.rows_of("departed")
    assert set(ours.cells) == {"0/box_AP", "0/mask_AP"}
    assert set(departed.cells) == {"1/box_AP", "1/mask_AP"}
    assert departed.cells["1/box_AP"].published is None
    assert any(departure in dict(table.notes)[letter] for letter in departed.notes)


def test_weight_decays_of_the_same_weights_are_not_mixed_in_a_row(tmp_path, paper_table):
    for task, usual, low in (("coco_maskrcnn_fpn_1x", 42.5, 43.0), ("coco_maskrcnn_fpn_2x", 43.5, 44.0)):
        _write(tmp_path / f"{task}-usual", (task, "4conv1fc"), usual, decay=1e-4)
        _write(tmp_path / f"{task}-low", (task, "4conv1fc"), low, decay=2.5e-5)
    table = paper_table("soco/1", tmp_path)
    rows = table.rows_of("ours")
    found = sorted(tuple(row.cells[f"{group}/box_AP"].value for group in (0, 1)) for row in rows)
    assert found == [(42.5, 43.5), (43.0, 44.0)]
    notes = dict(table.notes)
    texts = {row.cells["0/box_AP"].value: " ".join(notes[letter] for letter in row.notes) for row in rows}
    assert "weight decay 2.5e-05" in texts[43.0]
    assert "weight decay" not in texts[42.5]


def _values(rows):
    """Return the box AP of each row by group of columns, None where it has none."""
    found = [
        tuple(row.cells[key].value if (key := f"{group}/box_AP") in row.cells else None for group in (0, 1))
        for row in rows
    ]
    return sorted(found, key=str)


def _scaled(num_gpus, published_batch=16):
    """Return the schedule that --auto-scale makes for a number of GPUs."""
    batch = published_batch * num_gpus // 8
    scaled = {"batch_size": batch, "base_lr": batch / 800, "iterations": 90000 * 8 // num_gpus}
    return {**scaled, "num_gpus": num_gpus, "auto_scaled": num_gpus != 8}


@pytest.mark.parametrize("order", [(8, 4), (4, 8), (2, 4), (4, 2)])
def test_numbers_of_gpus_are_not_mixed_in_a_row(tmp_path, paper_table, order):
    for place, num_gpus in enumerate(order):  # whichever is found first
        schedule, box_ap = _scaled(num_gpus), 40.0 if num_gpus == 4 else 39.0
        _write(tmp_path / f"{place}-c4", C4, box_ap, schedule=schedule, config_digest=str(num_gpus))
    _write(tmp_path / "fpn", FPN, 41.0, schedule=_scaled(4))
    assert _values(paper_table("detco/3", tmp_path).rows_of("ours")) == [(39.0, None), (40.0, 41.0)]


def test_a_scaled_schedule_is_not_mixed_with_the_published_one(tmp_path, paper_table):
    _write(tmp_path / "c4", C4, 39.0, schedule={**_scaled(8), "num_gpus": 4})  # the published batch on 4 GPUs
    _write(tmp_path / "fpn", FPN, 40.0, schedule=_scaled(4))
    assert _values(paper_table("detco/3", tmp_path).rows_of("ours")) == [(39.0, None), (None, 40.0)]


def test_departures_are_not_mixed_in_a_row_whatever_the_tasks_value(tmp_path, paper_table):
    def lr(value, published):
        return [f"SOLVER.BASE_LR is {value}, the task's is {published}"]

    _write(tmp_path / "a", C4, 11.0, departures=lr(0.04, 0.02), config_digest="a")
    _write(tmp_path / "b", C4, 12.0, departures=lr(0.01, 0.02), config_digest="b")
    _write(tmp_path / "c", FPN, 13.0, departures=lr(0.01, 0.03))
    assert _values(paper_table("detco/3", tmp_path).rows_of("departed")) == [(11.0, None), (12.0, 13.0)]


@pytest.mark.parametrize("num_gpus", [8, 4])
def test_tasks_of_different_batch_and_lr_still_share_a_row(tmp_path, paper_table, num_gpus):
    instances, semantic = ("cityscapes_maskrcnn_fpn_24k", "moco"), ("cityscapes_semseg_fcn16s_90k", "moco")
    _write(tmp_path / "instances", instances, 33.0, schedule=_scaled(num_gpus, 8))
    _write(tmp_path / "semantic", semantic, 76.0, schedule=_scaled(num_gpus, 16))
    (row,) = paper_table("detco/6", tmp_path).rows_of("ours")
    assert [item.first.schedule["batch_size"] for item in row.measurements] == [num_gpus, 2 * num_gpus]


def test_full_ties_share_rows_by_their_rank(tmp_path, paper_table):
    for index in range(2):
        _write(tmp_path / f"c4-{index}", C4, 39.0 + index, config_digest=f"c4-{index}")
        _write(tmp_path / f"fpn-{index}", FPN, 40.0 + index, config_digest=f"fpn-{index}")
    assert _values(paper_table("detco/3", tmp_path).rows_of("ours")) == [(39.0, 40.0), (40.0, 41.0)]


@pytest.mark.parametrize(
    ("name", "number", "printed_name"), [("soco/3", 57.6, "MoCo v2"), ("detco/9", 57.4, "MoCo v2")]
)
def test_our_row_is_judged_against_the_number_that_the_table_itself_prints(
    tmp_path, paper_table, name, number, printed_name
):
    provenance = {"method": "moco_v2", "epochs": 800, "rand_augment": False, "dataset": {"images": 1281167}}
    weights = {"path": "weights.pkl", "sha256": "ab" * 32, "provenance": provenance}
    _write(tmp_path / "run", ("voc0712_fasterrcnn_c4_24k", "c4_extra_norm"), number, weights=weights)
    table = paper_table(name, tmp_path)
    (ours,) = table.rows_of("ours")
    assert ours.cells["0/box_AP"].published == number
    note = dict(table.notes)[ours.notes[0]]
    assert f'"{printed_name}", 800 epochs' in note
    cited = dict(table.citations)[int(re.search(r"epochs \[(\d+)", note)[1])]
    assert f"Table {name[-1]}" in cited


def test_a_published_row_has_the_name_that_the_table_prints(tmp_path, paper_table):
    _write(tmp_path / "c4", ("coco_maskrcnn_c4_12k", "c4_extra_norm"), 29.8)
    table = paper_table("detco/2", tmp_path)
    (ours,) = table.rows_of("ours")
    assert 'published row "DetCo", 200 epochs' in dict(table.notes)[ours.notes[0]]  # not "DetCo+AA", its name elsewhere


def test_notes_speak_of_differences_only_where_the_table_prints_them(tmp_path, paper_table):
    for task in ("coco_maskrcnn_fpn_1x", "coco_maskrcnn_c4_1x"):
        recipe = {"coco_maskrcnn_fpn_1x": "4conv1fc", "coco_maskrcnn_c4_1x": "c4_extra_norm"}[task]
        _write(tmp_path / f"{task}-low", (task, recipe), 43.0, decay=2.5e-5)
        _write(tmp_path / f"{task}-usual", (task, recipe), 40.0, label="supervised", path=MSRA, decay=1e-4)
    told = {
        name: any("Our supervised row has weight decay" in text for _, text in paper_table(name, tmp_path).notes)
        for name in ("soco/1", "detco/3")
    }
    assert told == {"soco/1": False, "detco/3": True}


def test_folded_columns_leave_out_our_rows_and_run_counts_that_have_no_place_in_them(tmp_path, printed):
    for seed in range(3):
        _write(tmp_path / f"c4-{seed}", C4, 39.7 + seed / 10, seed=seed, label="both")
    _write(tmp_path / "fpn", FPN, 40.6, label="both")
    _write(tmp_path / "alone", FPN, 30.0, label="alone", sha="cd")
    text = printed("--layout", "paper", "--table", "detco/3", tmp_path, "--width", "80")
    first, second = (part.split("\n\n")[0] for part in text.split("  pretraining ")[1:])
    assert ("> both" in first, "3 runs" in first, "> alone" in first) == (True, True, False)
    assert ("> both" in second, "runs" in second, "> alone" in second) == (True, False, True)
    assert "(1-3 runs)" in printed("--layout", "paper", "--table", "detco/3", tmp_path, "--format", "md")


@pytest.mark.parametrize(("form", "bold"), [("latex", r"\textbf{-}"), ("md", "**-**")])
def test_a_missing_number_of_ours_is_not_bold(tmp_path, printed, form, bold):
    _write(tmp_path / "c4", C4, 39.7)
    assert bold not in printed("--layout", "paper", "--table", "detco/3", tmp_path, "--format", form)


@pytest.mark.parametrize("decay", [1e-4, 2.5e-5])
def test_a_weight_decay_that_only_some_columns_have_stands_alone(tmp_path, paper_table, decay):
    for index, other in enumerate((1e-4, 2.5e-5)):
        _write(tmp_path / f"1x-{index}", SOCO, 43.0 if other == decay else 42.0, decay=other)
    _write(tmp_path / "2x", ("coco_maskrcnn_fpn_2x", "4conv1fc"), 44.0, decay=decay)
    assert _values(paper_table("soco/1", tmp_path).rows_of("ours")) == [(42.0, None), (43.0, 44.0)]


@pytest.mark.parametrize("name", load_paper_tables())
def test_our_numbers_stand_only_in_columns_of_their_task_and_recipe(name, tmp_path, paper_table):
    groups = {(group.task, group.recipe) for table in load_paper_tables().values() for group in table.groups}
    groups |= {
        ("coco_maskrcnn_fpn_1x", "as quoted by SoCo"),
        ("coco_fcos_1x", "moco"),
        ("coco_retinanet_1x", "4conv1fc"),
    }
    for index, (task, recipe) in enumerate(sorted(groups, key=str)):
        _write(tmp_path / str(index), (task, recipe), 10.0 + index / 10)
    table = paper_table(name, tmp_path)
    for row in table.rows_of("ours"):
        for group in table.groups:
            for cell in group.cells_of(row).values():
                (run,) = [item.first for item in row.measurements if cell.value in item.first.metrics.values()]
                assert (run.task, run.recipe) == (group.task, group.recipe)
    assert bool(table.rows_of("ours")) is not name.startswith("soco/7")


def test_numbers_of_mmdetection_are_never_joined_and_name_what_comes_near(tmp_path, capsys):
    _write(tmp_path / "run", ("coco_retinanet_1x", "moco"), 37.0)
    _write(tmp_path / "named-alike", ("coco_retinanet_1x_mmdet", None), 37.0)
    assert main(["--layout", "paper", "--table", "soco/7a", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "-- ours" not in captured.out
    assert "nearest of our tasks: coco_retinanet_1x" in captured.out
    assert "takes no runs" in captured.err


def test_subsets_tell_their_images_and_that_repeats_are_repeats_over_them(tmp_path, paper_table):
    for seed in range(2):
        part = {"coco_2017_train_1pct": {"images": 1183, "sha256": "00"}}
        data = {"train": ["coco_2017_train_1pct"], "test": ["coco_2017_val"]}
        protocol = ("coco_retinanet_1pct_12k", "moco")
        _write(tmp_path / str(seed), protocol, 9.0 + seed, seed=seed, subsets=part, datasets=data)
    table = paper_table("detco/8", tmp_path)
    (ours,) = table.rows_of("ours")
    assert ours.num_runs == 2
    assert "1,183 images" in dict(table.notes)[ours.notes[0]]
    assert any("repeats over subsets" in remark for remark in table.remarks)


def test_csv_has_one_line_per_number_with_its_own_task(tmp_path, printed):
    _write(tmp_path / "c4", C4, 39.7)
    _write(tmp_path / "fpn", FPN, 40.6)
    text = printed("--layout", "paper", "--table", "detco/3", tmp_path, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 96 + 4
    assert {row["paper_table"] for row in rows} == {"detco/3"}
    ours = {(row["task"], row["recipe"], row["metric"]): float(row["value"]) for row in rows if row["kind"] == "ours"}
    assert ours == {
        (*C4, "box_AP"): 39.7,
        (*C4, "mask_AP"): 34.7,
        (*FPN, "box_AP"): 40.6,
        (*FPN, "mask_AP"): 35.6,
    }
    assert {row["table"] for row in rows if row["kind"] == "published"} == {"Table 3"}


def test_json_holds_groups_measurements_and_null_for_nan(tmp_path, printed):
    _write(tmp_path / "c4", C4, 39.7)
    _write(tmp_path / "fpn", FPN, 40.6)
    content = json.loads(
        printed("--layout", "paper", "--table", "detco/3", "--table", "soco/5c", tmp_path, "--format", "json")
    )
    first, second = content["tables"]
    assert first["paper_table"] == "detco/3"
    assert [group["task"] for group in first["groups"]] == [C4[0], FPN[0]]
    assert first["groups"][1]["columns"]["1/mask_AP50"] == "mask_AP50"
    ours = next(row for row in first["rows"] if row["kind"] == "ours")
    assert [item["task"] for item in ours["measurements"]] == [C4[0], FPN[0]]
    assert second["rows"][-1]["cells"]["0/box_AP"]["value"] is None


def test_latex_has_a_head_over_each_group_and_equal_columns(tmp_path, printed):
    _write(tmp_path / "c4", C4, 39.7)
    text = printed("--layout", "paper", "--table", "detco/3", tmp_path, "--format", "latex")
    assert r"\multicolumn{6}{c}{R50-C4, 1x} & \multicolumn{6}{c}{R50-FPN, 1x}" in text
    assert r"\cmidrule(lr){3-8} \cmidrule(lr){9-14}" in text
    body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
    rows = [line for line in body.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {15}
    assert text.isascii()


def test_without_a_table_those_with_our_runs_are_printed(tmp_path, printed):
    _write(tmp_path / "run", ("lvis1_maskrcnn_fpn_1x", "4conv1fc"), 26.0)
    text = printed("--layout", "paper", tmp_path)
    assert re.findall(r"^(\S+/\S+): ", text, flags=re.MULTILINE) == ["soco/6"]


def test_runs_without_a_place_are_named(tmp_path, capsys):
    _write(tmp_path / "run", ("coco_fcos_1x", "moco"), 39.0)
    assert main(["--layout", "paper", str(tmp_path)]) == 2
    assert "coco_fcos_1x (moco)" in capsys.readouterr().err
    assert main(["--layout", "paper", "--table", "detco/3", str(tmp_path)]) == 0
    assert "takes runs of coco_maskrcnn_c4_1x (c4_extra_norm)" in capsys.readouterr().err


def test_no_reference_leaves_the_papers_rows_out(tmp_path, printed):
    _write(tmp_path / "fpn", FPN, 40.6)
    text = printed("--layout", "paper", "--table", "detco/3", tmp_path, "--no-reference")
    assert "40.6" in text
    assert "InsDis" not in text
    assert "published --" not in text


def test_many_runs_are_put_into_all_tables_quickly(tmp_path, printed):
    for index in range(200):
        _write(tmp_path / str(index), C4, 39.0, label=f"w{index}")
    start = time.perf_counter()
    printed("--layout", "paper", tmp_path)
    assert time.perf_counter() - start < 5
