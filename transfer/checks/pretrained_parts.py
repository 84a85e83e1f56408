"""Which pretrained parts of a weights file a detector takes: backbone, FPN, box head. Needs no Detectron2.

Detectron2 loads tensor by tensor, whatever finds a name and a shape. So half a part may be loaded: an FPN's
convolutions without the norms they were trained with, or of a box head the one linear layer that happens to fit. Such a
run trains, and is worth nothing as a measurement of the pretraining.

Source: the names in detectron2/modeling/backbone/fpn.py and roi_heads/box_head.py (c69939aa).
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from transfer.checks.heads import class_node
from transfer.tasks import show
from transfer.weights import WeightsRecord

BACKBONE, FPN, BOX_HEAD = "backbone", "fpn", "box_head"
TITLES = {FPN: "FPN", BOX_HEAD: "box head"}
# Where converted files and detectors have them: by suffix, or in full.
_LAYERS = {
    FPN: re.compile(r"(?:backbone\.)?(fpn_(?:lateral|output)[2-5])\.(.+)"),
    BOX_HEAD: re.compile(r"(?:roi_heads\.)?box_head\.((?:conv|fc)[1-9])\.(.+)"),
}
_BOX_HEADS = ("StandardROIHeads", "DensePoseROIHeads")  # a cascade has three, under other names
Layers = Mapping[str, frozenset[str]]
"""Name of a layer, in the order of the network, to the names of its tensors, its norm's included."""


def transferred_parts(cfg: Any, weights: WeightsRecord) -> tuple[str, ...]:
    """The parts of the detector that start from the weights; empty for random initialisation."""
    if not weights.path:
        return ()
    taken = [part for part in TITLES if set(_layers_in(weights.names, part)) & set(_layers_of(cfg, part))]
    return (BACKBONE, *taken)


def check_pretrained_parts(cfg: Any, weights: WeightsRecord) -> list[str]:
    """Refuse weights of which a pretrained FPN or box head would be loaded in part.

    Args:
        cfg: The resolved config.
        weights: Record of MODEL.WEIGHTS.

    Returns:
        Notes for the log: what is loaded beside the backbone, and what the detector has no use for.

    Raises:
        ValueError: If so; names the key and the ways out.
    """
    notes = []
    for part in TITLES:
        given, wanted = _layers_in(weights.names, part), _layers_of(cfg, part)
        if not given:
            continue
        if not set(given) & set(wanted):
            notes.append(f"Not used: the {TITLES[part]} in {weights.path}; this detector has none that it could be.")
            continue
        torn = [layer for layer in given if layer in wanted and given[layer] != wanted[layer]]
        if part == FPN and torn:
            _refuse_fpn(cfg, weights, any("norm" in name for name in given[torn[0]]))
        if part == BOX_HEAD and (torn or not _is_start(given, wanted)):
            _refuse_box_head(cfg, weights, [layer for layer in given if layer in wanted])
        notes.append(_describe(TITLES[part], given, wanted, weights))
    return notes


def lost_parts(missing: Collection[str], weights: WeightsRecord) -> list[str]:
    """Tensors of FPN and box head that a detector did not take although the file has them: of another shape.

    Args:
        missing: Names of the detector's tensors that were not loaded.
        weights: Record of the file.
    """
    return [
        name
        for name in missing
        for part, pattern in _LAYERS.items()
        if (match := pattern.fullmatch(name)) and match[2] in _layers_in(weights.names, part).get(match[1], ())
    ]


def is_part(name: str) -> bool:
    """Whether a detector's tensor belongs to an FPN or a box head of the kind that is pretrained."""
    return any(pattern.fullmatch(name) for pattern in _LAYERS.values()) and not name.endswith(".num_batches_tracked")


def _layers_in(names: Collection[str], part: str) -> Layers:
    """The layers of a part in a file."""
    layers: dict[str, set[str]] = defaultdict(set)
    for name in sorted(names):
        match = _LAYERS[part].fullmatch(name)
        if match and not name.endswith(".num_batches_tracked"):
            layers[match[1]].add(match[2])
    return {layer: frozenset(tensors) for layer, tensors in layers.items()}


def _layers_of(cfg: Any, part: str) -> Layers:
    """The layers of a part in the detector of a config; empty if it has none."""
    model = cfg.MODEL
    if part == FPN:
        levels = [stage.removeprefix("res") for stage in model.FPN.IN_FEATURES]
        if "resnet" not in model.BACKBONE.NAME or "fpn" not in model.BACKBONE.NAME:
            return {}
        tensors = _conv_tensors(model.FPN.NORM)
        return {f"fpn_{kind}{level}": tensors for level in levels for kind in ("lateral", "output")}
    head = model.ROI_BOX_HEAD
    has_one = class_node(cfg) == "ROI_HEADS" and model.ROI_HEADS.NAME in _BOX_HEADS
    if not has_one or head.NAME != "FastRCNNConvFCHead":
        return {}
    convs = {f"conv{number}": _conv_tensors(head.NORM) for number in range(1, head.NUM_CONV + 1)}
    return convs | {f"fc{number}": frozenset(("weight", "bias")) for number in range(1, head.NUM_FC + 1)}


def _conv_tensors(norm: str) -> frozenset[str]:
    """Of a convolution and its norm; it has a bias only without one."""
    if not norm:
        return frozenset(("weight", "bias"))
    names = ("weight", "bias", "running_mean", "running_var") if "BN" in norm else ("weight", "bias")
    return frozenset(("weight", *(f"norm.{name}" for name in names)))


def _is_start(given: Layers, wanted: Layers) -> bool:
    """Whether all given layers are loaded, and are the first of the detector's."""
    return set(given) == set(list(wanted)[: len(given)])


def _refuse_fpn(cfg: Any, weights: WeightsRecord, has_norm: bool) -> None:
    norm = cfg.MODEL.FPN.NORM
    theirs, ours = ("a norm after", "SyncBN") if has_norm else ("a bias in", '""')
    raise ValueError(
        f"{weights.path} brings an FPN with {theirs} each convolution, but MODEL.FPN.NORM is {show(norm)}: its kernels "
        f"would be loaded without what they were trained with. Append MODEL.FPN.NORM {ours}, or leave the FPN out: "
        "convert-to-d2 IN OUT.pkl --only backbone"
    )


def _refuse_box_head(cfg: Any, weights: WeightsRecord, loaded: list[str]) -> None:
    head = cfg.MODEL.ROI_BOX_HEAD
    given = _layers_in(weights.names, BOX_HEAD)
    convs = [layer for layer in given if layer.startswith("conv")]
    norm = "with" if any("norm" in name for layer in convs for name in given[layer]) else "without"
    raise ValueError(
        f"{weights.path} brings a box head of {len(convs)} conv ({norm} norm) and {len(given) - len(convs)} fc, but "
        f"MODEL.ROI_BOX_HEAD has NUM_CONV {head.NUM_CONV}, NUM_FC {head.NUM_FC}, NORM {show(head.NORM)}: parts of "
        f"{', '.join(loaded) or 'no layer'} would be loaded, which mean nothing there. Take a config of the 4conv1fc "
        "recipe (coco/mask_rcnn_r50_fpn_4conv1fc_1x_soco.yaml), or leave the box head out: convert-to-d2 IN OUT.pkl "
        "--only backbone+fpn (or backbone)"
    )


def _describe(title: str, given: Layers, wanted: Layers, weights: WeightsRecord) -> str:
    random = [layer for layer in wanted if layer not in given]
    unused = [layer for layer in given if layer not in wanted]
    ends = [f"{', '.join(random)} random, not in the file"] if random else []
    ends += [f"{', '.join(unused)} not used"] if unused else []
    return f"The {title} is pretrained as well, from {weights.path}" + "".join(f"; {end}" for end in ends) + "."
