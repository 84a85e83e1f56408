"""Writes the COCO scenes in the layout of LVIS v1: lvis_v1_{train,val}.json.

LVIS has finer classes than COCO, many of them rare, and labels only some of them in each image. So here a COCO look is
one of three LVIS classes, by how much it is stretched; the classes that are drawn have their real names, ids and
frequencies, the others are there by number only.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from demo_coco import Shot
from demo_layouts import LVIS
from demo_scenes import Placed

NUM_CATEGORIES = 1203
NEGATIVES_PER_IMAGE = 6
FROM_COCO_TRAIN = 4
"""How many images of COCO's training set belong to the validation set, as many of the real one do."""

TALL_BELOW, WIDE_ABOVE = 0.95, 1.1


class Category(NamedTuple):
    """A class of LVIS v1. Frequency: "r" in at most 10 of the real training images, "c" in at most 100, else "f"."""

    id: int
    name: str
    synset: str
    frequency: str


PERSON = Category(793, "person", "person.n.01", "f")
BICYCLE = Category(94, "bicycle", "bicycle.n.01", "f")
CAR = Category(207, "car_(automobile)", "car.n.01", "f")
AIRPLANE = Category(3, "airplane", "airplane.n.01", "f")
TRAIN = Category(1115, "train_(railroad_vehicle)", "train.n.01", "f")
BOAT = Category(118, "boat", "boat.n.01", "f")
CAT = Category(225, "cat", "cat.n.01", "f")
DOG = Category(378, "dog", "dog.n.01", "f")
BOTTLE = Category(133, "bottle", "bottle.n.01", "f")
CHAIR = Category(232, "chair", "chair.n.01", "f")
FLOWERPOT = Category(837, "flowerpot", "pot.n.04", "f")
TELEVISION = Category(1077, "television_set", "television_receiver.n.01", "f")

LVIS_LOOKS: dict[str, tuple[Category, Category, Category]] = {
    "person": (
        Category(920, "scarecrow", "scarecrow.n.01", "r"),
        PERSON,
        Category(977, "snowman", "snowman.n.01", "c"),
    ),
    "bicycle": (BICYCLE, BICYCLE, Category(1120, "tricycle", "tricycle.n.01", "c")),
    "car": (Category(593, "jeep", "jeep.n.01", "c"), CAR, Category(648, "limousine", "limousine.n.01", "r")),
    "aeroplane": (
        Category(436, "fighter_jet", "fighter.n.02", "c"),
        AIRPLANE,
        Category(931, "seaplane", "seaplane.n.01", "r"),
    ),
    "train": (TRAIN, TRAIN, Category(165, "bullet_train", "bullet_train.n.01", "c")),
    "boat": (Category(1199, "yacht", "yacht.n.01", "c"), BOAT, Category(200, "canoe", "canoe.n.01", "c")),
    "cat": (Category(612, "kitten", "kitten.n.01", "c"), CAT, Category(316, "cougar", "cougar.n.01", "r")),
    "dog": (Category(857, "puppy", "puppy.n.01", "c"), DOG, Category(355, "dalmatian", "dalmatian.n.02", "r")),
    "bottle": (
        Category(1188, "wine_bottle", "wine_bottle.n.01", "f"),
        BOTTLE,
        Category(1082, "thermos_bottle", "thermos.n.01", "c"),
    ),
    "chair": (
        Category(889, "rocking_chair", "rocking_chair.n.01", "c"),
        CHAIR,
        Category(420, "electric_chair", "electric_chair.n.01", "r"),
    ),
    "pottedplant": (
        Category(1032, "sugarcane_(plant)", "sugarcane.n.01", "r"),
        FLOWERPOT,
        Category(1034, "sunflower", "sunflower.n.01", "c"),
    ),
    "tvmonitor": (
        Category(1076, "television_camera", "television_camera.n.01", "c"),
        TELEVISION,
        Category(698, "monitor_(computer_equipment) computer_monitor", "monitor.n.04", "f"),
    ),
}
"""Look of a COCO scene -> the LVIS classes of a tall, a usual and a wide one."""


def lvis_category(placed: Placed) -> Category:
    """The class of a drawn object; a crowd is of the usual kind."""
    tall, usual, wide = LVIS_LOOKS[placed.name]
    if placed.pose is None or TALL_BELOW <= placed.pose.stretch <= WIDE_ABOVE:
        return usual
    return tall if placed.pose.stretch < TALL_BELOW else wide


def lvis(train: Sequence[Shot], val: Sequence[Shot], seed: int) -> dict[str, dict[str, Any]]:
    """Contents of lvis_v1_train.json and lvis_v1_val.json, by "train" and "val".

    Args:
        train: COCO's training images; the last FROM_COCO_TRAIN of them go to LVIS's validation set.
        val: COCO's validation images.
        seed: For the choice of the classes that an image is said not to contain.
    """
    folders = [("train2017", shot) for shot in train] + [("val2017", shot) for shot in val]
    border = len(train) - FROM_COCO_TRAIN
    annotations = {"train": _annotations(folders[:border]), "val": _annotations(folders[border:])}
    images = [_image(folder, shot, seed) for folder, shot in folders]
    # As in the real files, both tell how often a class is in the training set.
    categories = _categories(annotations["train"])
    return {
        name: {
            "info": {"description": "Drawn by make_demo_data.py", "version": "v1.0", "year": 2020},
            "licenses": [{"id": 1, "name": "none needed: drawn by a program", "url": ""}],
            "images": images[part],
            "annotations": annotations[name],
            "categories": categories,
        }
        for name, part in (("train", slice(border)), ("val", slice(border, None)))
    }


def _image(folder: str, shot: Shot, seed: int) -> dict[str, Any]:
    """An image's record. LVIS has no crowds: a class that has one here counts as not exhaustively labelled."""
    present = {lvis_category(placed).id for placed, _ in shot.objects}
    drawn = {category.id for kinds in LVIS_LOOKS.values() for category in kinds}
    rng = np.random.default_rng((seed, LVIS, shot.image["id"]))
    absent = rng.choice(sorted(drawn - present), size=NEGATIVES_PER_IMAGE, replace=False)
    return {
        "id": shot.image["id"],
        "coco_url": f"http://images.cocodataset.org/{folder}/{shot.image['file_name']}",
        "width": shot.image["width"],
        "height": shot.image["height"],
        "license": 1,
        "neg_category_ids": sorted(int(number) for number in absent),
        "not_exhaustive_category_ids": [lvis_category(placed).id for placed, _ in shot.objects if placed.is_crowd],
    }


def _annotations(folders: Sequence[tuple[str, Shot]]) -> list[dict[str, Any]]:
    return [
        {
            "id": annotation["id"],
            "image_id": annotation["image_id"],
            "category_id": lvis_category(placed).id,
            "segmentation": annotation["segmentation"],
            "area": annotation["area"],
            "bbox": annotation["bbox"],
        }
        for _, shot in folders
        for placed, annotation in shot.objects
        if not placed.is_crowd
    ]


def _categories(annotations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All classes of LVIS v1, ids 1 to 1203, with their numbers of images and objects among `annotations`."""
    drawn = {category.id: category for kinds in LVIS_LOOKS.values() for category in kinds}
    objects = Counter(annotation["category_id"] for annotation in annotations)
    images = Counter(number for _, number in {(a["image_id"], a["category_id"]) for a in annotations})
    records = []
    for number in range(1, NUM_CATEGORIES + 1):
        # Evaluation looks at ids and frequencies only; classes without an object are in no average.
        category = drawn.get(number, Category(number, f"not_drawn_{number}", f"not_drawn_{number}.n.01", "r"))
        record = {**category._asdict(), "synonyms": [category.name], "def": "a drawn shape"}
        records.append({**record, "image_count": images[number], "instance_count": objects[number]})
    return records
