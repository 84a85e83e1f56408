"""The demo data through Detectron2's own loaders, and its ground truth through the real evaluators: right is 100."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transfer import d2

if d2.info() is None:
    pytest.skip("Detectron2 is not installed: python tools/install_detectron2.py", allow_module_level=True)

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.structures import Boxes, BoxMode, Instances

from transfer.datasets import check_datasets, register_datasets
from transfer.evaluation import build_evaluator

pytestmark = pytest.mark.d2
TOOLS = Path(__file__).parents[2] / "tools"
Record = dict[str, Any]
NAMES = (
    *("keypoints_coco_2017_train", "keypoints_coco_2017_val", "lvis_v1_train", "lvis_v1_val"),
    *("cityscapes_fine_instance_seg_train", "cityscapes_fine_instance_seg_val"),
    *("cityscapes_fine_sem_seg_train", "cityscapes_fine_sem_seg_val"),
)


@contextmanager
def catalogs_kept() -> Iterator[None]:
    datasets, metadata = dict(DatasetCatalog), dict(MetadataCatalog)
    try:
        yield
    finally:
        for catalog, content in ((DatasetCatalog, datasets), (MetadataCatalog, metadata)):
            catalog.clear()
            catalog.update(content)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], list[Record]]]:
    """What Detectron2 loads for a dataset name, from demo data drawn for this file."""
    for package in ("lvis", "cityscapesscripts", "shapely"):
        pytest.importorskip(package)
    out = tmp_path_factory.mktemp("demo") / "data"
    command = [sys.executable, TOOLS / "make_demo_data.py", out, "--images", "1"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with catalogs_kept():
        register_datasets(out)
        yield DatasetCatalog.get


def evaluate(name: str, predictions: list[tuple[Record, Record]], folder: Path) -> dict[str, dict[str, float]]:
    """Results of the evaluator that a run would use, for (input, output) pairs."""
    evaluator = build_evaluator(get_cfg(), name, str(folder))
    evaluator.reset()
    for item, output in predictions:
        evaluator.process([item], [output])
    result: dict[str, dict[str, float]] = evaluator.evaluate()
    return result


def perfect(record: Record) -> tuple[Record, Instances]:
    """A record as input, and its objects (crowds left out) as sure predictions: boxes and classes."""
    size = (record["height"], record["width"])
    objects = [item for item in record["annotations"] if not item.get("iscrowd")]
    boxes = [BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS) for item in objects]
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.pred_classes = torch.tensor([item["category_id"] for item in objects], dtype=torch.long)
    instances.scores = torch.ones(len(objects))
    return {**record, "annotations": objects}, instances


def masks_of(record: Record) -> torch.Tensor:
    """The masks that Detectron2 would train with, bool, shape (N, H, W)."""
    objects = [{**item, "bbox": list(item["bbox"])} for item in record["annotations"]]
    size = (record["height"], record["width"])
    masks: torch.Tensor = annotations_to_instances(objects, size, "bitmask").gt_masks.tensor
    return masks


def test_every_layout_is_complete_and_loads(records: Callable[[str], list[Record]]) -> None:
    check_datasets(NAMES)
    counts = {name: len(records(name)) for name in NAMES}
    # LVIS takes four of COCO's training images for validation.
    assert list(counts.values()) == [48, 16, 44, 20, 8, 4, 8, 4]
    for name in NAMES:
        for record in records(name):
            with Image.open(record["file_name"]) as image:
                assert image.size == (record["width"], record["height"])


def test_images_with_people_stay_after_detectron2_has_filtered_and_mapped_them(
    records: Callable[[str], list[Record]],
) -> None:
    names = ["keypoints_coco_2017_train"]
    assert len(records(names[0])) == 48
    kept = get_detection_dataset_dicts(names, filter_empty=True, min_keypoints=1)
    assert 10 <= len(kept) < 48
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.MODEL.KEYPOINT_ON, cfg.INPUT.RANDOM_FLIP = names, True, "none"
    for record in kept:
        instances = DatasetMapper(cfg, is_train=True)(record)["instances"]
        inside = instances.gt_boxes.tensor[:, None, :2] <= instances.gt_keypoints.tensor[..., :2]
        assert (inside.all(dim=-1) | (instances.gt_keypoints.tensor[..., 2] == 0)).all()


def test_true_keypoints_score_100(records: Callable[[str], list[Record]], tmp_path: Path) -> None:
    predictions = []
    for record in records("keypoints_coco_2017_val"):
        item, instances = perfect(record)
        points = [annotation["keypoints"] for annotation in item["annotations"]]
        instances.pred_keypoints = torch.tensor(points, dtype=torch.float32).reshape(-1, 17, 3)
        predictions.append((item, {"instances": instances}))
    result = evaluate("keypoints_coco_2017_val", predictions, tmp_path)
    assert result["keypoints"]["AP"] == pytest.approx(100)
    assert result["bbox"]["AP"] == pytest.approx(100)


def test_keypoints_of_left_and_right_exchanged_score_less(
    records: Callable[[str], list[Record]], tmp_path: Path
) -> None:
    order = [0, *(index + 1 if index % 2 else index - 1 for index in range(1, 17))]
    predictions = []
    for record in records("keypoints_coco_2017_val"):
        item, instances = perfect(record)
        points = torch.tensor([annotation["keypoints"] for annotation in item["annotations"]], dtype=torch.float32)
        instances.pred_keypoints = points.reshape(-1, 17, 3)[:, order]
        predictions.append((item, {"instances": instances}))
    assert evaluate("keypoints_coco_2017_val", predictions, tmp_path)["keypoints"]["AP"] < 20


def test_true_lvis_objects_score_100_for_rare_common_and_frequent_classes(
    records: Callable[[str], list[Record]], tmp_path: Path
) -> None:
    predictions = []
    for record in records("lvis_v1_val"):
        item, instances = perfect(record)
        if item["annotations"]:
            instances.pred_masks = masks_of(item)
        predictions.append((item, {"instances": instances}))
    result = evaluate("lvis_v1_val", predictions, tmp_path)
    for task in ("bbox", "segm"):
        for metric in ("AP", "APr", "APc", "APf"):
            assert result[task][metric] == pytest.approx(100, abs=0.01), (task, metric)


def test_lvis_charges_for_classes_that_an_image_is_known_not_to_show(
    records: Callable[[str], list[Record]], tmp_path: Path
) -> None:
    scores = {}
    for wrong in ("neg_category_ids", "unknown"):
        predictions = []
        for record in records("lvis_v1_val"):
            item, instances = perfect(record)
            known = {n - 1 for n in record["neg_category_ids"]} | {a["category_id"] for a in record["annotations"]}
            drawn = {a["category_id"] for other in records("lvis_v1_val") for a in other["annotations"]}
            classes = [n - 1 for n in record["neg_category_ids"]] if wrong != "unknown" else sorted(drawn - known)
            extra = Instances(instances.image_size)
            extra.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, 50.0, 50.0]] * len(classes)))
            extra.pred_classes = torch.tensor(classes)
            extra.scores = torch.full((len(classes),), 2.0)
            predictions.append((item, {"instances": Instances.cat([instances, extra])}))
        scores[wrong] = evaluate("lvis_v1_val", predictions, tmp_path)["bbox"]["AP"]
    assert scores["unknown"] == pytest.approx(100, abs=0.01)
    assert scores["neg_category_ids"] < 90


def test_lvis_classes_are_detectron2_s(records: Callable[[str], list[Record]]) -> None:
    lvis = pytest.importorskip("lvis")
    categories = pytest.importorskip("detectron2.data.datasets.lvis_v1_categories").LVIS_CATEGORIES
    real = {category["id"]: category for category in categories}
    api = lvis.LVIS(MetadataCatalog.get("lvis_v1_train").json_file)
    assert set(api.cats) == set(real)
    for number in {annotation["category_id"] for annotation in api.anns.values()}:
        for key in ("name", "synset", "frequency"):
            assert api.cats[number][key] == real[number][key]


def test_true_cityscapes_instances_score_100(records: Callable[[str], list[Record]], tmp_path: Path) -> None:
    name = "cityscapes_fine_instance_seg_val"
    ids = [24, 25, 26, 27, 28, 31, 32, 33]
    predictions = []
    for record in records(name):
        path = (
            record["file_name"].replace("leftImg8bit/", "gtFine/").replace("leftImg8bit.png", "gtFine_instanceIds.png")
        )
        image = np.asarray(Image.open(path)).astype(np.int64)
        numbers = [int(number) for number in np.unique(image) if number >= 1000]
        instances = Instances(image.shape)
        instances.pred_masks = torch.from_numpy(np.stack([image == number for number in numbers]))
        instances.pred_classes = torch.tensor([ids.index(number // 1000) for number in numbers])
        instances.scores = torch.ones(len(numbers))
        predictions.append((record, {"instances": instances}))
    result = evaluate(name, predictions, tmp_path)["segm"]
    assert (result["AP"], result["AP50"]) == pytest.approx((100, 100))


def test_cityscapes_polygons_as_detectron2_loads_them_score_nearly_100(
    records: Callable[[str], list[Record]], tmp_path: Path
) -> None:
    name = "cityscapes_fine_instance_seg_val"
    predictions = []
    for record in records(name):
        item, instances = perfect(record)
        instances.pred_masks = masks_of(item)
        predictions.append((item, {"instances": instances}))
    result = evaluate(name, predictions, tmp_path)["segm"]
    assert result["AP50"] == pytest.approx(100)
    assert result["AP"] > 85


def test_cityscapes_groups_are_loaded_as_crowds(records: Callable[[str], list[Record]]) -> None:
    for split in ("train", "val"):
        objects = [
            item for record in records(f"cityscapes_fine_instance_seg_{split}") for item in record["annotations"]
        ]
        assert {item["category_id"] for item in objects if not item["iscrowd"]} == set(range(8))
        assert any(item["iscrowd"] for item in objects)


def test_true_cityscapes_labels_score_100_and_wrong_ones_less(
    records: Callable[[str], list[Record]], tmp_path: Path
) -> None:
    name = "cityscapes_fine_sem_seg_val"
    results = []
    for swapped in ({}, {13: 14}):
        predictions = []
        for record in records(name):
            labels = torch.from_numpy(np.asarray(Image.open(record["sem_seg_file_name"])).astype(np.int64))
            for true, said in swapped.items():
                labels[labels == true] = said
            scores = torch.nn.functional.one_hot(labels.clamp(max=19), 20)[..., :19].permute(2, 0, 1)
            predictions.append((record, {"sem_seg": scores.float()}))
        results.append(evaluate(name, predictions, tmp_path)["sem_seg"]["IoU"])
    assert results[0] == pytest.approx(100)
    assert results[1] < 95
