"""What a results table is, before anybody decides how it looks."""

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from transfer.results.reference import Published
from transfer.results.repeats import Measurement

Kind = Literal["quoted", "published", "ours", "departed"]
KINDS: tuple[Kind, ...] = ("quoted", "published", "ours", "departed")  # in the order of a table

# Sums and differences of one-decimal numbers miss by about 1e-14; a border case must not hang on that.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Cell:
    """One number, per cent.

    Attributes:
        value: The number; a mean if `num_runs` > 1; NaN where a paper prints that, never for ours.
        std: Sample standard deviation over our runs, None for one run and for published numbers.
        num_runs: Number of our runs that have the metric; 1 for published numbers.
        supervised: The supervised number it is measured against, None if there is none.
        matched: Mean over those of our runs that `supervised` may be held against; None if these are all.
        published: The published number of the same method and epochs, None if there is none.
        allowed: Largest difference to `published` that known noise explains, None if no noise is known.
    """

    value: float
    std: float | None = None
    num_runs: int = 1
    supervised: float | None = None
    matched: float | None = None
    published: float | None = None
    allowed: float | None = None

    @property
    def difference(self) -> float | None:
        """Difference to the supervised number, None if there is none."""
        if self.supervised is None:
            return None
        return (self.value if self.matched is None else self.matched) - self.supervised

    @property
    def is_outside(self) -> bool | None:
        """Whether the published number is further away than known noise explains; None if that cannot be said."""
        if self.published is None or self.allowed is None:
            return None
        return abs(self.value - self.published) > self.allowed + ROUNDING


@dataclass(frozen=True)
class Row:
    """One row: published, ours, or ours with a protocol that departs from the published one.

    Rows of the kind "quoted" are published in the same table, but under another recipe than that of the columns.

    Attributes:
        epochs: Epochs of pretraining, None if unknown or not applicable.
        cells: By column key (the group's prefix and the metric); may hold metrics that the table does not show.
        citations: Numbers of the table's citations.
        notes: Letters of the table's notes.
        entries: The published rows that say the same or fill one group of columns each (published rows only).
        measurements: Our runs, at most one measurement per group of columns (our rows only).
    """

    kind: Kind
    name: str
    epochs: float | None
    cells: Mapping[str, Cell]
    citations: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    entries: tuple[Published, ...] = ()
    measurements: tuple[Measurement, ...] = ()

    @property
    def num_runs(self) -> int:
        """Number of our runs behind the cell that has most; 0 for a published row."""
        return max((len(measurement.runs) for measurement in self.measurements), default=0)


@dataclass(frozen=True)
class Group:
    """Columns that stand together: the metrics of one task under one recipe.

    Attributes:
        title: Stands above the columns; "" for none.
        task: The task of the numbers.
        recipe: None if the sources do not state one.
        heads: Column head by metric name, in column order.
        prefix: What the keys of the columns begin with, so that two groups may show the same metric.
        also: Further tasks whose published rows stand in these columns.
    """

    title: str
    task: str
    recipe: str | None
    heads: Mapping[str, str]
    prefix: str = ""
    also: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the columns, by which rows hold their cells."""
        return tuple(self.prefix + metric for metric in self.heads)

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks whose published rows stand here."""
        return (self.task, *self.also)

    def cells_of(self, row: Row) -> dict[str, Cell]:
        """Return the row's cells of this group by metric, also of metrics that are not shown."""
        return {key.removeprefix(self.prefix): cell for key, cell in row.cells.items() if key.startswith(self.prefix)}


@dataclass(frozen=True)
class Table:
    """Results side by side: all of one task under one recipe, or a paper's table with several groups of columns.

    Attributes:
        title: For people.
        about: What the columns are: tasks and recipes.
        groups: At least one.
        rows: Published rows, then ours, then ours with a departing protocol.
        remarks: What holds for the whole table.
        citations: Legend of the citation numbers.
        notes: Legend of the note letters.
        id: The paper's table, e.g. "detco/3"; "" for a table of one task.
        shows_differences: Whether differences to supervised rows are printed.
        difference_remark: What the differences are measured against; "" if the remarks say so.
    """

    title: str
    about: tuple[str, ...]
    groups: tuple[Group, ...]
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]
    citations: tuple[tuple[int, str], ...]
    notes: tuple[tuple[str, str], ...]
    id: str = ""
    shows_differences: bool = True
    difference_remark: str = ""

    @property
    def task(self) -> str:
        """The task of the first columns: the only one but for a paper's table."""
        return self.groups[0].task

    @property
    def recipe(self) -> str | None:
        """The recipe of the first columns: the only one but for a paper's table."""
        return self.groups[0].recipe

    @property
    def metrics(self) -> tuple[str, ...]:
        """Keys of all columns: metric names but for a paper's table."""
        return tuple(key for group in self.groups for key in group.keys)

    @property
    def heads(self) -> dict[str, str]:
        """Heads by column key, with the title of the group where there are several."""
        several = len(self.groups) > 1
        return {
            group.prefix + metric: f"{group.title} {head}" if several else head
            for group in self.groups
            for metric, head in group.heads.items()
        }

    @property
    def all_remarks(self) -> tuple[str, ...]:
        """All remarks for a form of the table that prints its differences."""
        return (self.difference_remark, *self.remarks) if self.difference_remark else self.remarks

    def rows_of(self, kind: Kind) -> list[Row]:
        """Return the rows of one kind."""
        return [row for row in self.rows if row.kind == kind]


@dataclass
class Legend:
    """Numbers and letters handed out in the order of first use; equal texts share one."""

    citations: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def cite(self, text: str) -> int:
        """Return the number of a citation."""
        return self.citations.setdefault(text, len(self.citations) + 1)

    def note(self, text: str) -> str:
        """Return the letter of a note: a ... z, aa, ab, ..."""
        if text not in self.notes:
            self.notes[text] = _letters(len(self.notes))
        return self.notes[text]


def _letters(index: int) -> str:
    """Return a, b, ... z, aa, ab, ... for 0, 1, ..."""
    last = string.ascii_lowercase[index % 26]
    return last if index < 26 else _letters(index // 26 - 1) + last
