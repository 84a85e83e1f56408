"""What a file of weights is, and which ResNet-50 in it to take: artifacts, our checkpoints, MoCo's, bare state dicts.

Every source becomes parts under an artifact's names ("role/library name"). Files are read as safetensors or by
torch.load(weights_only=True) only.

Source: MoCo's checkpoints, as https://github.com/facebookresearch/moco writes them (main_moco.py).
"""

import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from detco.artifact import IMAGENET_RGB, Preprocess, read_artifact
from transfer.safe_read import load_pickle, load_torch, sha256_of

CHECKPOINT_FORMAT = "detco-checkpoint"
CHECKPOINT_SCHEMA = 1


class SourceError(ValueError):
    """A file that is readable, but in which no ResNet-50 of known naming is found; the message says why."""


@dataclass(frozen=True)
class Source:
    """The network in a file and where it comes from.

    Attributes:
        path: The file.
        sha256: Its digest.
        kind: What the file is, for people.
        network: Which of the file's networks was taken: "query", "key", or "backbone" if there is only one.
        tensors: "role/library name" to tensor, heads and counters included.
        left_out: Name in the file to the reason, for what is not part of the network.
        unexplained: Names in the file that belong neither to the network nor to what is known to lie beside it.
        preprocess: What the network's input must look like.
        preprocess_is_recorded: False if the file says nothing of it, so that ImageNet's usual one is assumed.
        provenance: The file's own account of the run that wrote it; empty if it has none.
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


def resnet50_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the 265 tensors that make a ResNet-50, under torchvision's names: no `fc`, no step counters."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add(conv: str, norm: str, *shape: int) -> None:
        shapes[f"{conv}.weight"] = shape
        shapes.update({f"{norm}.{name}": shape[:1] for name in ("weight", "bias", "running_mean", "running_var")})

    add("conv1", "bn1", 64, 3, 7, 7)
    inputs = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for index in range(blocks):
            block = f"layer{stage}.{index}"
            add(f"{block}.conv1", f"{block}.bn1", width, inputs, 1, 1)
            add(f"{block}.conv2", f"{block}.bn2", width, width, 3, 3)
            add(f"{block}.conv3", f"{block}.bn3", 4 * width, width, 1, 1)
            if index == 0:
                add(f"{block}.downsample.0", f"{block}.downsample.1", 4 * width, inputs, 1, 1)
            inputs = 4 * width
    return shapes


def read_source(path: Path) -> Source:
    """Read `path` and find the network in it.

    Raises:
        FileNotFoundError: If there is no such file.
        ArtifactError: If it is a safetensors file, but not a complete artifact.
        UnsafeFileError: If it is damaged, or needs more than tensors and builtin types.
        SourceError: If there is not exactly one ResNet-50 to take.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        source = _from_artifact(path)
    elif path.suffix == ".pkl" and not zipfile.is_zipfile(path):
        load_pickle(path)  # Names what is hostile or damaged, if something is.
        raise SourceError(
            f"{path} is a plain pickle, as Detectron2's weights files are. If it is one, give it to MODEL.WEIGHTS "
            f"as it is; otherwise save its state dict with torch.save"
        )
    else:
        content = load_torch(path)
        if not isinstance(content, Mapping):
            raise SourceError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
        is_ours = content.get("format") == CHECKPOINT_FORMAT
        source = _from_our_checkpoint(path, content) if is_ours else _from_state_dict(path, content)
    _require_resnet50(source)
    return source


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
    if content.get("schema") != CHECKPOINT_SCHEMA:
        raise SourceError(f"{path} has schema {content.get('schema')!r}; only {CHECKPOINT_SCHEMA!r} is known")
    required = ("model", "transfer_parts", "preprocess", "provenance")
    missing = [name for name in required if not isinstance(content.get(name), Mapping)]
    if missing:
        raise SourceError(f"{path} is a checkpoint of detco-pretrain without {', '.join(missing)}; it is incomplete")
    tensors: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    prefixes = {f"{attribute}.": role for role, attribute in content["transfer_parts"].items()}
    for name, tensor in content["model"].items():
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


# Beside MoCo's query encoder, by the name after the wrapper's prefix ("module.").
_BESIDE_MOCO = {
    r"encoder_k\..+": "the key network, a moving average of the query network",
    r"queue(_ptr)?": "the queue of negative keys",
}


def _from_state_dict(path: Path, content: Mapping[str, Any]) -> Source:
    """Find the ResNet-50 in a state dict, by the prefix of its names."""
    tensors = _unwrap(path, content)
    prefix = _choose_prefix(path, tensors)
    wrapper, _, encoder = prefix.rstrip(".").rpartition(".")
    network = {"encoder_q": "query", "encoder_k": "key"}.get(encoder, "backbone")
    beside = _BESIDE_MOCO if network == "query" else {}
    left_out: dict[str, str] = {}
    unexplained: list[str] = []
    for name in (name for name in tensors if not name.startswith(prefix)):
        inner = name.removeprefix(f"{wrapper}." if wrapper else "")
        reason = next((reason for pattern, reason in beside.items() if re.fullmatch(pattern, inner)), None)
        if reason is None:
            unexplained.append(name)
        else:
            left_out[name] = reason
    return Source(
        path=path,
        sha256=sha256_of(path),
        kind="ResNet-50 state dict" if network == "backbone" else "MoCo checkpoint",
        network=network,
        tensors={
            f"backbone/{name[len(prefix) :]}": tensor for name, tensor in tensors.items() if name.startswith(prefix)
        },
        left_out=left_out,
        unexplained=tuple(unexplained),
        preprocess=IMAGENET_RGB,
        preprocess_is_recorded=False,
        provenance={},
    )


def _unwrap(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the dict of tensors: the file's `state_dict` or `model`, or the file's content itself."""
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise SourceError(
            f"{path} holds no tensors under 'state_dict', 'model' or at its top level, only {sorted(map(str, content))}"
        )
    return tensors


def _choose_prefix(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Return the prefix of the one ResNet-50 to take; the query network goes before the key network."""
    stem, witnesses = "conv1.weight", ("layer1.0.conv1.weight", "layer4.2.bn3.running_var")
    candidates = [name[: -len(stem)] for name in tensors if name == stem or name.endswith(f".{stem}")]
    found = [
        prefix
        for prefix in candidates
        if tensors[prefix + stem].shape == (64, 3, 7, 7) and all(prefix + name in tensors for name in witnesses)
    ]
    query = [prefix for prefix in found if prefix.endswith("encoder_q.")]
    if len(query) == 1 and set(found) == {query[0], query[0].replace("encoder_q.", "encoder_k.")}:
        return query[0]
    if len(found) > 1:
        raise SourceError(f"{path} holds {len(found)} ResNet-50s, under {found}; save the one to take in its own file")
    if not found:
        raise SourceError(f"{path} holds no ResNet-50 under torchvision's names{_describe(tensors)}")
    return found[0]


def _describe(tensors: Mapping[str, Tensor]) -> str:
    """Say what a state dict without a ResNet-50 holds instead, as far as its names tell."""
    frequent = Counter(".".join(name.split(".")[:2]) for name in tensors)
    listing = ", ".join(f"{prefix} ({count})" for prefix, count in frequent.most_common(10))
    if any(name.endswith("stem.conv1.weight") for name in tensors):
        reason = ": these are Detectron2's names already, so give the file to MODEL.WEIGHTS as it is"
    elif any(name.endswith("conv1.0.weight") for name in tensors):
        reason = ": its stem is several convolutions (conv1.0), as in ResNet-50-D; only the 7x7 stem is supported"
    elif any(name.endswith("layer1.0.conv2.weight") for name in tensors):
        reason = ": it is another ResNet (another depth, or a stem that is not 64x3x7x7)"
    else:
        reason = ""
    return f"{reason}. Most frequent prefixes of its {len(tensors)} tensors: {listing}"


def _require_resnet50(source: Source) -> None:
    """Refuse a backbone that is not exactly a ResNet-50, instead of converting a part of it."""
    role = "backbone/"
    shapes = {
        name[len(role) :]: tuple(tensor.shape) for name, tensor in source.tensors.items() if name.startswith(role)
    }
    expected = resnet50_shapes()
    wrong = [f"{name} is missing" for name in expected if name not in shapes]
    wrong += [
        f"{name} has shape {shapes[name]}, not {shape}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    blocks = {name.rpartition(".conv1.")[0] for name in expected if name.startswith("layer") and ".conv1." in name}
    extra = {match[0] for name in shapes if (match := re.match(r"layer\d+\.\d+(?=\.)", name))} - blocks
    wrong += [f"{block} is a block too many" for block in sorted(extra)]
    if wrong:
        listing = "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise SourceError(
            f"{source.path} ({source.kind}) is not a ResNet-50 with torchvision's widths and blocks: {listing}. "
            f"Other depths, widths and stems are not converted"
        )
