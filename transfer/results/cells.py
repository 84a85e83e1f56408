"""Numbers as readers see them: "39.8", "39.8 (+0.9)", with one decimal as in the papers."""

import math
from collections.abc import Sequence

from transfer.results.table import Cell, Group, Row

PLUS_MINUS = "\u00b1"
NOTHING = "-"
MARK = "*"

KIND_TITLES = {
    "quoted": "published, other recipes: not comparable with the rows below",
    "published": "published",
    "ours": "ours",
    "departed": "ours, other protocol: not comparable with published rows",
}


def number(value: float) -> str:
    """Return a value with one decimal, "NaN" for none."""
    return "NaN" if math.isnan(value) else f"{value:.1f}"


def difference(cell: Cell) -> str:
    """Return the difference to the supervised row in the papers' form, e.g. "(+0.9)"; "" if there is none."""
    if cell.difference is None:
        return ""
    text = f"{cell.difference:+.1f}"
    return f"({text[1:] if text in ('+0.0', '-0.0') else text})"


def mark(cell: Cell) -> str:
    """Return the mark of a number that is outside the published one, else ""."""
    return MARK if cell.is_outside else ""


def whole(cell: Cell | None, *, with_difference: bool = True) -> str:
    """Return everything about a number in one string, e.g. "39.8 +- 0.2* (+0.9)"."""
    if cell is None:
        return NOTHING
    spread = f" {PLUS_MINUS} {number(cell.std)}" if cell.std is not None else ""
    bracket = difference(cell) if with_difference else ""
    return " ".join(filter(None, (f"{number(cell.value)}{spread}{mark(cell)}", bracket)))


def runs(row: Row, groups: Sequence[Group]) -> str:
    """Return the number of our runs in the columns of these groups: "3 runs", "1-3 runs" if they differ; "" for one."""
    places = {(group.task, group.recipe) for group in groups}
    counts = {len(item.runs) for item in row.measurements if (item.first.task, item.first.recipe) in places}
    if max(counts, default=0) < 2:
        return ""
    return f"{max(counts)} runs" if len(counts) == 1 else f"{min(counts)}-{max(counts)} runs"


def epochs(row: Row) -> str:
    """Return the epochs of pretraining."""
    return NOTHING if row.epochs is None else f"{row.epochs:.6g}"


def pointers(row: Row) -> str:
    """Return the citations and notes of a row, e.g. "[1,3] a,b"."""
    cited = f"[{','.join(str(citation) for citation in row.citations)}]" if row.citations else ""
    return " ".join(filter(None, (cited, ",".join(row.notes))))
