"""Numbers as readers see them: "39.8", "39.8 (+0.9)", with one decimal as in the papers."""

from transfer.results.table import Cell, Row, Table

PLUS_MINUS = "\u00b1"
NOTHING = "-"
MARK = "*"

KIND_TITLES = {
    "published": "published",
    "ours": "ours",
    "departed": "ours, other protocol: not comparable with published rows",
}


def number(value: float) -> str:
    """Return a value with one decimal."""
    return f"{value:.1f}"


def difference(cell: Cell) -> str:
    """Return the difference to the supervised row in the papers' form, e.g. "(+0.9)"; "" if there is none."""
    if cell.difference is None:
        return ""
    text = f"{cell.difference:+.1f}"
    return f"({text[1:] if text in ('+0.0', '-0.0') else text})"


def mark(cell: Cell) -> str:
    """Return the mark of a number that is outside the published one, else ""."""
    return MARK if cell.is_outside else ""


def whole(cell: Cell | None, plus_minus: str = PLUS_MINUS) -> str:
    """Return everything about a number in one string, e.g. "39.8 +- 0.2* (+0.9)" with the given sign."""
    if cell is None:
        return NOTHING
    spread = f" {plus_minus} {number(cell.std)}" if cell.std is not None else ""
    return " ".join(filter(None, (f"{number(cell.value)}{spread}{mark(cell)}", difference(cell))))


def epochs(row: Row) -> str:
    """Return the epochs of pretraining."""
    return NOTHING if row.epochs is None else f"{row.epochs:.6g}"


def pointers(row: Row) -> str:
    """Return the citations and notes of a row, e.g. "[1,3] a,b"."""
    cited = f"[{','.join(str(citation) for citation in row.citations)}]" if row.citations else ""
    return " ".join(filter(None, (cited, ",".join(row.notes))))


def subtitle(table: Table, recipes: str | None) -> str:
    """Return task id and recipe, with what the recipe is."""
    recipe = table.recipe if table.recipe is not None else "not stated"
    return f"task {table.task}, recipe {recipe}" + (f": {recipes}" if recipes else "")
