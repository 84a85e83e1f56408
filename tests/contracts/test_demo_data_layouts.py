"""Keypoints, LVIS and Cityscapes of the demo data, read by the packages that define them."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

TOOLS = Path(__file__).parents[2] / "tools"
KEYPOINTS = [
    "nose",
    *("left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow"),
    *("right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee"),
    *("left_ankle", "right_ankle"),
]
THING_IDS = {24, 25, 26, 27, 28, 31, 32, 33}


@pytest.fixture(scope="module")
def demo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "data"
    command = [sys.executable, TOOLS / "make_demo_data.py", out, "--images", "1"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return out


@pytest.fixture(scope="module")
def keypoints(demo_dir: Path) -> Callable[[str], Any]:
    """A split's people as pycocotools reads them, by annotation id."""
    coco = pytest.importorskip("pycocotools.coco")
    return lambda split: coco.COCO(demo_dir / f"coco/annotations/person_keypoints_{split}2017.json")


@pytest.fixture(scope="module")
def lvis(demo_dir: Path) -> Callable[[str], Any]:
    """A split as the lvis package reads it."""
    package = pytest.importorskip("lvis")
    return lambda split: package.LVIS(str(demo_dir / f"lvis/lvis_v1_{split}.json"))


@pytest.fixture(scope="module")
def cityscapes() -> Callable[[str], ModuleType]:
    """A module of cityscapesscripts."""
    return lambda name: pytest.importorskip(f"cityscapesscripts.{name}")


def points_of(annotation: dict[str, Any]) -> NDArray[np.int64]:
    return np.array(annotation["keypoints"]).reshape(17, 3)


def ground_truths(demo_dir: Path, split: str) -> list[Path]:
    return sorted((demo_dir / "cityscapes/gtFine" / split).glob("*/*_gtFine_polygons.json"))


def label_image(polygons: Path, kind: str) -> NDArray[np.int64]:
    with Image.open(str(polygons).replace("polygons.json", f"{kind}.png")) as image:
        return np.asarray(image).astype(np.int64)


@pytest.mark.parametrize("split", ["train", "val"])
def test_people_are_the_persons_of_the_instances(demo_dir: Path, keypoints: Callable[[str], Any], split: str) -> None:
    people, instances = (
        keypoints(split),
        json.loads((demo_dir / f"coco/annotations/instances_{split}2017.json").read_text()),
    )
    assert list(people.imgs.values()) == instances["images"], "images without a person are listed too"
    assert len({annotation["image_id"] for annotation in people.anns.values()}) < len(people.imgs)
    own = ("num_keypoints", "keypoints")
    written = [{k: v for k, v in annotation.items() if k not in own} for annotation in people.anns.values()]
    assert written == [annotation for annotation in instances["annotations"] if annotation["category_id"] == 1]


def test_the_category_is_coco_s(keypoints: Callable[[str], Any]) -> None:
    category = keypoints("val").cats[1]
    assert (category["name"], category["keypoints"]) == ("person", KEYPOINTS)
    assert len(category["skeleton"]) == 19
    bones = {frozenset((KEYPOINTS[start - 1], KEYPOINTS[end - 1])) for start, end in category["skeleton"]}
    assert {frozenset(("nose", "left_eye")), frozenset(("left_knee", "left_ankle"))} <= bones
    mirrored = {
        frozenset(n.replace("left", "?").replace("right", "left").replace("?", "right") for n in b) for b in bones
    }
    assert mirrored == bones


@pytest.mark.parametrize("split", ["train", "val"])
def test_visibility_follows_the_masks_and_labelled_points_lie_in_the_box(
    keypoints: Callable[[str], Any], split: str
) -> None:
    people = keypoints(split)
    flags: Counter[int] = Counter()
    for annotation in people.anns.values():
        points = points_of(annotation)
        assert annotation["num_keypoints"] == (points[:, 2] > 0).sum()
        assert not points[points[:, 2] == 0].any()
        if annotation["iscrowd"]:
            assert not points.any()
            continue
        left, top, width, height = annotation["bbox"]
        mask = people.annToMask(annotation)
        for x, y, flag in points[points[:, 2] > 0]:
            assert left - 0.5 <= x <= left + width - 0.5
            assert top - 0.5 <= y <= top + height - 0.5
            around = mask[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
            assert around.any() if flag == 2 else not around.all(), "off by a pixel at most: masks are polygons here"
            flags[flag] += 1
    assert flags[2] > flags[1] > 0


def test_training_people_have_every_odd_case(keypoints: Callable[[str], Any]) -> None:
    annotations = list(keypoints("train").anns.values())
    assert any(annotation["iscrowd"] for annotation in annotations)
    single = np.stack([points_of(annotation)[:, 2] for annotation in annotations if not annotation["iscrowd"]])
    assert {0, 1, 2} == set(single.ravel())
    assert ((single > 0).sum(axis=1) > 0).all()


def test_keypoints_are_one_affine_function_of_the_shape(keypoints: Callable[[str], Any]) -> None:
    # Learnable: all people are the same pattern, moved, turned and stretched, up to rounding to pixels.
    whole = [points_of(a)[:, :2] for split in ("train", "val") for a in keypoints(split).anns.values()
             if (points_of(a)[:, 2] > 0).all()]  # fmt: skip
    assert len(whole) > 10
    pattern = np.concatenate([whole[0], np.ones((17, 1))], axis=1).astype(float)
    for points in whole[1:]:
        map_, *_ = np.linalg.lstsq(pattern, points.astype(float), rcond=None)
        assert np.abs(pattern @ map_ - points).max() < 2.5
        assert np.linalg.det(map_[:2]) > 0, "left and right are never exchanged"
    for points in whole:
        eyes, ankles = points[[1, 2]], points[[15, 16]]
        assert eyes[0, 0] > eyes[1, 0], "people look at us"
        assert eyes[:, 1].max() < ankles[:, 1].min()


def test_lvis_files_have_all_categories_and_true_counts(lvis: Callable[[str], Any]) -> None:
    train, val = lvis("train"), lvis("val")
    assert sorted(train.cats) == list(range(1, 1204))
    assert train.dataset["categories"] == val.dataset["categories"]
    objects = Counter(a["category_id"] for a in train.anns.values())
    images = Counter(number for _, number in {(a["image_id"], a["category_id"]) for a in train.anns.values()})
    for number, category in train.cats.items():
        assert (category["instance_count"], category["image_count"]) == (objects[number], images[number])
    for split in (train, val):
        used = Counter(split.cats[a["category_id"]]["frequency"] for a in split.anns.values())
        assert min(used[frequency] for frequency in "rcf") >= 5


def test_lvis_splits_share_the_coco_images_among_them(demo_dir: Path, lvis: Callable[[str], Any]) -> None:
    urls = {split: [image["coco_url"] for image in lvis(split).imgs.values()] for split in ("train", "val")}
    paths = [demo_dir / "coco" / "/".join(url.split("/")[-2:]) for url in urls["train"] + urls["val"]]
    assert sorted(paths) == sorted((demo_dir / "coco").glob("*2017/*.jpg"))
    assert {url.split("/")[-2] for url in urls["train"]} == {"train2017"}
    assert {url.split("/")[-2] for url in urls["val"]} == {"train2017", "val2017"}, "as in the real validation set"


def test_lvis_says_what_is_not_there_and_what_is_not_all_labelled(demo_dir: Path, lvis: Callable[[str], Any]) -> None:
    partly = 0
    for split in ("train", "val"):
        api = lvis(split)
        for number, image in api.imgs.items():
            present = {annotation["category_id"] for annotation in api.img_ann_map[number]}
            negative = set(image["neg_category_ids"])
            assert negative
            assert not negative & (present | set(image["not_exhaustive_category_ids"]))
            partly += len(image["not_exhaustive_category_ids"])
    crowds = [
        annotation
        for split in ("train", "val")
        for annotation in json.loads((demo_dir / f"coco/annotations/instances_{split}2017.json").read_text())[
            "annotations"
        ]
        if annotation["iscrowd"]
    ]
    assert partly == len(crowds) > 0


def test_lvis_masks_are_those_of_coco(demo_dir: Path, lvis: Callable[[str], Any]) -> None:
    api = lvis("train")
    content = json.loads((demo_dir / "coco/annotations/instances_train2017.json").read_text())
    objects = {annotation["id"]: annotation for annotation in content["annotations"]}
    single = {number for number, annotation in objects.items() if not annotation["iscrowd"]}
    assert set(api.anns) == {number for number in single if objects[number]["image_id"] in api.imgs}
    for number, annotation in api.anns.items():
        assert annotation["segmentation"] == objects[number]["segmentation"]
        ys, xs = np.nonzero(api.ann_to_mask(annotation))
        x, y, width, height = annotation["bbox"]
        drawn = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert np.abs(np.array([x, y, x + width, y + height]) - drawn).max() <= 3


@pytest.mark.parametrize(("split", "count", "cities"), [("train", 8, 2), ("val", 4, 1)])
def test_cityscapes_has_every_file_of_every_image(demo_dir: Path, split: str, count: int, cities: int) -> None:
    images = sorted((demo_dir / "cityscapes/leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    assert len(images) == count
    assert len({path.parent for path in images}) == cities
    for image, polygons in zip(images, ground_truths(demo_dir, split), strict=True):
        assert polygons.name == image.name.replace("leftImg8bit.png", "gtFine_polygons.json")
        with Image.open(image) as opened:
            size = opened.size
            assert opened.mode == "RGB"
        content = json.loads(polygons.read_text())
        assert size == (content["imgWidth"], content["imgHeight"]) == (2 * size[1], size[1])
        for kind in ("instanceIds", "labelIds", "labelTrainIds"):
            assert label_image(polygons, kind).shape == size[::-1]


@pytest.mark.parametrize("split", ["train", "val"])
def test_label_images_are_those_of_cityscapes_own_scripts(
    demo_dir: Path, cityscapes: Callable[[str], ModuleType], split: str
) -> None:
    instances, labels = cityscapes("preparation.json2instanceImg"), cityscapes("preparation.json2labelImg")
    for path in ground_truths(demo_dir, split):
        annotation = cityscapes("helpers.annotation").Annotation()
        annotation.fromJsonFile(str(path))
        for kind, wanted in (
            ("instanceIds", instances.createInstanceImage(annotation, "ids")),
            ("labelIds", labels.createLabelImage(annotation, "ids")),
            ("labelTrainIds", labels.createLabelImage(annotation, "trainIds")),
        ):
            assert np.array_equal(label_image(path, kind), np.asarray(wanted)), (path.name, kind)


@pytest.mark.parametrize("split", ["train", "val"])
def test_cityscapes_has_all_classes_and_its_odd_cases(
    demo_dir: Path, cityscapes: Callable[[str], ModuleType], split: str
) -> None:
    names = cityscapes("helpers.labels").name2label
    used: set[str] = set()
    train_ids: set[int] = set()
    instances: Counter[int] = Counter()
    groups: set[int] = set()
    for path in ground_truths(demo_dir, split):
        used |= {item["label"] for item in json.loads(path.read_text())["objects"]}
        train_ids |= set(np.unique(label_image(path, "labelTrainIds")).tolist())
        ids, sizes = np.unique(label_image(path, "instanceIds"), return_counts=True)
        instances.update(int(number) // 1000 for number in ids if number >= 1000)
        assert sizes[ids >= 1000].min() >= 100, "smaller ones are not evaluated"
        groups |= {int(number) for number in ids if 24 <= number < 1000}
    assert train_ids == {*range(19), 255}
    assert set(instances) == THING_IDS
    assert min(instances.values()) >= 3
    assert groups <= {24, 26, 33}, "a group has the plain id"
    assert groups
    assert {"license plate", "out of roi", "ego vehicle", "static"} <= used, (
        "labels that no image shows, or none counts"
    )
    unknown = {name for name in used if name not in names}
    assert unknown <= {"cargroup", "persongroup", "bicyclegroup"}
    assert unknown


def test_streets_show_what_their_labels_say(demo_dir: Path) -> None:
    # A class has a colour of its own: the mean of its pixels is nearest to its mean elsewhere.
    means: dict[int, list[NDArray[np.float64]]] = {}
    for path in ground_truths(demo_dir, "train"):
        image = str(path).replace("gtFine/", "leftImg8bit/").replace("gtFine_polygons.json", "leftImg8bit.png")
        pixels, labels = np.asarray(Image.open(image)).astype(float), label_image(path, "labelTrainIds")
        for number in (0, 1, 8, 10, 13, 14, 16):
            if (labels == number).any():
                colour = pixels[labels == number].mean(axis=0)
                means.setdefault(number, []).append(colour / np.linalg.norm(colour))
    numbers, right = list(means), []
    for number in numbers:
        for index, colour in enumerate(means[number]):
            others = {n: [c for i, c in enumerate(means[n]) if (n, i) != (number, index)] for n in numbers}
            nearest = min(numbers, key=lambda n: float(np.linalg.norm(np.mean(others[n], axis=0) - colour)))
            right.append(nearest == number)
    assert np.mean(right) > 0.9
