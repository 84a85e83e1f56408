"""Which room may enter which: an AST walk over every file of the three packages."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for package in ("detco", "pretrain", "transfer") for path in (ROOT / package).rglob("*.py"))
USES_DETECTRON2 = tuple(
    f"transfer/{name}"
    for name in (
        *("d2.py", "modeling/", "datasets.py", "evaluation.py", "parity.py"),
        *("train_net.py", "finetune.py", "trainer.py", "scaling.py", "config.py"),
        *("mappers.py", "optimizer.py", "densepose.py", "subsets.py", "cityscapes.py"),
        *("settings_check.py", "checks/network.py", "checks/data.py", "resize_or_crop_mapper.py", "sem_seg_mapper.py"),
    )
)
"""The rest of transfer works without it: naming, sources, conversion, tasks, preflight, results."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[str, str | None, bool]]:
    """(module, imported name, is at module level) of every import statement."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top_level = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, id(node) in top_level
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            for alias in node.names:
                yield node.module or "", alias.name, id(node) in top_level


def starts(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_only_what_its_room_may_know(path: Path) -> None:
    name = name_of(path)
    for module, _, _ in imports(path):
        if name.startswith("detco/"):
            assert not starts(module, "pretrain", "transfer", "yaml", "yacs", "fvcore", "detectron2"), module
        if name.startswith("pretrain/"):
            assert not starts(module, "transfer", "detectron2"), module
        if name.startswith("transfer/"):
            assert not starts(module, "pretrain"), module
            assert not starts(module, "detco") or starts(module, "detco", "detco.artifact", "detco.models"), module
        if starts(module, "detectron2"):
            assert name.startswith(USES_DETECTRON2), f"{name} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nobody_imports_a_private_name_of_another_module(path: Path) -> None:
    for module, imported, _ in imports(path):
        if starts(module, "detco", "pretrain", "transfer") and imported is not None:
            assert not imported.startswith("_") or imported == "__version__", f"{module}.{imported}"


def test_the_packages_have_no_import_cycle() -> None:
    modules = {module_of(path): path for path in FILES}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        edges = set()
        for module, imported, _ in imports(path):
            for candidate in (f"{module}.{imported}", module):
                if candidate in modules:
                    edges.add(candidate)
                    break
        graph[name] = edges - {name}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for target in graph[module]:
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_no_file_is_named_after_nothing() -> None:
    vague = {"utils.py", "misc.py", "helpers.py", "common.py"}
    assert not [name_of(path) for path in FILES if path.name in vague]


def test_setup_imports_no_torch() -> None:
    assert "torch" not in {module for module, _, _ in imports(ROOT / "setup.py")}
