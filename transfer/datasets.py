"""Detectron2's dataset names under a root of the user's choice, and datasets of the user's own.

Nothing is registered by importing this module beyond what Detectron2 registers itself; train_net calls the functions.
"""

import difflib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfer import d2
from transfer.coco_source import CocoSet, read_coco
from transfer.dataset_files import MAKE_TRAIN_IDS, missing_files
from transfer.repairs import DatasetError, some_of
from transfer.voc_source import VocSplit, check_classes, read_voc

d2.require()

from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.data.datasets import builtin  # noqa: E402
from detectron2.data.datasets.coco import load_coco_json  # noqa: E402
from detectron2.structures import BoxMode  # noqa: E402

USER_TRAIN = "user_train"
USER_VAL = "user_val"
SOURCE_SYNTAX = 'VOC "DIR:SPLIT", say voc:train; COCO "FILE.json" or "FILE.json:IMAGE_DIR"'

LAYOUTS = {
    "pct": "coco/subsets/train2017_<percent>pct_seed<SEED>.txt (python tools/make_coco_subsets.py ROOT --seeds SEED)",
    "densepose": "coco/annotations/densepose_{train,valminusminival,minival}2014.json, coco/{train,val}2014/*.jpg",
    "coco_2017": "coco/annotations/instances_{train,val}2017.json, coco/{train,val}2017/*.jpg",
    "keypoints_coco": "coco/annotations/person_keypoints_{train,val}2017.json, coco/{train,val}2017/*.jpg",
    "voc": "VOC2007/ and VOC2012/, each with Annotations/*.xml, JPEGImages/*.jpg, ImageSets/Main/<split>.txt",
    "lvis": "lvis/lvis_v1_{train,val}.json, images in coco/{train,val}2017/",
    "cityscapes": "cityscapes/{leftImg8bit,gtFine}/{train,val}/<city>/",
    "cityscapes_fine_sem_seg": f"gtFine's *_labelTrainIds.png: {MAKE_TRAIN_IDS.format(root='ROOT/cityscapes')}",
}


@dataclass(frozen=True)
class UserDataset:
    """What a training run needs to know about a dataset of the user's own.

    Attributes:
        name: Its name in Detectron2's catalogs, for DATASETS.TRAIN or DATASETS.TEST.
        source: Where it was read from, as given.
        classes: Class names in the order of the network's outputs.
        num_images: Images, including those without an object.
        num_objects: Objects that are left after repairs.
        has_masks: Whether every object has a mask; Mask R-CNN needs it.
        mask_format: Value for INPUT.MASK_FORMAT: "polygon", or "bitmask" where some masks are run-length encoded.
        evaluator_type: As in the metadata, see transfer/evaluation.py.
        notes: What was repaired or is worth knowing, a sentence each; for the caller to show.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    num_images: int
    num_objects: int
    has_masks: bool
    mask_format: str
    evaluator_type: str
    notes: tuple[str, ...]


def register_datasets(root: str | Path) -> None:
    """Let Detectron2's builtin names (coco_2017_train, voc_2007_test, ...) mean the files under `root`.

    Detectron2 registers them when it is imported, for $DETECTRON2_DATASETS or ./datasets; those entries are replaced,
    all others stay. Calling it again with another root moves them again. Reads no file.
    """
    datasets, metadata = dict(DatasetCatalog), dict(MetadataCatalog)
    DatasetCatalog.clear()
    MetadataCatalog.clear()
    # Which names are builtin differs between versions, so they are found by registering them.
    for name, register in vars(builtin).items():
        if name.startswith("register_all_"):
            register(str(Path(root).expanduser()))
    for name, loader in datasets.items():
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, loader)
    for name, entry in metadata.items():
        if name not in MetadataCatalog:
            MetadataCatalog[name] = entry


def check_datasets(names: Iterable[str]) -> None:
    """Check that the files of these registered datasets exist, before anything is built.

    `missing_files` says what is looked at. The user's own sets have been read whole when they were registered.

    Raises:
        ValueError: If a name is not registered, or an annotation file is no JSON.
        FileNotFoundError: If files are missing; lists what is missing where, and the expected layout.
    """
    missing: list[str] = []
    layouts: list[str] = []
    for name in names:
        if name not in DatasetCatalog:
            near = difflib.get_close_matches(name, list(DatasetCatalog), n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"there is no dataset '{name}'{hint}")
        paths = missing_files(MetadataCatalog.get(name).as_dict()) if name not in (USER_TRAIN, USER_VAL) else []
        missing += [f"  {name}: {path}" for path in paths]
        if paths:
            layouts += [f"  {layout}" for prefix, layout in LAYOUTS.items() if prefix in name]
    if missing:
        layout = "\nexpected under the root:\n" + "\n".join(dict.fromkeys(layouts)) if layouts else ""
        raise FileNotFoundError(
            "datasets are incomplete; missing:\n"
            + "\n".join(missing)
            + layout
            + "\nName their root with --datasets-root or $DETECTRON2_DATASETS."
        )


def parse_source(source: str) -> tuple[Path, str]:
    """Split "DIR:SPLIT", "FILE.json" or "FILE.json:IMAGE_DIR" into the path and the rest ("" if there is none).

    Raises:
        DatasetError: If it is none of them, or the path does not exist.
    """
    head, mark, tail = source.partition(".json:")
    if mark or source.endswith(".json"):
        path = Path(head + ".json" if mark else source).expanduser()
        if not path.is_file():
            raise DatasetError(f"{path} does not exist")
        return path, tail
    # The last colon: a folder's name may contain one, a split's does not.
    folder, _, split = source.rpartition(":")
    if folder and Path(folder).expanduser().is_dir():
        return Path(folder).expanduser(), split
    if Path(source).expanduser().is_dir():
        splits = sorted(path.stem for path in Path(source).expanduser().glob("ImageSets/Main/*.txt"))
        raise DatasetError(f"which split of {source}? {source}:SPLIT with one of: {', '.join(splits) or 'none found'}")
    raise DatasetError(f"'{source}' is not a dataset: {SOURCE_SYNTAX}; {folder or source} is not a folder")


def register_user_datasets(
    train: str, val: str | None = None, *, with_masks: bool = False
) -> tuple[UserDataset, UserDataset | None]:
    """Register a training set as "user_train" and a validation set, with the same classes, as "user_val".

    Args:
        train: See SOURCE_SYNTAX.
        val: The same; None for no validation set.
        with_masks: Whether the network has a mask head; see `register_user_dataset`.

    Raises:
        DatasetError: If one of them cannot be used, or the validation set has classes that the training set lacks.
    """
    trained = register_user_dataset(USER_TRAIN, train, with_masks=with_masks)
    if val is None:
        return trained, None
    return trained, register_user_dataset(USER_VAL, val, classes=trained.classes, with_masks=with_masks)


def register_user_dataset(
    name: str, source: str | Path, *, classes: Sequence[str] | None = None, with_masks: bool = False
) -> UserDataset:
    """Read, check, repair and register one dataset. A dataset registered before under this name is replaced.

    Args:
        name: Name for Detectron2's catalogs.
        source: See SOURCE_SYNTAX.
        classes: The training set's classes, for a validation set. None reads them: VOC sorts the names, COCO's stand in
            the order of their ids.
        with_masks: COCO only: drop objects without a mask, for a network with a mask head. Otherwise all masks are left
            out if some object has none.

    Raises:
        DatasetError: If it cannot be used; says why and what to change.
    """
    path, rest = parse_source(str(source))
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog:
            catalog.remove(name)
    if path.suffix == ".json":
        found = read_coco(path, Path(rest).expanduser() if rest else None, classes=classes, with_masks=with_masks)
        dataset = _register_coco(name, str(source), found)
    else:
        split = read_voc(path, rest)
        check_classes(split, classes if classes is not None else split.classes)
        dataset = _register_voc(name, str(source), split, tuple(classes if classes is not None else split.classes))
    if with_masks and not dataset.has_masks:
        raise DatasetError(f"{source} has boxes only, but the network has a mask head: set MODEL.MASK_ON False")
    return dataset


def _register_voc(name: str, source: str, found: VocSplit, classes: tuple[str, ...]) -> UserDataset:
    records = [
        {
            "file_name": str(image.path),
            "image_id": image.stem,
            "width": image.width,
            "height": image.height,
            "annotations": [
                {
                    "category_id": classes.index(item.name),
                    "bbox": list(item.box),
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "difficult": int(item.is_difficult),  # not used in training, ignored in evaluation, as in VOC
                }
                for item in image.objects
            ],
        }
        for image in found.images
    ]
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(
        thing_classes=list(classes),
        evaluator_type="voc_folder",
        dirname=str(found.folder),
        split=found.split,
        year=2007,  # the 11-point metric, as for voc_2007_test
    )
    counts = len(found.images), sum(len(image.objects) for image in found.images)
    notes = found.notes + _absent_classes(classes, found.classes)
    return UserDataset(name, source, classes, *counts, False, "polygon", "voc_folder", notes)


def _register_coco(name: str, source: str, found: CocoSet) -> UserDataset:
    file = _store(found.content, name)
    DatasetCatalog.register(name, lambda: load_coco_json(str(file), str(found.image_dir), name))
    MetadataCatalog.get(name).set(
        thing_classes=list(found.classes),
        thing_dataset_id_to_contiguous_id={number + 1: number for number in range(len(found.classes))},
        evaluator_type="coco",
        json_file=str(file),
        image_root=str(found.image_dir),
    )
    annotations = found.content["annotations"]
    present = {found.classes[annotation["category_id"] - 1] for annotation in annotations}
    return UserDataset(
        name,
        source,
        found.classes,
        num_images=len(found.content["images"]),
        num_objects=len(annotations),
        has_masks=found.has_masks,
        mask_format="bitmask" if found.has_rle else "polygon",
        evaluator_type="coco",
        notes=found.notes + _absent_classes(found.classes, present),
    )


def _absent_classes(classes: Sequence[str], present: Iterable[str]) -> tuple[str, ...]:
    absent = [name for name in classes if name not in set(present)]
    return (f"no object of {len(absent)} of the {len(classes)} classes ({some_of(absent)})",) if absent else ()


def _store(content: dict[str, Any], name: str) -> Path:
    """Write repaired annotations where Detectron2's loader and pycocotools can read them: a file named by its digest.

    All processes of a run write the same content; renaming makes each file whole at every moment.
    """
    text = json.dumps(content)
    folder = Path(tempfile.gettempdir()) / f"detco-datasets-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as file:
        file.write(text)
    return Path(file.name).replace(path)
