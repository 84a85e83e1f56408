"""The folder that proposals are made in: finished parts, so that an interruption loses minutes, then one store.

    <folder>/parts/record.json              what is being made here; another one is refused
    <folder>/parts/part-00012.safetensors   images [12 * 256, 13 * 256), complete
    <folder>/proposals.safetensors          all of them, and parts/ is gone

Every file appears under its name only when it is complete, and is a function of the record alone. So it does not
matter which process, of how many, on which machine makes it, nor whether two make the same one.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detco.artifact import open_atomically
from pretrain.proposals.columns import Columns, ImageProposals, count, join, read_columns, stack, write_columns
from pretrain.proposals.store import STORE_KIND, STORE_NAME, ProposalsError, ProposalStore

logger = logging.getLogger(__name__)

IMAGES_PER_PART = 256
BYTES_PER_IMAGE = 600
"""Of parts and store together, with 20 boxes per image, the default's yield on ImageNet (spec: 19)."""

_PART_KIND = "detco-proposals-part"


class ProposalFolder:
    """Where the proposals of one record are made.

    Attributes:
        path: The folder; it need not exist.
        record: Everything that determines the store, as JSON types; `record["images"]` holds "digest" and "count".
        num_parts: How many parts make up the store.
    """

    def __init__(self, path: Path, record: Mapping[str, Any]) -> None:
        """Touches nothing."""
        self.path = path
        self.record = json.loads(json.dumps(record))  # as it will be read back: tuples are lists in JSON
        self._num_images = int(record["images"]["count"])
        self.num_parts = -(-self._num_images // IMAGES_PER_PART)
        self._parts = path / "parts"

    def images_of(self, part: int) -> range:
        """The indices of the images of a part."""
        return range(part * IMAGES_PER_PART, min((part + 1) * IMAGES_PER_PART, self._num_images))

    def finished_store(self) -> ProposalStore | None:
        """The store, if it is there.

        Raises:
            ValueError: If it was made of other images, or in another way; the message says what differs.
            ProposalsError: If it is damaged.
        """
        if not (self.path / STORE_NAME).is_file():
            return None
        store = ProposalStore.open(self.path)
        self._refuse_another(store.header["record"])
        if self._parts.is_dir():  # merged by a process that was killed before it could tidy up
            shutil.rmtree(self._parts, ignore_errors=True)
        return store

    def claim(self) -> None:
        """Make sure that this folder can be written to, and is for this record.

        Raises:
            ValueError: If it cannot, there is too little room on the disk, or another record is being made here.
        """
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._parts) as file:
                file.write(b"0" * 4096)
            free = shutil.disk_usage(self._parts).free
        except OSError as error:
            raise ValueError(f"cannot write to {self._parts}: {error}; choose another folder") from error
        needed = self._num_images * BYTES_PER_IMAGE
        if free < needed:
            raise ValueError(
                f"the disk of {self.path} has {free / 1e6:,.0f} MB left, and the proposals of {self._num_images:,} "
                f"images take about {needed / 1e6:,.0f} MB while they are made; make room or choose another folder"
            )
        claim = self._parts / "record.json"
        if not claim.exists():
            with open_atomically(claim) as file:
                file.write(json.dumps(self.record, indent=2, sort_keys=True).encode())
        # Read back even if just written: somebody else may have done so in the same moment.
        try:
            claimed = json.loads(claim.read_bytes())
        except ValueError as error:
            raise ValueError(f"{claim} is damaged ({error}); remove {self._parts} and start again") from error
        self._refuse_another(claimed)

    def give_up(self) -> None:
        """Take back a claim, for another record to be made here, with the parts that were made under it."""
        shutil.rmtree(self._parts, ignore_errors=True)

    def missing_parts(self, shard: int, num_shards: int) -> list[int]:
        """The parts of a shard that are still to be made; a damaged one is."""
        return [part for part in range(shard, self.num_parts, num_shards) if not self._is_intact(part)]

    def num_unfinished(self) -> int:
        """How many parts of all shards are not there; does not look into them."""
        return sum(not self._part_file(part).is_file() for part in range(self.num_parts))

    def write_part(self, part: int, rows: Sequence[ImageProposals]) -> None:
        """Keep the proposals of the images of a part."""
        assert len(rows) == len(self.images_of(part))
        write_columns(self._part_file(part), _PART_KIND, {"record": self.record, "part": part}, stack(rows))

    def merge(self) -> ProposalStore:
        """Make the store of all parts, and remove them.

        Raises:
            ProposalsError: If a part is damaged.
            FileNotFoundError: If a part is missing.
        """
        return self.write_store(join([self._read_part(part) for part in range(self.num_parts)]))

    def write_store(self, columns: Columns) -> ProposalStore:
        """Write the store of `columns`, and tidy up."""
        # By way of parts/, so that what a killed process leaves of it is tidied up too.
        complete = self._parts / STORE_NAME
        write_columns(complete, STORE_KIND, {"record": self.record, "counts": count(columns)}, columns)
        complete.replace(self.path / STORE_NAME)
        shutil.rmtree(self._parts, ignore_errors=True)
        return ProposalStore.open(self.path)

    def _part_file(self, part: int) -> Path:
        return self._parts / f"part-{part:05d}.safetensors"

    def _is_intact(self, part: int) -> bool:
        try:
            self._read_part(part)
        except FileNotFoundError:
            return False
        except ProposalsError as error:
            logger.warning("%s: it is made again", error)
            return False
        return True

    def _read_part(self, part: int) -> Columns:
        file = self._part_file(part)
        header, columns = read_columns(file, _PART_KIND)
        if header != {"record": self.record, "part": part} or len(columns.stages) != len(self.images_of(part)):
            raise ProposalsError(f"{file} is not part {part} of these proposals")
        return columns

    def _refuse_another(self, record: Any) -> None:
        found = _differences(record, self.record)
        if found:
            raise ValueError(
                f"{self.path} holds other proposals than those asked for: {'; '.join(found)}. "
                f"Ask for the same, choose another folder, or remove this one"
            )


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    """What differs between two JSON values, by dotted name."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted(there.keys() | here.keys())
        return [
            line for key in keys for line in _differences(there.get(key), here.get(key), f"{name}.{key}".strip("."))
        ]
    return [] if there == here else [f"{name} {json.dumps(there)} there, {json.dumps(here)} here"]
