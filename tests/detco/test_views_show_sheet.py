"""The sheet of views that `tools/show_views.py` draws."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detco.artifact import IMAGENET_RGB, Preprocess
from detco.views import BoxSet, PairedView, Proposals, SoCoFPNViews
from pretrain.images import list_images
from pretrain.proposals.official_json import import_json

TOOLS = Path(__file__).parents[2] / "tools"
GREY = (120, 120, 120)


def load_tool():
    spec = importlib.util.spec_from_file_location("show_views", TOOLS / "show_views.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(TOOLS))  # where a script finds the modules beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TOOLS))
    return module


tool = load_tool()


def grey_picture(side):
    return Image.new("RGB", (side, side), GREY)


def make_store(folder, photo_dir):
    """Six proposals of every photo, drawn at random."""
    rng = np.random.default_rng(0)
    boxes_xywh = {
        path.stem: np.concatenate([rng.integers(0, 40, (6, 2)), rng.integers(32, 56, (6, 2))], 1).tolist()
        for path in sorted(photo_dir.iterdir())
    }
    (folder / "boxes.json").write_text(json.dumps(boxes_xywh))
    import_json(folder / "boxes.json", list_images(photo_dir), folder / "proposals")
    return folder / "proposals"


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
        (["--method", "soco_fpn"], "`python tools/generate_proposals.py IMAGES -o proposals`"),
        (["--method", "soco_fpn", "DATA.PROPOSALS", "nowhere"], "nowhere does not exist"),
        (["--method", "moco_v2", "DATA.PROPOSALS", "nowhere"], "moco_v2 have no use for DATA.PROPOSALS nowhere"),
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


def test_proposals_of_other_images_are_refused(photo_dir, tmp_path, capsys):
    one = tmp_path / "one"
    one.mkdir()
    (one / "photo.jpg").write_bytes((photo_dir / "photo_000.jpg").read_bytes())
    store = make_store(tmp_path, photo_dir)
    target = tmp_path / "views.png"
    assert tool.main([str(one), "-o", str(target), "--method", "soco_c4", "DATA.PROPOSALS", str(store)]) == 2
    assert "was made of 24 images" in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize(
    ("method", "columns", "sizes"),
    [
        ("soco_c4", 3, []),
        ("soco_fpn", 5, ["VIEWS.SMALL_SIZE", "48"]),
        ("soco_fpn_star", 7, ["VIEWS.SMALL_SIZE", "48", "VIEWS.MEDIUM_SIZE", "80"]),
    ],
)
def test_a_method_with_proposals_has_two_columns_for_each_pair_of_views(method, columns, sizes, photo_dir, tmp_path):
    store, target = make_store(tmp_path, photo_dir), tmp_path / "views.png"
    options = ["--method", method, "--num-images", "2", "DATA.PROPOSALS", str(store), "VIEWS.VIEW_SIZE", "96", *sizes]
    assert tool.main([str(photo_dir), "-o", str(target), *options]) == 0
    first_row = np.asarray(Image.open(target))[tool.HEADING_HEIGHT + tool.MARGIN :][:90]
    filled = np.flatnonzero((first_row != tool.BACKGROUND).any(2).any(0))
    assert 1 + np.count_nonzero(np.diff(filled) > tool.MARGIN) == columns


def test_a_box_is_outlined_where_it_lies_in_the_view():
    boxes_view = np.array([[0.25, 0.5, 0.75, 1.0]])
    drawn = np.asarray(tool.draw_boxes(grey_picture(80), boxes_view, [7], ["7 P3"], {7: (255, 0, 0)}))
    label_rows, label_columns = slice(40, 57), slice(20, 60)
    for y in range(80):
        for x in range(80):
            if y in range(*label_rows.indices(80)) and x in range(*label_columns.indices(80)):
                continue  # the label, whose width depends on the font
            is_inside = 20 <= x < 60 and 40 <= y < 80
            is_edge = is_inside and not (22 <= x < 58 and 42 <= y < 78)
            assert tuple(drawn[y, x]) == ((255, 0, 0) if is_edge else GREY), (x, y)
    assert (drawn[label_rows, label_columns] == (255, 0, 0)).all(2).sum() > 200


@pytest.mark.parametrize(("method", "has_levels"), [("soco_c4", False), ("soco_fpn", True)])
def test_labels_have_levels_where_the_method_has_a_pyramid(method, has_levels, photo_dir, tmp_path, monkeypatch):
    written = []

    def record(picture, boxes_view, ids, labels, colours):
        written.extend(labels)
        return picture

    monkeypatch.setattr(tool, "draw_boxes", record)
    store = make_store(tmp_path, photo_dir)
    options = ["--method", method, "--num-images", "1", "DATA.PROPOSALS", str(store)]
    assert tool.main([str(photo_dir), "-o", str(tmp_path / "views.png"), *options]) == 0
    assert written
    assert {"P" in label for label in written} == {has_levels}


def test_an_edge_that_boxes_share_shows_all_their_colours():
    boxes_view = np.array([[0.0, 0.0, 1.0, 1.0]] * 3)
    colours = tool.colours_of([1, 2, 3])
    drawn = np.asarray(tool.draw_boxes(grey_picture(240), boxes_view, [1, 2, 3], ["1", "2", "3"], colours))
    bottom = [tuple(pixel) for pixel in drawn[239, 54:180].tolist()]
    assert {colour: bottom.count(colour) for colour in set(bottom)} == dict.fromkeys(colours.values(), 42)


def test_repeated_boxes_of_one_object_are_drawn_once():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 0.4, (2, 2))
    two = np.concatenate([corner, corner + 0.5], 1)
    colours = tool.colours_of([4, 9])
    once = tool.draw_boxes(grey_picture(96), two, [9, 4], ["9", "4"], colours)
    padded = tool.draw_boxes(grey_picture(96), two[[0, 1, 1, 0]], [9, 4, 4, 9], ["9", "4", "4", "9"], colours)
    assert padded.tobytes() == once.tobytes()
    assert once.tobytes() != tool.draw_boxes(grey_picture(96), two[:1], [9], ["9"], colours).tobytes()


def test_labels_of_equal_boxes_lie_side_by_side():
    ids, colours = [1, 2, 3, 4], tool.colours_of([1, 2, 3, 4])
    boxes_view = np.array([[0.1, 0.1, 0.9, 0.9]] * 4)
    apart = [tool.draw_boxes(grey_picture(224), boxes_view[:1], [number], [f"{number} P4"], colours) for number in ids]
    together = np.asarray(tool.draw_boxes(grey_picture(224), boxes_view, ids, [f"{n} P4" for n in ids], colours))
    for number, alone in zip(ids, apart, strict=True):
        inside = np.zeros((224, 224), dtype=bool)
        inside[26:198, 26:198] = True  # without the edges, which are shared

        def count(picture, number=number, inside=inside):
            return int(((np.asarray(picture) == colours[number]).all(2) & inside).sum())

        assert count(together) == pytest.approx(count(alone), rel=0.3)


def box_set(*boxes_view, ids):
    """The boxes of one view of one image, all on P2."""
    return BoxSet(torch.tensor([boxes_view]), torch.tensor([ids]), torch.zeros(1, len(ids), dtype=torch.int64))


def test_one_object_has_one_colour_in_every_view_of_a_row():
    low, high = (0.5, 0.5, 1.0, 1.0), (0.0, 0.25, 0.5, 0.5)
    grey = torch.zeros(1, 3, 224, 224)
    views = SoCoFPNViews(
        whole=grey,
        crop=PairedView(grey, box_set(low, high, ids=[3, 8]), box_set(high, low, ids=[3, 8])),
        small=PairedView(grey[..., ::2, ::2], box_set(high, low, ids=[8, 5]), box_set(low, high, ids=[8, 5])),
    )
    originals = [tool.add_caption(grey_picture(224), "")]
    sheet = np.asarray(tool.draw_paired_sheet(originals, views, IMAGENET_RGB, has_levels=True))

    def colour(column, box_view):
        """At the lower right corner of a box, where no label is."""
        left, top = tool.MARGIN + column * (224 + tool.MARGIN), tool.HEADING_HEIGHT + tool.MARGIN
        return tuple(sheet[top + round(box_view[3] * 224) - 1, left + round(box_view[2] * 224) - 1].tolist())

    by_id = tool.colours_of([3, 5, 8])
    assert len(set(by_id.values())) == 3
    in_columns = [{3: high, 8: low}, {3: low, 8: high}, {8: low, 5: high}, {8: high, 5: low}]
    for column, boxes in enumerate(in_columns, start=1):
        assert {number: colour(column, box_view) for number, box_view in boxes.items()} == {
            number: by_id[number] for number in boxes
        }


@pytest.mark.parametrize("count", [1, 2, 12, 48])
def test_no_two_objects_have_the_same_colour(count):
    assert len(set(tool.colours_of(range(5, 5 + count)).values())) == count


@pytest.mark.parametrize(
    ("level", "has_levels", "label"), [(0, True, "6 P2"), (3, True, "6 P5"), (-1, True, "6 no level"), (0, False, "6")]
)
def test_a_label_names_the_object_and_its_level(level, has_levels, label):
    assert tool.label_of(6, level, has_levels) == label


@pytest.mark.parametrize(
    ("num_boxes", "num_shown", "words"),
    [
        (0, 0, "no proposals:\nthe whole image is the object"),
        (5, 5, "5 proposals (6 with repeats)"),
        (31, 16, "31 proposals (32 with repeats),\n16 of them drawn"),
    ],
)
def test_the_image_says_how_many_proposals_it_has(num_boxes, num_shown, words):
    boxes_image_px = np.tile(np.array([[20.0, 40.0, 60.0, 80.0]], dtype=np.float32), (num_boxes, 1))
    multiplicity = np.ones(num_boxes, dtype=np.int64)
    multiplicity[:1] = 2
    drawn, shown = tool.draw_proposals(grey_picture(50), boxes_image_px, (100, 100))
    assert shown == num_shown
    assert tool.count_proposals(Proposals(boxes_image_px, multiplicity), shown) == words
    changed = (np.asarray(drawn) != GREY).any(2)
    expected = np.zeros((50, 50), dtype=bool)
    expected[20:40, 10:30] = num_boxes > 0
    expected[21:39, 11:29] = False
    assert np.array_equal(changed, expected)
