"""What a results table is, before anybody decides how it looks."""

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from transfer.results.reference import Published
from transfer.results.repeats import Measurement

Kind = Literal["published", "ours", "departed"]
KINDS: tuple[Kind, ...] = ("published", "ours", "departed")  # in the order of a table

# Sums and differences of one-decimal numbers miss by about 1e-14; a border case must not hang on that.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Cell:
    """One number, per cent.

    Attributes:
        value: The number; a mean if `num_runs` > 1.
        std: Sample standard deviation over our runs, None for one run and for published numbers.
        num_runs: Number of our runs that have the metric; 1 for published numbers.
        supervised: The supervised number it is measured against, None if there is none.
        published: The published number of the same method and epochs, None if there is none.
        allowed: Largest difference to `published` that known noise explains, None if no noise is known.
    """

    value: float
    std: float | None = None
    num_runs: int = 1
    supervised: float | None = None
    published: float | None = None
    allowed: float | None = None

    @property
    def difference(self) -> float | None:
        """Difference to the supervised number, None if there is none."""
        return None if self.supervised is None else self.value - self.supervised

    @property
    def is_outside(self) -> bool | None:
        """Whether the published number is further away than known noise explains; None if that cannot be said."""
        if self.published is None or self.allowed is None:
            return None
        return abs(self.value - self.published) > self.allowed + ROUNDING


@dataclass(frozen=True)
class Row:
    """One row: published, ours, or ours with a protocol that departs from the published one.

    Attributes:
        epochs: Epochs of pretraining, None if unknown or not applicable.
        cells: By metric name; may hold metrics that the table does not show.
        citations: Numbers of the table's citations.
        notes: Letters of the table's notes.
        entries: The published rows that say the same (published rows only).
        measurement: Our runs (our rows only).
    """

    kind: Kind
    name: str
    epochs: float | None
    cells: Mapping[str, Cell]
    citations: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    entries: tuple[Published, ...] = ()
    measurement: Measurement | None = None

    @property
    def num_runs(self) -> int:
        """Number of our runs behind the row; 0 for a published one."""
        return len(self.measurement.runs) if self.measurement else 0


@dataclass(frozen=True)
class Table:
    """All results of one task under one recipe.

    Attributes:
        recipe: None if the sources do not state one.
        metrics: Names of the metrics shown, in column order.
        heads: Column head by metric name.
        rows: Published rows, then ours, then ours with a departing protocol.
        remarks: What holds for the whole table.
        citations: Legend of the citation numbers.
        notes: Legend of the note letters.
    """

    task: str
    recipe: str | None
    title: str
    metrics: tuple[str, ...]
    heads: Mapping[str, str]
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]
    citations: tuple[tuple[int, str], ...]
    notes: tuple[tuple[str, str], ...]

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
