"""Where the members of a plain tar lie, from its headers alone.

Read with Python's own tarfile, so that every dialect is understood (ustar, PAX, GNU). A tar that ends before its end
mark, or has rubbish where a header should be, is refused: tarfile would take it for a shorter one.
"""

import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HEADER_BYTES = 512

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PK\x03\x04": "zip",
}
"""The first bytes of what people call .tar and is not."""


class Member(NamedTuple):
    """One member of a tar.

    Attributes:
        name: As it stands there.
        offset: Of its first byte; its (last) header is the `HEADER_BYTES` before it.
        size: In bytes.
        header_crc32: Of these.
        is_file: Whether it is a file with bytes of its own: no folder, link or device.
    """

    name: bytes
    offset: int
    size: int
    header_crc32: int
    is_file: bool


def is_safe(name: bytes) -> bool:
    """Whether a name stays below the folder that it is relative to."""
    return bool(name) and not name.startswith(b"/") and b".." not in name.split(b"/")


def read_members(path: Path) -> Iterator[Member]:
    """The members of a tar in their order.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is compressed, no tar, damaged or cut short. Members before the damage have been yielded.
    """
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES)
        _refuse_what_is_no_tar(path, start)
        file.seek(0)
        end = 0
        if any(start):  # else a tar without members, which tarfile reads too but some versions refuse
            try:
                with tarfile.TarFile(fileobj=file, mode="r", encoding="utf-8", errors="surrogateescape") as tar:
                    while (info := tar.next()) is not None:
                        tar.members = []  # type: ignore[attr-defined]  # it remembers all; absent from the stubs
                        yield _member(info, os.pread(file.fileno(), HEADER_BYTES, info.offset_data - HEADER_BYTES))
                    end = tar.offset
            except tarfile.TarError as error:
                raise _damaged(path, f"{error}") from error
        file.seek(end)
        # tarfile stops at the end mark, but also without a word at a header that it cannot read.
        mark = file.read(HEADER_BYTES)
        if len(mark) < HEADER_BYTES or any(mark):
            raise _damaged(path, f"no header and no end mark at byte {end:,}")


def _member(info: tarfile.TarInfo, header: bytes) -> Member:
    is_file = info.isreg() and not info.issparse()
    return Member(
        info.name.encode("utf-8", "surrogateescape"), info.offset_data, info.size, zlib.crc32(header), is_file
    )


def _refuse_what_is_no_tar(path: Path, start: bytes) -> None:
    for magic, kind in _COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(
                f"{path} is compressed ({kind}), so no image in it can be read without all before it: make it a plain "
                f".tar"
            )
    if len(start) < HEADER_BYTES:
        raise _damaged(path, f"it has {len(start)} bytes")


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is no whole tar ({reason}): it is damaged or was cut short. Copy or make it again")
