"""Read torch and pickle files without executing anything that is in them."""

import codecs
import hashlib
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch


class UnsafeFileError(ValueError):
    """A file that is damaged, or that only code from within it could read; the message says which and what to do."""


# What numpy's arrays and scalars need, under the module names that numpy 1 and numpy 2 wrote.
_NUMPY_RECONSTRUCT = np.zeros(1).__reduce__()[0]
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY_FROM_BUFFER = np.zeros(1).__reduce_ex__(5)[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): codecs.encode,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
for _module in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_module}.multiarray", "_reconstruct"] = _NUMPY_RECONSTRUCT
    _ALLOWED[f"{_module}.multiarray", "scalar"] = _NUMPY_SCALAR
    _ALLOWED[f"{_module}.numeric", "_frombuffer"] = _NUMPY_FROM_BUFFER


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and builtin containers; looks up no other name, so nothing else can be called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UnsafeFileError(f"it needs {module}.{name}")
        return _ALLOWED[module, name]


def load_pickle(path: Path) -> Any:
    """Read a pickle of numpy arrays and builtin types (Python 2's too, as in Detectron2's model zoo).

    Raises:
        UnsafeFileError: If the file holds anything else, or is damaged.
    """
    try:
        with path.open("rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except UnsafeFileError as error:
        raise UnsafeFileError(
            f"{path} is not read, because {error}: a weights file may hold numpy arrays, numbers, strings, lists and "
            f"dicts only, since anything else could run code. If you trust it, save its arrays alone in a new file"
        ) from None
    except Exception as error:  # A damaged pickle can raise nearly anything.
        raise UnsafeFileError(f"{path} is not a complete pickle file: {_first_line(error)}") from error


def load_torch(path: Path) -> Any:
    """Read a file of torch.save that holds tensors and builtin types; tensors are on the CPU.

    Raises:
        UnsafeFileError: If the file holds anything else, or is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A damaged archive can raise nearly anything.
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
        if forbidden is None:
            # torch's own text here advises weights_only=False, which is the wrong advice for a file nobody knows.
            reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({_first_line(error)})"
            raise UnsafeFileError(
                f"{path} is damaged or was not written by torch.save{reason}. Copy or download it again"
            ) from None
        raise UnsafeFileError(
            f"{path} is not read, because it needs {forbidden[1]}: a checkpoint may hold tensors, numbers, strings, "
            f"lists and dicts only, since anything else could run code. If you trust its author, save the weights "
            f"alone and convert that file: torch.save({{'state_dict': torch.load({path.name!r}, weights_only=False)"
            f"['state_dict']}}, 'weights_only.pth')"
        ) from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def sha256_of(path: Path) -> str:
    """Digest of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
