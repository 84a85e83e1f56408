"""DETR's augmentation: half of the images are cropped, and the boxes stay on their objects."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transfer import d2

if d2.info() is None:
    pytest.skip("needs Detectron2 (python tools/install_detectron2.py)", allow_module_level=True)

from detectron2.structures import BoxMode

from transfer.config import load_config
from transfer.mappers import build_mapper

pytestmark = pytest.mark.d2

BASE = Path(__file__).parents[2] / "configs/transfer/base/sparse_rcnn.yaml"
WIDTH, HEIGHT = 320, 240
OBJECT = (100, 60, 240, 200)
DRAWS = 60


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red grows from left to right, green from top to bottom, blue is 255 inside OBJECT and 0 elsewhere."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, WIDTH)[None]
    pixels[..., 1] = np.linspace(0, 255, HEIGHT)[:, None]
    pixels[OBJECT[1] : OBJECT[3], OBJECT[0] : OBJECT[2], 2] = 255
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def sample(photo: Path, mapper: Callable[[dict[str, Any]], Any], *, empty: bool = False) -> dict[str, Any]:
    annotation = {"bbox": list(OBJECT), "bbox_mode": BoxMode.XYXY_ABS, "category_id": 7, "iscrowd": 0}
    record = {"file_name": str(photo), "width": WIDTH, "height": HEIGHT, "image_id": 1}
    mapped: dict[str, Any] = mapper({**record, "annotations": [] if empty else [annotation]})
    return mapped


def make_mapper() -> Callable[[dict[str, Any]], Any]:
    mapper = build_mapper(load_config(BASE, ["INPUT.FORMAT", "RGB"]))
    assert mapper is not None
    return mapper


@pytest.fixture(scope="module")
def samples(photo: Path) -> list[dict[str, Any]]:
    mapper = make_mapper()
    np.random.seed(0)
    return [sample(photo, mapper) for _ in range(DRAWS)]


def visible(image: torch.Tensor) -> tuple[float, float]:
    """Shares of the original's width and height that the image shows, by its colour gradients."""
    red, green = image[0].float(), image[1].float()
    return float(red.max() - red.min()) / 255, float(green.max() - green.min()) / 255


def test_about_half_of_the_images_are_cropped(samples: list[dict[str, Any]]) -> None:
    shares = [visible(drawn["image"]) for drawn in samples]
    cropped = [share for share in shares if min(share) < 0.99]
    assert 0.3 * DRAWS < len(cropped) < 0.7 * DRAWS
    # At least 384 pixels of at most 600 (short side) and 800 (long side).
    assert all(width > 384 / 800 - 0.01 and height > 384 / 600 - 0.01 for width, height in cropped)
    assert min(width for width, _ in cropped) < 0.75


def test_every_image_ends_with_a_published_short_side(samples: list[dict[str, Any]]) -> None:
    sides = {min(drawn["image"].shape[1:]) for drawn in samples}
    assert sides <= set(range(480, 801, 32))
    assert len(sides) > 5
    assert max(max(drawn["image"].shape[1:]) for drawn in samples) <= 1333


def test_half_of_the_images_are_mirrored(samples: list[dict[str, Any]]) -> None:
    mirrored = [drawn for drawn in samples if drawn["image"][0, 0, 0] > drawn["image"][0, 0, -1]]
    assert 0.3 * DRAWS < len(mirrored) < 0.7 * DRAWS


def test_boxes_stay_on_their_objects(samples: list[dict[str, Any]]) -> None:
    for drawn in samples:
        rows, columns = (drawn["image"][2] > 127).nonzero(as_tuple=True)
        seen = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
        assert drawn["instances"].gt_boxes.tensor[0].tolist() == pytest.approx(seen, abs=2)
        assert drawn["instances"].gt_classes.tolist() == [7]
        assert drawn["instances"].image_size == tuple(drawn["image"].shape[1:])


def test_an_image_without_objects_is_a_sample(photo: Path) -> None:
    mapper = make_mapper()
    np.random.seed(0)
    for _ in range(4):
        assert len(sample(photo, mapper, empty=True)["instances"]) == 0


def test_a_config_without_crops_is_refused() -> None:
    with pytest.raises(ValueError, match=r"INPUT\.CROP\.ENABLED is False"):
        build_mapper(load_config(BASE, ["INPUT.CROP.ENABLED", "False"]))
