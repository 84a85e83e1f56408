"""Small files that would fill the memory, never end, end the process or change it: all are refused unread."""

import gzip
import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from transfer.pickle_scan import MOST_PARTS, complaint_about
from transfer.safe_read import UnsafeFileError, load_file, load_torch

START = b"\x80\x02"
DTYPE = b"cnumpy\ndtype\nX\x02\0\0\0u1\x85R"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R"


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def archive(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        for name, data in (("data.pkl", content), ("version", b"3\n"), ("byteorder", b"little")):
            opened.writestr(f"archive/{name}", data)
    return file.getvalue()


def legacy(content: bytes) -> bytes:
    info = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    first = b"".join(pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, info))
    return first + content + pickle.dumps([], protocol=2)


# Few enough that a reader without the limit fails the test instead of ending its process or never ending itself.
DEEP = b"K\x01" + b"\x85" * 20_000
DOUBLED = b")" + b"2\x86" * 20
INTERLEAVED = b")q\0" + b"0h\0h\0\x86q\0" * 20
PARTS = {
    "deep": START + b"}" + DEEP + b"Ns.",
    "doubled": START + b"}" + DOUBLED + b"Ns.",
    "through the memo": START + b"}" + INTERLEAVED + b"Ns.",
    "wide": START + b"}(" + b"K\0" * MOST_PARTS + b"tNs.",
    "frozen": b"\x80\x04})" + b"q\x000(h\0h\0\x86\x91" * 20 + b"Ns.",
}
WRAPPED: dict[str, Callable[[bytes], bytes]] = {"in.pkl": bytes, "in.pth": archive, "in.pth.tar": legacy}


@pytest.mark.parametrize("file", list(WRAPPED))
@pytest.mark.parametrize("name", list(PARTS))
def test_a_tuple_of_too_many_parts_is_refused(name: str, file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(WRAPPED[file](PARTS[name]))
    with pytest.raises(
        UnsafeFileError, match=r"in\.p.* is not read, because it holds a tuple of more than 10,000 parts"
    ):
        load_file(tmp_path / file)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_ordinary_content_is_not_complained_of(protocol: int) -> None:
    shared = (1, 2, (3, "x"))
    content = {
        "a": [shared] * 5000,
        shared: frozenset({shared}),
        "b": np.ones((2, 3)),
        "c": {1, 2},
        "d": (shared, shared),
    }
    content |= {f"name {index}": (index, [index]) for index in range(5000)}
    assert complaint_about(io.BytesIO(pickle.dumps(content, protocol=protocol))) is None


def test_numbers_of_objects_may_begin_at_one_but_have_no_gaps() -> None:
    assert complaint_about(io.BytesIO(START + b"]q\x01]q\x02\x86.")) is None
    assert complaint_about(io.BytesIO(START + b"]q\0]q\x03\x86.")) == "it numbers an object 3, after 1 others"


def test_a_number_of_an_object_is_bound_by_the_objects_and_not_by_the_size(tmp_path: Path) -> None:
    with (tmp_path / "in.pkl").open("wb") as file:
        file.write(START + b"}r" + struct.pack("<I", 190_000_000) + b".")
        file.truncate(200_000_000)  # Sparse: it takes no room on the disk.
    with pytest.raises(UnsafeFileError, match="numbers an object 190,000,000, after 0 others"):
        load_file(tmp_path / "in.pkl")


NOT_PLAIN = {
    "an array of a number of bytes": (
        ARRAY + b"(K\x01" + number(60_000_000) + b"\x85" + DTYPE + b"I00\n" + number(60_000_000) + b"tb.",
        "array with another content than bytes",
    ),
    "a type of tuples": (b"cnumpy\ndtype\n)" + b"2\x86" * 12 + b"\x85R.", "an array of tuple"),
    "an encoding of tuples": (b"c_codecs\nencode\nX\x01\0\0\0a)" + b"2\x86" * 12 + b"\x86R.", "encodes text as tuple"),
}


@pytest.mark.parametrize("name", list(NOT_PLAIN))
def test_what_only_looks_like_an_array_is_refused(name: str, tmp_path: Path) -> None:
    content, message = NOT_PLAIN[name]
    (tmp_path / "in.pkl").write_bytes(START + content)
    with pytest.raises(UnsafeFileError, match=f"because it .*{message}"):
        load_file(tmp_path / "in.pkl")


FUNCTIONS = ("torch._utils\n_rebuild_tensor_v2", "numpy.core.multiarray\n_reconstruct", "builtins\nbytes")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_file_that_changes_a_function_is_refused_and_changes_none(function: str, tmp_path: Path) -> None:
    content = START + b"c" + function.encode() + b"\nN}X\x0c\0\0\0__defaults__)s\x86b."
    (tmp_path / "in.pkl").write_bytes(content)
    before = torch._utils._rebuild_tensor_v2.__defaults__
    with pytest.raises(UnsafeFileError, match="it changes a function"):
        load_file(tmp_path / "in.pkl")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before
    torch.save({"a": torch.ones(2)}, tmp_path / "good.pth")
    assert torch.equal(load_file(tmp_path / "good.pth")["a"], torch.ones(2))


@pytest.mark.parametrize("file", ["in.pth", "in.pkl", "in"])
def test_a_compressed_archive_is_refused_without_being_unpacked(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 50_000_000
    (tmp_path / file).write_bytes(gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(50_000_000), 1))

    def unpack(*arguments: object, **options: object) -> None:
        raise AssertionError("it was unpacked")

    monkeypatch.setattr(gzip.GzipFile, "read", unpack)
    with pytest.raises(UnsafeFileError, match="Copy or download it again"):
        load_file(tmp_path / file)
    with pytest.raises(UnsafeFileError, match=r"was not written by torch\.save"):
        load_torch(tmp_path / file)


def test_a_legacy_file_that_ends_as_an_archive_is_looked_through_like_any(tmp_path: Path) -> None:
    (tmp_path / "in.pth").write_bytes(legacy(PARTS["doubled"]) + archive(pickle.dumps({}, protocol=2)))
    assert zipfile.is_zipfile(tmp_path / "in.pth")
    with pytest.raises(UnsafeFileError, match="tuple of more than 10,000 parts"):
        load_torch(tmp_path / "in.pth")
