"""What pretrained weights are written for: whose names, in which formats, with which record and which settings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from detco import __version__
from transfer.naming import TABLES, NameTable
from transfer.naming_mmdet import ONE_STAGE_TABLES, RCNN_TABLES
from transfer.sources import Source

PARTS = ("backbone", "fpn", "box_head")
"""The roles of an artifact that a detector can take, in its order."""


@dataclass(frozen=True)
class Target:
    """A library's detectors.

    Attributes:
        title: For people.
        tables: Role to naming rules.
        suffixes: Of the formats that the library reads: .pkl is a pickle of numpy arrays, .pth a file of torch.save.
        tensors_key: Key of the file's tensors.
        record: Makes the file's other keys, of the source and the parts that were converted.
        settings: Makes what the library's config must say for these weights, of the same two; empty where the training
            side here reads the record itself.
        unverifiable: Why --verify cannot be had; "" if it can.
    """

    title: str
    tables: Mapping[str, NameTable]
    suffixes: tuple[str, ...]
    tensors_key: str
    record: Callable[[Source, Sequence[str]], dict[str, Any]]
    settings: Callable[[Source, Sequence[str]], dict[str, Any]]
    unverifiable: str = ""


def _detectron2_record(source: Source, parts: Sequence[str]) -> dict[str, Any]:
    return {
        # Detectron2 takes a .pkl with an author as it is, but renames the keys of one without, losing its statistics.
        "__author__": f"detco convert-to-d2 {__version__}",
        # Matched by suffix, these names are found in detectors with and without an FPN, and in C4's roi_heads.
        "matching_heuristics": True,
        **_origin(source, parts),
    }


def _mmdet_record(source: Source, parts: Sequence[str]) -> dict[str, Any]:
    author = f"detco convert-to-d2 {__version__}"
    return {"meta": {"author": author, **_origin(source, parts), "settings": _mmdet_settings(source, parts)}}


def _mmdet_settings(source: Source, parts: Sequence[str]) -> dict[str, Any]:
    """What MMDetection's defaults have otherwise: they are those of a frozen, supervised backbone.

    Source: its configs/_base_/models/faster-rcnn_r50_fpn.py and configs/fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py.
    """
    preprocess = source.preprocess
    norm = {"type": "SyncBN", "requires_grad": True}
    settings: dict[str, Any] = {
        "data_preprocessor": {
            "mean": list(preprocess.mean_255),
            "std": list(preprocess.std_255),
            "bgr_to_rgb": preprocess.channel_order == "RGB",
        },
        "backbone": {
            "style": "caffe" if preprocess.stride_in_1x1 else "pytorch",
            "frozen_stages": -1,
            "norm_eval": False,
            "norm_cfg": norm,
            "init_cfg": None,
        },
    }
    if "fpn" in parts and any(name.startswith("fpn/") and ".bn." in name for name in source.tensors):
        settings["neck"] = {"norm_cfg": norm}
    if "box_head" in parts:
        settings["roi_head"] = {"bbox_head": {"type": "Shared4Conv1FCBBoxHead", "norm_cfg": norm}}
    return settings


def _origin(source: Source, parts: Sequence[str]) -> dict[str, Any]:
    """What every file says of its weights."""
    earlier = source.provenance.get("source")
    described = {
        "file": source.path.name,
        "sha256": source.sha256,
        "kind": source.kind,
        "name": source.name,
        "project": source.project,
        "network": source.network,
        "parts": list(parts),
        "preprocess_is_recorded": source.preprocess_is_recorded,
        # Of a file that was converted before.
        **({"earlier": earlier} if earlier is not None else {}),
    }
    return {"preprocess": source.preprocess.as_dict(), "provenance": {**source.provenance, "source": described}}


_NO_MMDET = (
    "nothing is installed here that could compute with the file; its names are those of a tested table. What the "
    "weights compute is compared when the same input is converted with --to d2 --verify"
)

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "d2": Target(
            title="Detectron2",
            tables=TABLES,
            suffixes=(".pkl", ".pth"),
            tensors_key="model",
            record=_detectron2_record,
            settings=lambda source, parts: {},
        ),
        "mmdet": Target(
            title="MMDetection, necks from C2 on (Faster and Mask R-CNN)",
            tables=RCNN_TABLES,
            suffixes=(".pth",),
            tensors_key="state_dict",
            record=_mmdet_record,
            settings=_mmdet_settings,
            unverifiable=_NO_MMDET,
        ),
        "mmdet-retinanet": Target(
            title="MMDetection, necks from C3 on (RetinaNet, FCOS)",
            tables=ONE_STAGE_TABLES,
            suffixes=(".pth",),
            tensors_key="state_dict",
            record=_mmdet_record,
            settings=_mmdet_settings,
            unverifiable=_NO_MMDET,
        ),
    }
)
"""By the name that --to takes."""
