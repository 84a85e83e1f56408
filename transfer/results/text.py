"""Tables for a terminal: aligned columns, our rows marked, legends wrapped, no line wider than the terminal."""

import re
import textwrap
from collections.abc import Sequence

from transfer.results import cells
from transfer.results.table import KINDS, Cell, Group, Row, Table

NARROWEST = 60
WIDEST_LEGEND = 120  # longer lines of prose are hard to read
GAP = "  "
GROUP_GAP = " | "
MARKERS = {"quoted": "  ", "published": "  ", "ours": "> ", "departed": "~ "}
NARROWEST_NAME = 12
WIDEST_NAME = 30
WIDEST_POINTERS = 14
HEAD_EPOCHS = "epochs"


def render(tables: Sequence[Table], width: int) -> str:
    """Return all tables as plain text.

    Columns that do not fit stand below the others; of a paper's table the differences are left out before that.

    Args:
        tables: What to write.
        width: Characters per line, at least NARROWEST.
    """
    return "\n\n".join(_table(table, width) for table in tables) + "\n"


def _table(table: Table, width: int) -> str:
    layout = _Layout(table, width)
    grids = [line for blocks in layout.grids for line in ("", *_grid(layout, blocks))]
    title = f"{table.id}: {table.title}" if table.id else table.title
    about = [line for text in table.about for line in _wrap(text, "", width)]
    return "\n".join([*_wrap(title, "", width), *about, *grids, "", *_legend(layout)])


class _Column:
    """Widths of one metric's column: number, mark and difference are aligned by themselves."""

    def __init__(self, table: Table, key: str, head: str, *, with_differences: bool) -> None:
        found = [row.cells[key] for row in table.rows if key in row.cells]
        self.key = key
        self.head = head
        self.with_differences = with_differences
        spreads = [len(self._spread(cell)) for cell in found]
        self.number_width = max([len(cells.number(cell.value)) for cell in found] + spreads, default=1)
        difference_width = max((len(self._difference(cell)) for cell in found), default=0)
        has_mark = any(cells.mark(cell) for cell in found)
        # The mark stands where the blank before the difference would be.
        self.width = max(
            len(self.head), self.number_width + (1 if difference_width or has_mark else 0) + difference_width
        )

    def _difference(self, cell: Cell) -> str:
        return cells.difference(cell) if self.with_differences else ""

    def _spread(self, cell: Cell) -> str:
        return "" if cell.std is None else f"{cells.PLUS_MINUS}{cells.number(cell.std)}"

    def text(self, row: Row) -> str:
        """Return the number, its mark and its difference."""
        cell = row.cells.get(self.key)
        if cell is None:
            return cells.NOTHING.rjust(self.number_width).ljust(self.width)
        value = cells.number(cell.value).rjust(self.number_width)
        return f"{value}{cells.mark(cell) or ' '}{self._difference(cell)}".ljust(self.width)[: self.width]

    def spread(self, row: Row) -> str:
        """Return the standard deviation, to stand below the number."""
        cell = row.cells.get(self.key)
        return ("" if cell is None else self._spread(cell)).rjust(self.number_width).ljust(self.width)

    def headline(self) -> str:
        """Return the head, above the numbers."""
        return self.head.ljust(self.width)


class _Block:
    """Columns of one group that stand side by side, below the group's title."""

    def __init__(self, group: Group, columns: Sequence[_Column]) -> None:
        self.group = group
        self.columns = columns
        inner = sum(column.width for column in columns) + len(GAP) * (len(columns) - 1)
        self.width = max(inner, len(group.title))

    def line(self, texts: Sequence[str]) -> str:
        """Return one line of the block from the texts of its columns."""
        return GAP.join(texts).ljust(self.width)

    def title(self) -> str:
        """Return the group's title, within a rule if there is room for one."""
        if len(self.group.title) + 4 > self.width:
            return self.group.title.center(self.width)
        return f" {self.group.title} ".center(self.width, "-")


class _Layout:
    """How a table is laid out in the given width: widths of its columns, and what stands below what."""

    def __init__(self, table: Table, width: int) -> None:
        self.table = table
        self.width = width
        self.pointer_width = min(WIDEST_POINTERS, max((len(cells.pointers(row)) for row in table.rows), default=0))
        self.longest_name = max((len(row.name) for row in table.rows), default=0)
        self.side_by_side = self._around(self._name_width(WIDEST_NAME)) + self._blocks_width(self._blocks(True))
        several = len(table.groups) > 1
        self.shows_differences = table.shows_differences and (not several or self.side_by_side <= width)
        self.grids = self._folded(self._blocks(self.shows_differences))

    @property
    def leaves_differences_out(self) -> bool:
        """Whether there is no room for the differences."""
        return self.table.shows_differences and not self.shows_differences

    def name_width(self, blocks: Sequence[_Block]) -> int:
        """Return the width of the names beside these blocks."""
        return self._name_width(self.width - self._around(0) - self._blocks_width(blocks))

    def _name_width(self, room: int) -> int:
        return max(NARROWEST_NAME, min(WIDEST_NAME, self.longest_name, room))

    def _around(self, name_width: int) -> int:
        """Return the width of everything but the blocks: marker, name, epochs, pointers."""
        return 2 + name_width + len(GAP) + len(HEAD_EPOCHS) + len(GAP) + len(GAP) + self.pointer_width

    def _blocks(self, with_differences: bool) -> list[_Block]:
        return [
            _Block(
                group,
                [
                    _Column(self.table, key, head, with_differences=with_differences)
                    for key, head in zip(group.keys, group.heads.values(), strict=True)
                ],
            )
            for group in self.table.groups
        ]

    def _blocks_width(self, blocks: Sequence[_Block]) -> int:
        return sum(block.width for block in blocks) + len(GROUP_GAP) * (len(blocks) - 1)

    def _folded(self, blocks: Sequence[_Block]) -> list[list[_Block]]:
        """Return the blocks in as many grids as are needed for each to fit; a grid goes below the one before."""
        room = self.width - self._around(NARROWEST_NAME)
        grids: list[list[_Block]] = [[]]
        for block in blocks:
            for part in _parts(block, room):
                if grids[-1] and self._blocks_width([*grids[-1], part]) > room:
                    grids.append([])
                grids[-1].append(part)
        return grids


def _parts(block: _Block, room: int) -> list[_Block]:
    """Return a block that is too wide in parts that fit, else the block itself."""
    if block.width <= room:
        return [block]
    parts: list[list[_Column]] = [[]]
    for column in block.columns:
        if parts[-1] and _Block(block.group, [*parts[-1], column]).width > room:
            parts.append([])
        parts[-1].append(column)
    return [_Block(block.group, columns) for columns in parts]


def _grid(layout: _Layout, blocks: Sequence[_Block]) -> list[str]:
    """Return the lines of the head and of all rows."""
    name_width = layout.name_width(blocks)
    start = 2 + name_width + len(GAP) + len(HEAD_EPOCHS) + len(GAP)
    lines = []
    if any(block.group.title for block in blocks):
        lines.append(" " * start + GROUP_GAP.join(block.title() for block in blocks))
    heads = GROUP_GAP.join(block.line([column.headline() for column in block.columns]) for block in blocks)
    lines.append(GAP.join(["  " + "pretraining".ljust(name_width), HEAD_EPOCHS, heads]).rstrip())
    width = start + len(heads) + (len(GAP) + layout.pointer_width if layout.pointer_width else 0)
    for kind in KINDS:
        rows = [row for row in layout.table.rows_of(kind) if not _stands_elsewhere(layout.table, row, blocks)]
        if rows:
            lines.append(f"  -- {cells.KIND_TITLES[kind]} ".ljust(width, "-")[: max(width, layout.width)])
            for row in rows:
                lines += _row(row, blocks, name_width, layout.pointer_width)
    return lines


def _stands_elsewhere(table: Table, row: Row, blocks: Sequence[_Block]) -> bool:
    """Whether a row of ours would be dashes alone, since its numbers stand in the columns above or below."""
    here = {column.key for block in blocks for column in block.columns}
    shown = row.cells.keys() & set(table.metrics)
    return bool(row.measurements and shown) and not shown & here


def _row(row: Row, blocks: Sequence[_Block], name_width: int, pointer_width: int) -> list[str]:
    """Return the lines of a row: long names and pointers go on below, and so do standard deviations."""
    names = textwrap.wrap(row.name, name_width) or [""]
    pointers = _wrap_pointers(cells.pointers(row), pointer_width)
    values = [GROUP_GAP.join(block.line([column.text(row) for column in block.columns]) for block in blocks)]
    runs = cells.runs(row, [block.group for block in blocks])
    if runs:
        spreads = (block.line([column.spread(row) for column in block.columns]) for block in blocks)
        values.append(GROUP_GAP.join(spreads))
        if len(names) == 1:
            names.append(f"  {runs}")
    blank = GROUP_GAP.join(" " * block.width for block in blocks)
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


def _legend(layout: _Layout) -> list[str]:
    table, width = layout.table, layout.width
    lines: list[str] = []
    if table.rows_of("ours") or table.rows_of("departed"):
        lines.append("  > ours" + ("; ~ ours with another protocol" if table.rows_of("departed") else ""))
    remarks = list(table.all_remarks if layout.shows_differences else table.remarks)
    if layout.leaves_differences_out:
        remarks.append(f"The differences to the supervised row are left out: they need --width {layout.side_by_side}.")
    for remark in remarks:
        lines += _wrap(remark.removeprefix("* "), "  * " if remark.startswith("* ") else "  - ", width)
    for number, text in table.citations:
        lines += _wrap(text, f"  [{number}] ", width)
    for letter, text in table.notes:
        lines += _wrap(text, f"  {letter}  ", width)
    return lines


def _wrap(text: str, first: str, width: int) -> list[str]:
    width = min(width, WIDEST_LEGEND)
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False
    ) or [first]
