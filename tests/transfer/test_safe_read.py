"""Hostile and damaged files, as plain pickles and in both formats of torch.save: none executes, each is refused.

Every hostile payload makes the folder `witness` under a careless reader, and each test shows that it does.
"""

import argparse
import contextlib
import copyreg
import functools
import importlib
import io
import marshal
import operator
import os
import pickle
import runpy
import subprocess
import tarfile
import time
import timeit
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.collect_env
from numpy.testing._private.utils import runstring
from torch import hub

from transfer.safe_read import Inert, UnsafeFileError, load_file, load_pickle, load_torch
from transfer.sources import read_source


class Call:
    """Pickles as a call of `function`, which may itself be a Call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.result: tuple[Any, ...] = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.result

    def __call__(self) -> None:
        """Only so that pickle takes it for a function."""


class Trap:
    """Takes the bait when its state is set."""

    def __setstate__(self, state: dict[str, str]) -> None:
        os.mkdir(state["witness"])  # noqa: PTH102 (so is the bait of the others)

    def __getstate__(self) -> dict[str, str]:
        return {"witness": self.bait}

    bait = ""


def trap(witness: str) -> Trap:
    made = Trap()
    made.bait = witness
    return made


def saved(content: Any, protocol: int = 2) -> bytes:
    return pickle.dumps(content, protocol=protocol)


def mkdir(witness: str) -> Call:
    return Call(os.mkdir, witness)


def code(witness: str) -> str:
    return f"import os; os.mkdir({witness!r})"


def in_file(witness: str, content: str | bytes, name: str) -> str:
    """Return the path of a file beside the witness."""
    path = Path(witness).with_name(name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def object_array(element: Any) -> Any:
    array = np.empty(1, dtype=object)
    array[0] = element
    return array


def hostile_npy(witness: str) -> bytes:
    file = io.BytesIO()
    np.save(file, object_array(mkdir(witness)), allow_pickle=True)
    return file.getvalue()


def hostile_options(witness: str) -> argparse.Namespace:
    return argparse.Namespace(lr=0.1, hook=mkdir(witness))


def dict_with_state(witness: str) -> Call:
    call = Call(OrderedDict)
    call.result = (OrderedDict, (), {"hook": mkdir(witness)})
    return call


def legacy_torch(content: bytes) -> bytes:
    """The file of torch.save before 1.6: three pickles of its own, the content, the keys of the storages."""
    info = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    return saved(0x1950A86A20F9469CFC6C) + saved(1001) + saved(info) + content + saved([])


def torch_archive(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in (("data.pkl", content), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"archive/{name}", data)
    return file.getvalue()


# Name -> the pickle, made from the path of the witness.
HOSTILE: dict[str, Callable[[str], bytes]] = {
    "os.system": lambda witness: saved(Call(os.system, f"mkdir {witness}")),
    "posix.mkdir": lambda witness: saved(mkdir(witness)),
    "every protocol, 0": lambda witness: saved(mkdir(witness), 0),
    "every protocol, 5": lambda witness: saved(mkdir(witness), 5),
    "eval": lambda witness: saved(Call(eval, f"__import__('os').mkdir({witness!r})")),
    "exec": lambda witness: saved(Call(exec, code(witness))),
    "chain of getattr": lambda witness: saved(Call(Call(getattr, Call(__import__, "os"), "mkdir"), witness)),
    "importlib": lambda witness: saved(Call(Call(getattr, Call(importlib.import_module, "os"), "mkdir"), witness)),
    "subprocess": lambda witness: saved(Call(subprocess.check_call, ["mkdir", witness])),
    "runpy": lambda witness: saved(Call(runpy.run_path, in_file(witness, code(witness), "program.py"))),
    "timeit": lambda witness: saved(Call(timeit.timeit, code(witness), "pass", time.perf_counter, 1)),
    "functools.partial": lambda witness: saved(Call(functools.partial(os.mkdir, witness))),
    "operator.methodcaller": lambda witness: saved(Call(operator.methodcaller("mkdir"), Path(witness))),
    "method of an allowed class's module": lambda witness: saved(Call(Path.mkdir, Path(witness)), 4),
    "code object": lambda witness: saved(
        Call(exec, Call(marshal.loads, marshal.dumps(compile(code(witness), "x", "exec"))))
    ),
    "numpy.load": lambda witness: saved(Call(np.load, in_file(witness, hostile_npy(witness), "array.npy"), None, True)),
    "numpy.testing": lambda witness: saved(Call(runstring, code(witness), {})),
    "array of objects": lambda witness: saved({"state_dict": {"a": object_array(mkdir(witness))}}),
    "torch.hub": lambda witness: saved(
        Call(hub._import_module, "program", in_file(witness, code(witness), "program.py"))
    ),
    "torch.utils": lambda witness: saved(Call(torch.utils.collect_env.run, f"mkdir {witness}")),
    "torch file in a storage": lambda witness: saved(
        Call(torch.storage._load_from_bytes, legacy_torch(saved(mkdir(witness))))
    ),
    "in a state dict": lambda witness: saved({"state_dict": OrderedDict(a=1, b=[mkdir(witness)])}),
    "in an option": lambda witness: saved({"opt": hostile_options(witness), "model": {}}),
    "in a dict's attributes": lambda witness: saved(dict_with_state(witness)),
    "as a key": lambda witness: b"\x80\x02}" + saved(mkdir(witness))[2:-1] + b"Ns.",
    "__setstate__": lambda witness: saved(trap(witness)),
    "instruction INST": lambda witness: f"(S'{witness}'\nios\nmkdir\n.".encode(),
    "instruction OBJ": lambda witness: f"(cos\nmkdir\nS'{witness}'\no.".encode(),
    "instruction EXT": lambda witness: b"\x80\x02\x82\xf0" + saved((witness,))[2:-1] + b"R.",
}
WRAPPED: dict[str, Callable[[bytes], bytes]] = {
    "in.pkl": bytes,
    "in.pth": torch_archive,
    "in.pth.tar": legacy_torch,
    "zip.pkl": torch_archive,
    "plain.pth": bytes,
}


@pytest.fixture
def mkdir_is_an_extension() -> Iterator[None]:
    """What EXT1 0xF0 stands for, until the test ends."""
    copyreg.add_extension("os", "mkdir", 0xF0)
    yield
    copyreg.remove_extension("os", "mkdir", 0xF0)
    copyreg.clear_extension_cache()


@pytest.mark.usefixtures("mkdir_is_an_extension")
@pytest.mark.parametrize("file", list(WRAPPED))
@pytest.mark.parametrize("payload", list(HOSTILE))
def test_a_hostile_file_executes_nothing_and_is_refused(payload: str, file: str, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    content = HOSTILE[payload](str(witness))
    path = tmp_path / file
    path.write_bytes(WRAPPED[file](content))
    with pytest.raises(UnsafeFileError, match=f"^{path} "):
        load_file(path)
    assert not witness.exists()
    with contextlib.suppress(Exception):  # Some fail after the deed.
        pickle.loads(content)
    assert witness.exists(), "the file was not hostile, so the test shows nothing"


def test_more_than_twenty_payloads_are_tried() -> None:
    assert len(HOSTILE) >= 20


@pytest.mark.parametrize("file", ["in.pkl", "in.pth", "in.pth.tar"])
def test_the_refusal_names_what_the_file_needs(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(WRAPPED[file](saved({"a": mkdir(str(tmp_path / "witness"))})))
    with pytest.raises(UnsafeFileError, match=r"needs posix\.mkdir: .*If you trust its author") as error:
        load_file(tmp_path / file)
    assert error.value.needs == "posix.mkdir"


NUMPY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
DTYPE_OF_OBJECTS = b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR"
STRUCTURE = b"cnumpy\ndtype\n(S'f8'\nI0\nI1\ntR(I3\nS'<'\nNI5\nNI-1\nI-1\nI0\ntb"
REFUSED: dict[str, tuple[bytes, str]] = {
    "class of __main__": (b"c__main__\nTrap\n)R.", r"needs __main__\.Trap"),
    "raw pointers as objects": (NUMPY + b"(I1\n(I1\nt" + DTYPE_OF_OBJECTS + b"I00\nS'12345678'\ntb.", "array of 'O8'"),
    "structured numbers": (STRUCTURE + b".", "array of structures"),
    "array of a made-up size": (b"cnumpy\nndarray\n(I9999999\ntR.", "another way than numpy writes"),
    "another encoding": (b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.", "encodes text as 'rot13'"),
    "persistent identifier": (b"Pname\n.", "not a complete pickle"),
    "huge memo": (b"\x80\x02}r\xff\xff\xff\x7f.", r"numbers an object 2,147,483,647, after 0 others"),
    "zip in a storage": (
        saved(Call(torch.storage._load_from_bytes, torch_archive(saved({})))),
        "storage in another format",
    ),
    "nothing": (b"", "not a complete pickle"),
    "text": (b"<html>not found</html>", "not a complete pickle"),
    "no end": (saved({"a": "b" * 99})[:-30], "not a complete pickle"),
    "reduce of a number": (b"\x80\x02K\x01)R.", "not a complete pickle"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_pickle_that_is_damaged_or_not_plain_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    (tmp_path / "in.pkl").write_bytes(content)
    with pytest.raises(UnsafeFileError, match=message):
        load_pickle(tmp_path / "in.pkl")


def test_an_archive_that_claims_more_than_it_has_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", saved({}))
        archive.writestr("archive/data/0", bytes(50_000_000))
    assert path.stat().st_size < 100_000
    with pytest.raises(UnsafeFileError, match=r"members claim 50,000,\d+ bytes and the file has \d\d,\d+"):
        load_file(path)


def test_a_storage_larger_than_its_bytes_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(4.0)}, tmp_path / "in.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "in.pth").read_bytes()
    huge = content.replace(b"X\x03\x00\x00\x00cpuq\x06K\x04", b"X\x03\x00\x00\x00cpuq\x06\x8a\x06\0\0\0\0\0\x10")
    (tmp_path / "in.pth").write_bytes(huge)
    assert huge != content
    with pytest.raises(UnsafeFileError, match="damaged"):
        load_file(tmp_path / "in.pth")


def test_a_tar_archive_is_refused_as_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "storages").write_bytes(b"x")
    with tarfile.open(tmp_path / "in.pth.tar", "w") as archive:
        archive.add(tmp_path / "storages", "storages")
    with pytest.raises(UnsafeFileError, match=r"tar archive, as torch 0\.1 wrote"):
        load_file(tmp_path / "in.pth.tar")


@pytest.mark.parametrize("legacy", [True, False])
def test_a_truncated_torch_file_is_refused(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "in.pth"
    torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for size in (40, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        with pytest.raises(UnsafeFileError, match=r"Copy or download it again"):
            load_file(path)


SETTINGS = argparse.Namespace(lr=np.float64(0.5), epochs=np.int64(3), out=Path("x"), names=["a"])


@pytest.mark.parametrize("file", ["zip", "legacy", "pickle"])
def test_tensors_arrays_scalars_and_options_are_read(file: str, tmp_path: Path) -> None:
    array = np.arange(6, dtype=">f4").reshape(2, 3)
    content = {"array": array, "fortran": np.asfortranarray(array), "tensor": torch.arange(3.0), "opt": SETTINGS}
    content |= {"words": np.array(["a", "bc"]), "empty": np.zeros((0, 2)), "flag": np.bool_(True)}
    path = tmp_path / "in.pth"
    if file == "pickle":
        path.write_bytes(saved(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=file == "zip")
    read = load_file(path)
    for name in ("array", "fortran", "words", "empty"):
        np.testing.assert_array_equal(read[name], content[name])
        assert read[name].shape == content[name].shape
    assert torch.equal(read["tensor"], torch.arange(3.0))
    assert (read["opt"].attributes["lr"], read["opt"].attributes["epochs"], read["flag"]) == (0.5, 3, True)
    assert read["opt"].attributes["names"] == ["a"]


def test_options_are_stand_ins_that_run_no_code_of_their_class(tmp_path: Path) -> None:
    torch.save({"opt": SETTINGS}, tmp_path / "in.pth")
    read = load_torch(tmp_path / "in.pth")["opt"]
    assert isinstance(read, Inert)
    assert not isinstance(read, argparse.Namespace)
    assert (read.name, type(read.attributes["out"]).__mro__[1]) == ("argparse.Namespace", Inert)


@pytest.mark.parametrize("file", ["in.pkl", "in.pth", "in.pth.tar"])
def test_a_logger_beside_the_weights_is_a_stand_in_even_where_its_package_is_not_installed(
    file: str, tmp_path: Path
) -> None:
    content = b"\x80\x02cmmengine.logging.history_buffer\nHistoryBuffer\n)\x81}X\x01\x00\x00\x00aK\x01sb."
    (tmp_path / file).write_bytes(WRAPPED[file](content))
    assert load_file(tmp_path / file).attributes == {"a": 1}


def test_a_pickle_of_haiku_is_refused_with_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "byol.pkl").write_bytes(b"\x80\x02cdill._dill\n_create_type\n)R.")
    with pytest.raises(UnsafeFileError, match=r"needs dill\._dill\._create_type: .*DeepMind's BYOL or DetCon"):
        read_source(tmp_path / "byol.pkl")


class Disguised(OrderedDict):
    """Pickled as an OrderedDict with an attribute in place of its method."""

    def __reduce__(self) -> tuple:
        return OrderedDict, (), {"items": 1}


def test_an_ordered_dict_with_a_method_replaced_is_refused(tmp_path: Path) -> None:
    content = {"state_dict": [Disguised()]}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=2))
    torch.save(content, tmp_path / "a.pth")
    for name in ("a.pkl", "a.pth"):
        with pytest.raises(UnsafeFileError, match="has the attributes items"):
            load_file(tmp_path / name)
