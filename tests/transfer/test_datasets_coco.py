"""Reading COCO files: hostile ones made up here, and real ones."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from transfer.coco_source import CocoSet, read_coco
from transfer.repairs import DatasetError

REAL = Path(os.environ.get("DETCO_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
needs_real = pytest.mark.skipif(
    not (REAL / "coco_animals").is_dir(), reason=f"{REAL / 'coco_animals'} does not exist; set $DETCO_TEST_DATA"
)
SQUARE = [[10, 10, 30, 10, 30, 30, 10, 30]]
RLE = {"size": [80, 100], "counts": [0, 8000]}


def image(number: int, **fields: Any) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number}.png", "width": 100, "height": 80, **fields}


def label(number: Any, box: Any = (10, 10, 20, 20), **fields: Any) -> dict[str, Any]:
    return {"id": number, "image_id": 1, "category_id": 1, "bbox": list(box), **fields}


class CocoFile:
    """Writes a COCO file and its images."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / "train.json"
        self.images = [image(1)]
        self.annotations: list[dict[str, Any]] = []
        self.categories = [{"id": 1, "name": "cat"}]

    def read(self, image_dir: str = "train", **options: Any) -> CocoSet:
        folder = self.root / image_dir
        folder.mkdir(parents=True, exist_ok=True)
        for entry in self.images:
            Image.new("RGB", (100, 80)).save(folder / entry["file_name"])
        return self.reread(**options)

    def reread(self, **options: Any) -> CocoSet:
        content = {"images": self.images, "annotations": self.annotations, "categories": self.categories}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(content))
        return read_coco(self.path, **options)


@pytest.fixture
def coco(tmp_path: Path) -> CocoFile:
    return CocoFile(tmp_path / "set")


def test_ids_become_contiguous_from_one_in_the_order_of_the_category_ids(coco: CocoFile) -> None:
    coco.categories = [
        {"id": 9, "name": "nine"},
        {"id": 0, "name": "zero"},
        {"id": 4, "name": "four", "supercategory": "n"},
    ]
    coco.annotations = [label(0, category_id=9), label(77, category_id=0), label(5, category_id=4)]
    found = coco.read()
    assert found.classes == ("zero", "four", "nine")
    assert [category["id"] for category in found.content["categories"]] == [1, 2, 3]
    assert found.content["categories"][1] == {"id": 2, "name": "four", "supercategory": "n"}
    assert [(a["id"], a["category_id"]) for a in found.content["annotations"]] == [(1, 3), (2, 1), (3, 2)]


def test_categories_with_the_same_name_are_refused_with_their_ids(coco: CocoFile) -> None:
    coco.categories = [{"id": 0, "name": "cat"}, {"id": 1, "name": "cat"}]
    coco.annotations = [label(1)]
    with pytest.raises(DatasetError, match=r"the same name: 'cat' \(id 0, 0 objects\), 'cat' \(id 1, 1 objects\)"):
        coco.read()
    coco.categories = [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]
    with pytest.raises(DatasetError, match="categories with the same id"):
        coco.read()


def test_boxes_are_dropped_or_clipped_and_counted(coco: CocoFile) -> None:
    boxes = [(10, 10, 0, 5), (10, 10, -3, 5), (100, 10, 5, 5), (90, 70, 20, 20), (99.5, 0, 1, 80)]
    coco.annotations = [label(number, box) for number, box in enumerate(boxes)]
    found = coco.read()
    assert [a["bbox"] for a in found.content["annotations"]] == [[90, 70, 10, 10], [99.5, 0, 0.5, 80]]
    assert found.notes == (
        "2 boxes without area dropped (annotation 0, annotation 1)",
        "1 boxes outside their image dropped (annotation 2)",
        "1 boxes reaching outside their image clipped (annotation 3)",
    )


def test_what_pycocotools_needs_is_filled_in(coco: CocoFile) -> None:
    coco.annotations = [label(1, (0, 0, 10, 20)), label(2, iscrowd=1, area=3.5), label(3, ignore=1)]
    first, second, third = coco.read().content["annotations"]
    assert (first["iscrowd"], first["area"]) == (0, 200)
    assert (second["iscrowd"], second["area"]) == (1, 3.5)
    assert third["iscrowd"] == 1
    assert "ignore" not in third


def test_masks_are_all_or_none(coco: CocoFile) -> None:
    coco.annotations = [label(1, segmentation=SQUARE), label(2), label(3, segmentation=[[1, 1, 5, 5]])]
    found = coco.read()
    assert not found.has_masks
    assert all("segmentation" not in a for a in found.content["annotations"])
    assert found.notes == (
        "2 objects without a valid mask; the set is used for boxes only (annotation 2, annotation 3)",
    )
    found = coco.read(with_masks=True)
    assert found.has_masks
    assert [a["segmentation"] for a in found.content["annotations"]] == [SQUARE]
    assert found.notes == ("2 objects without a valid mask dropped (annotation 2, annotation 3)",)


def test_run_length_masks_are_noticed_unless_they_are_crowds(coco: CocoFile) -> None:
    coco.annotations = [label(1, segmentation=SQUARE), label(2, segmentation=RLE, iscrowd=1)]
    assert not coco.read().has_rle
    coco.annotations[1]["iscrowd"] = 0
    assert coco.read().has_rle
    coco.annotations[1]["segmentation"] = {"size": [100, 80], "counts": [0, 8000]}  # transposed: of another image
    assert not coco.read().has_masks


def test_images_without_objects_and_objects_without_images_are_counted(coco: CocoFile) -> None:
    coco.images.append(image(2))
    coco.annotations = [label(1), label(2, image_id=99)]
    assert coco.read().notes == (
        "1 objects of images that are not in the file dropped (annotation 2)",
        "1 images without an object (2.png)",
    )


def test_missing_images_are_refused_by_name(coco: CocoFile) -> None:
    coco.annotations = [label(1)]
    coco.images.append(image(2))
    coco.read()
    (coco.root / "train/2.png").unlink()
    with pytest.raises(DatasetError, match=r"1 of the 2 images of .*train.json are not in .*train: 2.png"):
        coco.reread()


@pytest.mark.parametrize("image_dir", [".", "train", "images", "../images", "../train"])
def test_the_image_folder_is_found_near_the_file(coco: CocoFile, image_dir: str) -> None:
    coco.annotations = [label(1)]
    assert coco.read(image_dir).image_dir.resolve() == (coco.root / image_dir).resolve()


def test_coco_s_own_layout_is_found(coco: CocoFile, tmp_path: Path) -> None:
    coco.path = tmp_path / "set" / "annotations" / "instances_val2017.json"
    coco.annotations = [label(1)]
    assert coco.read("val2017").image_dir == tmp_path / "set" / "val2017"


def test_images_that_are_nowhere_near_are_asked_for(coco: CocoFile) -> None:
    coco.annotations = [label(1)]
    with pytest.raises(
        DatasetError, match=r"\(say, 1.png\) are in none of: .* Name their folder: .*train.json:IMAGE_DIR"
    ):
        coco.reread()


def test_a_missing_size_is_read_from_the_image(coco: CocoFile) -> None:
    coco.images[0].update(width=None, height=0)
    coco.annotations = [label(1, (50, 50, 500, 500))]
    found = coco.read()
    assert (found.content["images"][0]["width"], found.content["images"][0]["height"]) == (100, 80)
    assert found.content["annotations"][0]["bbox"] == [50, 50, 50, 30]


def test_a_validation_set_takes_the_classes_of_the_training_set_by_name(coco: CocoFile) -> None:
    coco.categories = [{"id": 3, "name": "dog"}, {"id": 8, "name": "unused"}]
    coco.annotations = [label(1, category_id=3)]
    found = coco.read(classes=("cat", "dog", "eel"))
    assert found.classes == ("cat", "dog", "eel")
    assert found.content["annotations"][0]["category_id"] == 2
    assert [c["name"] for c in found.content["categories"]] == ["cat", "dog", "eel"]
    with pytest.raises(DatasetError, match="the class 'dog' is not one of the training set's: cat, eel"):
        coco.read(classes=("cat", "eel"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": [label(1, category_id=5)]}, r"annotation 1: category_id 5 is not among the categories \[1\]"),
        ({"annotations": [label(1, (1, 2, 3))]}, r"annotation 1: bbox must be four numbers .*; it is \[1, 2, 3\]"),
        ({"annotations": [{"id": 4, "image_id": 1, "category_id": 1}]}, "annotation 4: bbox must be four numbers"),
        ({"annotations": []}, "no object of .* is usable"),
        ({"images": [image(1), image(1)]}, "several images with the same id: 1"),
        ({"categories": [{"id": 1}]}, r"every entry of 'categories' needs \('id', 'name'\)"),
        ({"categories": []}, "has no categories"),
    ],
)
def test_nonsense_is_refused_with_its_place(coco: CocoFile, change: dict[str, Any], message: str) -> None:
    coco.annotations = [label(1)]
    for name, value in change.items():
        setattr(coco, name, value)
    with pytest.raises(DatasetError, match=message):
        coco.read()


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "not in COCO's instances format")])
def test_another_kind_of_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DatasetError, match=message):
        read_coco(tmp_path / "a.json")


@needs_real
@pytest.mark.realdata
def test_real_sets_keep_all_they_have() -> None:
    animals = read_coco(REAL / "coco_animals" / "train.json")
    assert (len(animals.content["images"]), animals.has_masks, animals.has_rle) == (258, True, False)
    assert animals.image_dir.name == "train"
    mini = read_coco(REAL / "coco_mini" / "instances_train.json")
    assert (len(mini.classes), mini.classes[:2], mini.classes[-1]) == (80, ("person", "bicycle"), "toothbrush")
    raw = json.loads((REAL / "coco_mini" / "instances_train.json").read_text())
    assert len(mini.content["annotations"]) == len(raw["annotations"])
    assert sum(a["iscrowd"] for a in mini.content["annotations"]) == sum(a["iscrowd"] for a in raw["annotations"])
