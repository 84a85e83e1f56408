"""Detectron2: find it, bridge its versions to today's libraries, one clear error when it is missing.

Importing this module neither imports Detectron2 nor fails without it; `require` does both. Modules that use Detectron2
write

    from transfer import d2

    d2.require()

    from detectron2.config import get_cfg  # noqa: E402

Every bridge is applied only if the sources that were found mention what it stands in for and this Python lacks it:

- `detectron2._C`: v0.5 imports the compiled extension unconditionally. Where it was not compiled, an empty module takes
  its place. Since 0.4 nms and roi_align come from torchvision, so only rotated boxes, deformable convolution and the
  fast COCOeval are lost.
- `np.int`, `np.float`, `np.object`, `np.str` (gone in numpy 1.24) and `np.bool` (gone in 1.24, back in 2.0), and
  `np.in1d` (gone in 2.4): also for the evaluators' packages lvis 0.5.3 and cityscapesscripts 2.3.0, the last on PyPI.
- `PIL.Image.LINEAR`, gone in Pillow 10; the same filter is called BILINEAR.
- `pkg_resources`, gone in setuptools 81: Detectron2's `model_zoo` calls one function of it. It is removed again
  as soon as `model_zoo` is imported, so that no other library finds it.
- `deeplearning.projects.cityscapesApi.cityscapesscripts`, Meta's name for cityscapesscripts, in upstream since December
  2024 (detectron2 issue 5436). Aliased if cityscapesscripts is installed.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

INSTALL_COMMAND = "python tools/install_detectron2.py"
LOST_WITHOUT_COMPILED = "fast COCOeval, rotated boxes, deformable convolution"

# What this suite uses. All are imported at once, so that a broken installation shows before the work begins.
MODULES = ("config", "model_zoo", "modeling", "data", "evaluation", "engine", "checkpoint")
CITYSCAPES_ALIAS = "deeplearning.projects.cityscapesApi.cityscapesscripts"
# v0.5 means Python's own types by these names, as numpy did until 1.23.
NUMPY_ALIASES: dict[str, type] = {"int": int, "float": float, "object": object, "str": str, "bool": bool}


class Detectron2Missing(ImportError):
    """Detectron2 is not installed, or cannot be imported; the message says which, and the command that repairs it."""


@dataclass(frozen=True)
class D2Info:
    """The Detectron2 that this process uses.

    Attributes:
        version: `detectron2.__version__`; upstream calls everything since October 2021 "0.6".
        path: Folder of the package.
        commit: Commit of a pip installation from git; None if unknown.
        compiled: Whether the C++ extension loads. Without it LOST_WITHOUT_COMPILED do not work.
        bridges: What `require` had to put in place, in words; empty for an upstream that fits.
        distribution: Name and version of the installed package; None if it was found on PYTHONPATH.
    """

    version: str
    path: Path
    commit: str | None
    compiled: bool
    bridges: tuple[str, ...]
    distribution: str | None


@lru_cache(maxsize=1)
def require() -> D2Info:
    """Bridge and import Detectron2. Later calls return the first one's answer.

    Raises:
        Detectron2Missing: If it is not installed or cannot be imported even with the bridges.
    """
    folder = _find_package()
    try:
        return _bridge_and_import(folder)
    except Detectron2Missing:
        raise
    except Exception as error:  # whatever a foreign installation raises on import, the user needs to know where and why
        raise Detectron2Missing(
            f"Detectron2 is in {folder} but cannot be imported ({type(error).__name__}: {error}). "
            f"`detco-doctor` shows what its libraries lack; `{INSTALL_COMMAND}` installs a version known to work."
        ) from error


def info() -> D2Info | None:
    """Like `require`, but None where Detectron2 is missing or broken."""
    try:
        return require()
    except Detectron2Missing:
        return None


def _find_package() -> Path:
    try:
        spec = importlib.util.find_spec("detectron2")
    except ValueError:  # sys.modules["detectron2"] without a spec: somebody's stand-in
        spec = None
    # A folder called detectron2 without __init__.py (say, a checkout's root) is found as a namespace package: not it.
    if spec is None or spec.origin is None:
        raise Detectron2Missing(f"Detectron2 is not installed. Install it with: {INSTALL_COMMAND}")
    return Path(spec.origin).parent


def _silence_warnings() -> None:
    """Silence warnings about code that is neither the user's nor ours, and that nothing can be done about here."""
    for category, message in (
        (UserWarning, r"torch\.meshgrid"),
        (UserWarning, r"Creating a tensor from a list of numpy\.ndarrays"),
        (FutureWarning, r".*torch\.cuda\.amp"),
        (FutureWarning, r"`torch\.jit\.script` is deprecated"),
        (DeprecationWarning, r".*pkg_resources"),
    ):
        warnings.filterwarnings("ignore", message=message, category=category)
    # 0 / 0 for classes without an object, which Detectron2 then counts as 0.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"detectron2\.evaluation\.pascal_voc_evaluation")


def _bridge_and_import(folder: Path) -> D2Info:
    _silence_warnings()
    mentions = _mentions(folder)
    for package in ("lvis", "cityscapesscripts"):  # Detectron2's evaluators import them when they are used
        spec = importlib.util.find_spec(package)
        for location in (spec and spec.submodule_search_locations) or ():
            mentions |= _mentions(Path(location))
    bridges = _bridge_numpy(mentions) + _bridge_pillow(mentions)
    compiled, failure = _load_compiled()
    if not compiled and "unconditional _C" in mentions:
        _install_placeholder()
        bridges.append("placeholder detectron2._C")
    if failure:
        bridges.append(f"the compiled extension is ignored: it does not load ({failure})")
    if CITYSCAPES_ALIAS in mentions and _alias_cityscapes():
        bridges.append("Meta's name for cityscapesscripts")
    with _pkg_resources(mentions) as was_lent:
        for module in MODULES:
            importlib.import_module(f"detectron2.{module}")
    bridges += ["pkg_resources, for model_zoo"] if was_lent else []
    distribution, commit = _distribution(folder)
    version = str(importlib.import_module("detectron2").__version__)
    return D2Info(version, folder, commit, compiled, tuple(bridges), distribution)


_MENTIONS = re.compile(
    r"\b(?P<numpy>np\.(?:int|float|object|str|bool|in1d))\b"
    r"|\b(?P<linear>Image\.LINEAR)\b"
    r"|^(?P<pkg>import pkg_resources)\b"
    r"|\b(?P<alias>" + re.escape(CITYSCAPES_ALIAS) + r")\b",
    re.MULTILINE,
)


def _mentions(folder: Path) -> set[str]:
    """What the sources under `folder` use of all that may need a bridge (about 20 ms for its 250 files)."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        found.update(match.group() for match in _MENTIONS.finditer(path.read_text(encoding="utf-8", errors="replace")))
    # At the margin, thus outside any `try`: the import that fails where nothing was compiled. (Later versions also have
    # one in fast_eval_api, whose importer catches the failure and evaluates with pycocotools.)
    layer = folder / "layers" / "roi_align_rotated.py"
    if layer.is_file() and re.search(r"^from detectron2 import _C$", layer.read_text(encoding="utf-8"), re.MULTILINE):
        found.add("unconditional _C")
    return found


def _bridge_numpy(mentions: set[str]) -> list[str]:
    import numpy as np  # lazy: this module is imported for --help too

    def in1d(array: Any, values: Any, assume_unique: bool = False, invert: bool = False) -> Any:
        return np.isin(np.ravel(array), values, assume_unique=assume_unique, invert=invert)

    aliases = {**NUMPY_ALIASES, "in1d": in1d}
    missing = [name for name in aliases if f"np.{name}" in mentions and name not in vars(np)]
    for name in missing:
        setattr(np, name, aliases[name])
    return ["/".join(f"np.{name}" for name in missing)] if missing else []


def _bridge_pillow(mentions: set[str]) -> list[str]:
    from PIL import Image  # lazy, as above

    if "Image.LINEAR" not in mentions or hasattr(Image, "LINEAR"):
        return []
    setattr(Image, "LINEAR", Image.Resampling.BILINEAR)  # noqa: B010 - Pillow's types do not know the name
    return ["PIL.Image.LINEAR"]


def _load_compiled() -> tuple[bool, str | None]:
    """Whether `detectron2._C` loads; if it is there but does not (built for another torch), the reason."""
    import torch  # noqa: F401 - the extension needs torch's libraries in the process

    if importlib.util.find_spec("detectron2._C") is None:
        return False, None
    try:
        importlib.import_module("detectron2._C")
    except ImportError as error:
        return False, str(error).splitlines()[0]
    return True, None


def _install_placeholder() -> None:
    placeholder = ModuleType("detectron2._C", "Stands in for the extension that was not compiled.")

    def missing(name: str) -> object:
        raise AttributeError(f"detectron2._C.{name} needs the compiled extension, which this Detectron2 lacks")

    contents = {
        "__getattr__": missing,
        # Detectron2 writes these three into the environment report at the head of every log.
        "get_compiler_version": lambda: "not compiled",
        "get_cuda_version": lambda: "not compiled",
        "has_cuda": lambda: False,
    }
    vars(placeholder).update(contents)
    sys.modules["detectron2._C"] = placeholder
    vars(importlib.import_module("detectron2"))["_C"] = placeholder


def _alias_cityscapes() -> bool:
    """Let submodules of Meta's package be found in the folder of the installed cityscapesscripts, if there is one."""
    spec = importlib.util.find_spec("cityscapesscripts")
    if spec is None or spec.submodule_search_locations is None:
        return False
    parts = CITYSCAPES_ALIAS.split(".")
    for depth in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:depth]))
        module.__path__ = list(spec.submodule_search_locations) if depth == len(parts) else []
        sys.modules.setdefault(module.__name__, module)
    return True


@contextlib.contextmanager
def _pkg_resources(mentions: set[str]) -> Iterator[bool]:
    """Lend a `pkg_resources` with the one function that model_zoo calls, while it is being imported. Yields whether."""
    if "import pkg_resources" not in mentions or importlib.util.find_spec("pkg_resources") is not None:
        yield False
        return
    stand_in = ModuleType("pkg_resources", "Stands in for what setuptools 81 removed.")
    vars(stand_in)["resource_filename"] = _resource_filename
    sys.modules["pkg_resources"] = stand_in
    try:
        yield True
    finally:
        del sys.modules["pkg_resources"]


def _resource_filename(package: str, name: str) -> str:
    origin = importlib.import_module(package).__file__
    assert origin is not None
    return str(Path(origin).parent / name)


def _distribution(folder: Path) -> tuple[str | None, str | None]:
    """Name and version of the installed package that `folder` belongs to, and the commit pip built it from."""
    for name in ("detectron2", "detectron2-cdo"):
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        record = json.loads(found.read_text("direct_url.json") or "{}")
        is_editable = record.get("dir_info", {}).get("editable", False)
        if is_editable or Path(str(found.locate_file("detectron2"))).resolve() == folder.resolve():
            return f"{name} {found.version}", record.get("vcs_info", {}).get("commit_id")
    return None, None
