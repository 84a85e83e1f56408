"""What every list of images is, wherever the images lie: numbered names, a digest, and bytes to read.

The list is sorted by the bytes of the names, so that index i is the same image on every machine and in every kind of
place, and kept as one block of bytes: a Python list of 1.3 million strings would be copied into every loader worker,
page by page, as reference counts touch it.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""What counts as an image, in any case of letters."""


class ImagesLost(RuntimeError):
    """Where the images lay there is something else now, or nothing: a run that went on would not be the same run.

    Not for one damaged image, which a run replaces and records.
    """


class ImageList(ABC):
    """N named images in the order of their names' bytes, without one Python object per image.

    Tensors move to shared memory when the list is sent to a loader worker, so all workers of a process read one copy,
    however they were started.

    Attributes:
        root: Where the images lie, for messages: a folder, or the address of one.
        digest: sha256 (hex) of the relative names, each followed by a NUL byte. The same for images that were moved,
            copied or packed.
    """

    def __init__(self, root: Path | str, block: NDArray[np.uint8]) -> None:
        """Wrap `block`: the sorted names as bytes, each followed by a NUL byte."""
        if block.size == 0 or block[-1] != 0:
            raise ValueError("a block of names ends with a NUL byte and holds one name at least")
        self.root = root
        self.digest = hashlib.sha256(block.data).hexdigest()
        self._block = torch.from_numpy(block)
        self._ends = torch.from_numpy(np.flatnonzero(block == 0))

    def __len__(self) -> int:
        return len(self._ends)

    def relative_name(self, index: int) -> bytes:
        """The name of the image at `index` in [0, len), as it stands in the list."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        start = int(self._ends[index - 1]) + 1 if index else 0
        return self._block[start : int(self._ends[index])].numpy().tobytes()

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call the image at `index` in messages; ends with its file name."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The file of the image at `index`.

        Raises:
            OSError: If this one image cannot be read.
            ImagesLost: If the images are not there any more, or are others.
        """

    @property
    def block(self) -> NDArray[np.uint8]:
        """The names as they are stored: bytes, each followed by a NUL byte. Do not write to it."""
        block: NDArray[np.uint8] = self._block.numpy()
        return block


def as_block(sorted_names: Iterable[bytes]) -> NDArray[np.uint8]:
    """The names, each followed by a NUL byte, shape (number of bytes,)."""
    # bytearray, because torch wants memory that it may write to.
    return np.frombuffer(bytearray(b"".join(name + b"\0" for name in sorted_names)), dtype=np.uint8)
