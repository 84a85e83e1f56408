"""Parts of COCO: nested, the same on every machine, and what a run on one of them sees and records."""

import itertools
import json
import random
import shutil
from pathlib import Path

import pytest

from transfer import d2

pytestmark = pytest.mark.d2

d2.require()

from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402

from transfer.datasets import check_datasets, register_datasets  # noqa: E402
from transfer.repairs import DatasetError  # noqa: E402
from transfer.subsets import (  # noqa: E402
    NAMES,
    PERCENTS,
    describe_subsets,
    draw_subset,
    list_file,
    read_list,
    register_subsets,
    write_lists,
)

EXPECTED_FIRST = [46, 463, 604, 616, 763, 802, 808, 898]
IDS = [3 * number + 1 for number in range(400)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A COCO layout of 400 listed images, each with one box; no pixels are needed to list them."""
    annotations = tmp_path / "coco" / "annotations"
    annotations.mkdir(parents=True)
    (tmp_path / "coco" / "train2017").mkdir()
    content = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", "width": 40, "height": 30} for i in IDS],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0} for i in IDS
        ],
        "categories": [{"id": entry["id"], "name": entry["name"]} for entry in categories()],
    }
    (annotations / "instances_train2017.json").write_text(json.dumps(content))
    return tmp_path


def categories() -> list[dict]:
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    return [entry for entry in COCO_CATEGORIES if entry["isthing"]]


def test_parts_are_nested_and_have_the_stated_sizes() -> None:
    parts = [draw_subset(range(118287), percent, seed=0) for percent in PERCENTS]
    assert [len(part) for part in parts] == [1183, 2366, 5914, 11829, 59144]
    for smaller, larger in itertools.pairwise(parts):
        assert set(smaller) < set(larger)


def test_a_part_does_not_depend_on_the_order_of_the_annotations() -> None:
    shuffled = random.Random(0).sample(IDS, len(IDS))
    assert draw_subset(shuffled, 10, seed=1) == draw_subset(IDS, 10, seed=1)


def test_a_part_of_very_few_images_holds_one() -> None:
    assert len(draw_subset(IDS[:20], 1, seed=0)) == len(draw_subset(IDS[:1], 1, seed=0)) == 1
    assert draw_subset([], 1, seed=0) == []


def test_the_lists_are_these_for_ever() -> None:
    assert draw_subset(IDS, 2, seed=0) == EXPECTED_FIRST
    assert draw_subset(IDS, 2, seed=1) != EXPECTED_FIRST


def test_images_are_drawn_evenly_from_the_whole_and_independently_for_each_seed() -> None:
    drawn = [number for seed in range(200) for number in draw_subset(IDS, 10, seed)]
    counts = [drawn.count(number) for number in IDS]
    # 200 draws of 1 in 10: 20 +- 4.2; 400 images stay within 4.5 standard deviations but once in 300 such tests.
    assert sum(counts) == 200 * 40
    assert min(counts) > 1
    assert max(counts) < 39


def test_a_registered_part_holds_the_images_of_its_list(root: Path) -> None:
    write_lists(root, [0, 1])
    register_datasets(root)
    register_subsets(root, seed=1)
    records = DatasetCatalog.get("coco_2017_train_10pct")
    assert [record["image_id"] for record in records] == read_list(list_file(root, 10, 1))
    assert MetadataCatalog.get("coco_2017_train_10pct").thing_classes[0] == "person"
    register_subsets(root, seed=0)
    other = [record["image_id"] for record in DatasetCatalog.get("coco_2017_train_10pct")]
    assert other == read_list(list_file(root, 10, 0)) != read_list(list_file(root, 10, 1))


def test_a_list_that_was_not_drawn_is_named_with_the_command_that_draws_it(root: Path) -> None:
    register_datasets(root)
    register_subsets(root, seed=7)
    with pytest.raises(FileNotFoundError, match=r"train2017_1pct_seed7\.txt[\s\S]*make_coco_subsets\.py ROOT --seeds"):
        check_datasets(["coco_2017_train_1pct"])


def test_the_record_names_list_size_and_digest_of_parts_only(root: Path) -> None:
    write_lists(root, [0])
    register_datasets(root)
    register_subsets(root, seed=0)
    described = describe_subsets(["coco_2017_train", "coco_2017_train_5pct"])
    assert described.keys() == {"coco_2017_train_5pct"}
    entry = described["coco_2017_train_5pct"]
    assert (entry["list"], entry["images"], len(entry["sha256"])) == ("train2017_5pct_seed0.txt", 20, 64)


def test_a_list_of_other_annotations_is_neither_replaced_nor_trained_on(root: Path) -> None:
    write_lists(root, [0])
    path = list_file(root, 1, 0)
    path.write_text("2\n5\n")
    with pytest.raises(DatasetError, match="holds other ids"):
        write_lists(root, [0])
    assert path.read_text() == "2\n5\n"
    register_datasets(root)
    register_subsets(root, seed=0)
    with pytest.raises(DatasetError, match="2 of the 2 ids"):
        DatasetCatalog.get("coco_2017_train_1pct")


def test_a_line_that_is_no_id_is_named_with_its_file(root: Path) -> None:
    write_lists(root, [0])
    path = list_file(root, 1, 0)
    path.write_text("# a comment\n7\nabc\n")
    with pytest.raises(DatasetError, match=r"train2017_1pct_seed0\.txt holds 'abc'"):
        read_list(path)


def test_drawing_again_changes_nothing(root: Path) -> None:
    before = {path: path.read_bytes() for path in write_lists(root, [0, 1, 2])}
    assert len(before) == 3 * len(NAMES)
    assert {path: path.read_bytes() for path in write_lists(root, [0, 1, 2])} == before


def test_the_tool_draws_three_seeds_and_refuses_a_folder_without_coco(root: Path, capsys, load_tool) -> None:
    tool = load_tool("make_coco_subsets")
    assert tool.main([str(root)]) == 0
    assert "train2017_50pct_seed2.txt: 200 images" in capsys.readouterr().out
    shutil.rmtree(root / "coco")
    assert tool.main([str(root)]) == 2
    assert "instances_train2017.json" in capsys.readouterr().err
