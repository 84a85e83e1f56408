"""The sheet of views that `tools/show_views.py` draws."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detco.artifact import IMAGENET_RGB, Preprocess


def load_tool():
    path = Path(__file__).parents[2] / "tools" / "show_views.py"
    spec = importlib.util.spec_from_file_location("show_views", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


@pytest.mark.parametrize(("method", "columns"), [("moco_v2", 3), ("detco", 5)])
def test_a_sheet_has_a_row_per_image_and_a_column_per_view(method, columns, photo_dir, tmp_path, capsys):
    target = tmp_path / "views.png"
    small = ["VIEWS.GLOBAL_SIZE", "64"]
    assert tool.main([str(photo_dir), "-o", str(target), "--method", method, "--num-images", "3", *small]) == 0
    sheet = Image.open(target)
    assert f"{sheet.width}x{sheet.height} px" in capsys.readouterr().out
    filled = (np.asarray(sheet)[tool.HEADING_HEIGHT :] != tool.BACKGROUND).any(2)

    def blocks(line):
        """Runs of filled pixels that are further apart than the gaps within a patch set."""
        starts = np.flatnonzero(line)
        return 1 + np.count_nonzero(np.diff(starts) > tool.GAP + 1)

    assert blocks(filled.any(0)) == columns
    assert blocks(filled.any(1)) == 3


def test_the_same_seed_and_epoch_draw_the_same_sheet(photo_dir, tmp_path):
    sheets = []
    for name, options in (("a", []), ("b", []), ("c", ["--seed", "1"]), ("d", ["--epoch", "1"])):
        target = tmp_path / f"{name}.png"
        arguments = [str(photo_dir), "-o", str(target), "--method", "moco_v2", "--num-images", "2", *options]
        assert tool.main([*arguments, "VIEWS.GLOBAL_SIZE", "32"]) == 0
        sheets.append(target.read_bytes())
    assert sheets[0] == sheets[1]
    assert len(set(sheets)) == 3


@pytest.mark.parametrize(
    "preprocess", [IMAGENET_RGB, Preprocess("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), stride_in_1x1=True)]
)
def test_denormalising_gives_the_pixels_back(preprocess):
    pixels = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    ordered = pixels.flip(1) if preprocess.channel_order == "BGR" else pixels
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocess.mean_255, preprocess.std_255))
    assert torch.equal(tool.denormalise((ordered - mean) / std, preprocess), pixels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "simclr"], "METHOD.NAME is 'simclr'"),
        (["--num-images", "0"], "--num-images is 0"),
        (["VIEWS.BLUR_PROP", "1"], "did you mean VIEWS.BLUR_PROB"),
        (["VIEWS.BLUR_PROB", "3"], "blur_prob is 3"),
    ],
)
def test_wrong_input_is_refused_with_exit_code_2(arguments, message, photo_dir, tmp_path, capsys):
    assert tool.main([str(photo_dir), "-o", str(tmp_path / "views.png"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "views.png").exists()


def test_a_missing_folder_is_refused(tmp_path, capsys):
    assert tool.main([str(tmp_path / "nowhere"), "-o", str(tmp_path / "views.png")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_images_are_picked_evenly():
    assert tool.pick_indices(10, 4) == [0, 2, 5, 7]
    assert tool.pick_indices(2, 4) == [0, 1]
