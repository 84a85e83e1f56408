"""Where the images of a pretraining run lie: a folder tree, a flat folder, or a .txt listing.

The list is sorted by the bytes of the relative paths, so that index i is the same image on every machine, and kept as
one block of bytes: a Python list of 1.3 million strings would be copied into every loader worker, page by page, as
reference counts touch it.

Listing a large tree takes longer than reading one file, so lists of `MIN_FILES_TO_CACHE` images and more are cached in
`$DETCO_CACHE` or `~/.cache/detco`, never in the data folder. The cache is keyed by the resolved root, and valid as long
as every folder of the tree (or the listing file) has the modification time it had before it was read: adding, removing
or renaming a file changes that of its folder. Changing a file in place changes no list. A folder touched less than
`MTIME_GRAIN_S` before it was read is too fresh for its time to prove anything, and the list is not cached then.
"""

import hashlib
import logging
import os
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""What counts as an image, in any case of letters."""

ARCHIVE_SUFFIXES = (".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar", ".lmdb", ".parquet", ".rec")
"""What makes an empty folder look like data that has not been unpacked."""

MIN_FILES_TO_CACHE = 10_000
"""Shorter lists are made in a fraction of a second and leave nothing behind."""

MTIME_GRAIN_S = 2.0
"""The coarsest modification times among usual file systems (FAT; NFS and ext3 have 1 s)."""

CACHE_SCHEMA = 1
PROGRESS_EVERY_S = 5.0
MAX_NAMES_IN_MESSAGE = 5


class ImageList:
    """Paths of images, in the order of their bytes, without one Python object per path.

    Both tensors move to shared memory when the list is sent to a loader worker, so all workers of a process read one
    copy, however they were started.

    Attributes:
        root: What the relative paths are relative to: the folder itself, or the folder of the .txt listing.
        digest: sha256 (hex) of the relative paths, each followed by a NUL byte. The same for a moved or copied tree.
    """

    def __init__(self, root: Path, block: NDArray[np.uint8]) -> None:
        """Wrap `block`: the sorted relative (or absolute) paths as bytes, each followed by a NUL byte."""
        if block.size == 0 or block[-1] != 0:
            raise ValueError("a block of paths ends with a NUL byte and holds one path at least")
        self.root = root
        self.digest = hashlib.sha256(block.data).hexdigest()
        self._block = torch.from_numpy(block)
        self._ends = torch.from_numpy(np.flatnonzero(block == 0))

    def __len__(self) -> int:
        return len(self._ends)

    def path(self, index: int) -> Path:
        """The image at `index` in [0, len)."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        start = int(self._ends[index - 1]) + 1 if index else 0
        name = self._block[start : int(self._ends[index])].numpy().tobytes()
        return self.root / os.fsdecode(name)  # an absolute name in a listing replaces the root

    @property
    def block(self) -> NDArray[np.uint8]:
        """The paths as they are stored: bytes, each followed by a NUL byte. Do not write to it."""
        block: NDArray[np.uint8] = self._block.numpy()
        return block


class _Stamp(NamedTuple):
    """A folder or listing that the list was read from, and its modification time before it was read."""

    path: bytes
    mtime_ns: int


class _Found(NamedTuple):
    names: list[bytes]  # unsorted, relative to the root
    stamps: list[_Stamp]


def list_images(root: str | Path, cache_dir: Path | None = None) -> ImageList:
    """All images under `root`, sorted by the bytes of their relative paths.

    A folder is read with all its sub-folders, symbolic links to folders included. Hidden files and folders (names that
    begin with a dot) and files without an image suffix are passed over. A `.txt` file is a listing: one path per line,
    absolute or relative to the listing's folder, any suffix; a path that stands there twice counts twice.

    Args:
        root: Folder or listing.
        cache_dir: Where to keep long lists; by default `$DETCO_CACHE`, else `~/.cache/detco`.

    Raises:
        FileNotFoundError: If `root` or files of the listing are missing.
        ValueError: If `root` is neither folder nor listing, or if there is no image.
    """
    if str(root) == "":
        raise ValueError("no images given: set DATA.ROOT to a folder of images or to a .txt file listing their paths")
    source = Path(root).expanduser().resolve()
    if not source.exists():
        raise FileNotFoundError(f"DATA.ROOT {root} does not exist (looked for {source})")
    if not source.is_dir() and source.suffix.lower() != ".txt":
        raise ValueError(f"DATA.ROOT {root} is neither a folder nor a .txt listing with one path per line")

    cache_file = _cache_file(source, _default_cache_dir() if cache_dir is None else cache_dir)
    images = _read_cache(cache_file, source)
    if images is not None:
        logger.info("%s: %s images, from the list kept in %s", source, f"{len(images):,}", cache_file)
        return images

    started_s = time.time()
    found = _scan_folder(source) if source.is_dir() else _read_listing(source)
    images = ImageList(_list_root(source), _as_block(found.names))
    seconds = time.time() - started_s
    logger.info("%s: %s images, listed in %.1f s", source, f"{len(images):,}", seconds)
    if len(images) >= MIN_FILES_TO_CACHE:
        _write_cache(cache_file, source, images, found.stamps, started_s)
    return images


def _list_root(source: Path) -> Path:
    return source if source.is_dir() else source.parent


def _as_block(names: list[bytes]) -> NDArray[np.uint8]:
    names.sort()
    # bytearray, because torch wants memory that it may write to.
    return np.frombuffer(bytearray(b"\0".join(names) + b"\0"), dtype=np.uint8)


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
    found = _Found([], [])
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
        found.stamps.append(_Stamp(folder, info.st_mtime_ns))
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
                else:
                    other_suffixes[suffix] += 1
        progress.report(len(found.names), f"in {len(found.stamps):,} folders")
    if not found.names:
        raise ValueError(_no_images_message(root, len(found.stamps), other_suffixes))
    return found


def _suffix(name: bytes) -> str:
    return os.fsdecode(name[name.rfind(b".") :]).lower() if b"." in name else ""


def _no_images_message(root: Path, num_folders: int, other_suffixes: Counter[str]) -> str:
    message = (
        f"no images in {root}: looked for {', '.join(IMAGE_SUFFIXES)} in {num_folders} folder(s), "
        f"found 0 and {sum(other_suffixes.values())} other file(s)"
    )
    archives = {suffix: count for suffix, count in other_suffixes.items() if suffix in ARCHIVE_SUFFIXES}
    if archives:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(archives.items()))
        return f"{message}, among them archives ({kinds}): unpack them first"
    return f"{message}; set DATA.ROOT to the folder that holds the images"


def _read_listing(listing: Path) -> _Found:
    stamp = _Stamp(b"", listing.stat().st_mtime_ns)
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
    return _Found(names, [stamp])


def _first_names(names: Sequence[bytes]) -> str:
    shown = ", ".join(repr(os.fsdecode(name)) for name in names[:MAX_NAMES_IN_MESSAGE])
    return shown + (", ..." if len(names) > MAX_NAMES_IN_MESSAGE else "")


def _default_cache_dir() -> Path:
    configured = os.environ.get("DETCO_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "detco"


def _cache_file(source: Path, cache_dir: Path) -> Path:
    key = hashlib.sha256(os.fsencode(source)).hexdigest()[:32]
    return cache_dir / f"images_{key}.npz"


def _write_cache(file: Path, source: Path, images: ImageList, stamps: Sequence[_Stamp], started_s: float) -> None:
    newest_s = max(stamp.mtime_ns for stamp in stamps) / 1e9
    if newest_s > started_s - MTIME_GRAIN_S:
        logger.info("%s changed a moment ago: the list is not kept for the next run", source)
        return
    content: dict[str, NDArray[np.generic]] = {
        "schema": np.array(CACHE_SCHEMA),
        "source": np.array(os.fsencode(source)),
        "digest": np.array(images.digest),
        "block": images.block,
        "stamp_paths": np.frombuffer(b"".join(stamp.path + b"\0" for stamp in stamps), dtype=np.uint8),
        "stamp_mtimes_ns": np.array([stamp.mtime_ns for stamp in stamps], dtype=np.int64),
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=file.stem, suffix=".tmp", delete=False) as handle:
            temporary = Path(handle.name)
            try:
                np.savez(handle, allow_pickle=False, **content)
                handle.close()
                temporary.replace(file)  # other processes see the old list or the new one, never half of it
            except BaseException:
                temporary.unlink()
                raise
    except OSError as error:
        logger.warning("the list of images is not kept for the next run: %s (set DETCO_CACHE to change where)", error)


def _read_cache(file: Path, source: Path) -> ImageList | None:
    """The cached list of `source`, or None if there is none, it is out of date or damaged."""
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as content:
            if int(content["schema"]) != CACHE_SCHEMA or content["source"].item() != os.fsencode(source):
                return None
            paths = content["stamp_paths"].tobytes().split(b"\0")[:-1]
            mtimes_ns = content["stamp_mtimes_ns"].tolist()
            if not _still_true([_Stamp(*pair) for pair in zip(paths, mtimes_ns, strict=True)], source):
                return None
            images = ImageList(_list_root(source), content["block"])
            if images.digest != content["digest"].item():
                raise ValueError("its digest does not fit its paths")
            return images
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("the list of images in %s is damaged (%s): listing again", file, error)
        return None


def _still_true(stamps: Sequence[_Stamp], source: Path) -> bool:
    try:
        return all((source / os.fsdecode(stamp.path)).stat().st_mtime_ns == stamp.mtime_ns for stamp in stamps)
    except (FileNotFoundError, NotADirectoryError):
        return False  # a folder of the tree is gone
