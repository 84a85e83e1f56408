"""Where the images of a pretraining run lie: a folder tree, a flat folder, a .txt listing, or tar shards.

Shards are a folder of plain tars, with the index of tools/make_shards.py or without, or an http(s) address of such an
index. Without one they are listed from their headers, once. What takes long to list is kept, see list_cache.py.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.image_list import IMAGE_SUFFIXES, ImageList, ImagesLost, as_block
from pretrain.list_cache import Columns, ListCache, Stamp
from pretrain.remote_shards import is_address, open_remote_shards
from pretrain.shards import INDEX_NAME, LocalFolder, ShardIndex, ShardList, open_shards, scan_shards

__all__ = ["ImageFiles", "ImageList", "ImagesLost", "list_images"]

logger = logging.getLogger(__name__)

ARCHIVE_SUFFIXES = (".tgz", ".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar", ".lmdb", ".parquet", ".rec")
"""What makes an empty folder look like data that has not been unpacked."""

MIN_FILES_TO_CACHE = 10_000
"""Shorter lists are made in a fraction of a second and leave nothing behind."""

PROGRESS_EVERY_S = 5.0
MAX_NAMES_IN_MESSAGE = 5


class ImageFiles(ImageList):
    """Images that are files of their own, named by their paths."""

    def __init__(self, root: Path, block: NDArray[np.uint8]) -> None:
        """List the files of `block`, relative (or absolute) paths, in `root`: the folder, or that of the listing."""
        super().__init__(root, block)
        self._folder = root

    def path(self, index: int) -> Path:
        """The image at `index` in [0, len)."""
        # An absolute name in a listing replaces the root.
        return self._folder / os.fsdecode(self.relative_name(index))

    def name(self, index: int) -> str:
        """Its path."""
        return str(self.path(index))

    def read(self, index: int) -> bytes:
        """The whole file; raises OSError if it cannot be read."""
        return self.path(index).read_bytes()


class _Found(NamedTuple):
    """What there is in a place: names relative to it, unsorted, and the stamps of what they were read from."""

    names: list[bytes]
    tars: list[bytes]
    stamps: list[Stamp]


def list_images(root: str | Path, cache_dir: Path | None = None) -> ImageList:
    """All images under `root`, sorted by the bytes of their relative names.

    A folder is read with all its sub-folders, symbolic links to folders included. Hidden files and folders (names that
    begin with a dot) and files without an image suffix are passed over. A `.txt` file is a listing: one path per line,
    absolute or relative to the listing's folder, any suffix; a path that stands there twice counts twice. A folder of
    `.tar` files and no images, or with an index of tools/make_shards.py, is one of shards; its images are the members.

    Args:
        root: Folder, listing, or http(s) address of an index of shards.
        cache_dir: Where to keep long lists; by default `$DETCO_CACHE`, else `~/.cache/detco`.

    Raises:
        FileNotFoundError: If `root` or files of the listing are missing.
        ValueError: If `root` is neither of these, if there is no image, or if shards are damaged or do not fit their
            index.
    """
    if str(root) == "":
        raise ValueError("no images given: set DATA.ROOT to a folder of images or to a .txt file listing their paths")
    started_s = time.time()
    if is_address(str(root)):
        return _announced(open_remote_shards(str(root)), started_s)
    source = Path(root).expanduser().resolve()
    if "://" in str(root):
        raise ValueError(f"DATA.ROOT {root} is an address, of which only http:// and https:// can be read")
    if not source.exists():
        raise FileNotFoundError(f"DATA.ROOT {root} does not exist (looked for {source})")
    if not source.is_dir() and source.suffix.lower() != ".txt":
        of_shards = source.suffix.lower() == ".tar" or source.name == INDEX_NAME
        raise ValueError(
            f"DATA.ROOT {root} is neither a folder (of images or of .tar files) nor a .txt listing with one path per "
            f"line{f'; name the folder that it lies in, {source.parent}' if of_shards else ''}"
        )
    if (source / INDEX_NAME).is_file():
        return _announced(open_shards(source), started_s)

    cache = ListCache(source, cache_dir)
    columns = cache.read()
    if columns is not None:
        images = _from_columns(source, columns)
        logger.info("%s: %s images, from the list kept in %s", source, f"{len(images):,}", cache.file)
        return images
    found = _scan_folder(source) if source.is_dir() else _read_listing(source)
    of_files = {"block": as_block(sorted(found.names))} if found.names else None
    columns = of_files or scan_shards(source, found.tars).as_columns()
    images = _announced(_from_columns(source, columns), started_s)
    if len(images) >= MIN_FILES_TO_CACHE:
        cache.write(columns, found.stamps, started_s)
    return images


def _announced(images: ImageList, started_s: float) -> ImageList:
    logger.info("%s: %s images, listed in %.1f s", images.root, f"{len(images):,}", time.time() - started_s)
    return images


def _from_columns(source: Path, columns: Columns) -> ImageList:
    """The list of a source whose columns have been made or kept."""
    if "shards" in columns:
        return ShardList(ShardIndex.from_columns(columns), LocalFolder(source))
    return ImageFiles(source if source.is_dir() else source.parent, columns["block"].astype(np.uint8, copy=False))


class _Progress:
    """Says every few seconds how far a long listing is."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self._last_s = time.monotonic()

    def report(self, num_images: int, what: str) -> None:
        now_s = time.monotonic()
        if now_s - self._last_s >= PROGRESS_EVERY_S:
            self._last_s = now_s
            logger.info("%s: %s images %s so far", self._source, f"{num_images:,}", what)


def _scan_folder(root: Path) -> _Found:
    found = _Found([], [], [])
    other_suffixes: Counter[str] = Counter()
    progress = _Progress(root)
    pending: list[tuple[bytes, frozenset[tuple[int, int]]]] = [(b"", frozenset())]
    while pending:
        folder, ancestors = pending.pop()
        path = root / os.fsdecode(folder)
        info = path.stat()
        if (info.st_dev, info.st_ino) in ancestors:
            continue  # a symbolic link to a folder that contains it
        # The time is taken before the names, so that a file added in between makes the cached list invalid.
        found.stamps.append(Stamp(folder, info.st_mtime_ns))
        prefix = folder + b"/" if folder else b""
        with os.scandir(os.fsencode(path)) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                suffix = _suffix(entry.name)
                if entry.is_dir():
                    pending.append((prefix + entry.name, ancestors | {(info.st_dev, info.st_ino)}))
                elif suffix in IMAGE_SUFFIXES:
                    found.names.append(prefix + entry.name)
                elif suffix == ".tar":
                    found.tars.append(prefix + entry.name)
                    found.stamps.append(Stamp(prefix + entry.name, entry.stat().st_mtime_ns))
                else:
                    other_suffixes[suffix] += 1
        progress.report(len(found.names), f"in {len(found.stamps):,} folders")
    archives = _archives(other_suffixes)
    if not found.names and (archives or not found.tars):
        raise ValueError(_no_images_message(root, len(found.stamps) - len(found.tars), len(found.tars), other_suffixes))
    if found.names and found.tars:
        logger.warning("%s: %s .tar file(s) beside the images are passed over", root, f"{len(found.tars):,}")
    return found


def _archives(suffixes: Counter[str]) -> str:
    """How many archives there are of each kind, as text."""
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(suffixes.items()) if suffix in ARCHIVE_SUFFIXES)


def _suffix(name: bytes) -> str:
    return os.fsdecode(name[name.rfind(b".") :]).lower() if b"." in name else ""


def _no_images_message(root: Path, num_folders: int, num_tars: int, other_suffixes: Counter[str]) -> str:
    message = (
        f"no images in {root}: looked for {', '.join(IMAGE_SUFFIXES)} in {num_folders} folder(s), "
        f"found 0 and {num_tars + sum(other_suffixes.values())} other file(s)"
    )
    archives = _archives(other_suffixes)
    if archives and num_tars:
        return (
            f"{message}, among them archives ({archives}) beside {num_tars} .tar: uncompress these, or take them away"
        )
    if archives:
        return f"{message}, among them archives ({archives}): unpack them first (plain .tar files can stay as they are)"
    return f"{message}; set DATA.ROOT to the folder that holds the images"


def _read_listing(listing: Path) -> _Found:
    stamp = Stamp(b"", listing.stat().st_mtime_ns)
    lines = listing.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")  # some editors begin with a UTF-8 mark
    names = [name for line in lines if (name := line.rstrip(b"\r"))]
    if not names:
        raise ValueError(f"no images in {listing}: looked for one path per line, found 0 lines with text")
    folder = os.fsencode(listing.parent) + b"/"
    progress = _Progress(listing)
    missing: list[bytes] = []
    for position, name in enumerate(names):
        if not os.access(name if name.startswith(b"/") else folder + name, os.R_OK):
            missing.append(name)
        progress.report(position, "checked")
    if missing:
        raise FileNotFoundError(
            f"{len(missing):,} of the {len(names):,} files in {listing} are missing or not readable: "
            f"{_first_names(missing)}. A listing has one path per line and nothing else, absolute or relative to "
            f"{listing.parent}"
        )
    return _Found(names, [], [stamp])


def _first_names(names: Sequence[bytes]) -> str:
    shown = ", ".join(repr(os.fsdecode(name)) for name in names[:MAX_NAMES_IN_MESSAGE])
    return shown + (", ..." if len(names) > MAX_NAMES_IN_MESSAGE else "")
