"""What a detector takes of weights that bring an FPN and a box head, told from config and names."""

from typing import Any

import pytest

from transfer import d2

if d2.info() is None:
    pytest.skip("needs Detectron2 (python tools/install_detectron2.py)", allow_module_level=True)

from transfer.checks.pretrained_parts import check_pretrained_parts, is_part, lost_parts, transferred_parts
from transfer.checks.weights import resnet50_names
from transfer.config import load_config
from transfer.naming import account_for
from transfer.sources.parts import box_head_shapes, fpn_shapes
from transfer.tasks import CONFIGS
from transfer.weights import WeightsRecord

pytestmark = pytest.mark.d2

FPN = [f"fpn/{name}" for name in fpn_shapes(range(4), range(4), has_norm=True)]
RESIM = [f"fpn/{name}" for name in fpn_shapes(range(1, 4), range(1, 3), has_norm=True)]
HEAD = [f"box_head/{name}" for name in box_head_shapes()]
WITH_HEAD = "coco/mask_rcnn_r50_fpn_4conv1fc_1x_soco"
C4, MOCO_FPN = "coco/mask_rcnn_r50_c4_1x_soco", "coco/mask_rcnn_r50_fpn_1x_converted"
RETINANET = "coco/retinanet_r50_fpn_1x_soco"


def weights(*parts: list[str], place: str = "") -> WeightsRecord:
    """Converted weights with these parts beside the backbone; `place` is before the names of all."""
    names = [*resnet50_names(), *account_for(name for part in parts for name in part).converted.values()]
    return WeightsRecord("w.pkl", "0" * 64, None, {}, tuple(place + name for name in names))


def config(name: str, *values: Any) -> Any:
    return load_config(CONFIGS / f"{name}.yaml", list(map(str, values)))


@pytest.mark.parametrize(
    ("name", "taken", "unused"),
    [
        (WITH_HEAD, ("backbone", "fpn", "box_head"), []),
        ("lvis/mask_rcnn_r50_fpn_4conv1fc_1x_soco", ("backbone", "fpn", "box_head"), []),
        (RETINANET, ("backbone", "fpn"), ["box head"]),
        ("coco/fcos_r50_fpn_1x_soco", ("backbone", "fpn"), ["box head"]),
        (C4, ("backbone",), ["FPN", "box head"]),
        ("cityscapes/fcn16s_r50_90k_converted", ("backbone",), ["FPN", "box head"]),
    ],
)
def test_what_a_detector_takes_and_has_no_use_for_is_said(name: str, taken: tuple[str, ...], unused: list[str]) -> None:
    record = weights(FPN, HEAD)
    notes = check_pretrained_parts(config(name), record)
    assert transferred_parts(config(name), record) == taken
    assert [note.split(" in w.pkl")[0] for note in notes if note.startswith("Not used")] == [
        f"Not used: the {title}" for title in unused
    ]
    assert len(notes) == 2


def test_levels_below_a_one_stage_detectors_are_named_as_not_used() -> None:
    (note,) = check_pretrained_parts(config(RETINANET), weights(FPN))
    assert note.endswith("from w.pkl; fpn_lateral2, fpn_output2 not used.")


def test_an_fpn_with_fewer_levels_is_let_through_and_what_is_random_is_named() -> None:
    (note,) = check_pretrained_parts(config(MOCO_FPN), weights(RESIM))
    assert note.endswith("fpn_lateral2, fpn_output2, fpn_output5 random, not in the file.")


def test_backbones_alone_go_into_every_detector_without_a_word() -> None:
    for name in (WITH_HEAD, C4, MOCO_FPN, RETINANET, "coco/sparse_rcnn_r50_300pro_3x_converted"):
        assert check_pretrained_parts(config(name), weights()) == []
        assert transferred_parts(config(name), weights()) == ("backbone",)
    assert transferred_parts(config(C4), WeightsRecord("", None, None, {})) == ()


def test_an_fpn_without_its_box_head_goes_into_the_recipe_with_two_linear_layers() -> None:
    (note,) = check_pretrained_parts(config(MOCO_FPN), weights(FPN))
    assert note == "The FPN is pretrained as well, from w.pkl."


@pytest.mark.parametrize(
    ("name", "values"),
    [
        (MOCO_FPN, ()),
        (WITH_HEAD, ("MODEL.ROI_BOX_HEAD.NORM", "")),
        (WITH_HEAD, ("MODEL.ROI_BOX_HEAD.NORM", "GN")),
        (WITH_HEAD, ("MODEL.ROI_BOX_HEAD.NUM_CONV", 3)),
        (WITH_HEAD, ("MODEL.ROI_BOX_HEAD.NUM_FC", 0)),
    ],
)
def test_a_box_head_that_would_be_loaded_in_part_is_refused(name: str, values: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"MODEL\.ROI_BOX_HEAD has .*4conv1fc.*--only backbone\+fpn"):
        check_pretrained_parts(config(name, *values), weights(HEAD))


def test_a_box_head_with_one_more_linear_layer_behind_is_taken_and_the_random_one_named() -> None:
    (note,) = check_pretrained_parts(config(WITH_HEAD, "MODEL.ROI_BOX_HEAD.NUM_FC", 2), weights(HEAD))
    assert note.endswith("; fc2 random, not in the file.")


@pytest.mark.parametrize("norm", ["", "GN"])
def test_an_fpn_without_the_norms_it_was_trained_with_is_refused(norm: str) -> None:
    with pytest.raises(ValueError, match=r"MODEL\.FPN\.NORM is .*Append MODEL\.FPN\.NORM SyncBN"):
        check_pretrained_parts(config(WITH_HEAD, "MODEL.FPN.NORM", norm), weights(FPN, HEAD))


def test_a_cascade_has_no_use_for_one_box_head() -> None:
    cascade = config(WITH_HEAD, "MODEL.ROI_HEADS.NAME", "CascadeROIHeads")
    assert transferred_parts(cascade, weights(FPN, HEAD)) == ("backbone", "fpn")
    assert check_pretrained_parts(cascade, weights(FPN, HEAD))[1].startswith("Not used: the box head")


def test_a_whole_detector_fits_its_own_kind() -> None:
    names = ["backbone.fpn_lateral2.weight", "backbone.fpn_lateral2.bias", "roi_heads.box_head.fc1.weight"]
    names += ["roi_heads.box_head.fc1.bias", "roi_heads.box_head.fc2.weight", "roi_heads.box_head.fc2.bias"]
    detector = WeightsRecord("d.pkl", "0" * 64, None, {}, tuple(names))
    assert len(check_pretrained_parts(config(MOCO_FPN, "MODEL.FPN.NORM", ""), detector)) == 2
    with pytest.raises(ValueError, match=r"MODEL\.ROI_BOX_HEAD has"):
        check_pretrained_parts(config(WITH_HEAD, "MODEL.FPN.NORM", ""), detector)


def test_tensors_that_the_file_has_in_another_shape_are_found_after_loading() -> None:
    missing = [
        "roi_heads.box_head.fc1.weight",
        "roi_heads.box_head.fc2.weight",
        "roi_heads.box_predictor.cls_score.bias",
    ]
    missing += ["backbone.fpn_output5.norm.bias", "backbone.fpn_output5.norm.num_batches_tracked"]
    assert lost_parts(missing, weights(HEAD)) == ["roi_heads.box_head.fc1.weight"]
    assert lost_parts(missing, weights(FPN)) == ["backbone.fpn_output5.norm.bias"]
    assert [name for name in missing if is_part(name)] == [*missing[:2], missing[3]]
