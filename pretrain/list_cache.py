"""Long lists of images, kept from one run to the next.

Making a list takes longer than reading one file, so it is kept in `$DETCO_CACHE` or `~/.cache/detco`, never in the data
folder. The file is keyed by the resolved source, and valid as long as everything that the list was read from has the
modification time it had before it was read: a folder's changes when a file is added, removed or renamed. What was
touched less than `MTIME_GRAIN_S` before is too fresh for its time to prove anything, and the list is not kept then.
"""

import hashlib
import logging
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

MTIME_GRAIN_S = 2.0
"""The coarsest modification times among usual file systems (FAT; NFS and ext3 have 1 s)."""

SCHEMA = 2

Columns = Mapping[str, NDArray[np.generic]]
"""Named arrays."""


class Stamp(NamedTuple):
    """What a list was read from (relative to its source), and its modification time before it was read."""

    path: bytes
    mtime_ns: int


class ListCache:
    """Where the list of one source is kept.

    Attributes:
        file: Whether or not it is there.
    """

    def __init__(self, source: Path, folder: Path | None) -> None:
        """For a resolved source, in `folder` or by default `$DETCO_CACHE`, else `~/.cache/detco`."""
        self._source = source
        key = hashlib.sha256(os.fsencode(source)).hexdigest()[:32]
        self.file = (_default_folder() if folder is None else folder) / f"images_{key}.npz"

    def read(self) -> Columns | None:
        """What was kept, or None if there is nothing, it is out of date or damaged."""
        if not self.file.is_file():
            return None
        try:
            with np.load(self.file, allow_pickle=False) as content:
                if int(content["schema"]) != SCHEMA or content["source"].item() != os.fsencode(self._source):
                    return None
                paths = content["stamp_paths"].tobytes().split(b"\0")[:-1]
                mtimes_ns = content["stamp_mtimes_ns"].tolist()
                if not self._is_still_true([Stamp(*pair) for pair in zip(paths, mtimes_ns, strict=True)]):
                    return None
                # A zip file has a checksum of each of its members, which reading compares.
                return {name: content[name] for name in content.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("the list of images in %s is damaged (%s): listing again", self.file, error)
            return None

    def write(self, columns: Columns, stamps: Sequence[Stamp], started_s: float) -> None:
        """Keep the columns of a list; a failure is a warning only.

        Args:
            columns: The list.
            stamps: What it was read from.
            started_s: When reading began, as `time.time()`.
        """
        newest_s = max(stamp.mtime_ns for stamp in stamps) / 1e9
        if newest_s > started_s - MTIME_GRAIN_S:
            logger.info("%s changed a moment ago: the list is not kept for the next run", self._source)
            return
        content: dict[str, NDArray[np.generic]] = {
            "schema": np.array(SCHEMA),
            "source": np.array(os.fsencode(self._source)),
            "stamp_paths": np.frombuffer(b"".join(stamp.path + b"\0" for stamp in stamps), dtype=np.uint8),
            "stamp_mtimes_ns": np.array([stamp.mtime_ns for stamp in stamps], dtype=np.int64),
            **columns,
        }
        try:
            self._replace(content)
        except OSError as error:
            logger.warning(
                "the list of images is not kept for the next run: %s (set DETCO_CACHE to change where)", error
            )

    def _replace(self, content: Columns) -> None:
        folder, stem = self.file.parent, self.file.stem
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=stem, suffix=".tmp", delete=False) as handle:
            temporary = Path(handle.name)
            try:
                np.savez(handle, allow_pickle=False, **content)
                handle.close()
                temporary.replace(self.file)  # other processes see the old list or the new one, never half of it
            except BaseException:
                temporary.unlink()
                raise

    def _is_still_true(self, stamps: Sequence[Stamp]) -> bool:
        try:
            return all(
                (self._source / os.fsdecode(stamp.path)).stat().st_mtime_ns == stamp.mtime_ns for stamp in stamps
            )
        except (FileNotFoundError, NotADirectoryError):
            return False  # a folder of the tree is gone


def _default_folder() -> Path:
    configured = os.environ.get("DETCO_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "detco"
