"""Datasets in Detectron2's catalogs: builtin ones under a root, and the user's own."""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from transfer import d2

if d2.info() is None:
    pytest.skip("Detectron2 is not installed: python tools/install_detectron2.py", allow_module_level=True)

from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)

from transfer.datasets import (
    check_datasets,
    parse_source,
    register_datasets,
    register_user_dataset,
    register_user_datasets,
)
from transfer.repairs import DatasetError

pytestmark = pytest.mark.d2
REAL = Path(os.environ.get("DETCO_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
needs_real = pytest.mark.skipif(
    not (REAL / "coco_animals").is_dir(), reason=f"{REAL / 'coco_animals'} does not exist; set $DETCO_TEST_DATA"
)


def write_voc(folder: Path, split: str = "trainval") -> None:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(folder / "JPEGImages/000001.jpg")
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>20</ymax></bndbox>"
    size = "<size><width>40</width><height>30</height></size>"
    (folder / "Annotations/000001.xml").write_text(f"<a>{size}<object><name>cat</name>{box}</object></a>")
    (folder / f"ImageSets/Main/{split}.txt").write_text("000001\n")


def write_coco(file: Path, names: dict[int, str], with_mask: bool = True) -> None:
    (file.parent / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(file.parent / "images/1.jpg")
    mask = {"segmentation": [[1, 1, 20, 1, 20, 20]]} if with_mask else {}
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 40, "height": 30}],
        "annotations": [
            {"id": key, "image_id": 1, "category_id": key, "bbox": [1, 1, 19, 19], "iscrowd": 0, **mask}
            for key in names
        ],
        "categories": [{"id": key, "name": name} for key, name in names.items()],
    }
    file.write_text(json.dumps(content))


def test_builtin_names_move_to_the_root_and_others_stay(tmp_path: Path) -> None:
    DatasetCatalog.pop("mine", None)
    DatasetCatalog.register("mine", lambda: [{"mine": 1}])
    MetadataCatalog.get("mine").thing_classes = ["own"]
    before = set(DatasetCatalog)
    for root in (tmp_path / "first", tmp_path / "second"):
        register_datasets(root)
        assert MetadataCatalog.get("coco_2017_val").json_file == str(root / "coco/annotations/instances_val2017.json")
        assert MetadataCatalog.get("voc_2007_test").dirname == str(root / "VOC2007")
        assert MetadataCatalog.get("cityscapes_fine_instance_seg_val").image_dir.startswith(str(root))
        assert MetadataCatalog.get("lvis_v1_val").json_file.startswith(str(root))
    assert set(DatasetCatalog) == before
    assert DatasetCatalog.get("mine") == [{"mine": 1}]
    assert MetadataCatalog.get("mine").thing_classes == ["own"]


def test_a_registered_root_is_read_by_detectron2(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOC2007")
    register_datasets(tmp_path)
    check_datasets(["voc_2007_trainval"])
    # Detectron2's own reader cannot take a split of a single image.
    (tmp_path / "VOC2007/ImageSets/Main/trainval.txt").write_text("000001\n000001\n")
    records = DatasetCatalog.get("voc_2007_trainval")
    assert records[0]["annotations"][0]["bbox"] == [0, 0, 20, 20]


def test_missing_files_are_listed_before_anything_is_built(tmp_path: Path) -> None:
    register_datasets(tmp_path)
    write_voc(tmp_path / "VOC2012")
    (tmp_path / "VOC2012/ImageSets/Main/trainval.txt").write_text("000001\n000002\n")
    with pytest.raises(FileNotFoundError) as caught:
        check_datasets(["coco_2017_train", "keypoints_coco_2017_val", "voc_2012_trainval", "voc_2007_test"])
    message = str(caught.value)
    assert f"coco_2017_train: {tmp_path}/coco/annotations/instances_train2017.json" in message
    assert f"coco_2017_train: {tmp_path}/coco/train2017" in message
    assert f"1 of the 2 listed files in {tmp_path}/VOC2012/Annotations: 000002.xml" in message
    assert f"1 of the 2 listed files in {tmp_path}/VOC2012/JPEGImages: 000002.jpg" in message
    assert f"voc_2007_test: {tmp_path}/VOC2007/ImageSets/Main/test.txt" in message
    assert "  coco/annotations/instances_{train,val}2017.json, coco/{train,val}2017/*.jpg\n" in message
    assert "  coco/annotations/person_keypoints_{train,val}2017.json, coco/{train,val}2017/*.jpg\n" in message
    assert "$DETECTRON2_DATASETS" in message


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="no dataset 'voc_2007_tets'; did you mean voc_2007_test"):
        check_datasets(["voc_2007_tets"])


def test_sources_are_split_into_path_and_rest(tmp_path: Path) -> None:
    write_voc(tmp_path / "a:b")
    write_coco(tmp_path / "x.json", {1: "cat"})
    assert parse_source(f"{tmp_path}/a:b:trainval") == (tmp_path / "a:b", "trainval")
    assert parse_source(f"{tmp_path}/x.json") == (tmp_path / "x.json", "")
    assert parse_source(f"{tmp_path}/x.json:/some/images") == (tmp_path / "x.json", "/some/images")
    with pytest.raises(DatasetError, match=r"which split of .*a:b\? .*:SPLIT with one of: trainval"):
        parse_source(f"{tmp_path}/a:b")
    with pytest.raises(
        DatasetError, match=r"'nowhere:train' is not a dataset: VOC \"DIR:SPLIT\".* nowhere is not a folder"
    ):
        parse_source("nowhere:train")
    with pytest.raises(DatasetError, match=r"y.json does not exist"):
        parse_source(f"{tmp_path}/y.json")


def test_a_validation_set_shares_the_classes_of_the_training_set(tmp_path: Path) -> None:
    write_coco(tmp_path / "train.json", {3: "cat", 5: "dog", 9: "eel"})
    write_coco(tmp_path / "val.json", {1: "eel", 2: "cat"})
    train, val = register_user_datasets(f"{tmp_path}/train.json", f"{tmp_path}/val.json", with_masks=True)
    assert train.classes == val.classes == ("cat", "dog", "eel")
    assert (train.name, val.name) == ("user_train", "user_val")
    assert val.notes == ("no object of 1 of the 3 classes (dog)",)
    assert [a["category_id"] for a in DatasetCatalog.get("user_val")[0]["annotations"]] == [2, 0]
    assert MetadataCatalog.get("user_val").thing_classes == ["cat", "dog", "eel"]


def test_voc_and_coco_can_be_mixed_if_the_classes_fit(tmp_path: Path) -> None:
    write_voc(tmp_path / "voc")
    write_coco(tmp_path / "train.json", {3: "ant", 5: "cat"})
    _, val = register_user_datasets(f"{tmp_path}/train.json", f"{tmp_path}/voc:trainval")
    assert val.evaluator_type == "voc_folder"
    (record,) = DatasetCatalog.get("user_val")
    assert record["annotations"][0]["category_id"] == 1
    entry = MetadataCatalog.get("user_val")
    assert (entry.dirname, entry.split, entry.year) == (str(tmp_path / "voc"), "trainval", 2007)
    check_datasets(["user_train", "user_val"])


def test_a_name_can_be_registered_again(tmp_path: Path) -> None:
    write_coco(tmp_path / "train.json", {3: "cat"})
    register_user_dataset("again", f"{tmp_path}/train.json")
    write_coco(tmp_path / "train.json", {3: "dog"})
    register_user_dataset("again", f"{tmp_path}/train.json")
    DatasetCatalog.get("again")
    assert MetadataCatalog.get("again").thing_classes == ["dog"]


def test_a_mask_head_needs_masks(tmp_path: Path) -> None:
    write_voc(tmp_path / "voc")
    with pytest.raises(DatasetError, match=r"has boxes only, but the network has a mask head: set MODEL.MASK_ON False"):
        register_user_dataset("boxes", f"{tmp_path}/voc:trainval", with_masks=True)
    write_coco(tmp_path / "train.json", {3: "cat"}, with_mask=False)
    with pytest.raises(
        DatasetError, match=r"no object of .*train.json is usable. 1 objects without a valid mask dropped"
    ):
        register_user_dataset("boxes", f"{tmp_path}/train.json", with_masks=True)


@needs_real
@pytest.mark.realdata
@pytest.mark.parametrize(
    ("source", "objects", "has_masks"),
    [
        ("voc_blood_cells:train", 2804, False),
        ("coco_animals/train.json", 325, True),
        ("coco_mini/instances_train.json", 508, True),
    ],
)
def test_real_sets_go_through_detectron2s_loader(source: str, objects: int, has_masks: bool) -> None:
    train = register_user_dataset("real", f"{REAL}/{source}")
    assert (train.num_objects, train.has_masks) == (objects, has_masks)
    records = get_detection_dataset_dicts(["real"], filter_empty=False)
    assert len(records) == train.num_images
    assert sum(len(record["annotations"]) for record in records) == objects
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = (96,)
    cfg.MODEL.MASK_ON = has_masks
    mapper = DatasetMapper(cfg, is_train=True)
    loader = build_detection_train_loader(records, mapper=mapper, total_batch_size=2, num_workers=0)
    for _, batch in zip(range(3), loader, strict=False):
        for item in batch:
            assert item["image"].dtype == torch.uint8
            assert item["instances"].has("gt_masks") == (has_masks and len(item["instances"]) > 0)
            assert bool(item["instances"].gt_boxes.nonempty().all())
