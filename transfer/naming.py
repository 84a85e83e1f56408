"""Our tensor names -> Detectron2's, by anchored rules, one table per role. Strings only.

A name is mapped by a rule, dropped on purpose by a rule that carries the reason, or unexplained; nothing is guessed.
Our names are an artifact's: "role/library name", as in "backbone/layer1.0.bn1.weight". Detectron2's have no model
prefix ("res2.0.conv1.norm.weight"), because its suffix matching then finds them in any detector: below `backbone.`
without an FPN, below `backbone.bottom_up.` with one, and below `roi_heads.` for the res5 of a C4 detector.

Source: detectron2/modeling/backbone/resnet.py for its names, torchvision/models/resnet.py for ours.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

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


_INDEX = r"(0|[1-9][0-9]*)"
_NORM = r"(weight|bias|running_mean|running_var)"


def _stage(ours: str, theirs: str) -> dict[str, str]:
    """Rules of one stage: its blocks' three convolutions and the projection of the block's input."""
    return {
        rf"{ours}\.{_INDEX}\.conv([123])\.weight": rf"{theirs}.\1.conv\2.weight",
        rf"{ours}\.{_INDEX}\.bn([123])\.{_NORM}": rf"{theirs}.\1.conv\2.norm.\3",
        rf"{ours}\.{_INDEX}\.downsample\.0\.weight": rf"{theirs}.\1.shortcut.weight",
        rf"{ours}\.{_INDEX}\.downsample\.1\.{_NORM}": rf"{theirs}.\1.shortcut.norm.\2",
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
            rf"(layer[1-4]\.{_INDEX}\.)?bn[123]\.num_batches_tracked": COUNTER,
            rf"layer[1-4]\.{_INDEX}\.downsample\.1\.num_batches_tracked": COUNTER,
            # One layer (torchvision, MoCo v1) or an MLP's (MoCo v2).
            r"fc\.([0-9]+\.)?(weight|bias)": HEAD,
        },
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
