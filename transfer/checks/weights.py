"""Whether Detectron2 would find the backbone in a weights file, told from the names in it. Needs no Detectron2.

The loader never stops: what it does not find it leaves random, with a warning. trainer.load_backbone counts what was
really loaded; this is the same question before anything is built or written, with an answer that says what to do.

Source: detectron2/checkpoint/detection_checkpoint.py and c2_model_loading.py (c69939aa), fvcore/common/checkpoint.py.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfer.safe_read import load_pickle, load_torch

STAGES = {"res2": 3, "res3": 4, "res4": 6, "res5": 3}  # bottlenecks of a ResNet-50
# Parts that only a trained detector has. SoCo and InsLoc pretrain box heads and FPNs too, hence neither is listed.
_DETECTOR = re.compile(
    r"(^|\.)(proposal_generator|box_predictor|sem_seg_head|keypoint_head|mask_head\.predictor|"
    r"cls_score|bbox_pred|cls_subnet|head_series|rpn)([._]|$)"
)
_DETECTOR_ADDRESS = re.compile(r"/model_final|://(COCO|LVIS|Cityscapes|PascalVOC|Misc)")
_CAFFE2 = re.compile(r"res[2-5]_\d+_branch")
_REMEDY = "Make a file that fits with: convert-to-d2 IN OUT.pkl"


@dataclass(frozen=True)
class Layout:
    """How Detectron2 would read a local weights file.

    Attributes:
        path: The file.
        names: Of its tensors.
        is_caffe2: Whether it would be taken for a Caffe2 file, whose names are rewritten.
        match_suffixes: Whether a name may be the end of the model's, at a dot; otherwise they must be equal.
    """

    path: str
    names: tuple[str, ...]
    is_caffe2: bool
    match_suffixes: bool


def check_weights_file(cfg: Any, *, has_task: bool) -> list[str]:
    """Refuse a MODEL.WEIGHTS that is a detector's, or from which the backbone could not be loaded.

    Args:
        cfg: The resolved config.
        has_task: Whether the result will stand beside published ones.

    Returns:
        Notes for the log.

    Raises:
        ValueError: If so; says which mistake it is.
        UnsafeFileError: If the file cannot be read safely.
    """
    path, _, query = cfg.MODEL.WEIGHTS.partition("?")
    if "://" in path:
        return refuse_detector(path, path if _DETECTOR_ADDRESS.search(path) else "", has_task=has_task)
    if not path:
        return []
    layout = read_layout(path, match_suffixes=query == "matching_heuristics=True")
    check_names(layout, backbone_names(cfg))
    sign = next((name for name in layout.names if _DETECTOR.search(name)), "")
    return refuse_detector(path, sign, has_task=has_task)


def refuse_detector(path: str, sign: str, *, has_task: bool) -> list[str]:
    """Refuse to start a published task from a whole detector: the result would say nothing about pretraining.

    Detectron2's own Cityscapes config starts from a COCO detector (36.5 mask AP, where ImageNet's weights give 33).

    Args:
        path: The weights.
        sign: By what they were seen to be a detector's; "" if they are not.
        has_task: Whether the result will stand beside published ones.

    Returns:
        A warning instead, if there is no task.

    Raises:
        ValueError: If there is a sign and a task.
    """
    if not sign:
        return []
    said = f"MODEL.WEIGHTS {path} is a whole detector, not a backbone (it has {sign})"
    if not has_task:
        return [f"WARNING: {said}: the result says nothing about the backbone's pretraining."]
    raise ValueError(
        f"{said}: the result would say nothing about pretraining. Give a backbone (made by convert-to-d2), or add "
        "--eval-only to evaluate the detector"
    )


def read_layout(path: str, *, match_suffixes: bool) -> Layout:
    """Read the names in a local .pkl or .pth file.

    Args:
        path: The file.
        match_suffixes: Whether "?matching_heuristics=True" follows it; the file itself may ask for it as well.

    Raises:
        UnsafeFileError: If the file cannot be read safely.
    """
    is_pickle = path.endswith(".pkl")
    content = load_pickle(Path(path)) if is_pickle else load_torch(Path(path))
    return Layout(
        path,
        tuple(map(str, content.get("model", content))),
        is_caffe2=is_pickle and ("model" not in content or content.get("__author__", "Caffe2") == "Caffe2"),
        match_suffixes=match_suffixes or bool(content.get("matching_heuristics")),
    )


def check_names(layout: Layout, wanted: Collection[str]) -> None:
    """Refuse a file whose names, author or flags keep Detectron2 from loading the whole backbone.

    Args:
        layout: Of the file.
        wanted: The model's names; empty for a backbone that is not checked here.

    Raises:
        ValueError: If so; says which mistake it is.
    """
    if not wanted or any(_CAFFE2.match(name) for name in layout.names):
        return  # a real Caffe2 file: Detectron2 renames these, and the count after loading decides
    if layout.is_caffe2:
        raise ValueError(
            f"{layout.path} has no __author__, or Caffe2's: Detectron2 would take it for a Caffe2 file and lose all "
            f"BN means and variances. {_REMEDY}"
        )
    lost = missing_names(wanted, layout.names, match_suffixes=layout.match_suffixes)
    if lost:
        raise ValueError(
            f"{len(lost)} of the backbone's {len(wanted)} tensors are not in {layout.path} (first: "
            f"{', '.join(lost[:3])}); they would be trained from random values. {_reason(layout, wanted)}{_REMEDY}"
        )


def backbone_names(cfg: Any) -> list[str]:
    """Full names that the 265 tensors of a ResNet-50 have in the detector of a config; empty for another trunk."""
    if cfg.MODEL.RESNETS.DEPTH != 50 or not cfg.MODEL.RESNETS.NORM or "resnet" not in cfg.MODEL.BACKBONE.NAME:
        return []
    trunk = "backbone.bottom_up." if "fpn" in cfg.MODEL.BACKBONE.NAME else "backbone."
    has_res5_in_heads = cfg.MODEL.ROI_HEADS.NAME.startswith("Res5") and trunk == "backbone."
    return [
        f"{'roi_heads.' if has_res5_in_heads and name.startswith('res5') else trunk}{name}" for name in resnet50_names()
    ]


def resnet50_names() -> list[str]:
    """Detectron2's names of a ResNet-50's 265 tensors, without a model's prefix."""
    layers = ["stem.conv1"]
    for stage, blocks in STAGES.items():
        for block in range(blocks):
            parts = ("shortcut", "conv1", "conv2", "conv3") if block == 0 else ("conv1", "conv2", "conv3")
            layers += [f"{stage}.{block}.{part}" for part in parts]
    norm = [f"norm.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
    return [f"{layer}.{part}" for layer in layers for part in ("weight", *norm)]


def missing_names(wanted: Collection[str], names: Collection[str], *, match_suffixes: bool) -> list[str]:
    """Those of a model's names that Detectron2 would not find among a file's.

    Args:
        wanted: The model's.
        names: The file's.
        match_suffixes: Whether a file's name may be the end of the model's, at a dot. Otherwise they must be equal,
            after a "module." before all of the file's.
    """
    if not match_suffixes:
        if all(name.startswith("module.") for name in names):
            names = [name.removeprefix("module.") for name in names]
        return [name for name in wanted if name not in set(names)]
    known = set(names)
    return [
        name
        for name in wanted
        if not any(".".join(name.split(".")[start:]) in known for start in range(name.count(".") + 1))
    ]


def _reason(layout: Layout, wanted: Collection[str]) -> str:
    """Which well-known mistake the names show, as a sentence and a blank; "" if none."""
    for ending, kind in (("layer4.2.conv3.weight", "torchvision's"), ("res5.2.conv3.weight", "Detectron2's")):
        for name in layout.names:
            prefix = name.removesuffix(ending)
            if prefix != name and prefix:
                return f"Its names are {kind} behind the prefix '{prefix}'. "
            if prefix != name and kind == "torchvision's":
                return "Its names are torchvision's. "
    if not missing_names(wanted, layout.names, match_suffixes=True):
        return "It does not ask for matching_heuristics, without which names must be complete. "
    return ""
