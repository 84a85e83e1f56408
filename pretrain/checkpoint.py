"""Training checkpoints that survive a kill at any moment and are checked before they are used.

`step_XXXXXXXX.pth` appears by a rename after everything was synced, and its `.sha256` (readable by `sha256sum -c`) is
there before it. So a checkpoint without its digest, or with another one, is damaged, and the one before it is used.
"""

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from detco.artifact import open_atomically
from pretrain.launch import World, gather

logger = logging.getLogger(__name__)

FORMAT = "detco-checkpoint"
SCHEMA = 1

_NAME = re.compile(r"step_(\d{8})\.pth")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what to do."""


class CheckpointFolder:
    """The checkpoints of one run, newest last. Written by rank 0 alone.

    Attributes:
        path: The folder; made by the first save.
        keep_last: How many are kept.
    """

    def __init__(self, path: Path, keep_last: int) -> None:
        self.path = path
        self.keep_last = keep_last

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, increasing."""
        if not self.path.is_dir():
            return []
        matches = [_NAME.fullmatch(entry.name) for entry in self.path.iterdir()]
        return sorted(int(match[1]) for match in matches if match)

    def file(self, step: int) -> Path:
        """Return where the checkpoint of `step` lies or would lie."""
        return self.path / f"step_{step:08d}.pth"

    def save(self, step: int, content: Mapping[str, Any]) -> Path:
        """Write one checkpoint durably, then remove those beyond `keep_last`.

        Args:
            step: Steps done.
            content: What `torch.load(weights_only=True)` can read: dicts, lists, tensors, numbers, text, None.

        Raises:
            OSError: If it cannot be written, as on a full disk. The older checkpoints are untouched then.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.file(step)
        with open_atomically(file) as stream:
            hashing = _HashingWriter(stream)
            torch.save({"format": FORMAT, "schema": SCHEMA, "step": step, **content}, cast(BinaryIO, hashing))
            with open_atomically(_digest_file(file)) as digest_stream:
                digest_stream.write(f"{hashing.sha256.hexdigest()}  {file.name}\n".encode())
        _sync_folder(self.path)
        for old in self.steps()[: -self.keep_last]:
            self.file(old).unlink()
            _digest_file(self.file(old)).unlink(missing_ok=True)
        return file

    def newest_intact(self) -> Path | None:
        """Return the newest checkpoint that is whole, None if there was never one; set damaged ones aside, aloud.

        Raises:
            CheckpointError: If there are checkpoints but all are damaged.
        """
        if not self.path.is_dir():
            return None
        for leftover in self.path.glob(".*.partial"):  # of a process that was killed while saving
            leftover.unlink()
        damaged = []
        for step in reversed(self.steps()):
            file = self.file(step)
            reason = _damage(file)
            if reason is None:
                return file
            aside = file.with_name(f"{file.name}.damaged")
            file.replace(aside)
            damaged.append(aside.name)
            logger.warning("checkpoint %s is damaged (%s): kept as %s, trying the one before", file, reason, aside.name)
        if damaged or any(self.path.glob("*.damaged")):
            raise CheckpointError(
                f"no checkpoint in {self.path} is intact (damaged: {', '.join(damaged) or 'all'}); "
                f"to start from scratch, choose another --output-dir"
            )
        return None


def read(file: Path) -> dict[str, Any]:
    """Load a checkpoint of ours onto the CPU, without executing anything in it.

    Raises:
        CheckpointError: If it is not one.
    """
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("schema") != SCHEMA:
        raise CheckpointError(f"{file} is not a training checkpoint of this version (format {FORMAT} {SCHEMA})")
    return content


def own_buffers(module: nn.Module, world: World) -> dict[str, Tensor]:
    """Return this rank's buffers that differ from rank 0's: BatchNorm statistics, but not the queues. Collective."""
    if world.size == 1:
        return {}
    digests = {name: _digest(buffer) for name, buffer in module.named_buffers()}
    of_first = gather(digests, world)[0]
    return {
        name: buffer.detach().cpu().clone()
        for name, buffer in module.named_buffers()
        if digests[name] != of_first[name]
    }


def load_model(module: nn.Module, state: Mapping[str, Tensor], buffers_of_rank: Mapping[str, Tensor]) -> None:
    """Load rank 0's state, strictly, and then what this rank had different.

    Raises:
        CheckpointError: If names or shapes differ: the code has changed since.
    """
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit this version of the code: {error}") from error
    for name, value in buffers_of_rank.items():
        module.get_buffer(name).copy_(value)


class _HashingWriter:
    """A file that is hashed while it is written, front to back."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _digest_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _damage(file: Path) -> str | None:
    """Why `file` is not what was saved, None if it is."""
    if not _digest_file(file).is_file():
        return f"{_digest_file(file).name} is missing"
    expected = _digest_file(file).read_text(errors="replace").split()[:1]
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            found.update(block)
    return None if expected == [found.hexdigest()] else "its sha256 is not the one written when it was saved"


def _sync_folder(path: Path) -> None:
    """Make renames in `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
