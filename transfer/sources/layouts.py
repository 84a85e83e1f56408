"""The table of released checkpoints, known.yaml, as typed records; what each key means is said there."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from detco.artifact import Preprocess

SCHEMA = 1
FILE = Path(__file__).with_name("known.yaml")


@dataclass(frozen=True)
class Form:
    """One way in which a project's file is nested and named; the fields are the keys of known.yaml."""

    outer: str = ""
    take: Mapping[str, str] | None = None
    names: str = "torchvision"
    network: str = "backbone"
    needs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    sizes: Mapping[str, list[int]] | None = None
    not_sizes: Mapping[str, list[int]] | None = None
    has: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    equals: Mapping[str, Any] | None = None
    anonymous: bool = False
    beside: Mapping[str, str] | None = None
    siblings: Mapping[str, str] | None = None
    stated: Mapping[str, str] | None = None
    method: str | None = None
    settings: Mapping[str, str] | None = None

    def describe(self) -> str:
        """Say where the tensors are expected."""
        starts = ["Detectron2's names"] if self.names == "detectron2" else sorted(self.take or {"": ""})
        shown = ", ".join(start or "torchvision's names" for start in starts[:3]) + (", ..." if len(starts) > 3 else "")
        return f"{self.outer or 'top level'}: {shown}"


@dataclass(frozen=True)
class Layout:
    """A project and the forms of its files.

    Attributes:
        name: What `--source` takes.
        title: For people.
        project: Its address.
        seen: Where its layout can be read.
        verified: Whether it was read there.
        preprocess: What the network's input must look like.
        forms: The forms, the first that fits is taken.
        caution: What to know before using the weights; empty if nothing.
        assumes: What of `preprocess` is only assumed where the file has no record; empty if the project's code says it.
        refuse: Why such files are not converted; empty if they are.
    """

    name: str
    title: str
    project: str
    seen: str
    verified: bool
    preprocess: Preprocess
    forms: tuple[Form, ...]
    caution: str = ""
    assumes: str = ""
    refuse: str = ""


@dataclass(frozen=True)
class Known:
    """All that known.yaml holds.

    Attributes:
        layouts: Name to layout.
        refused_pickles: Package to what a plain pickle that needs a name of it is.
        preprocesses: Name to input convention.
    """

    layouts: Mapping[str, Layout]
    refused_pickles: Mapping[str, str]
    preprocesses: Mapping[str, Preprocess]


@lru_cache(maxsize=1)
def load_known(path: Path = FILE) -> Known:
    """Read the table.

    Raises:
        ValueError: If it has another schema, an unknown key or a pattern that is none.
    """
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path.name} has schema {data.get('schema')!r}, this program reads {SCHEMA}")
    preprocesses = {name: Preprocess.from_dict(record) for name, record in data["preprocess"].items()}
    layouts = [_layout(record, preprocesses) for record in data["sources"]]
    return Known({layout.name: layout for layout in layouts}, data["refused_pickles"], preprocesses)


def load_layouts() -> Mapping[str, Layout]:
    """Return every known project by its name."""
    return load_known().layouts


def _layout(record: Mapping[str, Any], preprocesses: Mapping[str, Preprocess]) -> Layout:
    own = {field.name for field in fields(Layout)}
    shared = {key: value for key, value in record.items() if key not in own}
    return Layout(
        **{key: value for key, value in record.items() if key in own and key not in ("forms", "preprocess")},
        preprocess=preprocesses[record["preprocess"]],
        forms=tuple(_form(record["name"], {**shared, **form}) for form in record["forms"]),
    )


def _form(name: str, record: Mapping[str, Any]) -> Form:
    if unknown := sorted(set(record) - {field.name for field in fields(Form)}):
        raise ValueError(f"known.yaml, source {name}: unknown keys {', '.join(unknown)}")
    for pattern in (*record.get("needs", ()), *record.get("lacks", ()), *record.get("beside", {})):
        re.compile(pattern)
    lists = ("needs", "lacks", "has", "without")
    values: dict[str, Any] = {key: tuple(value) if key in lists else value for key, value in record.items()}
    return Form(**values)
