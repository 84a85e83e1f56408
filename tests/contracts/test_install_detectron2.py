"""tools/install_detectron2.py: what it refuses, what it makes of the sdist, and in which order it tries."""

import ast
import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FILES = {
    "setup.py": "raise SystemExit('nobody runs this')",
    "detectron2/__init__.py": "__version__ = '0.5'\n",
    "detectron2/model_zoo/__init__.py": "",
    "detectron2/model_zoo/configs/COCO-Detection/a.yaml": "VERSION: 2\n",
    "detectron2/model_zoo/configs/common/b.py": "lr = 1\n",
    "projects/other/__init__.py": "",
}


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_detectron2", ROOT / "tools" / "install_detectron2.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sdist(tmp_path: Path) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    path = folder / "detectron2_cdo-0.5.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in FILES.items():
            member = tarfile.TarInfo(f"detectron2_cdo-0.5/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def use_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pip know this folder and no index, as a user without network would."""
    for key, value in {"CONFIG_FILE": "/dev/null", "NO_INDEX": "1", "FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(f"PIP_{key}", value)


def download(folder: Path, **constants: str) -> subprocess.CompletedProcess[str]:
    """Run download_sdist in a process of its own: pip's insides replace parts of the interpreter's."""
    code = (
        "import importlib.util, sys; from pathlib import Path\n"
        f"spec = importlib.util.spec_from_file_location('tool', {str(ROOT / 'tools/install_detectron2.py')!r})\n"
        "tool = importlib.util.module_from_spec(spec); spec.loader.exec_module(tool)\n"
        f"vars(tool).update({constants!r})\n"
        "try:\n"
        f"    print(tool.download_sdist(Path({str(folder)!r})))\n"
        "except tool.RouteError as error:\n"
        "    sys.exit(str(error))\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_sdist_is_fetched_by_pips_own_settings_without_being_built(sdist, tmp_path, monkeypatch) -> None:
    use_only(sdist.parent, monkeypatch)
    done = download(tmp_path, SDIST_SHA256=hashlib.sha256(sdist.read_bytes()).hexdigest())
    assert done.returncode == 0, done.stderr
    fetched = Path(done.stdout.splitlines()[-1])
    assert fetched.parent == tmp_path
    assert fetched.read_bytes() == sdist.read_bytes()


def test_a_file_with_another_digest_is_refused(sdist, tmp_path, monkeypatch) -> None:
    use_only(sdist.parent, monkeypatch)
    done = download(tmp_path)
    assert done.returncode == 1
    assert "expected 53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18" in done.stderr
    assert not (tmp_path / sdist.name).exists()


def test_an_index_without_the_sdist_is_named_as_the_reason(tmp_path, monkeypatch) -> None:
    use_only(tmp_path, monkeypatch)
    assert "not on any index or find-links folder" in download(tmp_path).stderr


def test_the_wheel_holds_the_package_and_its_configs_and_installs(tool, sdist, tmp_path) -> None:
    wheel = tool.write_wheel(sdist, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {name for name in FILES if name.startswith("detectron2/")}
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", target, wheel]
    subprocess.run(command, check=True)
    assert (target / "detectron2/model_zoo/configs/COCO-Detection/a.yaml").read_text() == "VERSION: 2\n"
    assert "Version: 0.5+pypi.cdo" in (target / "detectron2-0.5+pypi.cdo.dist-info/METADATA").read_text()


def routes(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, git: str | None, probed: dict) -> list[str]:
    """Replace what touches the machine; returns the list of routes taken. `git` is why that route fails."""
    taken: list[str] = []

    def by_git(dry_run: bool) -> None:
        taken.append("git")
        if git is not None:
            raise tool.RouteError(git)

    monkeypatch.setattr(tool, "ROUTES", {"git": by_git, "pypi": lambda dry_run: taken.append("pypi")})
    answers = iter(probed if isinstance(probed, list) else [probed])
    monkeypatch.setattr(tool, "probe", lambda: next(answers))
    return taken


def found(**fields: object) -> dict[str, object]:
    return {
        "error": None, "version": "0.6", "path": "/x", "commit": None, "compiled": False, "bridges": [],
        "distribution": "detectron2 0.6", **fields,
    }  # fmt: skip


def test_what_imports_is_kept(tool, monkeypatch, capsys) -> None:
    taken = routes(tool, monkeypatch, None, found())
    assert tool.main([]) == 0
    assert taken == []
    assert "kept: detectron2 0.6 in /x" in capsys.readouterr().out


def test_upstream_comes_first_and_pypi_when_it_is_out_of_reach(tool, monkeypatch, capsys) -> None:
    taken = routes(tool, monkeypatch, "not reachable", [{"error": "not installed"}, found()])
    assert tool.main([]) == 0
    assert taken == ["git", "pypi"]
    assert "route git does not work here: not reachable" in capsys.readouterr().out


def test_a_route_whose_result_does_not_import_is_not_a_success(tool, monkeypatch) -> None:
    taken = routes(tool, monkeypatch, None, [{"error": "not installed"}, {"error": "broken"}, {"error": "broken"}])
    assert tool.main([]) == 1
    assert taken == ["git", "pypi"]


def test_a_route_that_was_asked_for_is_the_only_one_and_is_not_repeated(tool, monkeypatch) -> None:
    taken = routes(tool, monkeypatch, "not reachable", [{"error": "not installed"}])
    assert tool.main(["--from", "git"]) == 1
    assert taken == ["git"]
    taken = routes(tool, monkeypatch, None, [found(distribution="detectron2 0.5+pypi.cdo")])
    assert tool.main(["--from", "pypi"]) == 0
    assert taken == []
    taken = routes(tool, monkeypatch, None, [found(), found(commit=tool.UPSTREAM_COMMIT)])
    assert tool.main(["--from", "git"]) == 0
    assert taken == ["git"]


def test_an_unreachable_upstream_is_noticed_within_seconds(tool, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(tool, "UPSTREAM", str(tmp_path / "no-repository"))
    with pytest.raises(tool.RouteError, match="not reachable"):
        tool.install_from_git(dry_run=False)


def test_dry_run_changes_nothing(tool, monkeypatch, capsys) -> None:
    monkeypatch.setattr(tool, "probe", lambda: {"error": "not installed"})
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("ran something"))
    assert tool.main(["--dry-run", "--from", "pypi"]) == 0
    assert "would download the sdist detectron2-cdo==0.5" in capsys.readouterr().out


def test_its_dependencies_are_those_of_setup_py(tool) -> None:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    call = next(
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    )
    values = {keyword.arg: keyword.value for keyword in call.keywords}
    extras, required = (ast.literal_eval(values[key]) for key in ("extras_require", "install_requires"))
    assert set(extras["transfer"]) <= set(tool.RUNTIME_DEPENDENCIES)
    assert set(tool.RUNTIME_DEPENDENCIES) <= set(extras["transfer"]) | set(required)
