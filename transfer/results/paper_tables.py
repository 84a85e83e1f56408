"""The shape of the papers' tables: typed access to paper_tables.yaml, validated against the published numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from transfer.results.reference import Published, Reference, ReferenceDataError, load_reference

SCHEMA = 1
PAPER_TABLES_FILE = Path(__file__).with_name("paper_tables.yaml")

# libyaml reads the file in a tenth of the time; the pure Python loader gives the same result.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class PaperGroup:
    """Columns that stand together in a paper's table.

    Attributes:
        title: What stands above them.
        task: Id of the numbers' task.
        recipe: Recipe of the columns; numbers of ours must have it.
        columns: Head by metric.
        protocol: Name of the task in tasks.yaml; None if there is none.
        nearest: Protocols that come closest; where there are any, no number of ours may stand in the columns.
        also: Further tasks whose published rows stand in the columns.
    """

    title: str
    task: str
    recipe: str | None
    columns: Mapping[str, str]
    protocol: str | None = None
    nearest: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    def takes(self, task: str, recipe: str | None) -> bool:
        """Whether a number of ours may stand in these columns."""
        return not self.nearest and (task, recipe) == (self.task, self.recipe)


@dataclass(frozen=True)
class PaperRow:
    """A row as the paper prints it.

    Attributes:
        name: As printed.
        method: Its name in reference.yaml; None if the row was found nowhere.
        epochs: Which of several rows of the method; None for the only one.
        variant: Likewise.
        note: What a reader must know.
        absent: Why there are no numbers.
    """

    name: str
    method: str | None = None
    epochs: int | None = None
    variant: str | None = None
    note: str | None = None
    absent: str | None = None

    def holds(self, entry: Published) -> bool:
        """Whether a published entry is part of this row."""
        return (
            entry.pretrain_method == self.method
            and self.epochs in (None, entry.pretrain_epochs)
            and self.variant in (None, entry.variant)
        )


@dataclass(frozen=True)
class PaperTable:
    """A table of a paper.

    Attributes:
        id: E.g. "detco/3", "soco/5a".
        title: Its caption in short.
        paper: Key of the paper in reference.yaml.
        table: Its label there.
        brackets: Whether the paper prints differences to the supervised row.
        groups: Columns, side by side.
        rows: In the order of the paper.
        remarks: What a reader must know.
        entries: The published entries of each row.
    """

    id: str
    title: str
    paper: str
    table: str
    brackets: bool
    groups: tuple[PaperGroup, ...]
    rows: tuple[PaperRow, ...]
    remarks: tuple[str, ...]
    entries: tuple[tuple[Published, ...], ...]

    def group_of(self, entry: Published) -> int:
        """Return the index of the columns that an entry of the table belongs to.

        Raises:
            ReferenceDataError: If there are none.
        """
        for index, group in enumerate(self.groups):
            if entry.task in (group.task, *group.also):
                return index
        raise ReferenceDataError(f"{self.id}: no columns for {entry}")


@lru_cache(maxsize=1)
def load_paper_tables() -> dict[str, PaperTable]:
    """Read all tables by id, in the order of the papers, with the numbers of reference.yaml.

    Raises:
        ReferenceDataError: As for `parse_paper_tables`.
    """
    data = yaml.load(PAPER_TABLES_FILE.read_text(encoding="utf-8"), Loader=_Loader)  # a safe loader: plain data only
    return parse_paper_tables(data, load_reference())


def parse_paper_tables(data: Mapping[str, Any], reference: Reference) -> dict[str, PaperTable]:
    """Build the tables from the plain data of the file.

    Raises:
        ReferenceDataError: If a published entry of a table fits into no row or columns, two stand in one place, or
            a table lacks a key or has an unknown one.
    """
    if data.get("schema") != SCHEMA:
        raise ReferenceDataError(f"paper tables have schema {data.get('schema')!r}, this program reads {SCHEMA}")
    return {item["id"]: _paper_table(item, reference) for item in data["tables"]}


def _paper_table(item: Mapping[str, Any], reference: Reference) -> PaperTable:
    try:
        groups = tuple(_group(group) for group in item["groups"])
        rows = tuple(PaperRow(**row) for row in item["rows"])
        fields = {**item, "groups": groups, "rows": rows, "remarks": tuple(item["remarks"])}
        table = PaperTable(**fields, entries=_entries(item["paper"], item["table"], rows, reference))
    except (KeyError, TypeError) as error:
        raise ReferenceDataError(f"table {item.get('id')} has a missing or an unknown key: {error}") from error
    _check(table)
    return table


def _group(group: Mapping[str, Any]) -> PaperGroup:
    return PaperGroup(
        **{**group, "nearest": tuple(group.get("nearest", ())), "also": tuple(group.get("also", ()))},
    )


def _entries(
    paper: str, label: str, rows: Sequence[PaperRow], reference: Reference
) -> tuple[tuple[Published, ...], ...]:
    """Return the entries of each row; every entry of the table is in exactly one."""
    printed = [found for entry in reference.results if (found := entry.printed_in(paper, label))]
    for entry in printed:
        if sum(row.holds(entry) for row in rows) != 1:
            raise ReferenceDataError(f"{paper} {label}: not exactly one row for {entry}")
    return tuple(tuple(entry for entry in printed if row.holds(entry)) for row in rows)


def _check(table: PaperTable) -> None:
    """Raise ReferenceDataError if an entry has no place of its own in the table."""
    for row, entries in zip(table.rows, table.entries, strict=True):
        places = [table.group_of(entry) for entry in entries]
        if len(set(places)) != len(places):
            raise ReferenceDataError(f"{table.id}: two numbers of row {row.name!r} stand in one place: {places}")
        for entry, place in zip(entries, places, strict=True):
            if hidden := set(entry.metrics) - set(table.groups[place].columns):
                raise ReferenceDataError(f"{table.id}: row {row.name!r} has no column for {sorted(hidden)}")
        if bool(row.absent) == bool(entries):
            raise ReferenceDataError(f"{table.id}: row {row.name!r} needs either published numbers or `absent`")
