"""The finished proposals of a list of images, looked up by the image's position in the list.

A store is one file, mapped into memory, so that opening costs next to nothing and all loader workers of a machine
share one copy. Sent to a worker, only its path travels.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from detco.views.base import Proposals
from pretrain.proposals.columns import Columns, ImageProposals, ProposalsError, read_columns

__all__ = ["STORE_KIND", "STORE_NAME", "ProposalStore", "ProposalsError", "file_digest"]

STORE_KIND = "detco-proposals"
STORE_NAME = "proposals.safetensors"

_BLOCK_BYTES = 1 << 20


class ProposalStore:
    """Read-only; made by `tools/generate_proposals.py`.

    Attributes:
        path: The file.
        header: Where the boxes come from, as JSON types: "record" (images, search, filters, versions) and "counts".
        columns: All boxes, mapped.
    """

    def __init__(self, path: Path, header: dict[str, Any], columns: Columns) -> None:
        """Wrap what was read; see `open`."""
        self.path = path
        self.header = header
        self.columns = columns

    @classmethod
    def open(cls, path: Path) -> "ProposalStore":
        """Map a store.

        Args:
            path: The file, or the folder that holds proposals.safetensors.

        Raises:
            FileNotFoundError: If it is not there, or not finished.
            ProposalsError: If it is damaged or something else.
        """
        file = path / STORE_NAME if path.is_dir() else path
        if not file.is_file():
            state = "is not finished: run the same command again" if (path / "parts").is_dir() else "does not exist"
            raise FileNotFoundError(f"{file} {state} (proposals are made by tools/generate_proposals.py)")
        header, columns = read_columns(file, STORE_KIND)
        try:
            is_whole = isinstance(header["record"]["images"]["digest"], str)
            is_whole &= header["counts"]["images"] == header["record"]["images"]["count"] == len(columns.stages)
        except (KeyError, TypeError):
            is_whole = False
        if not is_whole:
            raise ProposalsError(f"{file} is damaged: its header does not say which images it is of. Make it again")
        return cls(file, header, columns)

    def __reduce__(self) -> tuple[Callable[[Path], "ProposalStore"], tuple[Path]]:
        return ProposalStore.open, (self.path,)

    def __len__(self) -> int:
        return len(self.columns.stages)

    @property
    def images_digest(self) -> str:
        """`ImageList.digest` of the images that the proposals were made for."""
        return str(self.header["record"]["images"]["digest"])

    @property
    def digest(self) -> str:
        """sha256 (hex) of the file; reads all of it."""
        return file_digest(self.path)

    def of(self, index: int, width: int, height: int) -> Proposals:
        """The proposals of one image; none where nothing survived the filters.

        Args:
            index: Position in the image list, in [0, len).
            width: Of the decoded image, in pixels.
            height: Likewise.

        Raises:
            ProposalsError: If the proposals were made for an image of another size, or the entry is damaged.
        """
        entry = self.entry(index)
        if (entry.width, entry.height) != (width, height):
            raise ProposalsError(
                f"image {index} is {width}x{height} px, but when the proposals in {self.path} were made it "
                f"{_was(entry)}; restore the image, or remove these proposals and make them again"
            )
        return Proposals(entry.boxes_image_px.astype(np.float32), entry.multiplicity.astype(np.int64))

    def entry(self, index: int) -> ImageProposals:
        """What is stored about one image.

        Raises:
            ProposalsError: If a box is empty or leaves its image, or has no multiplicity.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        start, end = self.columns.offsets[index : index + 2]
        width, height = map(int, self.columns.sizes[index])
        boxes, multiplicity = self.columns.boxes_image_px[start:end], self.columns.multiplicity[start:end]
        x1, y1, x2, y2 = boxes.T
        if not ((x1 < x2) & (x2 <= width) & (y1 < y2) & (y2 <= height) & (multiplicity > 0)).all():
            raise ProposalsError(
                f"{self.path} is damaged: image {index} of {width}x{height} px has an empty or outlying box; "
                f"remove it and make it again"
            )
        return ImageProposals(width, height, boxes, multiplicity, int(self.columns.stages[index]))


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _was(entry: ImageProposals) -> str:
    return f"was {entry.width}x{entry.height} px" if entry.width else "could not be read"
