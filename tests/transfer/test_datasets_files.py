"""Files of published datasets that are not there: found by name, before anything is built."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transfer import d2

if d2.info() is None:
    pytest.skip("Detectron2 is not installed: python tools/install_detectron2.py", allow_module_level=True)

from detectron2.data import MetadataCatalog

from transfer import densepose
from transfer.dataset_files import missing_files, read_images
from transfer.datasets import check_datasets, register_datasets
from transfer.repairs import DatasetError
from transfer.subsets import register_subsets

pytestmark = pytest.mark.d2

IDS = range(1, 7)
ENDINGS = ("polygons.json", "instanceIds.png", "labelIds.png", "labelTrainIds.png")


def image(number: int, folder: str, prefix: str = "") -> dict[str, Any]:
    name = f"{prefix}{number:012d}.jpg"
    return {"license": 3, "id": number, "file_name": name, "coco_url": f"http://x.org/{folder}/{name}", "height": 9}


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def write(file: Path, images: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    annotations = [{"id": 1, "image_id": 1, "segmentation": {"size": [9, 9], "counts": "0}{"}}]
    file.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations, "categories": []}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """COCO, keypoints, a part, LVIS, DensePose's and Cityscapes, complete by name."""
    coco = tmp_path / "coco"
    for split in ("train", "val"):
        write(coco / f"annotations/instances_{split}2017.json", [image(i, f"{split}2017") for i in IDS])
        write(coco / f"annotations/person_keypoints_{split}2017.json", [image(i, f"{split}2017") for i in IDS])
        touch(*(coco / f"{split}2017/{i:012d}.jpg" for i in IDS))
        city = f"{split}/aachen/{split}_000"
        touch(*(tmp_path / f"cityscapes/leftImg8bit/{city}{i}_leftImg8bit.png" for i in IDS))
        touch(*(tmp_path / f"cityscapes/gtFine/{city}{i}_gtFine_{ending}" for i in IDS for ending in ENDINGS))
    write(tmp_path / "lvis/lvis_v1_train.json", [lvis_image(i, "train2017") for i in IDS])
    write(tmp_path / "lvis/lvis_v1_val.json", [lvis_image(1, "train2017"), lvis_image(2, "val2017")])
    write(coco / "annotations/densepose_minival2014.json", [image(i, "val2014", "COCO_val2014_") for i in IDS])
    touch(*(coco / f"val2014/COCO_val2014_{i:012d}.jpg" for i in IDS))
    touch(coco / "subsets/train2017_50pct_seed0.txt")
    (coco / "subsets/train2017_50pct_seed0.txt").write_text("# 3 of 6\n1\n3\n5\n")
    register_datasets(tmp_path)
    register_subsets(tmp_path, seed=0)
    return tmp_path


def lvis_image(number: int, folder: str) -> dict[str, Any]:
    return {key: value for key, value in image(number, folder).items() if key != "file_name"}


def missing(name: str) -> list[str]:
    return missing_files(MetadataCatalog.get(name).as_dict())


NAMES = [
    *("coco_2017_train", "coco_2017_val", "keypoints_coco_2017_train", "keypoints_coco_2017_val"),
    *("coco_2017_train_50pct", "lvis_v1_train", "lvis_v1_val"),
    *(f"cityscapes_fine_{kind}_{split}" for kind in ("instance_seg", "sem_seg") for split in ("train", "val")),
]


def test_nothing_is_missing_of_complete_layouts(root: Path) -> None:
    check_datasets(NAMES)


def removed(folder: str, pattern: str = "*") -> Callable[[Path], None]:
    """What removes files and leaves their folders."""

    def remove(root: Path) -> None:
        found = sorted((root / folder).glob(pattern))
        assert found
        for file in found:
            file.unlink()

    return remove


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("coco_2017_train", removed("coco/train2017"), "6 of the 6 images in {}/coco/train2017: 000000000001.jpg, "),
        ("coco_2017_val", removed("coco/val2017", "*5.jpg"), "1 of the 6 images in {}/coco/val2017: 000000000005.jpg"),
        ("keypoints_coco_2017_val", removed("coco/val2017"), "6 of the 6 images in {}/coco/val2017"),
        ("coco_2017_train_50pct", removed("coco/train2017", "*5.jpg"), "1 of the 3 images in {}/coco/train2017"),
        ("lvis_v1_train", removed("coco/train2017"), "6 of the 6 images in {}/coco/train2017"),
        ("lvis_v1_val", removed("coco/val2017"), "1 of the 1 images in {}/coco/val2017: 000000000002.jpg"),
        (
            "cityscapes_fine_sem_seg_val",
            removed("cityscapes/leftImg8bit/val", "*/*"),
            "{}/cityscapes/leftImg8bit/val/<city>/*_leftImg8bit.png",
        ),
        (
            "cityscapes_fine_sem_seg_train",
            removed("cityscapes/gtFine", "*/*/*_labelTrainIds.png"),
            "make them: CITYSCAPES_DATASET={}/cityscapes csCreateTrainIdLabelImgs",
        ),
        (
            "cityscapes_fine_sem_seg_val",
            removed("cityscapes/gtFine/val/aachen", "*4_gtFine_labelIds.png"),
            "1 of the 6 *_gtFine_labelIds.png in {}/cityscapes/gtFine/val: aachen/val_0004_gtFine_labelIds.png",
        ),
        (
            "cityscapes_fine_instance_seg_train",
            removed("cityscapes/gtFine", "train/*/*_polygons.json"),
            "6 of the 6 *_gtFine_polygons.json in {}/cityscapes/gtFine/train",
        ),
        (
            "cityscapes_fine_instance_seg_val",
            removed("cityscapes/gtFine", "val/*/*_instanceIds.png"),
            "6 of the 6 *_gtFine_instanceIds.png in {}/cityscapes/gtFine/val",
        ),
    ],
)
def test_what_is_missing_is_named_with_its_folder(
    name: str, damage: Callable[[Path], None], said: str, root: Path
) -> None:
    damage(root)
    (sentence,) = missing(name)
    assert said.format(root) in sentence
    with pytest.raises(FileNotFoundError) as caught:
        check_datasets([name])
    assert sentence in str(caught.value)


def test_files_that_a_dataset_does_not_need_are_not_missed(root: Path) -> None:
    removed("coco/train2017", "*[246].jpg")(root)
    removed("cityscapes/gtFine", "*/*/*_labelTrainIds.png")(root)
    removed("coco/val2017", "*[13456].jpg")(root)
    check_datasets(["coco_2017_train_50pct", "lvis_v1_val", "cityscapes_fine_instance_seg_val"])


@pytest.mark.skipif(not densepose.is_installed(), reason="needs the DensePose project of Detectron2")
def test_images_of_densepose_are_looked_for(root: Path) -> None:
    densepose.register_datasets(root)
    check_datasets(["densepose_coco_2014_minival"])
    removed("coco/val2014", "*3.jpg")(root)
    assert "1 of the 6 images in" in missing("densepose_coco_2014_minival")[0]


def test_the_command_for_the_train_ids_is_said_where_the_whole_folder_is_missing(tmp_path: Path) -> None:
    register_datasets(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"ROOT/cityscapes csCreateTrainIdLabelImgs"):
        check_datasets(["cityscapes_fine_sem_seg_val"])


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("after", [False, True])
def test_images_are_read_as_a_parser_reads_them(indent: int | None, after: bool, tmp_path: Path) -> None:
    generator = random.Random(0)
    images = [image(i, generator.choice("abc")) | {"neg_category_ids": [1, 2]} for i in range(50)]
    images[7]["file_name"] = 'a "quoted" \u00e4.jpg'
    lists = {"annotations": [{"id": 1, "segmentation": {"counts": "}{"}}], "images": images}
    content = lists if after else dict(reversed(lists.items()))
    (tmp_path / "a.json").write_text(json.dumps(content, indent=indent))
    assert read_images(tmp_path / "a.json", "file_name") == images


@pytest.mark.parametrize("name", ["{1}.jpg", "}.jpg", "{.jpg"])
def test_braces_in_a_name_are_part_of_it(name: str, tmp_path: Path) -> None:
    images = [image(1, "a"), image(2, "a") | {"file_name": name}]
    write(tmp_path / "a.json", images)
    assert read_images(tmp_path / "a.json", "file_name") == images


def test_annotations_that_are_cut_short_are_refused(root: Path) -> None:
    file = root / "coco/annotations/instances_val2017.json"
    whole = file.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(DatasetError, match=f"instances_val2017.json is cut short after {size} bytes"):
            check_datasets(["coco_2017_val"])
    file.write_bytes(whole[: whole.rindex(b"file_name") + 12] + b"}")
    with pytest.raises(DatasetError, match="no JSON"):
        check_datasets(["coco_2017_val"])


def test_annotations_without_images_are_refused(root: Path) -> None:
    write(root / "coco/annotations/instances_val2017.json", [])
    assert missing("coco_2017_val") == [f"{root}/coco/annotations/instances_val2017.json lists none of its images"]
