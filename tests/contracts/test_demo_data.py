import hashlib
import importlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

TOOLS = Path(__file__).parents[2] / "tools"
NUM_UNLABELLED = 22
SEED = "0"
# Two lists of their own, so that a slip in the program's lists is noticed.
VOC_CLASSES = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]
COCO_IDS_LEFT_OUT = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


def run_tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TOOLS / "make_demo_data.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def digest(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def demo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "data"
    result = run_tool(out, "--images", str(NUM_UNLABELLED), "--seed", SEED)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def drawing() -> Callable[[str], ModuleType]:
    """`drawing(name)` is a module of the drawing code, to draw labelled scenes again with their masks."""

    def load(name: str) -> ModuleType:
        sys.path.insert(0, str(TOOLS))
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(str(TOOLS))

    return load


def read_voc(root: Path, split: str) -> dict[str, ElementTree.Element]:
    ids = (root / f"ImageSets/Main/{split}.txt").read_text().split()
    return {image_id: ElementTree.parse(root / f"Annotations/{image_id}.xml").getroot() for image_id in ids}


def voc_box(element: ElementTree.Element) -> tuple[int, ...]:
    return tuple(int(element.findtext(f"bndbox/{name}") or "") for name in ("xmin", "ymin", "xmax", "ymax"))


def voc_sets(demo_dir: Path) -> list[tuple[Path, str, int]]:
    return [
        (demo_dir / "VOC2007", "trainval", 24),
        (demo_dir / "VOC2007", "test", 16),
        (demo_dir / "VOC2012", "trainval", 24),
    ]


def test_unlabelled_images_are_whole_and_lie_in_one_folder_per_shape(demo_dir: Path) -> None:
    paths = sorted((demo_dir / "unlabelled").glob("*/*.jpg"))
    assert len(paths) == NUM_UNLABELLED
    assert len({path.parent.name for path in paths}) == 11
    for path in paths:
        pixels = np.asarray(Image.open(path))
        assert min(pixels.shape[:2]) >= 160
        assert max(pixels.shape[:2]) <= 200
        assert pixels.std() > 15, "a scene is never nearly one colour"


def test_voc_boxes_count_from_one_and_lie_inside_the_images(demo_dir: Path) -> None:
    for root, split, count in voc_sets(demo_dir):
        annotations = read_voc(root, split)
        assert len(annotations) == count
        for image_id, annotation in annotations.items():
            width, height = Image.open(root / f"JPEGImages/{image_id}.jpg").size
            assert (annotation.findtext("size/width"), annotation.findtext("size/height")) == (str(width), str(height))
            assert annotation.findall("object")
            for element in annotation.findall("object"):
                x1, y1, x2, y2 = voc_box(element)
                assert 1 <= x1 <= x2 <= width
                assert 1 <= y1 <= y2 <= height


def test_voc_boxes_are_those_of_the_drawn_masks(demo_dir: Path, drawing: Callable[[str], ModuleType]) -> None:
    split = drawing("demo_voc").VOC2007_SPLITS["test"]
    scenes = drawing("demo_layouts").labelled_scenes(split, VOC_CLASSES, int(SEED))
    annotations = read_voc(demo_dir / "VOC2007", "test")
    for (image_id, annotation), (scene, _) in zip(annotations.items(), scenes, strict=True):
        decoded = np.asarray(Image.open(demo_dir / f"VOC2007/JPEGImages/{image_id}.jpg")).astype(int)
        assert np.abs(decoded - scene.pixels).mean() < 12, "the scene drawn again is the one in the file"
        written = [(element.findtext("name"), *voc_box(element)) for element in annotation.findall("object")]
        drawn = []
        for placed in scene.objects:
            ys, xs = np.nonzero(drawing("demo_scenes").visible_mask(scene, placed))
            drawn.append((placed.name, xs.min() + 1, ys.min() + 1, xs.max() + 1, ys.max() + 1))
        assert written == drawn


def test_every_voc_class_can_be_learned_and_measured(demo_dir: Path) -> None:
    trained: Counter[str | None] = Counter()
    tested: Counter[str | None] = Counter()
    difficult = 0
    for root, split, _ in voc_sets(demo_dir):
        for annotation in read_voc(root, split).values():
            for element in annotation.findall("object"):
                if element.findtext("difficult") == "1":
                    difficult += 1
                elif split == "test":
                    tested[element.findtext("name")] += 1
                else:
                    trained[element.findtext("name")] += 1
    assert set(tested) == set(trained) == set(VOC_CLASSES)
    assert min(trained.values()) >= 4
    assert min(tested.values()) >= 2
    assert 0 < difficult < 0.3 * (sum(trained.values()) + sum(tested.values()))


def test_voc_2007_splits_share_no_image(demo_dir: Path) -> None:
    ids = {split: set(read_voc(demo_dir / "VOC2007", split)) for split in ("train", "val", "trainval", "test")}
    assert ids["train"] | ids["val"] == ids["trainval"]
    assert not ids["train"] & ids["val"]
    assert not ids["trainval"] & ids["test"]


def load_coco(demo_dir: Path, split: str) -> Any:
    return pytest.importorskip("pycocotools.coco").COCO(demo_dir / f"coco/annotations/instances_{split}2017.json")


@pytest.mark.parametrize(("split", "count"), [("train", 48), ("val", 16)])
def test_coco_areas_and_boxes_agree_with_the_masks(demo_dir: Path, split: str, count: int) -> None:
    coco = load_coco(demo_dir, split)
    assert len(coco.imgs) == count
    for annotation in coco.anns.values():
        image = coco.imgs[annotation["image_id"]]
        with Image.open(demo_dir / f"coco/{split}2017" / image["file_name"]) as opened:
            assert opened.size == (image["width"], image["height"])
        mask = coco.annToMask(annotation)
        ys, xs = np.nonzero(mask)
        x, y, width, height = annotation["bbox"]
        drawn = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert np.abs(np.array([x, y, x + width, y + height]) - drawn).max() <= 3, (
            "tips of arrows are thinner than a pixel"
        )
        # The outline passes through pixels that the mask has or has not: up to half of its length.
        assert abs(mask.sum() - annotation["area"]) < 2 * (width + height)


def test_coco_masks_are_what_is_drawn(demo_dir: Path, drawing: Callable[[str], ModuleType]) -> None:
    coco = load_coco(demo_dir, "val")
    split, looks = drawing("demo_coco").COCO_SPLITS["val"], drawing("demo_coco").COCO_LOOKS
    scenes = drawing("demo_layouts").labelled_scenes(split, list(looks), int(SEED))
    compared = 0
    for image_id, (scene, _) in zip(sorted(coco.imgs), scenes, strict=True):
        for placed in scene.objects:
            annotation = coco.anns.get(100 * image_id + placed.owner)
            if annotation is None:
                continue
            drawn, written = drawing("demo_scenes").visible_mask(scene, placed), coco.annToMask(annotation).astype(bool)
            assert (drawn & written).sum() / (drawn | written).sum() > (0.999 if placed.is_crowd else 0.8)
            compared += 1
    assert compared == len(coco.anns)


def test_coco_has_its_real_categories_and_its_odd_cases(demo_dir: Path) -> None:
    coco = load_coco(demo_dir, "train")
    assert set(coco.cats) == set(range(1, 91)) - COCO_IDS_LEFT_OUT
    assert (coco.cats[1]["name"], coco.cats[64]["name"], coco.cats[90]["name"]) == (
        "person", "potted plant", "toothbrush",
    )  # fmt: skip
    annotations = list(coco.anns.values())
    assert any(annotation["iscrowd"] for annotation in annotations)
    assert any(not annotation["iscrowd"] and len(annotation["segmentation"]) > 1 for annotation in annotations)
    assert set(coco.imgs) - {annotation["image_id"] for annotation in annotations}, "some image has no object"
    used = Counter(annotation["category_id"] for annotation in annotations)
    assert len(used) == 12
    assert min(used.values()) >= 5
    val = {annotation["category_id"] for annotation in load_coco(demo_dir, "val").anns.values()}
    assert val == set(used)


def test_unfinished_data_is_drawn_again_byte_for_byte_and_finished_data_kept(demo_dir: Path) -> None:
    before = digest(demo_dir)
    arguments = (demo_dir, "--images", str(NUM_UNLABELLED), "--seed", SEED)
    assert "there already" in run_tool(*arguments).stdout
    marker = demo_dir / ".detco_demo_data.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "complete": False}))
    next((demo_dir / "unlabelled").glob("*/*.jpg")).write_bytes(b"half an image")
    (demo_dir / "VOC2007/JPEGImages/left_over.jpg").write_bytes(b"from another version")
    assert run_tool(*arguments).returncode == 0
    assert digest(demo_dir) == before


def test_scenes_are_those_of_earlier_versions(demo_dir: Path) -> None:
    # Runs on the demo data are compared over time. A pixel off is left to other versions of the drawing libraries.
    [element, *_] = read_voc(demo_dir / "VOC2007", "test")["000025"].findall("object")
    assert element.findtext("name") == "chair"
    assert voc_box(element) == pytest.approx((100, 40, 180, 98), abs=1)
    coco = json.loads((demo_dir / "coco/annotations/instances_train2017.json").read_text())
    first = coco["annotations"][0]
    assert (len(coco["annotations"]), first["image_id"], first["category_id"]) == (202, 4000, 7)
    assert first["bbox"] == pytest.approx([99.12, 30.12, 77.26, 115.5], abs=1)


def test_another_seed_or_split_gives_other_scenes(drawing: Callable[[str], ModuleType]) -> None:
    voc, layouts = drawing("demo_voc"), drawing("demo_layouts")
    splits = [*voc.VOC2007_SPLITS.values(), *voc.VOC2012_SPLITS.values()]
    scenes = [next(layouts.labelled_scenes(split, VOC_CLASSES, seed))[0] for split in splits for seed in (0, 1)]
    assert len({scene.pixels.tobytes() for scene in scenes}) == 6


def test_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "VOC2007").mkdir()
    (tmp_path / "VOC2007/mine.txt").write_text("precious")
    result = run_tool(tmp_path)
    assert result.returncode == 2
    assert "was not made by this program; choose a new or empty folder" in result.stderr
    assert digest(tmp_path).keys() == {"VOC2007/mine.txt"}


def test_impossible_number_of_images_is_refused(tmp_path: Path) -> None:
    result = run_tool(tmp_path / "out", "--images", "0")
    assert result.returncode == 2
    assert "--images 0 must be at least 1" in result.stderr
    assert not (tmp_path / "out").exists()
