"""The published protocols of tasks.yaml, and how a config departs from them. Needs no Detectron2."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

TASKS_FILE = Path(__file__).with_name("tasks.yaml")
CONFIGS = Path(__file__).parents[1] / "configs" / "transfer"
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Task:
    """One published protocol: a downstream task with everything that must be equal for two numbers to be compared.

    Attributes:
        name: What TRANSFER.TASK holds. It is the id, or "<id>/<recipe>" for the second recipe of one id.
        title: For people.
        recipe: Numbers of different recipes are never compared.
        config: The files are configs/transfer/<config>_<init>.yaml, see `config_file`.
        values: Dotted Detectron2 key -> published value. Input settings are not among them: they belong to the weights.
        accepts: Dotted key -> further values that are published too and hence no departure.
        inits: TRANSFER.INIT -> dotted key -> where its published row is unlike `values` and `load_init_values`.
        unpublished: Why no published number carries this id and recipe; "" where some do.
    """

    name: str
    title: str
    recipe: str
    config: str
    values: Mapping[str, Any]
    accepts: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    inits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unpublished: str = ""

    @property
    def id(self) -> str:
        """The id that published numbers and results.json carry, e.g. "coco_maskrcnn_fpn_1x"."""
        return self.name.split("/")[0]


def load_tasks() -> dict[str, Task]:
    """All tasks by name, in the order of the file."""
    return {name: Task(name, **fields) for name, fields in _read()["tasks"].items()}


def load_init_values() -> dict[str, dict[str, Any]]:
    """TRANSFER.INIT -> dotted Detectron2 key -> the value that the published rows of this kind use."""
    return {init: dict(values) for init, values in _read()["inits"].items()}


def published_values(task: Task, init: str, *, with_input: bool = True) -> dict[str, Any]:
    """Everything that the published row of one kind of weights asks for, by dotted key.

    Args:
        task: The protocol.
        init: TRANSFER.INIT: "converted", "supervised" or "random".
        with_input: False leaves out what `load_init_values` lists (what the network is fed, and MODEL.WEIGHTS), for
            converted weights that bring a record of their own input.
    """
    general = load_init_values()[init]
    special = {**general, **task.inits.get(init, {})}
    return {**task.values, **{key: value for key, value in special.items() if with_input or key not in general}}


def config_file(task: Task, init: str) -> Path:
    """The config of a task for one kind of weights.

    Args:
        task: The protocol.
        init: "converted", "supervised", "random", or "soco": converted weights with SoCo's fine-tuning weight decay.

    Raises:
        FileNotFoundError: If there is none; names those that there are.
    """
    path = CONFIGS / f"{task.config}_{init}.yaml"
    if not path.is_file():
        inits = (*load_init_values(), "soco")
        found = [name for name in inits if (CONFIGS / f"{task.config}_{name}.yaml").is_file()]
        raise FileNotFoundError(
            f"no config file {path}; {task.name} has {', '.join(found)}"
            if found
            else f"no config files {CONFIGS / task.config}_*.yaml; the configs come with a checkout of the suite"
        )
    return path


def departures(
    published: Mapping[str, Any], cfg: Mapping[str, Any], accepts: Mapping[str, Sequence[Any]] = NOTHING
) -> list[str]:
    """Where a resolved config is not the published protocol.

    Args:
        published: Dotted key -> value, see `published_values`.
        cfg: Detectron2's CfgNode. Keys that it lacks (those of DensePose in another detector) are departures.
        accepts: Dotted key -> further values that are no departure, see `Task.accepts`.

    Returns:
        Sentences, "SOLVER.MAX_ITER is 30, the task's is 24000"; empty if the config is the protocol.
    """
    actual, found = dict(pairs(cfg)), []
    for key, value in sorted(published.items()):
        if key not in actual:
            found.append(f"{key} is not set, the task's is {show(value)}")
        elif not any(is_same(actual[key], right) for right in (value, *accepts.get(key, ()))):
            found.append(f"{key} is {show(actual[key])}, the task's is {show(value)}")
    return found


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


@lru_cache(maxsize=1)
def _read() -> dict[str, Any]:
    contents: dict[str, Any] = yaml.safe_load(TASKS_FILE.read_text(encoding="utf-8"))
    return contents
