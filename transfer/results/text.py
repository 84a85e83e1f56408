"""Tables for a terminal: aligned columns, our rows marked, legends wrapped, no line wider than 120 columns."""

import re
import textwrap
from collections.abc import Sequence

from transfer.results import cells
from transfer.results.reference import Reference
from transfer.results.table import KINDS, Cell, Row, Table

WIDTH = 120
GAP = "  "
MARKERS = {"published": "  ", "ours": "> ", "departed": "~ "}
NARROWEST_NAME = 12
WIDEST_NAME = 30
WIDEST_POINTERS = 14
HEAD_EPOCHS = "epochs"


def render(tables: Sequence[Table], reference: Reference) -> str:
    """Return all tables as plain text."""
    return "\n\n".join(_table(table, reference) for table in tables) + "\n"


def _table(table: Table, reference: Reference) -> str:
    pointer_width = min(WIDEST_POINTERS, max((len(cells.pointers(row)) for row in table.rows), default=0))
    around = 2 + len(GAP) + len(HEAD_EPOCHS) + len(GAP) + pointer_width
    grids = []
    for columns in _folded([_Column(table, metric) for metric in table.metrics], WIDTH - around - NARROWEST_NAME):
        longest = max((len(row.name) for row in table.rows), default=0)
        room = WIDTH - around - _width(columns)
        grids += ["", *_grid(table, columns, max(NARROWEST_NAME, min(WIDEST_NAME, longest, room)), pointer_width)]
    subtitle = cells.subtitle(table, reference.recipes.get(table.recipe or ""))
    return "\n".join([table.title, *_wrap(subtitle, ""), *grids, "", *_legend(table)])


def _width(columns: Sequence["_Column"]) -> int:
    return sum(len(GAP) + column.width for column in columns)


def _folded(columns: Sequence["_Column"], room: int) -> list[list["_Column"]]:
    """Return the columns in as many groups as are needed for each to fit into the room; a group goes below the last."""
    groups: list[list[_Column]] = [[]]
    for column in columns:
        if groups[-1] and _width([*groups[-1], column]) > room:
            groups.append([])
        groups[-1].append(column)
    return groups


def _grid(table: Table, columns: Sequence["_Column"], name_width: int, pointer_width: int) -> list[str]:
    """Return the lines of the head and of all rows."""
    heads = [
        "  " + "pretraining".ljust(name_width),
        HEAD_EPOCHS,
        *(column.head.ljust(column.width) for column in columns),
    ]
    lines = [GAP.join(heads).rstrip()]
    width = 2 + name_width + len(GAP) + len(HEAD_EPOCHS) + _width(columns) + len(GAP) + pointer_width
    for kind in KINDS:
        rows = table.rows_of(kind)
        if rows:
            lines.append(f"  -- {cells.KIND_TITLES[kind]} ".ljust(width, "-").rstrip())
            for row in rows:
                lines += _row(row, columns, name_width, pointer_width)
    return lines


class _Column:
    """Widths of one metric's column: number, mark and difference are aligned by themselves."""

    def __init__(self, table: Table, metric: str) -> None:
        found = [row.cells[metric] for row in table.rows if metric in row.cells]
        self.metric = metric
        self.head = table.heads[metric]
        self.number_width = max((len(cells.number(cell.value)) for cell in found), default=1)
        difference_width = max((len(cells.difference(cell)) for cell in found), default=0)
        has_mark = any(cells.mark(cell) for cell in found)
        # The mark stands where the blank before the difference would be.
        self.width = max(
            len(self.head), self.number_width + (1 if difference_width or has_mark else 0) + difference_width
        )

    def text(self, cell: Cell | None) -> str:
        """Return the number, its mark and its difference."""
        if cell is None:
            return cells.NOTHING.rjust(self.number_width).ljust(self.width)
        value = cells.number(cell.value).rjust(self.number_width)
        return f"{value}{cells.mark(cell) or ' '}{cells.difference(cell)}".ljust(self.width)[: self.width]

    def spread(self, cell: Cell | None) -> str:
        """Return the standard deviation, to stand below the number."""
        text = "" if cell is None or cell.std is None else f"{cells.PLUS_MINUS}{cells.number(cell.std)}"
        return text.rjust(self.number_width).ljust(self.width)


def _row(row: Row, columns: Sequence[_Column], name_width: int, pointer_width: int) -> list[str]:
    """Return the lines of a row: long names and pointers go on below, and so do standard deviations."""
    names = textwrap.wrap(row.name, name_width) or [""]
    pointers = _wrap_pointers(cells.pointers(row), pointer_width)
    values = [GAP.join(column.text(row.cells.get(column.metric)) for column in columns)]
    if row.num_runs > 1:
        values.append(GAP.join(column.spread(row.cells.get(column.metric)) for column in columns))
        if len(names) == 1:
            names.append(f"  {row.num_runs} runs")
    blank = " " * len(values[0])
    lines = []
    for index in range(max(len(names), len(pointers), len(values))):
        name = names[index] if index < len(names) else ""
        lines.append(
            GAP.join(
                [
                    (MARKERS[row.kind] if index == 0 else "  ") + name.ljust(name_width),
                    (cells.epochs(row) if index == 0 else "").rjust(len(HEAD_EPOCHS)),
                    values[index] if index < len(values) else blank,
                    pointers[index] if index < len(pointers) else "",
                ]
            ).rstrip()
        )
    return lines


def _wrap_pointers(pointers: str, width: int) -> list[str]:
    """Return the pointers in lines, broken after commas and blanks."""
    lines = [""]
    for piece in re.findall(r"[^, ]+[, ]?", pointers):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return lines


def _legend(table: Table) -> list[str]:
    lines: list[str] = []
    if table.rows_of("ours") or table.rows_of("departed"):
        lines.append("  > ours" + ("; ~ ours with another protocol" if table.rows_of("departed") else ""))
    for remark in table.remarks:
        lines += _wrap(remark.removeprefix("* "), "  * " if remark.startswith("* ") else "  - ")
    for number, text in table.citations:
        lines += _wrap(text, f"  [{number}] ")
    for letter, text in table.notes:
        lines += _wrap(text, f"  {letter}  ")
    return lines


def _wrap(text: str, first: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False
    ) or [first]
