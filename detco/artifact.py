"""The file that pretraining ends with: network parts, what their input must look like, where they come from.

One safetensors file. Tensor names are `role/library name` ("backbone/layer1.0.conv1.weight"); the header carries four
strings: `format`, `schema`, and the JSON of `preprocess` and `provenance`. Nothing in it can execute.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT = "detco-artifact"
SCHEMA = "1"


class ArtifactError(ValueError):
    """A file or a value that is not a valid artifact; the message says why."""


@dataclass(frozen=True)
class Preprocess:
    """What the network's input must look like, and where it downsamples.

    Attributes:
        channel_order: "RGB" or "BGR".
        mean_255: Mean that is subtracted, per channel in `channel_order`, of pixels in 0..255.
        std_255: Positive divisor per channel in `channel_order`, of pixels in 0..255.
        stride_in_1x1: Whether bottlenecks downsample in their first 1x1 convolution (MSRA's ResNet) instead of the
            3x3 one (torchvision's). No tensor shape tells the two apart, so the file has to.

    Raises:
        ArtifactError: If a value is outside these ranges.
    """

    channel_order: str
    mean_255: tuple[float, float, float]
    std_255: tuple[float, float, float]
    stride_in_1x1: bool

    def __post_init__(self) -> None:
        if self.channel_order not in ("RGB", "BGR"):
            raise ArtifactError(f"preprocess.channel_order is {self.channel_order!r}; it must be 'RGB' or 'BGR'")
        for name, values in (("mean_255", self.mean_255), ("std_255", self.std_255)):
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise ArtifactError(f"preprocess.{name} is {values!r}; it must be three finite numbers")
        if min(self.std_255) <= 0:
            raise ArtifactError(f"preprocess.std_255 is {self.std_255!r}; every value must be positive")

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return asdict(self) | {"mean_255": list(self.mean_255), "std_255": list(self.std_255)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Preprocess":
        """Read the record that `as_dict` wrote.

        Raises:
            ArtifactError: If a key is missing or unknown, or a value has the wrong type or range.
        """
        expected = {field.name for field in fields(cls)}
        if not isinstance(record, Mapping) or set(record) != expected:
            found = sorted(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
            raise ArtifactError(f"preprocess must hold exactly {sorted(expected)}, not {found}")
        if not isinstance(record["stride_in_1x1"], bool):
            raise ArtifactError(f"preprocess.stride_in_1x1 is {record['stride_in_1x1']!r}; it must be true or false")
        return cls(
            channel_order=record["channel_order"],
            mean_255=_three_numbers("mean_255", record["mean_255"]),
            std_255=_three_numbers("std_255", record["std_255"]),
            stride_in_1x1=record["stride_in_1x1"],
        )


def _three_numbers(name: str, values: Any) -> tuple[float, float, float]:
    try:
        first, second, third = (float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"preprocess.{name} is {values!r}; it must be three finite numbers") from error
    return first, second, third


# torchvision's mean and std (0.485, 0.456, 0.406; 0.229, 0.224, 0.225) times 255.
IMAGENET_RGB = Preprocess("RGB", (123.675, 116.280, 103.530), (58.395, 57.120, 57.375), stride_in_1x1=False)


@dataclass(frozen=True)
class Artifact:
    """Pretrained parts with everything a user of them must know.

    Attributes:
        parts: Role ("backbone") to tensors under their library's names (backbone: torchvision's, without fc).
        preprocess: What the parts were trained with.
        provenance: JSON-able account of the run: method, steps, images seen, commit, config digest, seed and so on.
    """

    parts: Mapping[str, Mapping[str, Tensor]]
    preprocess: Preprocess
    provenance: Mapping[str, Any]


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears under `path` only when the block ends without an error.

    The bytes are synced before the rename, so after a crash `path` is the old file or the new one, never half of one.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_artifact(path: Path, artifact: Artifact) -> None:
    """Write `artifact` atomically, replacing an existing file.

    Raises:
        ArtifactError: If there is no part, a part has no tensors, a role holds "/", or the provenance is not JSON.
            Nothing has been written then.
    """
    if not artifact.parts:
        raise ArtifactError("an artifact needs at least one part, for example 'backbone'")
    tensors: dict[str, Tensor] = {}
    for role, part in artifact.parts.items():
        if not role or "/" in role or not part:
            raise ArtifactError(f"part {role!r} has {len(part)} tensors; it needs a name without '/' and some tensors")
        # Cloned, because safetensors refuses tensors that share memory, as views of one buffer do.
        tensors |= {f"{role}/{name}": tensor.detach().cpu().clone().contiguous() for name, tensor in part.items()}
    try:
        provenance = json.dumps(artifact.provenance, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the provenance cannot be written as JSON: {error}") from error
    metadata = {
        "format": FORMAT,
        "schema": SCHEMA,
        "preprocess": json.dumps(artifact.preprocess.as_dict(), sort_keys=True),
        "provenance": provenance,
    }
    with open_atomically(path) as file:
        file.write(save(tensors, metadata=metadata))


def read_artifact(path: Path) -> Artifact:
    """Read a file that `write_artifact` wrote; tensors are on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ArtifactError: If it is anything but a complete artifact of a known schema.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            preprocess, provenance = _read_header(path, metadata)
            parts: dict[str, dict[str, Tensor]] = {}
            for key in file.keys():  # noqa: SIM118 -- the handle is not iterable
                role, separator, name = key.partition("/")
                if not (role and separator and name):
                    raise ArtifactError(f"{path} holds the tensor {key!r}, which is not named 'role/name'")
                parts.setdefault(role, {})[name] = file.get_tensor(key)
    except SafetensorError as error:
        raise ArtifactError(
            f"{path} is not a complete safetensors file (truncated or another format): {error}"
        ) from error
    if not parts:
        raise ArtifactError(f"{path} holds no parts, so there is no network in it")
    return Artifact(parts, preprocess, provenance)


def _read_header(path: Path, metadata: Mapping[str, str]) -> tuple[Preprocess, dict[str, Any]]:
    """Return preprocess and provenance, having checked format and schema."""
    if metadata.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} is a safetensors file, but not an artifact of detco-pretrain: its header says format="
            f"{metadata.get('format')!r}, not {FORMAT!r}"
        )
    if metadata.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{path} has schema {metadata.get('schema')!r}; only {SCHEMA!r} is known. Use the version that wrote it"
        )
    records: dict[str, dict[str, Any]] = {}
    for name in ("preprocess", "provenance"):
        if name not in metadata:
            raise ArtifactError(f"{path} has no {name!r} in its header; write it again with write_artifact")
        try:
            records[name] = json.loads(metadata[name])
        except json.JSONDecodeError as error:
            raise ArtifactError(f"{path}: {name!r} in the header is not JSON: {error}") from error
        if not isinstance(records[name], dict):
            raise ArtifactError(f"{path}: {name!r} in the header is not a JSON object")
    try:
        return Preprocess.from_dict(records["preprocess"]), records["provenance"]
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
