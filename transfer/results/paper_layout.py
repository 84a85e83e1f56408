"""A paper's table with our rows added: columns of several tasks side by side, each with its own recipe."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from transfer.results.ours import our_rows, rank, weight_decay
from transfer.results.paper_tables import PaperGroup, PaperRow, PaperTable
from transfer.results.published import entry_notes, published_rows
from transfer.results.reference import Published, Reference
from transfer.results.repeats import Measurement
from transfer.results.table import KINDS, Cell, Group, Legend, Row, Table
from transfer.results.tables import noise_remark, repeats_remarks


def build_paper_table(
    paper_table: PaperTable,
    reference: Reference,
    measurements: Sequence[Measurement],
    *,
    with_published: bool = True,
) -> Table:
    """Return a paper's table: its rows as printed, then ours, joined over the columns by their weights.

    Args:
        paper_table: Which table.
        reference: The published numbers.
        measurements: Ours; those of other tasks or recipes than the columns' are left out.
        with_published: Whether published rows are shown and compared with.
    """
    groups = [_group(group, index) for index, group in enumerate(paper_table.groups)]
    legend = Legend()
    published = _published(paper_table, reference, groups, legend) if with_published else []
    selected = measurements_in(paper_table, measurements)
    ours = _ours(paper_table, reference, groups, selected, legend, with_published)
    rows, notes = _lettered([*published, *ours], legend)
    return Table(
        title=paper_table.title,
        about=tuple(_about(group) for group in paper_table.groups),
        groups=tuple(groups),
        rows=rows,
        remarks=tuple(_remarks(paper_table, reference, published, ours, selected)),
        citations=tuple((number, text) for text, number in legend.citations.items()),
        notes=notes,
        id=paper_table.id,
        shows_differences=paper_table.brackets,
        difference_remark=_difference_remark(paper_table, ours),
    )


def measurements_in(paper_table: PaperTable, measurements: Iterable[Measurement]) -> list[Measurement]:
    """Return the measurements that have a place in a table: of the task and recipe of one of its columns."""
    return [
        item
        for item in measurements
        if any(group.takes(item.first.task, item.first.recipe) for group in paper_table.groups)
    ]


def _group(group: PaperGroup, index: int) -> Group:
    return Group(group.title, group.task, group.recipe, group.columns, prefix=f"{index}/", also=group.also)


def _about(group: PaperGroup) -> str:
    """Return what the columns of a group are, and what comes nearest if ours cannot stand there."""
    what = f"{group.title}: {group.protocol or group.task}"
    if group.recipe is not None:
        what += f", recipe {group.recipe}"
    if group.nearest:
        what += f" (never joined with ours; the nearest of our tasks: {', '.join(group.nearest)})"
    return what


def _published(paper_table: PaperTable, reference: Reference, groups: Sequence[Group], legend: Legend) -> list[Row]:
    """Return the paper's rows in its order."""
    usual = _usual_reading(paper_table, reference)
    rows = []
    for row, entries in zip(paper_table.rows, paper_table.entries, strict=True):
        placed = [(entry, groups[paper_table.group_of(entry)]) for entry in entries]
        cells: dict[str, Cell] = {}
        for entry, group in placed:
            supervised = _supervised(paper_table, entry)
            # A paper prints NaN where the pretraining diverged; the note says so.
            numbers = entry.metrics or dict.fromkeys(group.heads, math.nan)
            for metric, number in numbers.items():
                cells[group.prefix + metric] = Cell(number, supervised=supervised.get(metric))
        rows.append(
            Row(
                kind="quoted" if any(entry.recipe != group.recipe for entry, group in placed) else "published",
                name=row.name,
                epochs=next((entry.pretrain_epochs for entry in entries), None),
                cells=cells,
                notes=tuple(legend.note(text) for text in _row_notes(reference, row, entries, usual)),
                entries=entries,
            )
        )
    return rows


def _all(paper_table: PaperTable) -> list[Published]:
    return [entry for entries in paper_table.entries for entry in entries]


def _supervised(paper_table: PaperTable, entry: Published) -> dict[str, float]:
    """Return the numbers of the table's own supervised row for the same task and recipe, none for that row itself."""
    if entry.is_supervised:
        return {}
    found = (other for other in _all(paper_table) if other.is_supervised)
    same = (other for other in found if (other.task, other.recipe) == (entry.task, entry.recipe))
    return next((dict(other.metrics) for other in same), {})


def _reading(reference: Reference, entry: Published) -> str:
    """Return how a number was read, and how sure that is."""
    doubt = "" if entry.confidence == "high" else f"; confidence {entry.confidence}"
    return f"{reference.sources[entry.source]}{doubt}"


def _usual_reading(paper_table: PaperTable, reference: Reference) -> str:
    """Return how most numbers of a table were read."""
    return Counter(_reading(reference, entry) for entry in _all(paper_table)).most_common(1)[0][0]


def _row_notes(reference: Reference, row: PaperRow, entries: Sequence[Published], usual: str) -> list[str]:
    """Return the notes of a row, each once; how it was read only where that is not the table's usual way."""
    notes = [text for text in (row.note, row.absent) if text]
    notes += [text for entry in entries for text in entry_notes(reference, entry)]
    readings = (_reading(reference, entry) for entry in entries)
    notes += [f"read otherwise than the other rows: {reading}" for reading in readings if reading != usual]
    return list(dict.fromkeys(notes))


def _ours(
    paper_table: PaperTable,
    reference: Reference,
    groups: Sequence[Group],
    measurements: Sequence[Measurement],
    legend: Legend,
    with_published: bool,
) -> list[Row]:
    """Return our rows: of each group of columns as in its own task's table, then joined."""
    parts: list[tuple[Group, Row]] = []
    for group, place in zip(groups, paper_table.groups, strict=True):
        selected = [item for item in measurements if place.takes(item.first.task, item.first.recipe)]
        published = _compared_with(paper_table, reference, group) if with_published else []
        where = f"{group.title}: " if len(groups) > 1 else ""
        found = our_rows(reference, selected, published, legend, where=where, tells_baselines=paper_table.brackets)
        parts += [(group, row) for row in found]
    rows = _joined(parts, reference.usual_weight_decay)
    return sorted(rows, key=lambda row: rank(row.measurements[0]))


def _compared_with(paper_table: PaperTable, reference: Reference, group: Group) -> list[Row]:
    """Return the rows that ours are judged against: the table's own before those of other tables, by their names here.

    They are not shown, so that they cite nothing.
    """
    own = [entry for entry in _all(paper_table) if (entry.task, entry.recipe) == (group.task, group.recipe)]
    elsewhere = [
        entry
        for entry in reference.rows(group.task, group.recipe)
        if entry.printed_in(paper_table.paper, paper_table.table) is None
    ]
    rows = published_rows([*own, *elsewhere], reference, Legend())
    return [replace(row, name=_printed_name(paper_table, row)) for row in rows]


def _printed_name(paper_table: PaperTable, published: Row) -> str:
    """Return the name of a published row as the table prints it, its usual one if it stands elsewhere."""
    first = published.entries[0]
    placed = zip(paper_table.rows, paper_table.entries, strict=True)
    return next((row.name for row, entries in placed if first in entries), published.name)


def _joined(parts: Sequence[tuple[Group, Row]], usual: float) -> list[Row]:
    """Return one row per weights file, label and protocol, whatever the number of tasks; what departs stands apart.

    Measurements of one group of columns that tie in all of it (other data, say) share rows by their rank.
    """
    by_weights: dict[tuple[object, ...], dict[tuple[object, ...], list[tuple[Group, Row]]]] = {}
    seen: Counter[tuple[object, ...]] = Counter()
    for group, row in parts:
        run = row.measurements[0].first
        weights = (row.kind, run.weights_sha256 or run.weights_path.split("?")[0], run.label)
        protocol = _protocol(row.measurements[0], usual)
        ordinal = seen[group.prefix, weights, protocol]
        seen[group.prefix, weights, protocol] += 1
        by_weights.setdefault(weights, {}).setdefault((protocol, ordinal), []).append((group, row))
    return [_one_row(found) for apart in by_weights.values() for found in apart.values()]


def _protocol(item: Measurement, usual: float) -> tuple[object, ...]:
    """Return what the numbers of one row share, whatever the tasks' own values: GPUs, scaling, decay, departures.

    Batch, lr and iterations are not compared: tasks differ in them by nature (Cityscapes has 8 or 16 images). Beyond
    the task's own they follow from the departures and, if scaled, from the number of GPUs.
    """
    run = item.first
    departures = frozenset(sentence.partition(", the task's is ")[0] for sentence in run.departures)
    scaled = bool(run.schedule.get("auto_scaled", False))
    return weight_decay(item, usual), run.schedule.get("num_gpus"), scaled, departures


def _one_row(parts: Sequence[tuple[Group, Row]]) -> Row:
    first = parts[0][1]
    return Row(
        kind=first.kind,
        name=first.name,
        epochs=first.epochs,
        cells={group.prefix + metric: cell for group, row in parts for metric, cell in row.cells.items()},
        notes=tuple(dict.fromkeys(letter for _, row in parts for letter in row.notes)),
        measurements=tuple(measurement for _, row in parts for measurement in row.measurements),
    )


def _lettered(rows: Sequence[Row], legend: Legend) -> tuple[tuple[Row, ...], tuple[tuple[str, str], ...]]:
    """Return the rows and the legend's notes with the letters in the order of the rows, not of the columns."""
    texts = {letter: text for text, letter in legend.notes.items()}
    ordered = Legend()
    placed = sorted(rows, key=lambda row: KINDS.index(row.kind))
    again = tuple(replace(row, notes=tuple(ordered.note(texts[letter]) for letter in row.notes)) for row in placed)
    return again, tuple((letter, text) for text, letter in ordered.notes.items())


def _difference_remark(paper_table: PaperTable, ours: Sequence[Row]) -> str:
    """Return what the numbers in brackets are measured against; "" if there are none."""
    if not paper_table.brackets:
        return ""
    text = "In brackets: difference to the supervised row of the same columns"
    return text + (", of ours to our own supervised row if there is one with the same protocol." if ours else ".")


def _remarks(
    paper_table: PaperTable,
    reference: Reference,
    published: Sequence[Row],
    ours: Sequence[Row],
    measurements: Sequence[Measurement],
) -> list[str]:
    """Return what holds for the whole table: recipes and sources first, then the table's own, then what ours are."""
    recipes = dict.fromkeys(group.recipe for group in paper_table.groups if group.recipe)
    remarks = [f"Recipe {recipe}: {reference.recipes[recipe]}." for recipe in recipes]
    if published:
        unstated = dict.fromkeys(
            entry.task for entry in _all(paper_table) if not entry.recipe_is_stated and entry.recipe
        )
        reasons = dict.fromkeys(reference.recipe_reasons[task] for task in unstated)
        remarks += [f"Recipe by convention: {reason}." for reason in reasons]
        paper = reference.papers[paper_table.paper].citation
        usual = _usual_reading(paper_table, reference)
        remarks.append(f"Published numbers: {paper}, {paper_table.table} [{usual}].")
        remarks += paper_table.remarks
    remarks += repeats_remarks(measurements)
    if any(row.kind == "ours" for row in ours) and published:
        filled = dict.fromkeys(item.first.task for item in measurements)
        found = {task: noise_remark(reference, reference.noise_of(task)) for task in filled}
        several = len(set(found.values())) > 1
        remarks += dict.fromkeys(f"{text} This holds for {task}." if several else text for task, text in found.items())
    return remarks
