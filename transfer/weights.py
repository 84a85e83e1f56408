"""What a value of MODEL.WEIGHTS says about itself: digest, preprocessing, provenance."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detco.artifact import IMAGENET_RGB, Preprocess
from transfer.digest import sha256_of
from transfer.safe_read import Inert, load_pickle, load_torch

# Detectron2's model zoo files carry no record. MSRA's were trained by Caffe on BGR pixels, with the std folded into the
# first convolution and the stride in the first 1x1 (detectron2/model_zoo, MODEL_ZOO.md, "ImageNet Pretrained Models").
_MODEL_ZOO = {
    "detectron2://ImageNetPretrained/MSRA/": Preprocess(
        "BGR", (103.530, 116.280, 123.675), (1.0, 1.0, 1.0), stride_in_1x1=True
    ),
    "detectron2://ImageNetPretrained/torchvision/": IMAGENET_RGB,
}


@dataclass(frozen=True)
class WeightsRecord:
    """The record of a weights file.

    Attributes:
        path: The value of MODEL.WEIGHTS without a query; "" for random initialisation.
        sha256: Digest of the file; None where there is no local file.
        preprocess: What its network's input must look like; None if nothing is known.
        provenance: The run that made it, with `source`, the file it was converted from; empty if nothing is known.
        names: Of the tensors in a local file.
    """

    path: str
    sha256: str | None
    preprocess: Preprocess | None
    provenance: dict[str, Any]
    names: tuple[str, ...] = field(default=(), compare=False, repr=False)


def read_record(path: str) -> WeightsRecord:
    """Read the record of a value of MODEL.WEIGHTS, without executing anything in the file.

    Args:
        path: A local file, a URL, or "" for random initialisation; "?matching_heuristics=True" may follow.

    Raises:
        FileNotFoundError: If it is no URL and there is no such file.
        UnsafeFileError: If the file is damaged or holds more than arrays and builtin types.
        ValueError: If it is a file of another suffix than .pkl or .pth, holds what Detectron2 does not read, or its
            record is not valid.
    """
    name = path.partition("?")[0]
    if not name:
        return WeightsRecord("", None, None, {})
    if "://" in name:
        known = (preprocess for start, preprocess in _MODEL_ZOO.items() if name.startswith(start))
        return WeightsRecord(name, None, next(known, None), {})
    file = Path(name)
    if not file.is_file():
        raise FileNotFoundError(f"MODEL.WEIGHTS is {path!r}, but there is no file {name}")
    if file.suffix not in (".pkl", ".pth"):
        raise ValueError(
            f"MODEL.WEIGHTS is {path!r}; it must be a .pkl or .pth file. Make one with: convert-to-d2 {name} OUT.pkl"
        )
    content = load_pickle(file) if file.suffix == ".pkl" else load_torch(file)
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} holds a {type(content).__name__}, not a dict of weights")
    if settings := [str(key) for key, value in content.items() if isinstance(value, Inert)]:
        raise ValueError(
            f"MODEL.WEIGHTS is {path!r}, which holds its project's settings ({', '.join(settings)}); Detectron2 does "
            f"not read such files. Convert it first: convert-to-d2 {name} OUT.pkl"
        )
    meta = content.get("meta")
    if isinstance(meta, Mapping) and str(meta.get("author")).startswith("detco convert-to-d2"):
        raise ValueError(
            f"MODEL.WEIGHTS is {path!r}, which was written for MMDetection; convert what it was made from once more, "
            f"without --to: convert-to-d2 IN OUT.pkl"
        )
    provenance = content.get("provenance", {})
    if not isinstance(provenance, Mapping):
        raise ValueError(
            f"MODEL.WEIGHTS is {path!r}, whose record is not valid: provenance is of type {type(provenance).__name__}, "
            f"not a dict. Convert the weights again with convert-to-d2"
        )
    return WeightsRecord(
        path=name,
        sha256=sha256_of(file),
        preprocess=Preprocess.from_dict(content["preprocess"]) if "preprocess" in content else None,
        provenance=dict(provenance),
        names=tuple(map(str, content.get("model", content))),
    )
