from collections import Counter

import pytest
from torchvision.models import resnet50

from transfer.naming import COUNTER, HEAD, TABLES, NameTable, account_for, from_detectron2


def names_of_torchvision() -> list[str]:
    return [f"backbone/{name}" for name in resnet50(weights=None).state_dict()]


def test_torchvisions_320_names_are_265_converted_53_counters_and_2_of_fc() -> None:
    account = account_for(names_of_torchvision())
    assert len(names_of_torchvision()) == 320
    assert len(account.converted) == 265
    assert Counter(account.dropped.values()) == {COUNTER: 53, HEAD: 2}
    assert account.unexplained == ()
    assert account.colliding == {}
    assert len(set(account.converted.values())) == 265


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("conv1.weight", "stem.conv1.weight"),
        ("bn1.weight", "stem.conv1.norm.weight"),
        ("bn1.running_var", "stem.conv1.norm.running_var"),
        ("layer1.0.conv1.weight", "res2.0.conv1.weight"),
        ("layer2.3.conv2.weight", "res3.3.conv2.weight"),
        ("layer3.5.bn3.bias", "res4.5.conv3.norm.bias"),
        ("layer4.2.bn3.running_mean", "res5.2.conv3.norm.running_mean"),
        ("layer4.0.downsample.0.weight", "res5.0.shortcut.weight"),
        ("layer1.0.downsample.1.running_var", "res2.0.shortcut.norm.running_var"),
    ],
)
def test_a_name_becomes_detectron2s(ours: str, theirs: str) -> None:
    assert account_for([f"backbone/{ours}"]).converted == {f"backbone/{ours}": theirs}


@pytest.mark.parametrize(
    "name",
    [
        "backbone/layer1.0.conv4.weight",
        "backbone/layer1.0.se.fc1.weight",
        "backbone/layer5.0.conv1.weight",
        "backbone/layer1.00.conv1.weight",
        "backbone/layer1.0.conv1.bias",
        "backbone/layer1.0.downsample.2.weight",
        "backbone/layer1.0.bn1.weight_orig",
        "backbone/module.conv1.weight",
        "backbone/conv1.weight\n",
        "backbone/xconv1xweight",
        "backbone/conv1xweight",
        "backbone/myfc.weight",
        "backbone/fc.weight.extra",
        "backbone/queue.num_batches_tracked",
        "backbone/fc.num_batches_tracked",
        "neck/conv1.weight",
        "conv1.weight",
    ],
)
def test_a_name_that_merely_resembles_a_known_one_is_unexplained(name: str) -> None:
    account = account_for([name])
    assert account.unexplained == (name,)
    assert not account.converted
    assert not account.dropped


@pytest.mark.parametrize(
    "name", ["fc.weight", "fc.bias", "fc.0.weight", "fc.2.bias", "fc.1.running_var", "fc.4.num_batches_tracked"]
)
def test_linear_and_mlp_heads_are_dropped_as_heads(name: str) -> None:
    assert account_for([f"backbone/{name}"]).dropped == {f"backbone/{name}": HEAD}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("fpn/lateral_convs.0.conv.weight", "fpn_lateral2.weight"),
        ("fpn/lateral_convs.3.bn.running_var", "fpn_lateral5.norm.running_var"),
        ("fpn/fpn_convs.1.conv.bias", "fpn_output3.bias"),
        ("fpn/fpn_convs.2.bn.weight", "fpn_output4.norm.weight"),
        ("box_head/conv4.weight", "box_head.conv4.weight"),
        ("box_head/bn1.bias", "box_head.conv1.norm.bias"),
        ("box_head/fc1.weight", "box_head.fc1.weight"),
    ],
)
def test_an_fpn_and_a_box_head_get_detectron2s_names(ours: str, theirs: str) -> None:
    assert account_for([ours]).converted == {ours: theirs}


@pytest.mark.parametrize(
    "name",
    ["fpn/fpn_convs.4.conv.weight", "fpn/lateral_convs.0.weight", "box_head/conv5.weight", "box_head/fc2.weight"],
)
def test_layers_that_a_detector_lacks_are_unexplained(name: str) -> None:
    assert account_for([name]).unexplained == (name,)


def test_detectron2s_names_lead_back_to_ours_from_any_place_in_a_detector() -> None:
    table = account_for([*names_of_torchvision(), "fpn/fpn_convs.0.bn.running_mean", "box_head/fc1.bias"]).converted
    for ours, theirs in table.items():
        assert from_detectron2(theirs) == ours
    assert from_detectron2("backbone.bottom_up.res2.0.conv1.weight") == "backbone/layer1.0.conv1.weight"
    assert from_detectron2("roi_heads.res5.0.shortcut.norm.bias") == "backbone/layer4.0.downsample.1.bias"
    assert from_detectron2("roi_heads.box_head.conv2.norm.weight") == "box_head/bn2.weight"
    assert from_detectron2("stem.conv1.norm.num_batches_tracked") == "backbone/bn1.num_batches_tracked"
    for name in ("stem.fc.weight", "res6.0.conv1.weight", "proposal_generator.rpn_head.conv.weight", "conv1.weight"):
        assert from_detectron2(name) is None


def test_two_names_that_claim_one_target_collide_and_neither_is_converted() -> None:
    tables = {"a": NameTable({r"x": "same", r"y": "other"}, {}), "b": NameTable({r"(x|z)": "same"}, {})}
    account = account_for(["a/x", "a/y", "b/x", "b/z"], tables)
    assert account.converted == {"a/y": "other"}
    assert account.colliding == {"same": ("a/x", "b/x", "b/z")}


def test_no_name_is_both_mapped_and_dropped() -> None:
    table = TABLES["backbone"]
    names = names_of_torchvision()
    mapped = account_for(names, {"backbone": NameTable(table.mapped, {})})
    dropped = account_for(names, {"backbone": NameTable({}, table.dropped)})
    assert len(mapped.converted) == 265
    assert not set(mapped.converted) & set(dropped.dropped)
