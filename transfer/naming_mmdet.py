"""Our tensor names -> MMDetection's, by the same anchored rules as Detectron2's. Strings only.

MMDetection's ResNet has torchvision's names and its FPN ours, so little more than the place in a detector is new. One
thing no name tells: an FPN numbers its convolutions from the first stage it takes, which is res2 in R-CNNs and res3 in
RetinaNet and FCOS (`start_level=1`). There our level i is number i - 1, and loaded as it is every kernel would land one
level too low, for most of them without a complaint about the shape. Hence two sets of tables.

Source: MMDetection's mmdet/models/{backbones/resnet,necks/fpn,roi_heads/bbox_heads/convfc_bbox_head}.py and
configs/_base_/models/retinanet_r50_fpn.py, MMCV's mmcv/cnn/bricks/conv_module.py.
"""

from collections.abc import Mapping

from transfer.naming import HEAD, INDEX, NameTable

BELOW_C3 = "level p2 of the FPN, which a neck that starts at C3 does not have"
NO_BOX_HEAD = "box head, which a one-stage detector does not have"

_CONVS = ("lateral_convs", "fpn_convs")
_NORM = "(weight|bias|running_mean|running_var|num_batches_tracked)"

_BACKBONE = NameTable(
    mapped={
        r"conv1\.weight": "backbone.conv1.weight",
        rf"bn1\.{_NORM}": r"backbone.bn1.\1",
        rf"layer([1-4])\.{INDEX}\.conv([123])\.weight": r"backbone.layer\1.\2.conv\3.weight",
        rf"layer([1-4])\.{INDEX}\.bn([123])\.{_NORM}": r"backbone.layer\1.\2.bn\3.\4",
        rf"layer([1-4])\.{INDEX}\.downsample\.0\.weight": r"backbone.layer\1.\2.downsample.0.weight",
        rf"layer([1-4])\.{INDEX}\.downsample\.1\.{_NORM}": r"backbone.layer\1.\2.downsample.1.\3",
    },
    dropped={r"fc\.(weight|bias)": HEAD, rf"fc\.[0-9]+\.{_NORM}": HEAD},
)


def _fpn(first: int) -> NameTable:
    """Rules of an FPN whose first stage is our level `first`; those before it are dropped."""
    mapped = {
        rule: name
        for convs in _CONVS
        for level in range(first, 4)
        for rule, name in (
            (rf"{convs}\.{level}\.conv\.(weight|bias)", rf"neck.{convs}.{level - first}.conv.\1"),
            (rf"{convs}\.{level}\.bn\.{_NORM}", rf"neck.{convs}.{level - first}.bn.\1"),
        )
    }
    dropped = {
        rule: BELOW_C3
        for convs in _CONVS
        for level in range(first)
        for rule in (rf"{convs}\.{level}\.conv\.(weight|bias)", rf"{convs}\.{level}\.bn\.{_NORM}")
    }
    return NameTable(mapped, dropped)


def _box_head_rules() -> dict[str, str]:
    rules = {r"fc1\.(weight|bias)": r"roi_head.bbox_head.shared_fcs.0.\1"}
    for number in range(1, 5):
        place = f"roi_head.bbox_head.shared_convs.{number - 1}"
        rules[rf"conv{number}\.weight"] = f"{place}.conv.weight"
        rules[rf"bn{number}\.{_NORM}"] = rf"{place}.bn.\1"
    return rules


RCNN_TABLES: Mapping[str, NameTable] = {
    "backbone": _BACKBONE,
    "fpn": _fpn(0),
    "box_head": NameTable(_box_head_rules(), {}),
}
"""For a detector whose neck starts at C2, with MMDetection's Shared4Conv1FCBBoxHead."""

ONE_STAGE_TABLES: Mapping[str, NameTable] = {
    "backbone": _BACKBONE,
    "fpn": _fpn(1),
    "box_head": NameTable({}, dict.fromkeys(_box_head_rules(), NO_BOX_HEAD)),
}
"""For a detector whose neck starts at C3."""
