"""Writes drawn scenes in the directory layout of Pascal VOC.

The names of the classes are the real ones, so that programs made for the real data work unchanged; what is drawn under
a name is a textured shape.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from demo_layouts import VOC2007, VOC2012, Split, labelled_scenes, mask_box, save_jpeg, write_bytes
from demo_scenes import Scene, visible_mask
from demo_shapes import LOOKS

DIFFICULT_BELOW_SHARE = 0.55
DIFFICULT_BELOW_PX = 16

VOC2007_SPLITS = {"trainval": Split(VOC2007, 0, 24), "test": Split(VOC2007, 24, 16)}
VOC2012_SPLITS = {"trainval": Split(VOC2012, 0, 24)}


def write_voc(root: Path, year: int, splits: dict[str, Split], seed: int) -> Iterator[Path]:
    """Write a VOC year: JPEGImages, Annotations, ImageSets/Main; yields each image file."""
    for name, split in splits.items():
        ids = []
        for offset, (scene, rng) in enumerate(labelled_scenes(split, list(LOOKS), seed)):
            number = split.first + offset + 1
            image_id = f"{number:06d}" if year == 2007 else f"{year}_{number:06d}"
            path = root / "JPEGImages" / f"{image_id}.jpg"
            save_jpeg(scene.pixels, path, rng)
            write_bytes(root / "Annotations" / f"{image_id}.xml", _voc_annotation(scene, path.name, f"VOC{year}"))
            ids.append(image_id)
            yield path
        _write_ids(root, name, ids)
        if name == "trainval":
            _write_ids(root, "train", ids[::2])
            _write_ids(root, "val", ids[1::2])


def _write_ids(root: Path, name: str, ids: Sequence[str]) -> None:
    write_bytes(root / "ImageSets" / "Main" / f"{name}.txt", "".join(f"{i}\n" for i in ids).encode())


def _voc_annotation(scene: Scene, file_name: str, folder: str) -> bytes:
    height, width = scene.pixels.shape[:2]
    root = ElementTree.Element("annotation")
    _add(root, folder=folder, filename=file_name)
    _add(ElementTree.SubElement(root, "source"), database="drawn by make_demo_data.py")
    _add(ElementTree.SubElement(root, "size"), width=width, height=height, depth=3)
    _add(root, segmented=0)
    for placed in scene.objects:
        mask = visible_mask(scene, placed)
        if not mask.any():
            continue
        x1, y1, x2, y2 = mask_box(mask)
        seen_share = mask.sum() / placed.full_area_px
        at_edge = x1 == 0 or y1 == 0 or x2 == width or y2 == height
        small = min(x2 - x1, y2 - y1) < DIFFICULT_BELOW_PX
        element = ElementTree.SubElement(root, "object")
        _add(element, name=placed.name, pose="Unspecified", truncated=int(at_edge))
        _add(element, difficult=int(small or seen_share < DIFFICULT_BELOW_SHARE))
        # VOC counts pixels from 1 and includes the last one, so x2 and y2 stay and x1 and y1 grow by one.
        _add(ElementTree.SubElement(element, "bndbox"), xmin=x1 + 1, ymin=y1 + 1, xmax=x2, ymax=y2)
    ElementTree.indent(root, space="\t")
    return ElementTree.tostring(root) + b"\n"


def _add(parent: ElementTree.Element, **values: str | int) -> None:
    for name, value in values.items():
        ElementTree.SubElement(parent, name).text = str(value)
