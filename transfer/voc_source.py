"""Read any folder in the layout of PASCAL VOC: Annotations, JPEGImages, ImageSets/Main/<split>.txt.

Stricter than Detectron2's reader where data is lost, more tolerant where tools differ: any image suffix, names with
spaces, parentheses or '#', a single image, sizes of 0, without the devkit's pose, truncated and difficult.

Boxes in the files are inclusive pixel indices counted from 1: xmin=1, xmax=W is the whole width. Here they are
half-open and counted from 0, so xmin and ymin lose 1, as in Detectron2.
"""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from transfer.repairs import Box, DatasetError, Tally, image_size, repair_box, some_of

# In the order of preference where one stem has several files.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
LAYOUT = "Annotations/*.xml, JPEGImages/, ImageSets/Main/<split>.txt"


class VocObject(NamedTuple):
    """One annotated object."""

    name: str
    box: Box
    is_difficult: bool


class VocImage(NamedTuple):
    """One image of a split; `stem` is its name in the split file."""

    stem: str
    path: Path
    width: int
    height: int
    objects: tuple[VocObject, ...]


@dataclass(frozen=True)
class VocSplit:
    """A split as read and repaired; `notes` says what was repaired."""

    folder: Path
    split: str
    images: tuple[VocImage, ...]
    notes: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of all objects' classes, sorted."""
        return tuple(sorted({item.name for image in self.images for item in image.objects}))


def read_voc(folder: Path, split: str) -> VocSplit:
    """Read one split.

    Raises:
        DatasetError: If the layout is another one, a listed image or its XML is missing, or an XML makes no sense.
    """
    stems = read_split(folder, split)
    files = _index_images(folder / "JPEGImages")
    missing = [stem for stem in stems if stem not in files]
    if missing:
        raise DatasetError(
            f"{len(missing)} of the {len(stems)} images listed in {_split_file(folder, split)} are not in "
            f"{folder / 'JPEGImages'}: {some_of(missing)}. Add them or take them off the list."
        )
    tally = Tally()
    images = tuple(_read_image(folder, stem, files[stem], tally) for stem in stems)
    if not any(image.objects for image in images):
        raise DatasetError(f"no image of the split '{split}' of {folder} has a usable box")
    return VocSplit(folder, split, images, tuple(tally.notes()))


def read_split(folder: Path, split: str) -> list[str]:
    """Image names of a split, in the order of its file; the file's class columns ("name 1", "name -1") are cut off.

    Raises:
        DatasetError: If a folder or the file is missing, the list is empty, or names occur twice or have no XML.
    """
    for name in ("Annotations", "JPEGImages"):
        if not (folder / name).is_dir():
            raise DatasetError(f"{folder} has no folder {name}; a VOC dataset is laid out as {LAYOUT}")
    file = _split_file(folder, split)
    if not file.is_file():
        splits = sorted(path.stem for path in file.parent.glob("*.txt"))
        raise DatasetError(f"{file} does not exist; splits there: {', '.join(splits) or 'none'}")
    annotated = {path.stem for path in (folder / "Annotations").glob("*.xml")}
    lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    stems = [_stem(line, annotated) for line in lines]
    if not stems:
        raise DatasetError(f"{file} lists no image")
    without = [stem for stem in stems if stem not in annotated]
    if without:
        raise DatasetError(
            f"{len(without)} of the {len(stems)} images listed in {file} have no XML in "
            f"{folder / 'Annotations'}: {some_of(without)}"
        )
    if len(set(stems)) < len(stems):
        twice = dict.fromkeys(stem for stem in stems if stems.count(stem) > 1)
        raise DatasetError(f"{file} lists images twice: {some_of(twice)}")
    return stems


def _split_file(folder: Path, split: str) -> Path:
    return folder / "ImageSets" / "Main" / f"{split}.txt"


def _stem(line: str, annotated: set[str]) -> str:
    """The image's name in a line of a split file: the line, without a class column or an image suffix it may carry."""
    head, _, column = line.rpartition(" ")
    candidates = [line, head.strip()] if column in ("1", "0", "-1") else [line]
    for name in candidates:
        for stem in (name, Path(name).stem if Path(name).suffix.lower() in IMAGE_SUFFIXES else name):
            if stem in annotated:
                return stem
    return line


def _index_images(folder: Path) -> dict[str, Path]:
    """Image file of each stem; suffixes in any case."""
    found: dict[str, Path] = {}
    files = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    for path in sorted(files, key=lambda path: (IMAGE_SUFFIXES.index(path.suffix.lower()), path.name)):
        found.setdefault(path.stem, path)
    return found


def _read_image(folder: Path, stem: str, path: Path, tally: Tally) -> VocImage:
    file = folder / "Annotations" / f"{stem}.xml"
    try:
        tree = ET.parse(file)
    except ET.ParseError as error:
        raise DatasetError(f"{file} is not XML: {error}") from error
    width, height = (int(_number(tree, f"size/{side}", file, absent=0.0)) for side in ("width", "height"))
    if width < 1 or height < 1:
        tally.add("sizes missing in the XML, read from the images", file.name)
        width, height = image_size(path)
    objects = [_read_object(item, file, width, height, tally) for item in tree.findall("object")]
    kept = tuple(item for item in objects if item is not None)
    if not kept:
        tally.add("images without a box", path.name)
    return VocImage(stem, path, width, height, kept)


def _read_object(item: ET.Element, file: Path, width: int, height: int, tally: Tally) -> VocObject | None:
    name = (item.findtext("name") or "").strip()
    if not name:
        raise DatasetError(f"{file} has an object without a name")
    xmin, ymin, xmax, ymax = (_number(item, f"bndbox/{key}", file) for key in ("xmin", "ymin", "xmax", "ymax"))
    # As written, xmin = xmax is one pixel wide; in practice it is a slip of the mouse, and nothing to learn from.
    as_written = Box(xmin, ymin, xmax, ymax)
    box = Box(xmin - 1, ymin - 1, xmax, ymax) if as_written.has_area() else as_written
    repaired = repair_box(box, width, height, tally, file.name)
    if repaired is None:
        return None
    return VocObject(name, repaired, is_difficult=_number(item, "difficult", file, absent=0.0) != 0)


def _number(
    item: "ET.Element | ET.ElementTree[ET.Element]", key: str, file: Path, absent: float | None = None
) -> float:
    text = (item.findtext(key) or "").strip()
    if not text and absent is not None:
        return absent
    try:
        return float(text)
    except ValueError:
        raise DatasetError(f"{file}: <{key}> is '{text}', not a number") from None


def check_classes(found: VocSplit, classes: Sequence[str]) -> None:
    """Check that a network for `classes` can be evaluated on this split.

    Raises:
        DatasetError: If the split has objects of other classes.
    """
    unknown = {item.name: image.stem for image in found.images for item in image.objects if item.name not in classes}
    if unknown:
        where = some_of(f"'{name}' (say, in {stem})" for name, stem in sorted(unknown.items()))
        raise DatasetError(
            f"{found.folder}:{found.split} has classes that the training set lacks: {where}; "
            f"the training set's are: {', '.join(classes)}"
        )
