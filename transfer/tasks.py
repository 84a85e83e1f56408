"""The published protocols of tasks.yaml, and how a config departs from them. Needs no Detectron2."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TASKS_FILE = Path(__file__).with_name("tasks.yaml")


@dataclass(frozen=True)
class Task:
    """One published downstream task.

    Attributes:
        id: The id that published numbers carry too, e.g. "coco_maskrcnn_fpn_1x".
        title: For people.
        recipe: Numbers of different recipes are never compared.
        values: Dotted Detectron2 key -> published value. Input settings are not among them: they belong to the weights.
    """

    id: str
    title: str
    recipe: str
    values: Mapping[str, Any]


def load_tasks() -> dict[str, Task]:
    """All tasks by id, in the order of the file."""
    return {name: Task(name, **fields) for name, fields in _read()["tasks"].items()}


def load_init_values() -> dict[str, dict[str, Any]]:
    """TRANSFER.INIT -> dotted Detectron2 key -> the value that the published rows of this kind use."""
    inits: dict[str, dict[str, Any]] = _read()["inits"]
    return inits


def departures(published: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
    """Where a resolved config is not the published protocol.

    Args:
        published: Dotted key -> value.
        cfg: Detectron2's CfgNode; every key of `published` exists in it.

    Returns:
        Sentences, "SOLVER.MAX_ITER is 30, the task's is 24000"; empty if the config is the protocol.
    """
    return [
        f"{key} is {show(value_at(cfg, key))}, the task's is {show(value)}"
        for key, value in sorted(published.items())
        if not is_same(value_at(cfg, key), value)
    ]


def value_at(cfg: Mapping[str, Any], key: str) -> Any:
    """Value of a dotted key. Raises KeyError if there is none."""
    value: Any = cfg
    for part in key.split("."):
        value = value[part]
    return value


def is_same(left: Any, right: Any) -> bool:
    """Equality of config values: tuples equal lists, numbers are compared to 9 digits, True is not 1."""
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(is_same, left, right))
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, int | float) and isinstance(right, int | float):
        return math.isclose(left, right, rel_tol=1e-9)
    return bool(left == right)


def show(value: Any) -> str:
    """A config value as its user would write it after KEY."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(show(item) for item in value)}]"
    if isinstance(value, str):
        return value or '""'
    return f"{value:g}" if isinstance(value, float) else str(value)


def pairs(cfg: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """All (dotted key, value) of a nested config."""
    for key, value in cfg.items():
        if isinstance(value, Mapping):
            yield from pairs(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read() -> dict[str, Any]:
    contents: dict[str, Any] = yaml.safe_load(TASKS_FILE.read_text(encoding="utf-8"))
    return contents
