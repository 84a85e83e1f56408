"""Evaluators by metadata, exact numbers on perfect and on wrong predictions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from transfer import d2

if d2.info() is None:
    pytest.skip("Detectron2 is not installed: python tools/install_detectron2.py", allow_module_level=True)

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import Boxes, BoxMode, Instances

from transfer.datasets import UserDataset, register_user_dataset
from transfer.evaluation import build_evaluator
from transfer.run_record import metric_names

pytestmark = pytest.mark.d2
SIZE = (64, 48)  # width, height


def write_voc(folder: Path, images: dict[str, list[tuple[str, tuple[float, ...]]]]) -> str:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for stem, objects in images.items():
        Image.new("RGB", SIZE).save(folder / "JPEGImages" / f"{stem}.JPG", format="JPEG")
        xml = "".join(
            f"<object><name>{name}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
            for name, (a, b, c, d) in objects
        )
        size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height></size>"
        (folder / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{size}{xml}</annotation>")
    (folder / "ImageSets/Main/val.txt").write_text("\n".join(images))
    return f"{folder}:val"


def write_coco(folder: Path, annotations: list[dict[str, Any]]) -> str:
    folder.mkdir(exist_ok=True)
    for number in (0, 1):
        Image.new("RGB", SIZE).save(folder / f"{number}.png")
    images = [{"id": n, "file_name": f"{n}.png", "width": SIZE[0], "height": SIZE[1]} for n in (0, 1)]
    categories = [{"id": 0, "name": "cat"}, {"id": 7, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "val.json").write_text(json.dumps(content))
    return str(folder / "val.json")


def evaluate(dataset: UserDataset, tmp_path: Path, change: Any = lambda boxes: boxes) -> dict[str, float | None]:
    """Evaluate the ground truth itself as predictions, with `change` made to the boxes."""
    evaluator = build_evaluator(get_cfg(), dataset.name, str(tmp_path / "predictions"))
    evaluator.reset()
    for record in DatasetCatalog.get(dataset.name):
        items = record["annotations"]
        boxes = [BoxMode.convert(list(map(float, a["bbox"])), a["bbox_mode"], BoxMode.XYXY_ABS) for a in items]
        found = Instances((record["height"], record["width"]))
        found.pred_boxes = Boxes(change(torch.tensor(boxes).reshape(-1, 4)))
        found.scores = torch.full((len(items),), 0.9)
        found.pred_classes = torch.tensor([a["category_id"] for a in items], dtype=torch.int64)
        evaluator.process([record], [{"instances": found}])
    return metric_names(flatten_results_dict(evaluator.evaluate()))


HOSTILE = {
    "IMG (1) of 2": [("red cell/a", (5, 5, 30, 30)), ("dog", (40, 10, 60, 40))],
    "b#2 {x}": [("dog", (3, 3, 3, 3)), ("dog", (1.4, 1, 70, 20.6)), ("red cell/a", (90, 5, 99, 9))],
    "empty": [],
}


def test_a_voc_folder_with_odd_names_and_boxes_scores_100_on_its_own_ground_truth(tmp_path: Path) -> None:
    dataset = register_user_dataset("evaluated", write_voc(tmp_path / "a set", HOSTILE))
    metrics = evaluate(dataset, tmp_path)
    assert metrics["box_AP50"] == pytest.approx(100.0)
    assert metrics["box_AP"] == pytest.approx(100.0)
    assert set(metrics) == {"box_AP", "box_AP50", "box_AP75"}


def test_wrong_predictions_on_a_voc_folder_score_0(tmp_path: Path) -> None:
    dataset = register_user_dataset("evaluated", write_voc(tmp_path / "a set", HOSTILE))
    assert evaluate(dataset, tmp_path, change=lambda boxes: boxes * 0 + torch.tensor([0.0, 40, 2, 42]))["box_AP"] == 0.0


def test_a_class_without_an_object_does_not_lower_the_mean(tmp_path: Path) -> None:
    source = write_voc(tmp_path / "set", {"a": [("dog", (5, 5, 30, 30))]})
    dataset = register_user_dataset("evaluated", source, classes=("cat", "dog", "eel"))
    assert evaluate(dataset, tmp_path)["box_AP"] == pytest.approx(100.0)


def test_a_class_with_nothing_but_difficult_objects_does_not_lower_the_mean(tmp_path: Path) -> None:
    source = write_voc(tmp_path / "set", {"a": [("dog", (5, 5, 30, 30)), ("cat", (40, 5, 60, 30))]})
    dataset = register_user_dataset("evaluated", source)
    for item in DatasetCatalog.get("evaluated")[0]["annotations"]:
        item["difficult"] = int(dataset.classes[item["category_id"]] == "cat")
    assert evaluate(dataset, tmp_path)["box_AP"] == pytest.approx(100.0)


def test_half_the_classes_found_is_half_the_mean(tmp_path: Path) -> None:
    images = {"a": [("dog", (5, 5, 30, 30))], "b": [("cat", (5, 5, 20, 20))]}
    dataset = register_user_dataset("evaluated", write_voc(tmp_path / "set", images))
    # Boxes of 25 px stay, boxes of 15 px are moved away.
    metrics = evaluate(dataset, tmp_path, change=lambda b: torch.where(b[:, 2:3] - b[:, :1] > 20, b, b * 0 + 1))
    assert metrics["box_AP50"] == pytest.approx(50.0)


def test_an_annotation_with_id_0_counts(tmp_path: Path) -> None:
    annotations = [
        {"id": 0, "image_id": 0, "category_id": 0, "bbox": [5, 5, 30, 30]},
        {"id": 1, "image_id": 1, "category_id": 7, "bbox": [5, 5, 90, 30]},
    ]
    dataset = register_user_dataset("evaluated", write_coco(tmp_path / "set", annotations))
    metrics = evaluate(dataset, tmp_path)
    assert metrics["box_AP"] == pytest.approx(100.0)
    assert metrics["box_APl"] is None  # no object is that large


def test_without_the_extension_coco_is_evaluated_by_pycocotools(tmp_path: Path) -> None:
    annotations = [{"id": 3, "image_id": 0, "category_id": 0, "bbox": [5, 5, 30, 30]}]
    dataset = register_user_dataset("evaluated", write_coco(tmp_path / "set", annotations))
    evaluator = build_evaluator(get_cfg(), dataset.name, str(tmp_path))
    assert evaluator._use_fast_impl == d2.require().compiled


def test_an_unknown_evaluator_type_is_named_with_the_known_ones() -> None:
    MetadataCatalog.get("odd_one").evaluator_type = "panoptic_of_the_future"
    with pytest.raises(
        ValueError, match=r"'odd_one' has the evaluator_type 'panoptic_of_the_future'.* coco, pascal_voc"
    ):
        build_evaluator(get_cfg(), "odd_one", "")
    with pytest.raises(ValueError, match="evaluator_type None"):
        build_evaluator(get_cfg(), "bare_one", "")


def test_a_missing_package_is_named_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    MetadataCatalog.get("lvis_like").evaluator_type = "lvis"
    with pytest.raises(ValueError, match="needs lvis: pip install --no-deps lvis"):
        build_evaluator(get_cfg(), "lvis_like", "")
