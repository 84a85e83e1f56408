"""Packing images into tar shards, with the index that makes them a list of images again.

    <folder>/shards.json            what is packed here; something else is refused
    <folder>/shard-000012.tar       images [12 * n, 13 * n) of the list
    <folder>/image_index.npz        all of them; written last

Every file appears under its name only when it is complete, and its bytes are a function of names and images alone: no
times, owners or permissions are kept. So an interruption costs no more than the shards that were not complete.
"""

import json
import logging
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detco.artifact import open_atomically
from pretrain.image_list import ImageList, ImagesLost
from pretrain.proposals.progress import Progress
from pretrain.shards import INDEX_NAME, NUM_READERS, ShardIndex, open_shards
from pretrain.tar_members import HEADER_BYTES, is_safe, read_members

logger = logging.getLogger(__name__)

RECORD_NAME = "shards.json"
RECORD_SCHEMA = 1

IMAGES_AT_ONCE = 64
"""How many images are read ahead and held in memory."""

RECORD_BYTES = 20 * HEADER_BYTES
"""A tar's length is a multiple of this, by tradition."""

MAX_NAMES_IN_MESSAGE = 5


class PackError(RuntimeError):
    """Packing cannot go on; the shards that are complete are kept. The message says what to do."""


def pack(images: ImageList, folder: Path, images_per_shard: int) -> ImageList:
    """Pack the images in their order, or go on where an earlier call ended; return the list of the packed ones.

    Args:
        images: From wherever they lie.
        folder: For the shards; made if need be.
        images_per_shard: At least 1; the last shard has what is left.

    Raises:
        ValueError: Before any work: a name leaves the folder, the folder holds something else or cannot be written to.
        PackError: If an image cannot be read, or a shard not be written.
    """
    if images_per_shard < 1:
        raise ValueError(f"--shard-size is {images_per_shard}; a shard must have at least 1 image")
    _refuse_names(images)
    _claim(images, folder, images_per_shard)
    starts = range(0, len(images), images_per_shard)
    stretches = [range(start, min(start + images_per_shard, len(images))) for start in starts]
    files = [folder / f"shard-{number:06d}.tar" for number in range(len(stretches))]
    places = [_place_in(file, images, stretch) for file, stretch in zip(files, stretches, strict=True)]
    missing = [number for number, place in enumerate(places) if place is None]
    if len(missing) < len(files):
        logger.info("%s: %s of %s shards are complete", folder, f"{len(files) - len(missing):,}", f"{len(files):,}")
    progress = Progress("shards", sum(len(stretches[number]) for number in missing))
    try:
        for number in missing:
            places[number] = _write_shard(files[number], images, stretches[number], progress)
        _write_index(folder, images, files, [place for place in places if place is not None])
    except OSError as error:
        raise PackError(
            f"cannot write to {folder}: {error}. What is complete is kept: the same command goes on"
        ) from error
    for partial in folder.glob(".*.partial"):  # of calls that were killed
        partial.unlink(missing_ok=True)
    return open_shards(folder)


def _refuse_names(images: ImageList) -> None:
    """A member must have the name that stands in the list, or the digest would be another; and lie below its folder."""
    bad = [name for index in range(len(images)) if not is_safe(name := images.relative_name(index))]
    if bad:
        shown = ", ".join(repr(os.fsdecode(name)) for name in bad[:MAX_NAMES_IN_MESSAGE])
        raise ValueError(
            f"{len(bad):,} of the {len(images):,} names in {images.root} are absolute or have '..': {shown}. Names in "
            f"a tar are relative: put the listing into the folder that its paths begin at"
        )


def _claim(images: ImageList, folder: Path, images_per_shard: int) -> None:
    """Make sure that this folder can be written to, and is for these images and shards."""
    record = {
        "schema": RECORD_SCHEMA,
        "images": {"digest": images.digest, "count": len(images)},
        "images_per_shard": images_per_shard,
    }
    claim = folder / RECORD_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not claim.exists():
            # Images too: beside an index, they would be seen no more.
            foreign = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
            if foreign:
                raise ValueError(f"{folder} holds {foreign[0]}, which was not made here; choose another folder")
            with open_atomically(claim) as file:
                file.write(json.dumps(record, indent=2, sort_keys=True).encode() + b"\n")
        content = claim.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    try:
        claimed = json.loads(content)
        there = _in_words(claimed)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{claim} is damaged ({type(error).__name__}: {error}); remove {folder} and start again"
        ) from error
    if claimed != record:
        raise ValueError(
            f"{folder} holds shards of other images, or of another size: {there}, and here are {_in_words(record)}. "
            f"Ask for the same, choose another folder, or remove this one"
        )


def _in_words(record: Mapping[str, Any]) -> str:
    images = record["images"]
    return (
        f"{images['count']:,} images (digest {images['digest'][:12]}) in shards of {record['images_per_shard']:,}, "
        f"version {record['schema']}"
    )


def _place_in(file: Path, images: ImageList, stretch: range) -> NDArray[np.int64] | None:
    """Offset, size and header's CRC of each image in a complete shard, shape (n, 3); None if it is to be made."""
    if not file.is_file():
        return None
    try:
        members = list(read_members(file))
        if [member.name for member in members] != [images.relative_name(index) for index in stretch]:
            raise ValueError(f"{file} has other members than it should")
    except ValueError as error:
        logger.warning("%s: it is made again", error)
        return None
    return np.array([(member.offset, member.size, member.header_crc32) for member in members], dtype=np.int64)


def _write_shard(file: Path, images: ImageList, stretch: range, progress: Progress) -> NDArray[np.int64]:
    """Make a shard; its places as `_place_in` gives them."""
    rows = []
    with open_atomically(file) as stream:
        position = 0
        for index, data in _read_ahead(images, stretch):
            headers = _headers(images.relative_name(index), len(data))
            position += len(headers)
            rows.append((position, len(data), zlib.crc32(headers[-HEADER_BYTES:])))
            padding = bytes(-len(data) % HEADER_BYTES)
            position += len(data) + len(padding)
            stream.write(headers + data + padding)
            progress.count()
        end_mark = 2 * HEADER_BYTES
        stream.write(bytes(end_mark + -(position + end_mark) % RECORD_BYTES))
    return np.array(rows, dtype=np.int64)


def _headers(name: bytes, size: int) -> bytes:
    info = tarfile.TarInfo(os.fsdecode(name))
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _read_ahead(images: ImageList, stretch: range) -> Iterator[tuple[int, bytes]]:
    """(index, file) of each image in order; threads, because they wait for the disk or the network."""

    def read(index: int) -> bytes:
        try:
            return images.read(index)
        except (OSError, ImagesLost) as error:
            raise PackError(
                f"cannot read {images.name(index)}: {error}. Repair or remove it; without it, it is another list, for "
                f"another folder. What is complete is kept"
            ) from error

    with ThreadPoolExecutor(NUM_READERS) as readers:
        for start in range(stretch.start, stretch.stop, IMAGES_AT_ONCE):
            some = range(start, min(start + IMAGES_AT_ONCE, stretch.stop))
            yield from zip(some, readers.map(read, some), strict=True)


def _write_index(folder: Path, images: ImageList, files: Sequence[Path], places: Sequence[NDArray[np.int64]]) -> None:
    table = np.concatenate(places)
    index = ShardIndex(
        block=images.block,
        shards=np.repeat(np.arange(len(files), dtype=np.int32), [len(place) for place in places]),
        offsets=table[:, 0],
        sizes=table[:, 1],
        headers=table[:, 2],
        shard_names=[file.name for file in files],
        shard_bytes=np.array([file.stat().st_size for file in files], dtype=np.int64),
    )
    with open_atomically(folder / INDEX_NAME) as stream:
        np.savez(stream, allow_pickle=False, **index.as_columns())
