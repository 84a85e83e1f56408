import pytest

from detco.models.box_head import BoxHead
from detco.models.fpn import FPN
from detco.models.resnet import ResNetTrunk
from transfer.naming import HEAD, account_for
from transfer.naming_mmdet import BELOW_C3, NO_BOX_HEAD, ONE_STAGE_TABLES, RCNN_TABLES

PARTS = {"backbone": ResNetTrunk, "fpn": FPN, "box_head": BoxHead}
NAMES = [f"{role}/{name}" for role, module in PARTS.items() for name in module().state_dict()]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("backbone/conv1.weight", "backbone.conv1.weight"),
        ("backbone/bn1.num_batches_tracked", "backbone.bn1.num_batches_tracked"),
        ("backbone/layer3.5.bn2.running_var", "backbone.layer3.5.bn2.running_var"),
        ("backbone/layer4.0.downsample.1.bias", "backbone.layer4.0.downsample.1.bias"),
        ("fpn/lateral_convs.0.conv.weight", "neck.lateral_convs.0.conv.weight"),
        ("fpn/lateral_convs.2.conv.bias", "neck.lateral_convs.2.conv.bias"),
        ("fpn/fpn_convs.3.bn.running_mean", "neck.fpn_convs.3.bn.running_mean"),
        ("box_head/conv1.weight", "roi_head.bbox_head.shared_convs.0.conv.weight"),
        ("box_head/bn4.num_batches_tracked", "roi_head.bbox_head.shared_convs.3.bn.num_batches_tracked"),
        ("box_head/fc1.bias", "roi_head.bbox_head.shared_fcs.0.bias"),
    ],
)
def test_a_name_becomes_mmdetections(ours: str, theirs: str) -> None:
    assert account_for([ours], RCNN_TABLES).converted == {ours: theirs}


def test_every_name_of_our_modules_has_one_of_its_own_in_an_rcnn() -> None:
    account = account_for(NAMES, RCNN_TABLES)
    assert (account.dropped, account.unexplained, account.colliding) == ({}, (), {})
    assert len(set(account.converted.values())) == len(NAMES) == 392


def test_in_a_one_stage_detector_the_necks_numbers_begin_one_level_higher() -> None:
    account = account_for(NAMES, ONE_STAGE_TABLES)
    assert (account.unexplained, account.colliding) == ((), {})
    for name in NAMES:
        if name.startswith("backbone/"):
            assert account.converted[name] == name.replace("/", ".")
        elif name.startswith("box_head/"):
            assert account.dropped[name] == NO_BOX_HEAD
        else:
            convs, level, rest = name.removeprefix("fpn/").split(".", 2)
            shifted = f"neck.{convs}.{int(level) - 1}.{rest}"
            assert account.converted.get(name) == (None if level == "0" else shifted)
            assert account.dropped.get(name) == (BELOW_C3 if level == "0" else None)


@pytest.mark.parametrize("tables", [RCNN_TABLES, ONE_STAGE_TABLES])
def test_names_that_no_detector_of_theirs_has_are_unexplained_and_heads_are_dropped(tables: dict[str, object]) -> None:
    strange = ["fpn/fpn_convs.4.conv.weight", "box_head/fc2.weight", "backbone/layer5.0.conv1.weight", "mask_head/x"]
    assert account_for(strange, tables).unexplained == tuple(strange)
    assert account_for(["backbone/fc.weight", "backbone/fc.1.running_mean"], tables).dropped == {
        "backbone/fc.weight": HEAD,
        "backbone/fc.1.running_mean": HEAD,
    }
