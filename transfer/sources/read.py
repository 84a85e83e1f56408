"""What a file of weights is, and which ResNet-50 in it to take: artifacts, checkpoints of ours, everybody else's.

Every source becomes parts under an artifact's names ("role/library name"). Files are read as safetensors or by
transfer.safe_read only, so nothing in them is executed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from detco.artifact import FORMAT, IMAGENET_RGB, Preprocess, read_artifact
from transfer.digest import sha256_of
from transfer.safe_read import UnsafeFileError, load_file
from transfer.sources.inputs import input_warnings
from transfer.sources.layouts import load_known
from transfer.sources.nesting import tensors_in
from transfer.sources.parts import differences_from_known_parts
from transfer.sources.recognise import ANY, BACKBONE, SourceError, recognise

CHECKPOINT_FORMAT = "detco-checkpoint"
CHECKPOINT_SCHEMA = 1


@dataclass(frozen=True)
class Source:
    """The network in a file and where it comes from.

    Attributes:
        path: The file.
        sha256: Its digest.
        kind: What the file is, for people.
        network: Which of the file's networks was taken: "query", "teacher", or "backbone" if there is only one.
        tensors: "role/library name" to tensor, heads and counters included.
        left_out: Name in the file to the reason, for what is not part of the network.
        unexplained: Names in the file that belong neither to the network nor to what is known to lie beside it.
        preprocess: What the network's input must look like.
        preprocess_is_recorded: Whether the file itself says so, rather than what is known of its project.
        provenance: The file's own account of the run that wrote it; of a foreign checkpoint `method`, `epochs` and the
            like, as far as its layout and its content tell; may be empty.
        name: Which known project's it is, a name of `--source`; "detco-pretrain" for our own, "resnet50" for a
            ResNet-50 of which nothing tells the project.
        project: The project's address; empty if unknown.
        cautions: What to know before using it.
    """

    path: Path
    sha256: str
    kind: str
    network: str
    tensors: Mapping[str, Tensor]
    left_out: Mapping[str, str]
    unexplained: tuple[str, ...]
    preprocess: Preprocess
    preprocess_is_recorded: bool
    provenance: Mapping[str, Any]
    name: str = "detco-pretrain"
    project: str = ""
    cautions: tuple[str, ...] = field(default=())


def read_source(path: Path, name: str | None = None) -> Source:
    """Read `path` and find the network in it.

    Args:
        path: The file.
        name: The known project that it is of, as `--source` names them; None to recognise it.

    Raises:
        FileNotFoundError: If there is nothing of that name.
        ArtifactError: If it is an artifact of ours, but not a complete one.
        UnsafeFileError: If it is damaged, or needs more than tensors, arrays and plain containers.
        SourceError: If it is a folder, empty or a web page, or there is not exactly one ResNet-50 to take.
    """
    _require_content(path)
    if path.suffix == ".safetensors" and _is_artifact(path):
        source = _from_artifact(path)
    else:
        content = _load(path)
        stated = content.get("format")
        if isinstance(stated, str) and stated == CHECKPOINT_FORMAT:
            source = _from_our_checkpoint(path, content)
        else:
            source = _from_project(path, content, name)
    if name is not None and source.name != name:
        raise SourceError(f"{path} is a {source.kind}, which says itself what it is; give no --source for it")
    _require_known_parts(source)
    return source


def _require_content(path: Path) -> None:
    """Refuse what is no file of weights at first sight: what a wrong path or a failed download leaves."""
    if path.is_dir():
        raise SourceError(f"{path} is a folder; give the file in it")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    if path.stat().st_size == 0:
        raise UnsafeFileError(f"{path} is empty. Copy or download it again")
    if start.startswith((b"<!doctype html", b"<html")):
        raise UnsafeFileError(f"{path} is a web page, not weights: the server sent HTML. Copy or download it again")


def _is_artifact(path: Path) -> bool:
    """Whether a safetensors file is ours; a file that is no such file counts as one, so that the reader says why."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return True


def _load(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    try:
        content = load_file(path)
    except UnsafeFileError as error:
        package = (error.needs or "").partition(".")[0]
        if package in load_known().refused_pickles:
            raise UnsafeFileError(
                f"{path} is not read, because it needs {error.needs}: {load_known().refused_pickles[package]}",
                error.needs,
            ) from None
        raise
    if not isinstance(content, Mapping):
        raise SourceError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return content


def _from_artifact(path: Path) -> Source:
    artifact = read_artifact(path)
    return Source(
        path=path,
        sha256=sha256_of(path),
        kind="artifact of detco-pretrain",
        network="backbone",
        tensors={f"{role}/{name}": tensor for role, part in artifact.parts.items() for name, tensor in part.items()},
        left_out={},
        unexplained=(),
        preprocess=artifact.preprocess,
        preprocess_is_recorded=True,
        provenance=artifact.provenance,
    )


def _from_our_checkpoint(path: Path, content: Mapping[str, Any]) -> Source:
    """Take the method's transfer parts from a training checkpoint."""
    schema = content.get("schema")
    if not isinstance(schema, int) or schema != CHECKPOINT_SCHEMA:
        shown = schema if isinstance(schema, int) else f"of type {type(schema).__name__}"
        raise SourceError(f"{path} has schema {shown}; only {CHECKPOINT_SCHEMA} is known")
    required = ("model", "transfer_parts", "preprocess", "provenance")
    missing = [name for name in required if not isinstance(content.get(name), Mapping)]
    if missing:
        raise SourceError(f"{path} is a checkpoint of detco-pretrain without {', '.join(missing)}; it is incomplete")
    if not all(isinstance(name, str) for part in content["transfer_parts"].items() for name in part):
        raise SourceError(f"{path} is a checkpoint of detco-pretrain whose transfer_parts are no names; it is damaged")
    tensors: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    prefixes = {f"{attribute}.": role for role, attribute in content["transfer_parts"].items()}
    for name, tensor in tensors_in(content["model"]).items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            left_out[name] = "used in pretraining only: not among the method's transfer parts"
        else:
            tensors[f"{prefixes[prefix]}/{name[len(prefix) :]}"] = tensor
    return Source(
        path=path,
        sha256=sha256_of(path),
        kind="training checkpoint of detco-pretrain",
        network=content["transfer_parts"].get("backbone", "backbone").partition(".")[0],
        tensors=tensors,
        left_out=left_out,
        unexplained=(),
        preprocess=Preprocess.from_dict(content["preprocess"]),
        preprocess_is_recorded=True,
        provenance=content["provenance"],
    )


def _from_project(path: Path, content: Mapping[str, Any], name: str | None) -> Source:
    """Find the network in a checkpoint of another project, or in a file that was converted before."""
    try:
        found = recognise(content, name)
    except SourceError as error:
        raise SourceError(f"{path} is not converted: {error}") from None
    layout = found.layout
    is_recorded = "preprocess" in content
    trunk = {name.removeprefix(BACKBONE): value for name, value in found.tensors.items() if name.startswith(BACKBONE)}
    cautions = [layout.caution if layout is not None else "", found.caution]
    cautions += [] if is_recorded else input_warnings(trunk, layout)
    record = content.get("provenance")
    own = dict(record) if isinstance(record, Mapping) else {}
    values = {key: value.item() if isinstance(value, np.generic) else value for key, value in found.settings.items()}
    settings = {key: value for key, value in values.items() if isinstance(value, (str, int, float, bool))}
    return Source(
        path=path,
        sha256=sha256_of(path),
        kind=f"checkpoint of {layout.title}" if layout is not None else "ResNet-50 state dict",
        network=found.network,
        tensors=found.tensors,
        left_out=found.left_out,
        unexplained=found.unexplained,
        preprocess=(
            Preprocess.from_dict(content["preprocess"])
            if is_recorded
            else layout.preprocess
            if layout is not None
            else IMAGENET_RGB
        ),
        preprocess_is_recorded=is_recorded,
        provenance=own | settings,
        name=layout.name if layout is not None else ANY,
        project=layout.project if layout is not None else "",
        cautions=tuple(caution for caution in cautions if caution),
    )


def _require_known_parts(source: Source) -> None:
    """Refuse a backbone, FPN or box head that is not exactly one, instead of converting a part of it."""
    shapes = {name: tuple(tensor.shape) for name, tensor in source.tensors.items()}
    for title, wrong in differences_from_known_parts(shapes).items():
        listing = "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise SourceError(
            f"{source.path} ({source.kind}) is not {title}: {listing}. Other depths, widths and stems are not converted"
        )
