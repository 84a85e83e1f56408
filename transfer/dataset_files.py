"""Which files of a published dataset are missing, told from listings of its folders, before anything is built.

A test set is read only after the training, and images one by one: what is missing then costs the run. So every image
that the annotations name is looked for (by name; no image is opened), and in Cityscapes every image's labels.
"""

import json
import mmap
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from transfer.repairs import DatasetError, some_of
from transfer.subsets import read_list

PATH_KEYS = (
    *("json_file", "subset_file", "panoptic_json", "image_root", "panoptic_root"),
    *("sem_seg_root", "image_dir", "gt_dir"),
)
# evaluator_type -> the key of an entry of "images" that Detectron2's loader makes the image's path of.
IMAGE_KEYS = {"coco": "file_name", "densepose": "file_name", "lvis": "coco_url"}
CITYSCAPES_IMAGE = "leftImg8bit.png"
TRAIN_IDS = "gtFine_labelTrainIds.png"
# evaluator_type -> endings of what Detectron2 reads beside each image, in training (first) and in the evaluation.
CITYSCAPES_LABELS = {
    "cityscapes_instance": ("gtFine_polygons.json", "gtFine_instanceIds.png"),
    "cityscapes_sem_seg": (TRAIN_IDS, "gtFine_labelIds.png"),
}
MAKE_TRAIN_IDS = "CITYSCAPES_DATASET={root} csCreateTrainIdLabelImgs (of pip install cityscapesscripts)"


def missing_files(entry: Mapping[str, Any]) -> list[str]:
    """What is missing of one dataset, a path or a sentence each; empty if it is complete.

    Looked at are the paths that the metadata name; for VOC the files of the listed images; for COCO, its parts, LVIS
    and DensePose the images that the annotation file names; for Cityscapes the labels of each image. Annotation files
    are searched for the names of images, not parsed: for COCO's 118287 training images that takes a second or two.

    Args:
        entry: The dataset's metadata in Detectron2's catalog.

    Raises:
        DatasetError: If an annotation file is cut short, or is no JSON.
    """
    # "scheme://" is for Detectron2's PathManager to fetch.
    named = [str(entry[key]) for key in PATH_KEYS if entry.get(key)]
    missing = [path for path in named if "://" not in path and not Path(path).exists()]
    kind = entry.get("evaluator_type")
    if missing or any("://" in path for path in named):
        return missing
    if kind == "pascal_voc":
        return _missing_voc(Path(entry["dirname"]), entry["split"])
    if kind in IMAGE_KEYS and entry.get("json_file"):
        return _missing_images(entry, IMAGE_KEYS[kind])
    if kind in CITYSCAPES_LABELS:
        return _missing_labels(Path(entry["image_dir"]), Path(entry["gt_dir"]), CITYSCAPES_LABELS[kind])
    return []


def read_images(file: Path, key: str) -> list[dict[str, Any]]:
    """The entries of an annotation file's "images", without parsing the annotations, which are most of it.

    Args:
        file: COCO-style JSON.
        key: One that all images have, and nothing else in the file.

    Raises:
        DatasetError: If the file is cut short, or is no JSON.
    """
    mark, found = f'"{key}"'.encode(), []
    with file.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - 64))
        if not opened.read().rstrip().endswith(b"}"):
            raise DatasetError(f"{file} is cut short after {size} bytes: get it again")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as text:
            position = text.find(mark)
            while position >= 0:
                start, end = text.rfind(b"{", 0, position), text.find(b"}", position) + 1
                try:
                    found.append(json.loads(text[start:end]))
                except ValueError:  # a brace in one of its strings
                    return _parse_images(file)
                position = text.find(mark, end)
    return found


def _parse_images(file: Path) -> list[dict[str, Any]]:
    try:
        images: list[dict[str, Any]] = json.loads(file.read_bytes())["images"]
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{file} is no JSON of COCO's format ({error}): get it again") from error
    return images


def _missing_images(entry: Mapping[str, Any], key: str) -> list[str]:
    images = read_images(Path(entry["json_file"]), key)
    if entry.get("subset_file"):
        wanted = set(read_list(Path(entry["subset_file"])))
        images = [image for image in images if image["id"] in wanted]
    if not images:
        return [f"{entry['json_file']} lists none of its images"]
    # LVIS: .../train2017/000000391895.jpg, as in Detectron2's loader.
    names = ["/".join(image[key].split("/")[-2:]) if key == "coco_url" else image[key] for image in images]
    return _absent(Path(entry["image_root"]), names, "images")


def _missing_voc(folder: Path, split: str) -> list[str]:
    file = folder / "ImageSets" / "Main" / f"{split}.txt"
    missing = [str(path) for path in (folder / "Annotations", folder / "JPEGImages", file) if not path.exists()]
    if missing:
        return missing
    stems = file.read_text(encoding="utf-8").split()
    return [
        sentence
        for part, suffix in (("Annotations", ".xml"), ("JPEGImages", ".jpg"))
        for sentence in _absent(folder / part, [f"{stem}{suffix}" for stem in stems], "listed files")
    ]


def _missing_labels(image_dir: Path, gt_dir: Path, endings: Sequence[str]) -> list[str]:
    cities = sorted(path for path in image_dir.iterdir() if path.is_dir())
    stems = [
        f"{city.name}/{name.removesuffix(CITYSCAPES_IMAGE)}"
        for city in cities
        for name in sorted(_listing(city))
        if name.endswith(CITYSCAPES_IMAGE)
    ]
    if not stems:
        return [f"{image_dir}/<city>/*_{CITYSCAPES_IMAGE}"]
    labelled = {f"{city.name}/{name}" for city in cities for name in _listing(gt_dir / city.name)}
    missing = []
    for ending in endings:
        absent = [f"{stem}{ending}" for stem in stems if f"{stem}{ending}" not in labelled]
        if absent:
            remedy = f"; make them: {MAKE_TRAIN_IDS.format(root=gt_dir.parents[1])}" if ending == TRAIN_IDS else ""
            missing.append(f"{len(absent)} of the {len(stems)} *_{ending} in {gt_dir}: {some_of(absent)}{remedy}")
    return missing


def _absent(root: Path, names: Sequence[str], what: str) -> list[str]:
    """A sentence per folder below `root` in which some of these files are not; each folder is listed once."""
    wanted: dict[str, list[str]] = {}
    for name in names:
        folder, _, own = name.rpartition("/")
        wanted.setdefault(folder, []).append(own)
    missing = []
    for folder, listed in wanted.items():
        there = _listing(root / folder)
        absent = [name for name in listed if name not in there]
        if absent:
            missing.append(f"{len(absent)} of the {len(listed)} {what} in {root / folder}: {some_of(absent)}")
    return missing


def _listing(folder: Path) -> Collection[str]:
    """Names in a folder; none if it does not exist."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
