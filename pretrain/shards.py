"""Images in tar shards (the WebDataset layout), read at random: each is a range of bytes of one shard.

Where the ranges are stands in an index: the one that tools/make_shards.py wrote beside its shards, or the one made here
from the headers of any plain tars. The list is sorted by the names of the members over all shards, as a folder's is by
its paths, so a run on packed images is the run on the folder, bit for bit.

The header in front of an image is read with it and compared with what the index knows of it: shards that were packed
anew, into files of the same lengths, are noticed at the first image that moved.
"""

import io
import logging
import os
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.image_list import IMAGE_SUFFIXES, ImageList, ImagesLost, as_block
from pretrain.list_cache import Columns
from pretrain.tar_members import HEADER_BYTES, is_safe, read_members

logger = logging.getLogger(__name__)

INDEX_NAME = "image_index.npz"
"""Of the file that tools/make_shards.py writes beside its shards."""

INDEX_SCHEMA = 1

NUM_READERS = 16
"""Threads that look into shards: they wait for the disk or the network most of the time."""

MAX_OPEN_SHARDS = 128
"""Per thread: opening takes a round trip on a network file system, and processes may often have 1024 files open."""


class RangeSource(Protocol):
    """A folder of shards, here or elsewhere. Pickles as its address; safe to use from several threads.

    Attributes:
        root: The folder, for messages.
    """

    root: Path | str

    def read(self, shard: str, shard_bytes: int, start: int, num_bytes: int) -> bytes:
        """Exactly bytes [start, start + num_bytes) of a shard that must be `shard_bytes` long.

        Raises:
            ImagesLost: If the shard is missing, has another length or cannot be reached.
            OSError: If these bytes cannot be read.
        """


@dataclass(frozen=True)
class ShardIndex:
    """Where each of N images lies in S shards.

    Attributes:
        block: The names of the members, sorted by their bytes, each followed by a NUL byte, uint8.
        shards: In which shard, int32, in [0, S), shape (N,).
        offsets: Of its first byte in the shard, int64, shape (N,); a header of `HEADER_BYTES` lies before it.
        sizes: In bytes, int64, shape (N,).
        headers: zlib.crc32 of that header, int64, shape (N,).
        shard_names: Relative paths of the shards, length S.
        shard_bytes: Their lengths, int64, shape (S,).

    Raises:
        ValueError: If these do not fit together.
    """

    block: NDArray[np.uint8]
    shards: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    headers: NDArray[np.int64]
    shard_names: Sequence[str]
    shard_bytes: NDArray[np.int64]

    def __post_init__(self) -> None:
        num_images = int(np.count_nonzero(self.block == 0))
        columns = (self.shards, self.offsets, self.sizes, self.headers)
        fits = all(column.shape == (num_images,) for column in columns)
        fits &= self.shard_bytes.shape == (len(self.shard_names),)
        fits &= all(is_safe(os.fsencode(name)) for name in self.shard_names)
        fits = fits and bool((self.shards >= 0).all() and (self.shards < len(self.shard_names)).all())
        fits = fits and bool((self.offsets >= HEADER_BYTES).all() and (self.sizes >= 0).all())
        if not (fits and (self.offsets + self.sizes <= self.shard_bytes[self.shards]).all()):
            raise ValueError("the index does not fit itself: columns of other lengths, or images outside their shards")

    def as_columns(self) -> Columns:
        """The same as arrays, for `from_columns`."""
        return {
            "schema_of_shards": np.array(INDEX_SCHEMA),
            "block": self.block,
            "shards": self.shards,
            "offsets": self.offsets,
            "sizes": self.sizes,
            "headers": self.headers,
            "shard_names": as_block(os.fsencode(name) for name in self.shard_names),
            "shard_bytes": self.shard_bytes,
        }

    @classmethod
    def from_columns(cls, columns: Mapping[str, NDArray[np.generic]]) -> "ShardIndex":
        """The index of which `as_columns` made these.

        Raises:
            KeyError, ValueError: If it did not.
        """
        schema = int(columns["schema_of_shards"])
        if schema != INDEX_SCHEMA:
            raise ValueError(f"it has version {schema}, this program reads version {INDEX_SCHEMA}")
        return cls(
            block=columns["block"].astype(np.uint8, casting="no", copy=False),
            shards=columns["shards"].astype(np.int32, casting="no", copy=False),
            offsets=columns["offsets"].astype(np.int64, casting="no", copy=False),
            sizes=columns["sizes"].astype(np.int64, casting="no", copy=False),
            headers=columns["headers"].astype(np.int64, casting="no", copy=False),
            shard_names=[os.fsdecode(name) for name in columns["shard_names"].tobytes().split(b"\0")[:-1]],
            shard_bytes=columns["shard_bytes"].astype(np.int64, casting="no", copy=False),
        )

    @classmethod
    def parse(cls, data: bytes, name: str) -> "ShardIndex":
        """Read the file that tools/make_shards.py wrote; nothing in it can execute.

        Raises:
            ValueError: If it is damaged or something else; the message calls it `name`.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as content:
                return cls.from_columns({column: content[column] for column in content.files})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{name} is no index of tools/make_shards.py, or it is damaged ({type(error).__name__}: {error}): copy "
                f"it again, or remove it and run make_shards.py again"
            ) from error


class ShardList(ImageList):
    """The images of tar shards. Its columns are shared by the workers of a process, as the names are."""

    def __init__(self, index: ShardIndex, source: RangeSource) -> None:
        """The images of `index`, whose shards lie in `source`."""
        super().__init__(source.root, index.block)
        self._source = source
        self._shards, self._offsets, self._sizes, self._headers = map(
            torch.from_numpy, (index.shards, index.offsets, index.sizes, index.headers)
        )
        self._shard_names = list(index.shard_names)
        self._shard_bytes = torch.from_numpy(index.shard_bytes)

    def name(self, index: int) -> str:
        """Folder, shard and member, as one path."""
        member = os.fsdecode(self.relative_name(index))
        return f"{self.root}/{self._shard_names[int(self._shards[index])]}/{member}"

    def read(self, index: int) -> bytes:
        """The member at `index`; see ImageList."""
        return self._read_with_header(index, int(self._sizes[index]), self._source)

    def check(self, source: RangeSource) -> None:
        """Look at the first image's header in every shard, so that a run does not find out hours later.

        Args:
            source: Of the same shards; one that gives up sooner, perhaps.

        Raises:
            ValueError: If a shard is missing, is another one than the index knows, or cannot be read in ranges.
        """
        shards = self._shards.numpy()
        first = np.full(len(self._shard_names), -1, dtype=np.int64)
        first[shards[::-1]] = np.arange(len(shards) - 1, -1, -1)  # the last to be written is the first of the list
        try:
            with ThreadPoolExecutor(NUM_READERS) as readers:
                for _ in readers.map(
                    lambda index: self._read_with_header(index, 0, source), first[first >= 0].tolist()
                ):
                    pass
        except (ImagesLost, OSError) as error:
            raise ValueError(str(error)) from error

    def _read_with_header(self, index: int, num_bytes: int, source: RangeSource) -> bytes:
        """The first `num_bytes` of a member, if the header in front of it is the one that the index knows."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        shard = int(self._shards[index])
        start = int(self._offsets[index]) - HEADER_BYTES
        shard_name, shard_bytes = self._shard_names[shard], int(self._shard_bytes[shard])
        data = source.read(shard_name, shard_bytes, start, HEADER_BYTES + num_bytes)
        if zlib.crc32(data[:HEADER_BYTES]) != int(self._headers[index]):
            raise ImagesLost(
                f"{self.root}/{shard_name} has changed since its index was made: "
                f"{os.fsdecode(self.relative_name(index))!r} does not begin at byte {int(self._offsets[index]):,}. "
                f"Restore the shard, or make the index again"
            )
        return data[HEADER_BYTES:]


class LocalFolder(threading.local):
    """A RangeSource on a file system; each thread has its own open files.

    Attributes:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        """Opens nothing yet."""
        self.root: Path | str = root
        self._open_files: OrderedDict[str, io.FileIO] = OrderedDict()

    def __reduce__(self) -> tuple[type["LocalFolder"], tuple[Path | str]]:
        return LocalFolder, (self.root,)

    def read(self, shard: str, shard_bytes: int, start: int, num_bytes: int) -> bytes:
        """See RangeSource."""
        data = os.pread(self._file(shard, shard_bytes).fileno(), num_bytes, start)
        if len(data) < num_bytes:
            raise ImagesLost(f"{self.root}/{shard} has become shorter while it was read: restore it")
        return data

    def _file(self, shard: str, shard_bytes: int) -> io.FileIO:
        file = self._open_files.pop(shard, None) or self._opened(shard, shard_bytes)
        self._open_files[shard] = file  # the one that was used last is the last to be closed
        if len(self._open_files) > MAX_OPEN_SHARDS:
            self._open_files.popitem(last=False)[1].close()
        return file

    def _opened(self, shard: str, shard_bytes: int) -> io.FileIO:
        path = Path(self.root, shard)
        try:
            file = io.FileIO(path)
            found_bytes = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise ImagesLost(f"the shard {path} is missing or not readable ({error.strerror}): restore it") from error
        if found_bytes != shard_bytes:
            file.close()
            raise ImagesLost(
                f"{path} has changed since its index was made: it has {found_bytes:,} bytes and had {shard_bytes:,}. "
                f"Copy it again, or make the index again"
            )
        return file


def open_shards(folder: Path) -> ShardList:
    """The images of a folder in which tools/make_shards.py has written its index.

    Raises:
        ValueError: If the index is damaged, or a shard is missing or does not fit it.
    """
    file = folder / INDEX_NAME
    source = LocalFolder(folder)
    images = ShardList(ShardIndex.parse(file.read_bytes(), str(file)), source)
    images.check(source)
    return images


def scan_shards(folder: Path, shard_names: Sequence[bytes]) -> ShardIndex:
    """The index of any plain tars, from their headers.

    Leading "./" is no part of a name. Passed over are members that are no images by their suffix, hidden ones (a part
    of the name begins with a dot), and, with a warning, images that are links or whose names are absolute or have "..".

    Args:
        folder: Of the shards.
        shard_names: Their paths relative to it.

    Raises:
        ValueError: If one is no whole plain tar, or there is no image in any.
    """
    ordered = sorted(shard_names)
    names: list[bytes] = []
    rows: list[NDArray[np.int64]] = []
    unsafe = others = 0
    with ThreadPoolExecutor(NUM_READERS) as readers:
        scans = readers.map(lambda name: _scan(folder / os.fsdecode(name)), ordered)
        for number, scan in enumerate(scans):
            names += scan.names
            rows.append(np.column_stack([np.full(len(scan.names), number), scan.rows]))
            unsafe, others = unsafe + scan.num_unsafe, others + scan.num_others
    if unsafe:
        logger.warning("%s: %s images are passed over: links, or names that are absolute or have ..", folder, unsafe)
    if not names:
        raise ValueError(
            f"no images in the {len(ordered)} tar(s) of {folder}: looked for {', '.join(IMAGE_SUFFIXES)}, found 0 and "
            f"{others + unsafe} other member(s)"
        )
    order = sorted(range(len(names)), key=names.__getitem__)  # stable: what has the same name stays in shard order
    table = np.concatenate(rows)[order]
    return ShardIndex(
        block=as_block(map(names.__getitem__, order)),
        shards=table[:, 0].astype(np.int32),
        offsets=table[:, 1].copy(),
        sizes=table[:, 2].copy(),
        headers=table[:, 3].copy(),
        shard_names=[os.fsdecode(name) for name in ordered],
        shard_bytes=np.array([(folder / os.fsdecode(name)).stat().st_size for name in ordered], dtype=np.int64),
    )


@dataclass(frozen=True)
class _Scan:
    """The images of one tar.

    Attributes:
        names: Of the members, in the order of the tar, length n.
        rows: Their offset, size and header's CRC, int64, shape (n, 3).
        num_unsafe: Images passed over for being links or having odd names.
        num_others: Other members passed over.
    """

    names: list[bytes]
    rows: NDArray[np.int64]
    num_unsafe: int
    num_others: int


def _scan(path: Path) -> _Scan:
    names: list[bytes] = []
    rows: list[tuple[int, int, int]] = []
    unsafe = others = 0
    for member in read_members(path):
        name = member.name
        while name.startswith(b"./"):  # as `tar -c .` writes them
            name = name[2:]
        if not _looks_like_an_image(name):
            others += 1
        elif not (member.is_file and is_safe(name)):
            unsafe += 1
        else:
            names.append(name)
            rows.append((member.offset, member.size, member.header_crc32))
    return _Scan(names, np.array(rows, dtype=np.int64).reshape(-1, 3), unsafe, others)


def _looks_like_an_image(name: bytes) -> bool:
    is_hidden = any(part.startswith(b".") and part != b".." for part in name.split(b"/"))
    return not is_hidden and name.lower().endswith(tuple(suffix.encode() for suffix in IMAGE_SUFFIXES))
