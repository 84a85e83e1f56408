"""Read torch and pickle files without executing anything that is in them.

A pickle is a program whose only dangerous instruction is "take this name from that module". Both readers here, torch's
own (weights_only) and Python's, answer it from one short table: tensors, containers, and stand-ins of ours for numpy's
arrays and for a few classes that hold settings. Any other name is refused before it is looked up.
"""

import codecs
import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from transfer.pickle_scan import complaint_about


class UnsafeFileError(ValueError):
    """A file that is damaged, or that only code from within it could read; the message says which and what to do.

    Attributes:
        needs: The name ("module.function") that the file asks for; None if it is refused for another reason.
    """

    def __init__(self, message: str, needs: str | None = None) -> None:
        super().__init__(message)
        self.needs = needs


class Inert:
    """What is left of an object of a class that holds data only: its class's name and its attributes.

    Attributes:
        attributes: Attribute to value, as the file has them.
    """

    name: str
    attributes: dict[str, Any]

    def __new__(cls, *arguments: Any) -> "Inert":
        """Make one, whatever the class's constructor would have done with `arguments`."""
        self = super().__new__(cls)
        self.attributes = {}
        return self

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes = {str(key): value for key, value in state.items()}


class _Dtype:
    """Stands for numpy.dtype: numbers and texts only, and never numpy's shared objects, which a state could change."""

    dtype: np.dtype[Any]

    def __new__(cls, code: Any, align: bool = False, copy: bool = False) -> "_Dtype":
        if not isinstance(code, str) or not re.fullmatch(r"[biufc][0-9]{1,2}|[SU][0-9]{1,4}", code):
            raise UnsafeFileError(f"it holds an array of {_shown(code)}")
        self = super().__new__(cls)
        self.dtype = np.dtype(code)
        return self

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if any(part is not None for part in state[2:5]):
            raise UnsafeFileError("it holds an array of structures")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray[Any, Any]):
    """An array that takes its content from a checked state only."""

    def __new__(cls, *arguments: Any) -> "_Array":
        if arguments:
            raise UnsafeFileError("it makes an array in another way than numpy writes")
        made: _Array = super().__new__(cls, (0,), np.uint8)
        return made

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        if isinstance(data, str):  # A Python 2 pickle
            data = data.encode("latin1")
        if not isinstance(data, bytes) or not isinstance(dtype, _Dtype):
            raise UnsafeFileError("it holds an array with another content than bytes")
        super().__setstate__((1, shape, dtype.dtype, is_fortran, data))


def _shown(value: Any) -> str:
    """Return a value for a message, but of a container its type only: writing it out may never end."""
    return repr(value) if isinstance(value, (str, int)) else type(value).__name__


class _Function:
    """Something to call in whose attributes a pickle can write nothing, as it can in a function's: for good."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise UnsafeFileError("it changes a function")


def _reconstruct(array_class: Any, shape: Any, code: Any) -> _Array:
    return _Array()


def _from_buffer(data: Any, dtype: _Dtype, shape: Any, order: str) -> Any:
    return np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: _Dtype, data: Any) -> Any:
    return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, dtype.dtype)[0]


def _encode(text: str, encoding: Any) -> bytes:
    if not isinstance(encoding, str) or encoding not in ("latin1", "latin-1"):
        raise UnsafeFileError(f"it encodes text as {_shown(encoding)}")
    return codecs.encode(text, "latin1")


def _no_bytes() -> bytes:
    """What protocol 2 calls for the content of an empty array."""
    return b""


def _tensor_from_bytes(data: bytes) -> Any:
    """What torch.storage has for a storage inside a plain pickle, but restricted."""
    if not data.startswith(_LEGACY_TORCH):
        raise UnsafeFileError("it holds a storage in another format than torch writes into a pickle")
    _check_legacy(io.BytesIO(data))
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


# Arrays and scalars, under the module names that numpy 1 and numpy 2 write.
_STAND_INS: dict[str, Any] = {"numpy.ndarray": _Array, "numpy.dtype": _Dtype}
for _module in ("builtins", "__builtin__"):
    _STAND_INS[f"{_module}.bytes"] = _Function(_no_bytes)
for _module in ("numpy.core", "numpy._core"):
    _STAND_INS[f"{_module}.multiarray._reconstruct"] = _Function(_reconstruct)
    _STAND_INS[f"{_module}.multiarray.scalar"] = _Function(_scalar)
    _STAND_INS[f"{_module}.numeric._frombuffer"] = _Function(_from_buffer)
# Settings that projects save beside their weights: argparse's options and paths in them (SoCo, PixPro, DINO), the loss
# curves of OpenMMLab's logger.
for _name in (
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "mmengine.logging.history_buffer.HistoryBuffer",
):
    _STAND_INS[_name] = type("Inert", (Inert,), {"name": _name})

_KNOWN = _STAND_INS | {
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _Function(_encode),
    "torch._utils._rebuild_tensor_v2": _Function(torch._utils._rebuild_tensor_v2),
    "torch.storage._load_from_bytes": _Function(_tensor_from_bytes),
}


class _Unpickler(pickle.Unpickler):
    """Answers for the names in the table; looks up no other, so nothing else can be called."""

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in _KNOWN:
            raise UnsafeFileError(f"it needs {full_name}", full_name)
        return _KNOWN[full_name]


# How a file of torch.save before 1.6 begins: a pickle of its own, of one number.
_LEGACY_TORCH = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
# And since: a zip archive. torch, too, tells the two apart by this.
_ARCHIVE = b"PK\x03\x04"
_REMEDY = (
    "Anything else could run code. If you trust its author, save the weights alone in a new file with the author's "
    "own program"
)


def load_file(path: Path) -> Any:
    """Read a file of torch.save, in any of its formats, or a plain pickle; whichever it is by its content.

    Raises:
        UnsafeFileError: As `load_torch` and `load_pickle` raise it.
    """
    is_of_torch = _starts_with(path, _ARCHIVE) or _starts_with(path, _LEGACY_TORCH) or _is_tar(path)
    return load_torch(path) if is_of_torch else load_pickle(path)


def _plain(content: Any) -> Any:
    """The content, if its dicts are what they seem: a file may hang an attribute `items` on an ordered one.

    Raises:
        UnsafeFileError: If one has an attribute other than torch's own `_metadata`.
    """
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, OrderedDict) and (hung := vars(item).keys() - {"_metadata"}):
            raise UnsafeFileError(f"an OrderedDict in it has the attributes {', '.join(sorted(map(str, hung)))}")
        if isinstance(item, dict):
            waiting += dict.values(item)
        elif isinstance(item, list | tuple | set | frozenset):
            waiting += item
    return content


def _starts_with(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


def _is_tar(path: Path) -> bool:
    """Whether it is an uncompressed tar archive; tarfile would look into compressed ones and so unpack anything."""
    with path.open("rb") as file:
        file.seek(257)
        return file.read(5) == b"ustar"


def load_pickle(path: Path) -> Any:
    """Read a pickle of numpy arrays, tensors and builtin types (Python 2's too, as in Detectron2's model zoo).

    Raises:
        UnsafeFileError: If the file holds anything else, or is damaged.
    """
    try:
        with path.open("rb") as file:
            _check_pickle(file)
            file.seek(0)
            return _plain(_Unpickler(file, encoding="latin1").load())
    except UnsafeFileError as error:
        raise UnsafeFileError(
            f"{path} is not read, because {error}: a weights file may hold numpy arrays, tensors, numbers, strings, "
            f"lists and dicts only. {_REMEDY}",
            error.needs,
        ) from None
    except Exception as error:  # A damaged pickle can raise nearly anything.
        raise UnsafeFileError(
            f"{path} is not a complete pickle file ({_first_line(error)}). Copy or download it again"
        ) from None


def load_torch(path: Path) -> Any:
    """Read a file of torch.save that holds tensors and builtin types; tensors are on the CPU.

    Raises:
        UnsafeFileError: If the file holds anything else, or is damaged.
    """
    if _is_tar(path):
        raise UnsafeFileError(
            f"{path} is a tar archive, as torch 0.1 wrote; it is not read. Load it with an old torch and save it again"
        )
    try:
        _check_torch(path)
        with torch.serialization.safe_globals([(value, name) for name, value in _STAND_INS.items()]):
            return _plain(torch.load(path, map_location="cpu", weights_only=True))
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{path} is not read, because {error}") from None
    except Exception as error:  # A damaged archive can raise nearly anything.
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
        if forbidden is None:
            # torch's own text here advises weights_only=False, which is the wrong advice for a file nobody knows.
            reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({_first_line(error)})"
            if "Unsupported operand" in str(error):
                reason = " (or with another pickle_protocol than its own, 2)"
            raise UnsafeFileError(
                f"{path} is damaged or was not written by torch.save{reason}. Copy or download it again"
            ) from None
        raise UnsafeFileError(
            f"{path} is not read, because it needs {forbidden[1]}: a checkpoint may hold tensors, numbers, strings, "
            f"lists and dicts only. {_REMEDY}: torch.save({{'state_dict': torch.load({path.name!r}, "
            f"weights_only=False)['state_dict']}}, 'weights_only.pth')",
            forbidden[1],
        ) from None


def _check_torch(path: Path) -> None:
    """Refuse what torch would fill the memory with, or try to read in yet another way."""
    if _starts_with(path, _ARCHIVE):
        _check_archive(path)
    elif _starts_with(path, _LEGACY_TORCH):
        with path.open("rb") as file:
            _check_legacy(file)
    else:
        raise pickle.UnpicklingError


def _check_archive(path: Path) -> None:
    """Refuse an archive whose members claim more bytes than the file has; torch.save compresses nothing."""
    with zipfile.ZipFile(path) as archive:
        claimed, size = sum(member.file_size for member in archive.infolist()), path.stat().st_size
        if claimed > size:
            raise UnsafeFileError(
                f"its members claim {claimed:,} bytes and the file has {size:,}: torch.save compresses nothing, so "
                f"this is damaged or made to fill the memory"
            )
        for member in archive.infolist():
            if member.filename.endswith("data.pkl"):
                _check_pickle(io.BytesIO(archive.read(member)))


def _check_legacy(file: IO[bytes]) -> None:
    """Look through the five pickles before the storages: three of torch's own, the content, the storages' keys."""
    for _ in range(5):
        _check_pickle(file)


def _check_pickle(file: IO[bytes]) -> None:
    if complaint := complaint_about(file):
        raise UnsafeFileError(complaint)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
