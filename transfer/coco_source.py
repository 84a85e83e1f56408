"""Read any JSON in COCO's instances format into a form that Detectron2 and pycocotools take without surprises.

What comes out is COCO JSON again: category ids 1..C in the order of the classes, annotation ids 1..A (pycocotools takes
id 0 for "unmatched", so that every detection of that object would count as false), boxes clipped to their images,
`iscrowd` and `area` everywhere.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfer.repairs import Box, DatasetError, Tally, image_size, repair_box, some_of

# Three points, two numbers each: what pycocotools can make a mask of.
_SHORTEST_POLYGON = 6


@dataclass(frozen=True)
class CocoSet:
    """A COCO file as read and repaired.

    Attributes:
        content: The repaired JSON: images, annotations, categories.
        image_dir: Folder that the images' `file_name` is relative to.
        classes: Category names in the order of the network's outputs.
        has_masks: Whether every object has a mask.
        has_rle: Whether one of them is run-length encoded; Detectron2 then needs INPUT.MASK_FORMAT "bitmask".
        notes: What was repaired.
    """

    content: dict[str, Any]
    image_dir: Path
    classes: tuple[str, ...]
    has_masks: bool
    has_rle: bool
    notes: tuple[str, ...]


def read_coco(
    file: Path, image_dir: Path | None = None, *, classes: Sequence[str] | None = None, with_masks: bool = False
) -> CocoSet:
    """Read, check and repair one file.

    Args:
        file: JSON in COCO's instances format.
        image_dir: Folder of the images; None looks beside the file (see `guess_image_dir`).
        classes: The training set's classes, for a validation set; None takes the file's own, by category id.
        with_masks: Drop objects without a mask. Otherwise all masks are left out if some object has none.

    Raises:
        DatasetError: If it is not in that format, images are missing, or its classes do not fit.
    """
    raw = _load(file)
    tally = Tally()
    image_dir = image_dir or guess_image_dir(file, [str(image["file_name"]) for image in raw["images"]])
    _check_images_exist(file, image_dir, raw["images"])
    images = {image["id"]: _repair_size(image, image_dir, tally) for image in raw["images"]}
    names = _category_names(file, raw)
    own = tuple(names[key] for key in sorted(names))
    order = tuple(classes) if classes is not None else own
    annotations = list(_repair_annotations(file, raw, images, names, order, tally))
    annotations, has_masks = _settle_masks(annotations, with_masks, tally)
    if not annotations:
        raise DatasetError(f"no object of {file} is usable. {' '.join(tally.notes())}".strip())
    annotated = {annotation["image_id"] for annotation in annotations}
    for key, image in images.items():
        if key not in annotated:
            tally.add("images without an object", str(image["file_name"]))
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    extras = {category["name"]: category for category in raw["categories"]}
    categories = [{**extras.get(name, {}), "id": number, "name": name} for number, name in enumerate(order, start=1)]
    content = {"info": {}, "licenses": [], "images": list(images.values()), "annotations": annotations}
    content["categories"] = categories
    has_rle = has_masks and any(isinstance(a["segmentation"], dict) and not a["iscrowd"] for a in annotations)
    return CocoSet(content, image_dir, order, has_masks, has_rle, tuple(tally.notes()))


def guess_image_dir(file: Path, names: Sequence[str]) -> Path:
    """The folder near the JSON that holds most of the images.

    Looked at: the JSON's own folder, a folder of its stem (train.json: train/), images/ beside it, and the same beside
    the JSON's folder, where COCO itself has them (annotations/instances_val2017.json: val2017/).

    Raises:
        DatasetError: If none of them holds any.
    """
    stem = file.stem.rpartition("_")[2]
    near = [file.parent, file.parent / file.stem, file.parent / stem, file.parent / "images"]
    above = [file.parent.parent / name for name in (file.stem, stem, "images", f"images/{stem}")]
    tried = list(dict.fromkeys(near + above))
    # A sample tells the folders apart; that every image is there is checked afterwards.
    sample = names[:: max(1, len(names) // 100)]
    counts = [sum((folder / name).is_file() for name in sample) for folder in tried]
    if not any(counts):
        raise DatasetError(
            f"the images of {file} (say, {some_of(names, 2)}) are in none of: {', '.join(map(str, tried))}. "
            f"Name their folder: {file}:IMAGE_DIR"
        )
    return tried[counts.index(max(counts))]


def _load(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DatasetError(f"{file} does not exist") from None
    except ValueError as error:
        raise DatasetError(f"{file} is not JSON: {error}") from error
    keys = ("images", "annotations", "categories")
    if not isinstance(raw, dict) or not all(isinstance(raw.get(key), list) for key in keys):
        raise DatasetError(f"{file} is not in COCO's instances format: it must be an object with the lists {keys}")
    for key, fields in (("images", ("id", "file_name")), ("categories", ("id", "name"))):
        if not raw[key]:
            raise DatasetError(f"{file} has no {key}")
        for item in raw[key]:
            if not isinstance(item, dict) or any(field not in item for field in fields):
                raise DatasetError(f"{file}: every entry of '{key}' needs {fields}, this one lacks some: {item}")
    twice = [key for key, count in Counter(image["id"] for image in raw["images"]).items() if count > 1]
    if twice:
        raise DatasetError(f"{file} has several images with the same id: {some_of(twice)}")
    result: dict[str, Any] = raw
    return result


def _category_names(file: Path, raw: dict[str, Any]) -> dict[Any, str]:
    """Name of each category id.

    Raises:
        DatasetError: If an id or a name occurs twice: nobody can tell which of them a detection should be.
    """
    categories = raw["categories"]
    used = Counter(annotation.get("category_id") for annotation in raw["annotations"] if isinstance(annotation, dict))
    for field in ("id", "name"):
        twice = [value for value, count in Counter(category[field] for category in categories).items() if count > 1]
        same = [
            f"'{category['name']}' (id {category['id']}, {used[category['id']]} objects)"
            for category in categories
            if category[field] in twice
        ]
        if same:
            raise DatasetError(f"{file} has categories with the same {field}: {some_of(same)}. Merge or rename them.")
    return {category["id"]: str(category["name"]) for category in categories}


def _check_images_exist(file: Path, image_dir: Path, images: Sequence[dict[str, Any]]) -> None:
    missing = [image["file_name"] for image in images if not (image_dir / image["file_name"]).is_file()]
    if missing:
        raise DatasetError(
            f"{len(missing)} of the {len(images)} images of {file} are not in {image_dir}: {some_of(missing)}. "
            f"Add them, take them off the file, or name another folder: {file}:IMAGE_DIR"
        )


def _repair_size(image: dict[str, Any], image_dir: Path, tally: Tally) -> dict[str, Any]:
    if image.get("width") and image.get("height"):
        return image
    tally.add("sizes missing in the JSON, read from the images", str(image["file_name"]))
    width, height = image_size(image_dir / image["file_name"])
    return {**image, "width": width, "height": height}


def _repair_annotations(
    file: Path,
    raw: dict[str, Any],
    images: dict[Any, dict[str, Any]],
    names: dict[Any, str],
    order: Sequence[str],
    tally: Tally,
) -> Iterator[dict[str, Any]]:
    number_of = {name: number for number, name in enumerate(order, start=1)}
    for annotation in raw["annotations"]:
        where = f"annotation {annotation.get('id')}"
        image = images.get(annotation.get("image_id"))
        if image is None:
            tally.add("objects of images that are not in the file dropped", where)
            continue
        category = annotation.get("category_id")
        if category not in names:
            raise DatasetError(f"{file}, {where}: category_id {category} is not among the categories {sorted(names)}")
        if names[category] not in number_of:
            raise DatasetError(
                f"{file}, {where}: the class '{names[category]}' is not one of the training set's: {', '.join(order)}"
            )
        box = repair_box(_box(file, annotation, where), image["width"], image["height"], tally, where)
        if box is None:
            continue
        repaired = {**annotation, "category_id": number_of[names[category]]}
        repaired["bbox"] = [box.x1, box.y1, box.x2 - box.x1, box.y2 - box.y1]
        # Detectron2 refuses `ignore`; crowd regions are what COCO's evaluation ignores.
        repaired["iscrowd"] = int(bool(annotation.get("iscrowd")) or bool(repaired.pop("ignore", 0)))
        repaired["area"] = annotation.get("area") or repaired["bbox"][2] * repaired["bbox"][3]
        repaired["segmentation"] = _mask(annotation.get("segmentation"), image)
        yield repaired


def _box(file: Path, annotation: dict[str, Any], where: str) -> Box:
    try:
        x, y, width, height = (float(value) for value in annotation["bbox"])
    except (KeyError, TypeError, ValueError):
        given = annotation.get("bbox")
        raise DatasetError(f"{file}, {where}: bbox must be four numbers x, y, width, height; it is {given}") from None
    return Box(x, y, x + width, y + height)


def _mask(given: Any, image: dict[str, Any]) -> list[list[float]] | dict[str, Any] | None:
    """A mask that pycocotools can decode at the image's size, or None."""
    if isinstance(given, dict):
        return given if "counts" in given and given.get("size") == [image["height"], image["width"]] else None
    polygons = [p for p in given or [] if isinstance(p, list) and len(p) >= _SHORTEST_POLYGON and len(p) % 2 == 0]
    return polygons or None


def _settle_masks(
    annotations: list[dict[str, Any]], with_masks: bool, tally: Tally
) -> tuple[list[dict[str, Any]], bool]:
    """All objects with masks, or all without: Detectron2 cannot take a mixture."""
    bare = [annotation for annotation in annotations if annotation["segmentation"] is None]
    if not bare:
        return annotations, True
    if with_masks:
        for annotation in bare:
            tally.add("objects without a valid mask dropped", f"annotation {annotation['id']}")
        return [annotation for annotation in annotations if annotation["segmentation"] is not None], True
    if len(bare) < len(annotations):
        for annotation in bare:
            tally.add("objects without a valid mask; the set is used for boxes only", f"annotation {annotation['id']}")
    for annotation in annotations:
        del annotation["segmentation"]
    return annotations, False
