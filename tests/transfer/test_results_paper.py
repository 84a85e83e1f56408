"""The papers' tables: every published number in its cell, the traps beside it, no line wider than the terminal."""

import copy
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from transfer.results.cli import main
from transfer.results.paper_tables import PAPER_TABLES_FILE, load_paper_tables, parse_paper_tables
from transfer.results.reference import ReferenceDataError, load_reference
from transfer.tasks import load_tasks

# By table: rows, columns, numbers, their sum, and three of them as (row, column, number); transcribed from the papers
# independently of reference.yaml.
SHAPES = {
    "detco/1": (6, 4, 20, 1261.4, [(0, 0, 60.6), (3, 2, 39.3), (5, 3, 76.5)]),
    "detco/2": (8, 12, 96, 2760.7, [(0, 0, 7.9), (4, 0, 16.5), (7, 11, 28.7)]),
    "detco/3": (8, 12, 96, 4108.4, [(0, 0, 26.4), (4, 0, 32.9), (7, 11, 38.9)]),
    "detco/4": (2, 6, 12, 595.9, [(0, 0, 45.0), (1, 0, 46.5), (1, 5, 59.7)]),
    "detco/5": (5, 3, 15, 915.7, [(0, 0, 40.8), (2, 1, 85.9), (4, 2, 53.3)]),
    "detco/6": (8, 3, 24, 1326.5, [(0, 0, 25.4), (4, 0, 33.9), (7, 2, 76.5)]),
    "detco/7": (8, 12, 96, 4471.9, [(0, 0, 4.0), (4, 0, 19.7), (7, 11, 73.4)]),
    "detco/8": (5, 12, 60, 903.9, [(0, 0, 1.4), (2, 6, 15.0), (4, 11, 22.3)]),
    "detco/9": (11, 3, 33, 2138.4, [(0, 0, 33.8), (5, 1, 81.5), (10, 2, 65.0)]),
    "detco/10": (11, 3, 22, 1583.1, [(0, 0, 44.6), (6, 0, 74.3), (10, 2, 85.1)]),
    "detco/11": (4, 3, 8, 488.7, [(0, 0, 64.3), (2, 0, 67.1), (3, 2, 57.4)]),
    "detco/12": (4, 4, 8, 546.4, [(0, 0, 47.1), (3, 0, 51.6), (3, 3, 84.3)]),
    "detco-v1/3": (9, 12, 108, 3169.0, [(0, 0, 7.9), (4, 6, 25.5), (8, 11, 28.7)]),
    "detco-v1/4": (9, 12, 108, 4650.3, [(0, 0, 26.4), (4, 6, 38.5), (8, 11, 38.9)]),
    "detco-v1/5": (9, 12, 105, 4836.6, [(0, 0, 4.0), (4, 4, 54.9), (8, 8, 42.6)]),
    "detco-v1/6": (11, 3, 33, 2138.4, [(0, 0, 33.8), (5, 1, 81.5), (10, 2, 65.0)]),
    "detco-v1/7": (8, 3, 24, 1326.5, [(0, 0, 25.4), (4, 0, 33.9), (7, 2, 76.5)]),
    "detco-v1/8": (11, 3, 22, 1583.1, [(0, 0, 44.6), (6, 0, 74.3), (10, 2, 85.1)]),
    "detco-v1/9": (5, 3, 15, 915.7, [(0, 0, 40.8), (2, 1, 85.9), (4, 2, 53.3)]),
    "detco-v1/10": (6, 12, 72, 972.1, [(0, 0, 2.5), (3, 0, 9.9), (5, 11, 15.1)]),
    "detco-v1/11": (6, 12, 72, 1797.4, [(0, 0, 9.2), (3, 0, 20.6), (5, 11, 25.0)]),
    "detco-v1/12": (6, 12, 72, 1132.1, [(0, 0, 1.4), (3, 0, 8.4), (5, 11, 22.3)]),
    "detco-v1/13": (6, 12, 72, 3303.0, [(0, 0, 35.6), (3, 0, 41.0), (5, 11, 40.5)]),
    "soco/1": (16, 12, 161, 7533.0, [(0, 0, 31.0), (7, 2, 43.5), (15, 11, 42.5)]),
    "soco/2": (13, 12, 123, 5498.2, [(0, 0, 26.4), (5, 7, 61.2), (12, 11, 38.8)]),
    "soco/3": (16, 3, 48, 3152.1, [(0, 0, 33.8), (8, 0, 55.9), (15, 2, 65.9)]),
    "soco/4": (7, 2, 14, 542.5, [(0, 0, 38.1), (3, 1, 37.0), (6, 1, 37.6)]),
    "soco/5a": (5, 2, 10, 399.1, [(0, 0, 42.1), (2, 1, 37.7), (4, 1, 37.8)]),
    "soco/5b": (4, 2, 8, 317.4, [(0, 0, 41.7), (2, 0, 42.3), (3, 1, 37.3)]),
    "soco/5c": (7, 2, 10, 394.3, [(0, 0, 41.6), (2, 1, 37.4), (4, 1, 36.9)]),
    "soco/5d": (3, 2, 6, 226.0, [(0, 0, 35.0), (1, 1, 37.6), (2, 1, 37.6)]),
    "soco/6": (2, 12, 24, 696.0, [(0, 0, 20.4), (1, 0, 26.3), (1, 11, 28.7)]),
    "soco/7a": (2, 3, 6, 266.9, [(0, 0, 36.3), (1, 0, 38.3), (1, 2, 41.2)]),
    "soco/7b": (2, 3, 6, 265.0, [(0, 0, 36.6), (1, 0, 37.4), (1, 2, 39.9)]),
    "soco/8": (4, 12, 48, 1506.1, [(0, 0, 19.4), (2, 0, 26.0), (3, 11, 28.9)]),
    "soco/9": (4, 6, 24, 1080.1, [(0, 0, 42.3), (2, 0, 37.3), (3, 5, 38.7)]),
    "soco/10": (2, 6, 12, 586.8, [(0, 0, 41.9), (1, 0, 44.5), (1, 5, 42.4)]),
    "soco/11": (11, 2, 19, 1398.2, [(0, 0, 76.5), (5, 0, 53.9), (10, 0, 75.3)]),
    "soco/12": (2, 6, 12, 546.0, [(0, 0, 38.9), (1, 0, 40.1), (1, 5, 37.9)]),
}
REFERENCE = Path(os.environ.get("DETCO_TEST_REFERENCE", Path(__file__).parents[3] / "shared/reference"))


def _grid(markdown):
    """Return name, epochs and numbers (None for "-", else text without the difference) of each row of Markdown."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ")][2:]
    rows = [[part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [
        (re.sub(r"\\(.)", r"\1", name), epochs, [None if text == "-" else text.split(" ")[0] for text in cells])
        for name, epochs, *cells, _ in rows
    ]


@functools.cache
def _transcribed():
    """Return the tables of the folder with the reference material, by our ids."""
    found = {}
    detco = yaml.safe_load((REFERENCE / "detco_tables.yaml").read_text())["tables"]
    by_id = {table["id"]: table for table in detco}
    for table in detco:
        paper, _, number = table["id"].partition("_T")
        if number and "status" not in table:
            key = {"iccv": "detco", "v1": "detco-v1"}[paper] + "/" + number
            found[key] = table if "rows" in table else by_id[table["same_as"]]
    for table in yaml.safe_load((REFERENCE / "soco_tables.yaml").read_text())["tables"]:
        found[f"soco/{table['id'][1:]}"] = table
    return found


def test_every_table_of_both_papers_is_there():
    assert list(load_paper_tables()) == list(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_a_table_has_the_papers_shape_and_numbers(name, printed):
    grid = _grid(printed("--layout", "paper", "--table", name, "--format", "md"))
    num_rows, num_columns, count, total, picks = SHAPES[name]
    assert len(grid) == num_rows
    assert {len(cells) for _, _, cells in grid} == {num_columns}
    numbers = [float(cell) for _, _, cells in grid for cell in cells if cell not in (None, "NaN")]
    assert len(numbers) == count
    assert sum(numbers) == pytest.approx(total, abs=1e-6)
    for row, column, number in picks:
        assert float(grid[row][2][column]) == number


@pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"no transcription of the papers' tables in {REFERENCE}")
@pytest.mark.parametrize("name", SHAPES)
def test_every_number_of_the_transcription_is_printed_in_its_cell(name, printed):
    grid = _grid(printed("--layout", "paper", "--table", name, "--format", "md"))
    table = _transcribed()[name]
    for (ours, epochs, cells), (theirs, values) in zip(grid, table["rows"].items(), strict=True):
        expected = [None if value is None else value if value == "NaN" else f"{value:.1f}" for value in values]
        assert cells == expected, (ours, theirs)
        told = re.search(r"@(\d+)$|\((\d+)ep\)$", theirs)
        if told:
            # Epochs that the scanned table lost are not printed either.
            assert epochs in ((told[1] or told[2]), "-")
        plain = re.sub(r"@\d+$| \(\d+ep\)$", "", theirs)
        if not re.match(r"\d|[abcd]: |selective|random K|ImageNet|COCO|InstLoc", plain):
            assert ours.removesuffix(" (quoted)") == plain


@pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"no transcription of the papers' tables in {REFERENCE}")
def test_the_transcription_has_no_further_table():
    assert set(_transcribed()) == set(SHAPES)


@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_no_line_is_wider_than_the_terminal(width, printed):
    arguments = [word for name in SHAPES for word in ("--table", name)]
    text = printed("--layout", "paper", *arguments, "--width", width)
    assert max(map(len, text.splitlines())) <= width


def test_wide_tables_fold_and_narrow_ones_do_not(printed):
    def heads(width):
        text = printed("--layout", "paper", "--table", "detco/3", "--width", width)
        return [line for line in text.splitlines() if line.lstrip().startswith("pretraining")], text

    folded, text = heads(80)
    assert len(folded) == 2
    side_by_side, text = heads(120)
    assert len(side_by_side) == 1
    assert "(+1.6)" not in text
    needed = re.search(r"--width (\d+)", " ".join(text.split()))[1]
    with_differences, text = heads(int(needed))
    assert len(with_differences) == 1
    assert "39.8 (+1.6)" in text
    assert "left out" in heads(int(needed) - 1)[1]


def test_the_groups_stand_side_by_side_in_the_papers_order(printed):
    text = printed("--layout", "paper", "--table", "detco/7")
    titles = next(line for line in text.splitlines() if "RetinaNet 12k" in line and "|" in line)
    assert [part.strip(" -") for part in titles.split("|")] == [
        "RetinaNet 12k",
        "RetinaNet 1x",
        "RetinaNet 2x",
        "Keypoint 2x",
    ]


def test_rows_of_other_recipes_are_marked_as_such(printed, paper_table):
    table = paper_table("soco/1", Path("nowhere"))
    assert {row.name for row in table.rows_of("published")} == {"SoCo", "SoCo*"}
    quoted = [entry for row in table.rows_of("quoted") for entry in row.entries]
    assert {entry.recipe for entry in quoted} == {"as quoted by SoCo"}
    (supervised,) = paper_table("soco/12", Path("nowhere")).rows_of("quoted")
    assert supervised.entries[0].task == "coco_maskrcnn_fpn_1x"
    quoted_in = {name for name in SHAPES if paper_table(name, Path("nowhere")).rows_of("quoted")}
    assert quoted_in == {"soco/1", "soco/12"}
    assert "other recipes" in printed("--layout", "paper", "--table", "soco/1")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("detco/1", "mixes two checkpoints"),
        ("detco/3", "mask AP (29.3) exceeds box AP (26.4)"),
        ("detco/3", '"DetCo+AA" in arXiv v1'),
        ("detco/5", "legacy DensePose head"),
        ("detco/9", "57.4 in the MoCo README"),
        ("detco/11", "secondary"),
        ("detco/12", "found in no source"),
        ("soco/1", "fair supervised baseline at 1x is 39.7/35.9"),
        ("soco/1", "800-epoch"),
        ("soco/2", "mask AP (29.3) exceeds box AP (26.4)"),
        ("soco/3", "57.6 here"),
        ("soco/5c", "diverged (NaN)"),
        ("soco/5d", "printed 0.98 twice"),
        ("soco/6", "the SoCo* row is re-assembled"),
        ("soco/7b", "MMDetection"),
        ("soco/9", "it is mask AP75"),
        ("soco/11", "77.3"),
        ("soco/11", "confidence medium"),
        ("soco/12", "Not like for like"),
    ],
)
def test_the_traps_are_told_beside_the_numbers(name, text, printed):
    printed = " ".join(printed("--layout", "paper", "--table", name).split())
    assert text.lower() in printed.lower()


def test_every_protocol_of_a_column_exists_with_its_task_and_recipe():
    tasks = load_tasks()
    for table in load_paper_tables().values():
        for group in table.groups:
            assert set(group.nearest) <= set(tasks)
            if group.protocol is not None:
                task = tasks[group.protocol]
                assert (task.id, task.recipe) == (group.task, group.recipe)


def test_every_published_protocol_fills_a_column():
    filled = {group.protocol for table in load_paper_tables().values() for group in table.groups}
    published = {
        (row.task, row.recipe) for row in load_reference().results if row.paper in ("DetCo", "DetCo-v1", "SoCo")
    }
    for name, task in load_tasks().items():
        assert (name in filled) == ((task.id, task.recipe) in published), name


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(tmp_path, printed):
    tables = [word for name in SHAPES for word in ("--table", name)]
    text = printed("--layout", "paper", *tables, "--format", "latex")
    packages = r"\usepackage[T1]{fontenc}\usepackage{booktabs}\usepackage{graphicx}\extrafloats{100}"
    (tmp_path / "main.tex").write_text(rf"\documentclass{{article}}{packages}\begin{{document}}{text}\end{{document}}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:]


def test_a_table_stands_for_its_sub_tables(printed):
    text = printed("--layout", "paper", "--table", "soco/5")
    assert re.findall(r"^(\S+/\S+): ", text, flags=re.MULTILINE) == ["soco/5a", "soco/5b", "soco/5c", "soco/5d"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "paper", "--table", "detco/33"], "it has detco/1, detco/2"),
        (["--layout", "paper"], "--list-tables"),
        (["--table", "detco/3"], "add --layout paper"),
        (["--layout", "paper", "--table", "detco/3", "--task", "coco_retinanet_1x"], "use --table"),
        (["--layout", "paper", "--table", "detco/3", "--no-reference"], "name run directories"),
        (["--layout", "paper", "--table", "detco/3", "--width", "20"], "--width is 20"),
    ],
)
def test_wrong_input_says_what_to_do(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_list_names_every_table_with_the_tasks_that_fill_it(printed):
    text = printed("--list-tables")
    assert [line.split()[0] for line in text.splitlines()[1:] if not line.startswith(" ")] == list(SHAPES)
    assert "R50-FPN, 1x: coco_maskrcnn_fpn_1x/4conv1fc" in text
    assert "no run of ours (coco_fcos_1x_mmdet); nearest: coco_fcos_1x" in text


def _changed(change):
    data = copy.deepcopy(yaml.safe_load(PAPER_TABLES_FILE.read_text(encoding="utf-8")))
    table = next(table for table in data["tables"] if table["id"] == "soco/6")
    change(table)
    return {**data, "tables": [table]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.pop("brackets"), "missing or an unknown key"),
        (lambda table: table.update(colour="red"), "missing or an unknown key"),
        (lambda table: table["rows"].pop(), "not exactly one row"),
        (lambda table: table["rows"].append(table["rows"][0]), "not exactly one row"),
        (lambda table: table["rows"].append({"name": "b"}), "needs either published numbers or `absent`"),
        (lambda table: table["groups"].pop(), "no columns for"),
        (lambda table: table["groups"][0].update(also=["lvis1_maskrcnn_fpn_2x"]), "two numbers"),
        (lambda table: table["groups"][0].update(columns={"box_AP": "bb"}), "has no column for"),
    ],
)
def test_a_table_that_contradicts_the_numbers_is_refused(change, message):
    with pytest.raises(ReferenceDataError) as error:
        parse_paper_tables(_changed(change), load_reference())
    assert message in str(error.value)
