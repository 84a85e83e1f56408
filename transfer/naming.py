"""Our tensor names -> Detectron2's, by anchored rules, one table per role. Strings only.

A name is mapped by a rule, dropped on purpose by a rule that carries the reason, or unexplained; nothing is guessed.
Our names are an artifact's: "role/library name", as in "backbone/layer1.0.bn1.weight". Detectron2's have no model
prefix ("res2.0.conv1.norm.weight"), because its suffix matching then finds them in any detector: below `backbone.`
without an FPN, below `backbone.bottom_up.` with one, and below `roi_heads.` for the res5 of a C4 detector.

The role "fpn" has the names of an FPN by OpenMMLab, from the finest level on ("lateral_convs.0.conv.weight"); the
role "box_head" those of SoCo's head of four convolutions and a linear layer ("conv1.weight", "bn1.weight", "fc1.bias").

Source: detectron2/modeling/backbone/{resnet,fpn}.py, modeling/roi_heads/box_head.py for its names;
torchvision/models/resnet.py and SoCo's contrast/models/{fpn,fast_rcnn_conv_fc_head}.py
(hologerry/SoCo@624a70d) for ours.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

COUNTER = "BatchNorm step counter, which no detector reads"
HEAD = "head behind the pooled features, which a detector replaces with its own"


@dataclass(frozen=True)
class NameTable:
    r"""The rules of one role. A pattern must match the whole name; no name may match two patterns.

    Attributes:
        mapped: Pattern to Detectron2 name, in which \1, \2 stand for the pattern's groups.
        dropped: Pattern to the reason why a name is left out on purpose.
    """

    mapped: Mapping[str, str]
    dropped: Mapping[str, str]


INDEX = r"(0|[1-9][0-9]*)"
"""A block's number, as one group; no leading zeros."""
_NORM = r"(weight|bias|running_mean|running_var)"


def _stage(ours: str, theirs: str) -> dict[str, str]:
    """Rules of one stage: its blocks' three convolutions and the projection of the block's input."""
    return {
        rf"{ours}\.{INDEX}\.conv([123])\.weight": rf"{theirs}.\1.conv\2.weight",
        rf"{ours}\.{INDEX}\.bn([123])\.{_NORM}": rf"{theirs}.\1.conv\2.norm.\3",
        rf"{ours}\.{INDEX}\.downsample\.0\.weight": rf"{theirs}.\1.shortcut.weight",
        rf"{ours}\.{INDEX}\.downsample\.1\.{_NORM}": rf"{theirs}.\1.shortcut.norm.\2",
    }


TABLES: Mapping[str, NameTable] = {
    "backbone": NameTable(
        mapped={
            r"conv1\.weight": "stem.conv1.weight",
            rf"bn1\.{_NORM}": r"stem.conv1.norm.\1",
            **_stage("layer1", "res2"),
            **_stage("layer2", "res3"),
            **_stage("layer3", "res4"),
            **_stage("layer4", "res5"),
        },
        dropped={
            rf"(layer[1-4]\.{INDEX}\.)?bn[123]\.num_batches_tracked": COUNTER,
            rf"layer[1-4]\.{INDEX}\.downsample\.1\.num_batches_tracked": COUNTER,
            # One layer (torchvision, MoCo v1) or an MLP's (MoCo v2), with norms in MoCo v3 and SimSiam.
            r"fc\.(weight|bias)": HEAD,
            rf"fc\.[0-9]+\.({_NORM}|num_batches_tracked)": HEAD,
        },
    ),
    "fpn": NameTable(
        mapped={
            rule: name
            for level in range(4)
            for ours, theirs in (("lateral_convs", "fpn_lateral"), ("fpn_convs", "fpn_output"))
            for rule, name in (
                (rf"{ours}\.{level}\.conv\.(weight|bias)", rf"{theirs}{level + 2}.\1"),
                (rf"{ours}\.{level}\.bn\.{_NORM}", rf"{theirs}{level + 2}.norm.\1"),
            )
        },
        dropped={r"(lateral|fpn)_convs\.[0-3]\.bn\.num_batches_tracked": COUNTER},
    ),
    "box_head": NameTable(
        mapped={
            r"conv([1-4])\.weight": r"box_head.conv\1.weight",
            rf"bn([1-4])\.{_NORM}": r"box_head.conv\1.norm.\2",
            r"fc1\.(weight|bias)": r"box_head.fc1.\1",
        },
        dropped={r"bn[1-4]\.num_batches_tracked": COUNTER},
    ),
}


@dataclass(frozen=True)
class KeyAccount:
    """What became of every name.

    Attributes:
        converted: Our name to Detectron2's, only where one name of ours claims it.
        dropped: Our name to the reason.
        unexplained: Our names that no rule covers.
        colliding: Detectron2 name to the several names of ours that claim it.
    """

    converted: Mapping[str, str]
    dropped: Mapping[str, str]
    unexplained: tuple[str, ...]
    colliding: Mapping[str, tuple[str, ...]]


def account_for(names: Iterable[str], tables: Mapping[str, NameTable] = TABLES) -> KeyAccount:
    """Decide for every "role/library name" what becomes of it."""
    claims: dict[str, list[str]] = defaultdict(list)
    dropped: dict[str, str] = {}
    unexplained: list[str] = []
    for full_name in names:
        role, _, name = full_name.partition("/")
        table = tables.get(role, NameTable({}, {}))
        reason = next((reason for pattern, reason in table.dropped.items() if re.fullmatch(pattern, name)), None)
        target = next(
            (match.expand(new) for old, new in table.mapped.items() if (match := re.fullmatch(old, name))), None
        )
        if reason is not None:
            dropped[full_name] = reason
        elif target is not None:
            claims[target].append(full_name)
        else:
            unexplained.append(full_name)
    return KeyAccount(
        converted={names[0]: target for target, names in claims.items() if len(names) == 1},
        dropped=dropped,
        unexplained=tuple(unexplained),
        colliding={target: tuple(names) for target, names in claims.items() if len(names) > 1},
    )


_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _our_names() -> list[str]:
    """Every "role/library name" that the tables map or drop as a counter, of a ResNet-50 and a full FPN and head."""
    layers = [("backbone/conv1", "backbone/bn1")]
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        starts = [f"backbone/layer{stage}.{index}" for index in range(blocks)]
        layers += [(f"{start}.conv{n}", f"{start}.bn{n}") for start in starts for n in (1, 2, 3)]
        layers.append((f"{starts[0]}.downsample.0", f"{starts[0]}.downsample.1"))
    convs = [f"fpn/{kind}_convs.{level}" for kind in ("lateral", "fpn") for level in range(4)]
    layers += [(f"{conv}.conv", f"{conv}.bn") for conv in convs]
    layers += [(f"box_head/conv{n}", f"box_head/bn{n}") for n in range(1, 5)]
    names = [f"{conv}.weight" for conv, _ in layers] + [
        f"{norm}.{name}" for _, norm in layers for name in _NORM_TENSORS
    ]
    return [*names, *(f"{conv}.conv.bias" for conv in convs), "box_head/fc1.weight", "box_head/fc1.bias"]


@lru_cache(maxsize=1)
def _from_detectron2() -> Mapping[str, str]:
    ours = {target: name for name, target in account_for(_our_names()).converted.items()}
    mean = "running_mean"
    counters = {
        target.removesuffix(mean) + _NORM_TENSORS[-1]: name.removesuffix(mean) + _NORM_TENSORS[-1]
        for target, name in ours.items()
        if target.endswith(mean)
    }
    return ours | counters


def from_detectron2(name: str) -> str | None:
    """Return "role/library name" of a name of Detectron2's, with or without the place in a detector before it.

    Returns:
        None for a name that no table maps to.
    """
    places = ("", "backbone.bottom_up.", "backbone.", "roi_heads.")
    inner = (name[len(place) :] for place in places if name.startswith(place))
    return next((ours for part in inner if (ours := _from_detectron2().get(part)) is not None), None)
