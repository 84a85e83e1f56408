"""Samples for semantic segmentation: the crop's size, image and labels together, and how often what is drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transfer import d2

if d2.info() is None:
    pytest.skip("needs Detectron2 (python tools/install_detectron2.py)", allow_module_level=True)

from detectron2.config import CfgNode

from transfer.config import load_config
from transfer.mappers import build_mapper
from transfer.sem_seg_mapper import RandomWindow, Window

pytestmark = pytest.mark.d2

CITYSCAPES = Path(__file__).parents[2] / "configs" / "transfer" / "base" / "cityscapes_semseg.yaml"
HEIGHT, WIDTH = 128, 256
CROP = (97, 161)
BLOCK = 32  # pixels of the original that have the same label
MEAN = [123.675, 116.28, 103.53]


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    """An image whose red is x and whose green is y; its label is the number of the 32 x 32 block."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.uint8)
    Image.fromarray(np.stack([x, y, np.full_like(x, 7)], axis=-1)).save(tmp_path / "image.png")
    Image.fromarray(x // BLOCK + 8 * (y // BLOCK)).save(tmp_path / "labels.png")
    return {
        "file_name": str(tmp_path / "image.png"),
        "sem_seg_file_name": str(tmp_path / "labels.png"),
        "height": HEIGHT,
        "width": WIDTH,
    }


def config(*pairs: str) -> CfgNode:
    """The published file for a dataset of 128 x 256: scales 0.5 to 2.0, RGB."""
    size = ("INPUT.MIN_SIZE_TRAIN", "(64, 256)", "INPUT.MAX_SIZE_TRAIN", "512", "INPUT.CROP.SIZE", str(list(CROP)))
    inputs = ("INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", str(MEAN))
    return load_config(CITYSCAPES, [*size, *inputs, *pairs])


def draw(mapper: Any, record: dict[str, Any], count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """`count` pairs of image (H, W, 3) and labels (H, W)."""
    np.random.seed(seed)
    mapped = [mapper(record) for _ in range(count)]
    return [(sample["image"].permute(1, 2, 0).numpy(), sample["sem_seg"].numpy()) for sample in mapped]


def slope(image: np.ndarray, labels: np.ndarray) -> float:
    """Change of red per pixel to the right, away from borders: 1 / scale, negative if flipped."""
    columns = np.flatnonzero(labels[0] != 255)[4:-4]
    red = image[0, columns, 0].astype(float)
    return float((red[-1] - red[0]) / (columns[-1] - columns[0]))


def test_the_published_config_states_scale_and_crop() -> None:
    cfg = load_config(CITYSCAPES)
    mapper = build_mapper(cfg)
    resize, window, flip = mapper.augmentations.augs
    assert (resize.short_edge_length, resize.max_size, resize.is_range) == ((512, 2048), 4096, True)
    assert (window.size, window.label) == ((769, 769), 255)
    assert (flip.prob, flip.horizontal) == (0.5, True)


def test_every_sample_has_the_size_of_the_crop(record) -> None:
    before = dict(record)
    mapper = build_mapper(config())
    for image, labels in draw(mapper, record, 50):
        assert image.shape == (*CROP, 3)
        assert labels.shape == CROP
        assert (image.dtype, labels.dtype) == (np.uint8, np.int64)
    assert record == before


def test_labels_go_with_the_pixels(record) -> None:
    for image, labels in draw(build_mapper(config()), record, 100):
        inside = labels != 255
        red, green = (image[..., channel][inside].astype(float) for channel in (0, 1))
        column, row = labels[inside] % 8, labels[inside] // 8
        # A pixel of block k has a colour of 32 k to 32 k + 31, give or take one pixel of the smallest scale.
        for colour, block in ((red, column), (green, row)):
            assert (colour >= BLOCK * block - 2.5).all()
            assert (colour <= BLOCK * (block + 1) + 1.5).all()


def test_what_the_image_does_not_fill_has_the_mean_colour_and_no_label(record) -> None:
    found_padding = 0
    for image, labels in draw(build_mapper(config()), record, 100):
        filled = labels != 255
        rows, columns = filled.any(axis=1), filled.any(axis=0)
        assert (filled == rows[:, None] & columns[None, :]).all()  # a rectangle
        assert rows[0]  # padded below
        assert (image[~filled] == np.rint(MEAN)).all()
        assert (image[filled][:, 2] == 7).all()
        scale = 1 / abs(slope(image, labels))
        for sides, original, crop in ((rows, HEIGHT, CROP[0]), (columns, WIDTH, CROP[1])):
            assert sides.sum() == pytest.approx(min(original * scale, crop), abs=0.05 * crop)
        found_padding += bool((~filled).any())
    assert 0 < found_padding < 100


def test_half_of_the_samples_are_flipped_and_all_scales_are_as_likely(record) -> None:
    count = 600
    slopes = np.array([slope(*pair) for pair in draw(build_mapper(config()), record, count)])
    four_sigma = 4 * np.sqrt(0.25 / count)
    assert np.mean(slopes < 0) == pytest.approx(0.5, abs=four_sigma)
    scales = 1 / np.abs(slopes)
    assert scales.min() == pytest.approx(0.5, abs=0.03)
    assert scales.max() == pytest.approx(2.0, abs=0.06)
    assert np.mean(scales < 1.25) == pytest.approx(0.5, abs=four_sigma)  # the middle of 0.5 to 2.0
    # Neither depends on the other.
    assert np.corrcoef(slopes < 0, scales)[0, 1] == pytest.approx(0, abs=4 / np.sqrt(count))


def test_every_place_of_the_crop_is_as_likely_on_both_axes() -> None:
    np.random.seed(0)
    window = RandomWindow((4, 4), (0.0, 0.0, 0.0), 255)
    count = 4000
    places = np.array([(w.x, w.y) for w in (window.get_transform(np.zeros((8, 13, 3))) for _ in range(count))])
    for axis, positions in ((0, 10), (1, 5)):
        values, counts = np.unique(places[:, axis], return_counts=True)
        assert list(values) == list(range(positions))
        expected = count / positions
        assert (np.abs(counts - expected) < 4.5 * np.sqrt(expected)).all()
    assert abs(np.corrcoef(places.T)[0, 1]) < 4 / np.sqrt(count)  # not along the diagonal


def test_a_window_on_a_small_image_fills_in_the_rest() -> None:
    window = RandomWindow((3, 4), (9.6, 1.0, 2.0), 200).get_transform(np.zeros((2, 6, 3)))
    assert window.y == 0
    image = window.apply_image(np.zeros((2, 6, 3), np.uint8))
    assert (image[2] == [10, 1, 2]).all()
    assert (image[:2] == 0).all()
    labels = window.apply_segmentation(np.ones((2, 6), np.uint8))
    assert (labels == [[1] * 4, [1] * 4, [200] * 4]).all()


def test_points_move_with_the_window() -> None:
    whole = np.arange(48).reshape(6, 8, 1)
    window = Window(2, 1, (3, 4), (0.0,), 255)
    ((x, y),) = window.apply_coords(np.array([[5.0, 3.0]])).astype(int)
    assert window.apply_image(whole)[y, x] == whole[3, 5]


def test_channels_are_in_the_order_of_the_config(record) -> None:
    rgb, bgr = (draw(build_mapper(config("INPUT.FORMAT", order)), record, 5) for order in ("RGB", "BGR"))
    for (one, labels), (other, _) in zip(rgb, bgr, strict=True):
        inside = labels != 255
        assert (one[inside] == other[inside][:, ::-1]).all()
        assert (one[~inside] == other[~inside]).all()  # MODEL.PIXEL_MEAN is in that order already


def test_the_ignore_value_and_the_flip_are_the_config_s(record) -> None:
    cfg = config("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "99", "INPUT.RANDOM_FLIP", "none", "INPUT.CROP.SIZE", "[300, 300]")
    for image, labels in draw(build_mapper(cfg), record, 10):
        assert labels[-1, 0] == 99
        assert (labels != 255).all()
        assert image[0, 100, 0] > image[0, 10, 0]  # x grows to the right in every one


def test_the_same_seed_gives_the_same_samples(record) -> None:
    mapper = build_mapper(config())
    first, again, other = (draw(mapper, record, 3, seed=seed) for seed in (5, 5, 6))
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a[0], b[0]) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    "pair",
    [
        ("INPUT.CROP.ENABLED", "False"),
        ("INPUT.CROP.TYPE", "relative_range"),
        ("INPUT.CROP.SIZE", "[0.9, 0.9]"),
        ("INPUT.CROP.SIZE", "[769]"),
        ("INPUT.CROP.SIZE", "[0, 769]"),
    ],
)
def test_a_crop_without_a_size_in_pixels_is_refused(pair) -> None:
    with pytest.raises(ValueError, match="needs ENABLED True, TYPE absolute and SIZE"):
        build_mapper(config(*pair))


def test_labels_are_what_the_loss_takes(record) -> None:
    sample = build_mapper(config())(record)
    assert sample["sem_seg"].dtype == torch.int64
    assert (sample["height"], sample["width"]) == (HEIGHT, WIDTH)
