"""The published transfer numbers: typed access to reference.yaml, validated when it is read.

All metrics are per cent, as printed in the source. A table is identified by (task, recipe); recipe None means that the
source names none and the task has no convention either.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

SCHEMA = 1
REFERENCE_FILE = Path(__file__).with_name("reference.yaml")
SUPERVISED = "supervised_in1k"
CONFIDENCES = ("high", "medium", "low")
VARIANTS = ("plain", "AA")

# libyaml reads the file in a tenth of the time; the pure Python loader gives the same result.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class ReferenceDataError(ValueError):
    """The data file contradicts its own schema; the message names the entry."""


@dataclass(frozen=True)
class Published:
    """One published row of one task.

    Attributes:
        recipe: Recipe of the fine-tuning, by the source or by convention; None if neither says.
        recipe_is_stated: False if `recipe` is None or taken from the convention.
        table: Label of the table in the paper; None for a README or a model zoo.
        pretrain_epochs: None if not stated or not applicable.
        variant: "AA" (with RandAugment) or "plain"; None for everything but DetCo.
        metrics: Per cent by metric name; empty only if `status` says why.
        trials: Number of runs that the number averages, None if not stated.
        std: Standard deviation of one run that the source expects, by metric.
        also_in: Another table that prints the same numbers in the same row: {"paper", "table", "source"}.
    """

    task: str
    paper: str
    table: str | None
    pretrain_method: str
    pretrain_epochs: int | None
    metrics: Mapping[str, float]
    source: str
    confidence: str
    recipe: str | None = None
    recipe_is_stated: bool = True
    variant: str | None = None
    trials: int | None = None
    std: Mapping[str, float] | None = None
    data_fraction: float | None = None
    protocol: str | None = None
    codebase: str | None = None
    best_stage: str | None = None
    status: str | None = None
    note: str | None = None
    also_in: Mapping[str, str] | None = None

    def printed_in(self, paper: str, table: str) -> "Published | None":
        """Return the row as this table prints it, None if it does not."""
        if (self.paper, self.table) == (paper, table):
            return self
        if self.also_in and (self.also_in["paper"], self.also_in["table"]) == (paper, table):
            return replace(self, paper=paper, table=table, source=self.also_in["source"], also_in=None)
        return None

    @property
    def is_supervised(self) -> bool:
        """Whether this is a supervised ImageNet row, which the papers measure the others against."""
        return self.pretrain_method.startswith(SUPERVISED)

    @property
    def name(self) -> str:
        """The row's name for readers, e.g. "DetCo+AA" or "supervised"."""
        return display_name(self.pretrain_method, self.variant)


def display_name(pretrain_method: str, variant: str | None) -> str:
    """Return a published method's name for readers, e.g. "DetCo+AA" for ("DetCo", "AA")."""
    name = pretrain_method.replace(SUPERVISED, "supervised").replace("random_init", "random init")
    return f"{name}+AA" if variant == "AA" else name


@dataclass(frozen=True)
class Noise:
    """Known run-to-run noise of some tasks: per metric either a standard deviation or a largest harmless difference."""

    std: Mapping[str, float]
    difference: Mapping[str, float]
    source: str

    def allowed_difference(self, metric: str, *, num_ours: int, num_published: int) -> float | None:
        """Return the largest difference between two means that counts as noise; None if nothing is known of the metric.

        With a standard deviation s of one run it is two standard deviations of a difference of means,
        2 s sqrt(1/num_ours + 1/num_published). A difference that is called noise as such holds for any number of runs.

        Args:
            metric: Metric name.
            num_ours: Number of our runs, at least 1.
            num_published: Number of published runs, at least 1.
        """
        if metric in self.std:
            return 2 * self.std[metric] * math.sqrt(1 / num_ours + 1 / num_published)
        return self.difference.get(metric)


@dataclass(frozen=True)
class Paper:
    """Where numbers are published: a short label for a table row and a citation for its legend."""

    label: str
    citation: str


@dataclass(frozen=True)
class Reference:
    """Everything in reference.yaml.

    Attributes:
        metrics: Column heads by metric name, in column order.
        recipes: What each recipe is.
        tasks: Title of each task.
        papers: By key, in the order in which comparisons prefer them.
        sources: How the numbers were read.
        results: The published rows, in the order of the papers.
        usual_weight_decay: Of the fine-tuning, in every recipe.
    """

    metrics: Mapping[str, str]
    recipes: Mapping[str, str]
    tasks: Mapping[str, str]
    papers: Mapping[str, Paper]
    sources: Mapping[str, str]
    results: tuple[Published, ...]
    task_notes: tuple[Mapping[str, Any], ...]
    noise: tuple[tuple[frozenset[str], Noise], ...]
    recipe_reasons: Mapping[str, str]
    usual_weight_decay: float

    def rows(self, task: str, recipe: str | None) -> list[Published]:
        """Return the published rows of one table, the papers in their order of preference, each in its own order."""
        rows = [row for row in self.results if (row.task, row.recipe) == (task, recipe)]
        order = list(self.papers)
        return sorted(rows, key=lambda row: order.index(row.paper))

    def recipes_of(self, task: str) -> list[str | None]:
        """Return the recipes under which results of a task are published, in the order of the data."""
        return list(dict.fromkeys(row.recipe for row in self.results if row.task == task))

    def notes(self, task: str, recipe: str | None) -> list[str]:
        """Return what a reader of the table must know about its published rows."""
        return [
            note["note"]
            for note in self.task_notes
            if task in note["tasks"] and ("recipes" not in note or recipe in note["recipes"])
        ]

    def noise_of(self, task: str) -> Noise | None:
        """Return the known noise of a task, None if nobody has measured it."""
        return next((noise for tasks, noise in self.noise if task in tasks), None)

    def baseline(self, row: Published) -> Published | None:
        """Return the supervised row that a published row is measured against, None if there is none of its recipe.

        It is of the same task and recipe: of the same table if that has one, else of the same paper, else the first.
        """
        supervised = [other for other in self.rows(row.task, row.recipe) if other.is_supervised]
        same_paper = [other for other in supervised if other.paper == row.paper]
        same_table = [other for other in same_paper if other.table == row.table]
        return next(iter(same_table + same_paper + supervised), None)


@lru_cache(maxsize=1)
def load_reference(path: Path = REFERENCE_FILE) -> Reference:
    """Read and validate the published numbers.

    Raises:
        ReferenceDataError: If an entry has an unknown task, paper, source, metric or key, or a number is no percentage.
    """
    data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a safe loader: plain data only
    return parse_reference(data)


def parse_reference(data: Mapping[str, Any]) -> Reference:
    """Build the typed reference from the plain data of the file.

    Raises:
        ReferenceDataError: As for `load_reference`.
    """
    if data.get("schema") != SCHEMA:
        raise ReferenceDataError(f"reference data has schema {data.get('schema')!r}, this program reads {SCHEMA}")
    conventions = {task: item for item in data["recipe_when_not_stated"] for task in item["tasks"]}
    reference = Reference(
        metrics=data["metrics"],
        recipes=data["recipes"],
        tasks=data["tasks"],
        papers={key: Paper(**paper) for key, paper in data["papers"].items()},
        sources=data["sources"],
        results=tuple(_published(entry, index, conventions) for index, entry in enumerate(data["results"])),
        task_notes=tuple(data["task_notes"]),
        noise=tuple(
            (frozenset(item["tasks"]), Noise(item.get("std", {}), item.get("difference", {}), item["source"]))
            for item in data["noise"]
        ),
        recipe_reasons={task: item["reason"] for task, item in conventions.items()},
        usual_weight_decay=data["usual_weight_decay"],
    )
    for index, row in enumerate(reference.results):
        _check(reference, row, index)
    listed = [task for note in data["task_notes"] for task in note["tasks"]]
    listed += [task for tasks, _ in reference.noise for task in tasks] + list(conventions)
    if unknown := sorted(set(listed) - set(reference.tasks)):
        raise ReferenceDataError(f"notes, noise or recipe conventions name tasks that do not exist: {unknown}")
    return reference


def _published(entry: Mapping[str, Any], index: int, conventions: Mapping[str, Mapping[str, Any]]) -> Published:
    """Return one entry with its recipe completed from the convention of its task."""
    known = {field.name for field in fields(Published)} - {"recipe_is_stated"}
    if unknown := sorted(set(entry) - known):
        raise ReferenceDataError(f"result {index} has unknown keys {unknown}; known: {sorted(known)}")
    required = (
        "task",
        "paper",
        "table",
        "pretrain_method",
        "pretrain_epochs",
        "metrics",
        "source",
        "confidence",
        "recipe",
    )
    if lacking := [key for key in required if key not in entry]:
        raise ReferenceDataError(f"result {index} lacks {lacking}: {dict(entry)}")
    recipe = entry["recipe"]
    if recipe is not None:
        return Published(**entry)
    convention = conventions.get(entry["task"], {}).get("recipe")
    return Published(**{**entry, "recipe": convention}, recipe_is_stated=False)


def _check(reference: Reference, row: Published, index: int) -> None:
    """Raise ReferenceDataError if a row contradicts the rest of the file."""
    choices: list[tuple[str, object, Sequence[object]]] = [
        ("task", row.task, list(reference.tasks)),
        ("paper", row.paper, list(reference.papers)),
        ("source", row.source, list(reference.sources)),
        ("confidence", row.confidence, CONFIDENCES),
        ("variant", row.variant, (None, *VARIANTS)),
        ("recipe", row.recipe, (None, *reference.recipes)),
    ]
    if row.also_in:
        choices.append(("also_in", sorted(row.also_in), (["paper", "source", "table"],)))
        choices.append(("also_in.paper", row.also_in.get("paper"), list(reference.papers)))
        choices.append(("also_in.source", row.also_in.get("source"), list(reference.sources)))
    for key, value, allowed in choices:
        if value not in allowed:
            raise ReferenceDataError(f"result {index} has {key} {value!r}; allowed: {list(allowed)}")
    for metric, number in row.metrics.items():
        if metric not in reference.metrics:
            raise ReferenceDataError(f"result {index} has an unknown metric {metric!r}")
        if not isinstance(number, (int, float)) or isinstance(number, bool) or not 0 <= number <= 100:
            raise ReferenceDataError(f"result {index} has {metric} {number!r}, not a number in per cent")
    if not row.metrics and row.status is None:
        raise ReferenceDataError(f"result {index} has neither metrics nor a status that says why")
    epochs = row.pretrain_epochs
    if epochs is not None and (not isinstance(epochs, int) or epochs < 1):
        raise ReferenceDataError(f"result {index} has pretrain_epochs {epochs!r}, neither null nor a positive integer")
