"""The evaluator that a dataset's metadata ask for, and its results by our names."""

import importlib.util
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transfer import cityscapes, d2, densepose

d2.require()

from detectron2.config import CfgNode  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.evaluation import (  # noqa: E402
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.utils import comm  # noqa: E402

# Packages that Detectron2's evaluators import when they are first used, thus after the training, and how to get them.
# lvis without its dependencies: it asks for opencv-python, which must not be installed beside the headless one.
_PACKAGES = {
    "lvis": {"lvis": "--no-deps lvis"},
    "cityscapes_instance": {"cityscapesscripts": "cityscapesscripts", "shapely": "shapely"},
    "cityscapes_sem_seg": {"cityscapesscripts": "cityscapesscripts"},
}

# evaluator_types whose processes exchange their predictions through a temporary folder of the first one.
ONE_MACHINE = ("cityscapes_instance", "cityscapes_sem_seg")


class VocFolderEvaluator(PascalVOCDetectionEvaluator):  # type: ignore[misc]  # Detectron2 is not followed
    """Detectron2's VOC evaluator, on the ground truth as registered instead of the folder's XML files.

    The XML files may hold boxes without area, lack fields or have names that Detectron2's evaluator cannot read (it
    parses predictions at spaces and makes file names of class names). So it gets its own, written from the repaired
    records: images and classes by number. Classes without an object are left out of the mean, as COCO's evaluation
    does; Detectron2 would count them as 0.
    """

    def __init__(self, dataset_name: str) -> None:
        super().__init__(dataset_name)
        self._predictions: dict[int, list[str]] = {}  # Detectron2's: lines of text by class; `reset` makes a new one
        self._records: list[dict[str, Any]] = DatasetCatalog.get(dataset_name)
        self._number = {record["image_id"]: str(index) for index, record in enumerate(self._records)}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Collect the detections of a batch."""
        super().process([{**item, "image_id": self._number[item["image_id"]]} for item in inputs], outputs)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """{"bbox": {"AP", "AP50", "AP75"}} in per cent on rank 0, None on the others. Collective."""
        objects = [item for record in self._records for item in record["annotations"]]
        present = sorted({item["category_id"] for item in objects if not item["difficult"]})
        self._class_names = [str(index) for index in present]
        # Before the gather, so that it holds for the predictions of every rank.
        found: dict[int, list[str]] = self._predictions
        self._predictions = {present.index(index): lines for index, lines in found.items() if index in present}
        with tempfile.TemporaryDirectory(prefix="voc_ground_truth_") as name:
            folder = Path(name)
            if comm.is_main_process():
                for record in self._records:
                    _write_xml(record, folder / f"{self._number[record['image_id']]}.xml")
                (folder / "images.txt").write_text("\n".join(self._number.values()), encoding="utf-8")
            self._anno_file_template = str(folder / "{}.xml")
            self._image_set_path = str(folder / "images.txt")
            result: dict[str, dict[str, float]] | None = super().evaluate()
        return result


def _write_xml(record: Mapping[str, Any], path: Path) -> None:
    """One image's objects in the form that Detectron2's `parse_rec` reads: integers, counted from 1, inclusive."""
    tree = ET.Element("annotation")
    for item in record["annotations"]:
        entry = ET.SubElement(tree, "object")
        fields = {"name": item["category_id"], "pose": "", "truncated": 0, "difficult": item["difficult"]}
        for key, value in fields.items():
            ET.SubElement(entry, key).text = str(value)
        x1, y1, x2, y2 = item["bbox"]
        left, top = round(x1) + 1, round(y1) + 1
        corners = {"xmin": left, "ymin": top, "xmax": max(round(x2), left), "ymax": max(round(y2), top)}
        box = ET.SubElement(entry, "bndbox")
        for key, number in corners.items():
            ET.SubElement(box, key).text = str(number)
    ET.ElementTree(tree).write(path, encoding="unicode")


def _coco(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    # Without the extension Detectron2 0.5 would fail after the inference, later versions warn.
    fast, sigmas = d2.require().compiled, cfg.TEST.KEYPOINT_OKS_SIGMAS
    return COCOEvaluator(dataset_name, output_dir=output_folder, use_fast_impl=fast, kpt_oks_sigmas=sigmas)


EVALUATORS: dict[str, Callable[[CfgNode, str, str], DatasetEvaluator]] = {
    "coco": _coco,
    "pascal_voc": lambda cfg, name, folder: PascalVOCDetectionEvaluator(name),
    "voc_folder": lambda cfg, name, folder: VocFolderEvaluator(name),
    "lvis": lambda cfg, name, folder: LVISEvaluator(name, output_dir=folder),
    "cityscapes_instance": lambda cfg, name, folder: cityscapes.InstanceEvaluator(name),
    "cityscapes_sem_seg": lambda cfg, name, folder: CityscapesSemSegEvaluator(name),
    "densepose": densepose.build_evaluator,
    "sem_seg": lambda cfg, name, folder: SemSegEvaluator(name, output_dir=folder),
}
"""evaluator_type of a dataset's metadata -> (config, dataset name, folder for the predictions) -> evaluator."""


def check_evaluator(dataset_name: str) -> None:
    """Refuse a registered dataset that could not be evaluated after the training.

    Raises:
        ValueError: If the metadata have no evaluator_type, or one that this suite does not evaluate, or a package that
            the evaluation needs is not installed.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in EVALUATORS:
        raise ValueError(
            f"the dataset '{dataset_name}' has the evaluator_type {kind!r} in its metadata; this suite evaluates: "
            f"{', '.join(EVALUATORS)}"
        )
    absent = [name for name in _PACKAGES.get(kind, {}) if importlib.util.find_spec(name) is None]
    if absent:
        remedy = " && ".join(f"pip install {_PACKAGES[kind][name]}" for name in absent)
        raise ValueError(f"evaluating '{dataset_name}' ({kind}) needs {' and '.join(absent)}: {remedy}")


def check_machines(dataset_name: str, num_machines: int) -> list[str]:
    """Refuse to evaluate Cityscapes on several machines, which Detectron2 cannot: it would fail after the training.

    All processes write their predictions into one temporary folder, the first one's, which other machines do not have.

    Args:
        dataset_name: A name in Detectron2's catalogs.
        num_machines: Machines of the run.

    Raises:
        ValueError: If so.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if num_machines > 1 and kind in ONE_MACHINE:
        raise ValueError(
            f"--num-machines is {num_machines}, but '{dataset_name}' ({kind}) can be evaluated on one machine only; "
            "train and evaluate on one, with --auto-scale if it has fewer than the published 8 GPUs"
        )
    return []


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """The evaluator for a registered dataset, by the `evaluator_type` of its metadata.

    Args:
        cfg: Detectron2's config; TEST.KEYPOINT_OKS_SIGMAS is used.
        dataset_name: A name in Detectron2's catalogs.
        output_folder: Where COCO and LVIS evaluators write the predictions.

    Raises:
        ValueError: As `check_evaluator`.
    """
    check_evaluator(dataset_name)
    return EVALUATORS[MetadataCatalog.get(dataset_name).evaluator_type](cfg, dataset_name, output_folder)
