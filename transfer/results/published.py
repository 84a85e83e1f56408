"""Published rows of a table, each measured against the supervised row of its own recipe."""

from collections.abc import Sequence

from transfer.results.reference import Published, Reference
from transfer.results.table import Cell, Legend, Row


def published_rows(entries: Sequence[Published], reference: Reference, legend: Legend) -> list[Row]:
    """Return the rows of published entries of one task and recipe: random init, supervised, then in the order given.

    Entries that several papers print with equal numbers become one row that cites them all.
    """
    merged = _merge_equal(entries)
    merged.sort(key=lambda entries: _rank(entries[0]))  # stable: the papers' order within a rank
    return [_row(reference, entries, legend) for entries in merged]


def _rank(row: Published) -> int:
    if row.pretrain_method == "random_init":
        return 0
    return 1 if row.is_supervised else 2


def _merge_equal(rows: Sequence[Published]) -> list[list[Published]]:
    """Collect rows that say the same: method, variant, epochs, conditions, and equal numbers wherever both have one."""
    merged: list[list[Published]] = []
    for row in rows:
        twin = next((entries for entries in merged if all(_agree(row, entry) for entry in entries)), None)
        if twin is None:
            merged.append([row])
        else:
            twin.append(row)
    return merged


def _agree(one: Published, other: Published) -> bool:
    conditions = (
        "pretrain_method",
        "variant",
        "pretrain_epochs",
        "data_fraction",
        "protocol",
        "codebase",
        "best_stage",
    )
    if any(getattr(one, key) != getattr(other, key) for key in conditions):
        return False
    shared = one.metrics.keys() & other.metrics.keys()
    return bool(shared) and all(one.metrics[metric] == other.metrics[metric] for metric in shared)


def _row(reference: Reference, entries: list[Published], legend: Legend) -> Row:
    first = entries[0]
    baseline = None if first.is_supervised else reference.baseline(first)
    supervised = baseline.metrics if baseline else {}
    metrics = {metric: value for entry in reversed(entries) for metric, value in entry.metrics.items()}
    notes = [legend.note(text) for entry in entries for text in entry_notes(reference, entry)]
    return Row(
        kind="published",
        name=first.name,
        epochs=first.pretrain_epochs,
        cells={metric: Cell(value, supervised=supervised.get(metric)) for metric, value in metrics.items()},
        citations=tuple(sorted({legend.cite(citation(reference, entry)) for entry in entries})),
        notes=tuple(dict.fromkeys(notes)),
        entries=tuple(entries),
    )


def citation(reference: Reference, entry: Published) -> str:
    """Return where a row is printed and how it was read, for the legend."""
    paper = reference.papers[entry.paper]
    table = f", {entry.table}" if entry.table else ""
    if entry.also_in:
        table += f" and {reference.papers[entry.also_in['paper']].label}, {entry.also_in['table']}"
    doubt = "" if entry.confidence == "high" else f"; confidence {entry.confidence}"
    convention = "" if entry.recipe_is_stated or entry.recipe is None else "; recipe by convention"
    return f"{paper.citation}{table} [{reference.sources[entry.source]}{doubt}{convention}]"


def entry_notes(reference: Reference, entry: Published) -> list[str]:
    """Return what belongs to this row alone."""
    notes = [text for text in (entry.status, entry.note) if text]
    if entry.protocol:
        notes.append(f"protocol: {entry.protocol}")
    if entry.best_stage:
        notes.append(f"best stage: {entry.best_stage}")
    if entry.trials and entry.std:
        spread = ", ".join(
            f"{reference.metrics[name]} {entry.std[name]:g}" for name in reference.metrics if name in entry.std
        )
        notes.append(f"mean of {entry.trials} runs in {entry.paper}, standard deviations about {spread}")
    return notes
