"""The bridges, on made-up packages that have the quirks of a version of Detectron2, each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PLAIN = {f"{name}/__init__.py": "" for name in ("config", "modeling", "data", "evaluation", "engine", "checkpoint")}
V05 = {
    "layers/__init__.py": "from . import roi_align_rotated",
    "layers/roi_align_rotated.py": "from detectron2 import _C",
    "config/__init__.py": "import numpy as np\nfrom PIL import Image\nKINDS = (np.int, np.float, np.object, np.bool)\n"
    "INTERP = Image.LINEAR",
    "modeling/__init__.py": "from detectron2 import layers",
}
ZOO = {
    "model_zoo/__init__.py": "import pkg_resources\n"
    "CONFIG = pkg_resources.resource_filename('detectron2.model_zoo', 'c/a.yaml')"
}
CITYSCAPES = {
    "data/__init__.py": "def labels():\n"
    "    from deeplearning.projects.cityscapesApi.cityscapesscripts.helpers.labels import labels\n    return labels"
}
# As setuptools 81 leaves it, whatever this environment has.
WITHOUT_PKG_RESOURCES = "import sys; sys.modules['pkg_resources'] = None\n"
REQUIRE = "import json, sys; from transfer import d2; info = d2.require()\n"


def write_package(folder: Path, files: dict[str, str], name: str = "detectron2") -> None:
    for path, text in {"__init__.py": "__version__ = '0.5'", "model_zoo/__init__.py": "", **files}.items():
        target = folder / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    (folder / "torch.py").touch()  # nothing here needs the real one, and it takes seconds
    for package in ("lvis", "cityscapesscripts"):  # found before installed ones
        (folder / package).mkdir(exist_ok=True)
        (folder / package / "__init__.py").touch()


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{folder}:{ROOT}"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True
    )


def answer(code: str, folder: Path) -> Any:
    done = run_python(code, folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_the_module_imports_neither_detectron2_nor_torch(tmp_path: Path) -> None:
    code = "import sys, json; from transfer import d2; heavy = {'detectron2', 'torch'} & set(sys.modules)\n"
    code += "print(json.dumps(sorted(heavy)))"
    assert answer(code, tmp_path) == []


def test_without_detectron2_the_error_is_the_install_command(tmp_path: Path) -> None:
    done = run_python("import sys; sys.modules['detectron2'] = None\n" + REQUIRE, tmp_path)
    assert done.returncode == 1
    assert "Detectron2Missing: Detectron2 is not installed" in done.stderr
    assert "python tools/install_detectron2.py" in done.stderr
    quiet = "import sys; sys.modules['detectron2'] = None\nfrom transfer import d2; print(int(d2.info() is None))"
    assert answer(quiet, tmp_path) == 1


def test_a_checkout_folder_without_a_package_is_not_taken_for_an_installation(tmp_path: Path) -> None:
    (tmp_path / "detectron2" / "projects").mkdir(parents=True)
    code = "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p and 'd2' not in p]\n" + REQUIRE
    assert "Detectron2 is not installed" in run_python(code, tmp_path).stderr


def test_a_broken_installation_is_named_with_its_place_and_reason(tmp_path: Path) -> None:
    write_package(tmp_path, {**PLAIN, "engine/__init__.py": "raise RuntimeError('no luck today')"})
    stderr = run_python(REQUIRE, tmp_path).stderr
    assert f"Detectron2 is in {tmp_path / 'detectron2'} but cannot be imported (RuntimeError: no luck today)" in stderr


def test_a_version_that_fits_is_left_alone(tmp_path: Path) -> None:
    write_package(tmp_path, PLAIN)
    code = REQUIRE + (
        "import numpy as np; from PIL import Image\n"
        "names = [name for name in ('int', 'float', 'object', 'str') if name in vars(np)]\n"
        "has_placeholder = 'detectron2._C' in sys.modules\n"
        "print(json.dumps([info.bridges, names, hasattr(Image, 'LINEAR'), has_placeholder, info.compiled]))"
    )
    assert answer(code, tmp_path) == [[], [], False, False, False]


def test_version_0_5_gets_all_it_needs_and_says_so(tmp_path: Path) -> None:
    write_package(tmp_path, {**PLAIN, **V05})
    code = REQUIRE + (
        "from detectron2 import _C, config\n"
        "try: _C.nms_rotated\nexcept AttributeError as error: message = str(error)\n"
        "kinds = [kind.__name__ for kind in config.KINDS]\n"
        "from PIL import Image\n"
        "is_bilinear = config.INTERP == Image.BILINEAR\n"
        "print(json.dumps([info.bridges, kinds, is_bilinear, info.compiled, message, info.version]))"
    )
    bridges, kinds, is_bilinear, compiled, message, version = answer(code, tmp_path)
    assert bridges == ["np.int/np.float/np.object", "PIL.Image.LINEAR", "placeholder detectron2._C"]
    assert kinds == ["int", "float", "object", "bool"]
    assert is_bilinear
    assert not compiled
    assert message.startswith("detectron2._C.nms_rotated needs the compiled extension")
    assert version == "0.5"


def test_a_stand_in_for_pkg_resources_is_lent_to_model_zoo_only(tmp_path: Path) -> None:
    write_package(tmp_path, {**PLAIN, **ZOO})
    code = (
        WITHOUT_PKG_RESOURCES
        + REQUIRE
        + (
            "from detectron2 import model_zoo\n"
            "print(json.dumps([info.bridges, model_zoo.CONFIG, 'pkg_resources' in sys.modules]))"
        )
    )
    config = str(tmp_path / "detectron2" / "model_zoo" / "c" / "a.yaml")
    assert answer(code, tmp_path) == [["pkg_resources, for model_zoo"], config, False]


def test_an_existing_pkg_resources_is_not_replaced(tmp_path: Path) -> None:
    write_package(tmp_path, {**PLAIN, **ZOO})
    (tmp_path / "pkg_resources.py").write_text("def resource_filename(package, name): return 'the real one'")
    code = REQUIRE + "from detectron2 import model_zoo; print(json.dumps([info.bridges, model_zoo.CONFIG]))"
    assert answer(code, tmp_path) == [[], "the real one"]


def test_metas_name_for_cityscapesscripts_finds_the_installed_package(tmp_path: Path) -> None:
    write_package(tmp_path, {**PLAIN, **CITYSCAPES})
    write_package(tmp_path, {"helpers/__init__.py": "", "helpers/labels.py": "labels = [7]"}, "cityscapesscripts")
    code = REQUIRE + "from detectron2 import data; print(json.dumps([info.bridges, data.labels()]))"
    assert answer(code, tmp_path) == [["Meta's name for cityscapesscripts"], [7]]


def test_an_extension_that_does_not_load_counts_as_not_compiled(tmp_path: Path) -> None:
    write_package(tmp_path, {**PLAIN, **V05, "_C.py": "raise ImportError('undefined symbol: _ZN2at')"})
    code = REQUIRE + "print(json.dumps([info.compiled, info.bridges]))"
    compiled, bridges = answer(code, tmp_path)
    assert not compiled
    assert bridges[-2:] == [
        "placeholder detectron2._C",
        "the compiled extension is ignored: it does not load (undefined symbol: _ZN2at)",
    ]


def test_an_extension_that_loads_counts_as_compiled(tmp_path: Path) -> None:
    write_package(tmp_path, {**PLAIN, **V05, "_C.py": "nms_rotated = 'real'"})
    code = REQUIRE + "from detectron2 import _C; print(json.dumps([info.compiled, _C.nms_rotated, len(info.bridges)]))"
    assert answer(code, tmp_path) == [True, "real", 2]


def test_what_the_evaluators_packages_need_of_old_numpy_is_bridged_too(tmp_path: Path) -> None:
    write_package(tmp_path, PLAIN)
    (tmp_path / "lvis" / "eval.py").write_text("import numpy as np\ndef evaluate(): return np.float(1)")
    uses = "import numpy as np\ndef evaluate(): return np.in1d([[1, 2], [3, 4]], [2, 3], invert=True).tolist()"
    (tmp_path / "cityscapesscripts" / "instances.py").write_text(uses)
    code = REQUIRE + "from lvis import eval; from cityscapesscripts import instances\n"
    code += "print(json.dumps([info.bridges, eval.evaluate(), instances.evaluate()]))"
    bridges, number, found = answer(code, tmp_path)
    assert bridges[0].startswith("np.float")
    assert (number, found) == (1.0, [True, False, False, True])
