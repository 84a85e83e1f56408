"""The table of `tools/benchmark_proposals.py`, and how it measures what proposals cover."""

import json

import numpy as np
import pytest
from PIL import Image

from pretrain.proposals.backends import SearchParams, propose
from pretrain.proposals.filters import FilterParams, filter_boxes


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("benchmark_proposals")


@pytest.fixture
def photos_with_truth(tmp_path):
    """A folder of 4 pictures of one rectangle each, and the ground truth of 3: rectangle, a tiny box, and a crowd."""
    folder = tmp_path / "photos" / "train"
    folder.mkdir(parents=True)
    images, annotations = [], []
    for index in range(4):
        x1, y1, x2, y2 = 20 + 5 * index, 30, 100 + 5 * index, 90
        pixels = np.full((120, 160, 3), 220, np.uint8)
        pixels[y1:y2, x1:x2] = (20, 90, 200)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        if index < 3:
            images.append({"id": 7 * index, "file_name": f"{index}.png"})
            for crowd, box in ((0, [x1, y1, x2 - x1, y2 - y1]), (0, [1.5, 2.0, 9.0, 9.0]), (1, [0, 0, 160, 120])):
                annotations.append({"image_id": 7 * index, "bbox": box, "iscrowd": crowd})
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({"images": images, "annotations": annotations}))
    return tmp_path / "photos", truth


def test_best_overlaps_equal_a_double_loop(tool):
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 50, (30, 2))
    boxes = np.concatenate([corners, corners + rng.integers(1, 40, (30, 2))], axis=1)
    truth = boxes[:9] + 0.5

    def iou(a, b):
        common = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)

    expected = [max(iou(one, box) for box in boxes) for one in truth]
    assert tool.best_overlaps(truth, boxes) == pytest.approx(expected)
    assert tool.best_overlaps(truth, boxes[:0]).tolist() == [0.0] * 9
    assert tool.best_overlaps(truth[:0], boxes).shape == (0,)


def test_coverage_counts_overlaps_of_exactly_a_half(tool):
    found = tool.coverage(np.array([0.5, 0.49, 0.7, 1.0]))
    assert found == tool.Coverage(4, pytest.approx(0.6725), 0.75, 0.5)
    assert tool.coverage(np.zeros(0)) is None


def test_the_table_says_what_each_backend_costs_and_finds(tool, photos_with_truth, tmp_path, capsys):
    pytest.importorskip("skimage")
    photos, truth = photos_with_truth
    report = tmp_path / "figures.json"
    arguments = [str(photos), "--coco-json", str(truth), "--backends", "skimage", "--json", str(report)]
    assert tool.main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "scikit-image" in printed[0]
    assert "4 images of 0.02 megapixels" in printed[0]
    table = [line.strip("| ").split(" | ") for line in printed[2:]]
    assert [len(cells) for cells in table] == [8, 8, 8]
    assert "of 3 boxes that pass" in table[0][6]
    assert table[0][7] == "... of all 6 boxes"
    assert table[2][0].startswith("skimage, scale 300")

    (row,) = json.loads(report.read_text())["rows"]
    assert row["truth_that_passes"]["recall_70"] == 1.0
    assert row["all_truth"]["recall_70"] == 0.5
    assert row["images_per_stage"] == [4, 0, 0, 0]
    raw = [propose(np.asarray(Image.open(path)), SearchParams()) for path in sorted(photos.rglob("*.png"))]
    assert row["raw"] == sum(map(len, raw)) / 4
    assert row["unique"] == sum(len(filter_boxes(boxes, 160, 120, FilterParams()).boxes) for boxes in raw) / 4
    assert row["cpu_s"] > 0


def test_images_without_ground_truth_have_a_table_without_its_columns(tool, photos_with_truth, capsys):
    pytest.importorskip("skimage")
    assert tool.main([str(photos_with_truth[0]), "--backends", "skimage", "--num-images", "2", "--max-side", "64"]) == 0
    printed = capsys.readouterr().out
    assert "2 images" in printed
    assert "max_side 64" in printed
    assert "ABO" not in printed


def test_a_backend_that_is_not_installed_is_left_out_by_name_and_refused_if_asked_for(
    tool, photos_with_truth, capsys, monkeypatch
):
    pytest.importorskip("skimage")

    def check(params):
        if params.backend != "skimage":
            raise ValueError("not installed: the remedy")

    monkeypatch.setattr(tool, "check_available", check)
    assert tool.main([str(photos_with_truth[0]), "--num-images", "1"]) == 0
    left_out = capsys.readouterr().err.splitlines()
    assert left_out == [f"opencv_{name} is left out: not installed: the remedy" for name in ("single", "fast")]
    with pytest.raises(SystemExit):
        tool.main([str(photos_with_truth[0]), "--backends", "opencv_fast"])
    assert "not installed: the remedy" in capsys.readouterr().err


def test_ground_truth_of_other_images_is_refused(tool, photos_with_truth, tmp_path, capsys):
    pytest.importorskip("skimage")
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"images": [{"id": 1, "file_name": "x.jpg"}], "annotations": []}))
    with pytest.raises(SystemExit):
        tool.main([str(photos_with_truth[0]), "--backends", "skimage", "--coco-json", str(other)])
    assert "has boxes for none of the 4 images" in capsys.readouterr().err
