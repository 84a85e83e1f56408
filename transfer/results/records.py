"""Tables for programs: csv with one row per number, and json. Both hold all metrics, unrounded."""

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

from transfer.results import cells
from transfer.results.reference import Reference
from transfer.results.repeats import Measurement
from transfer.results.runs import LeftOut
from transfer.results.table import Cell, Group, Row, Table

SCHEMA = 1
FORMAT = "detco-results"
CSV_FIELDS = (
    "task",
    "recipe",
    "kind",
    "pretraining",
    "variant",
    "epochs",
    "metric",
    "value",
    "std",
    "num_runs",
    "seeds",
    "difference_to_supervised",
    "supervised",
    "published",
    "allowed_difference",
    "outside_noise",
    "paper",
    "table",
    "confidence",
    "weights_sha256",
    "config_digest",
    "departures",
    "paper_table",
)


def render_csv(tables: Sequence[Table]) -> str:
    """Return one line per number, with CSV_FIELDS as the head; lists are joined by "; ", what is unknown is empty."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    for table in tables:
        for row in table.rows:
            for group in table.groups:
                fields = {**_row_fields(group, row), "paper_table": table.id}
                for metric, cell in group.cells_of(row).items():
                    writer.writerow({**fields, "metric": metric, **_cell_fields(cell)})
    return stream.getvalue()


def _row_fields(group: Group, row: Row) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "task": group.task,
        "recipe": group.recipe,
        "kind": row.kind,
        "pretraining": row.name,
        "epochs": row.epochs,
    }
    entries = [entry for entry in row.entries if entry.task in group.tasks]
    if entries:
        first = entries[0]
        fields["task"] = first.task
        fields["recipe"] = first.recipe
        fields["variant"] = first.variant
        fields["paper"] = "; ".join(entry.paper for entry in entries)
        fields["table"] = "; ".join(entry.table or cells.NOTHING for entry in entries)
        fields["confidence"] = "; ".join(entry.confidence for entry in entries)
    for measurement in row.measurements:
        if measurement.first.task != group.task:
            continue
        run = measurement.first
        fields["seeds"] = "; ".join("none" if item.seed is None else str(item.seed) for item in measurement.runs)
        fields["weights_sha256"] = run.weights_sha256
        fields["config_digest"] = run.config_digest
        fields["departures"] = "; ".join(run.departures)
    return fields


def _cell_fields(cell: Cell) -> dict[str, Any]:
    return {
        "value": _rounded(cell.value),
        "std": _rounded(cell.std),
        "num_runs": cell.num_runs,
        "difference_to_supervised": _rounded(cell.difference),
        "supervised": _rounded(cell.supervised),
        "published": _rounded(cell.published),
        "allowed_difference": _rounded(cell.allowed),
        "outside_noise": None if cell.is_outside is None else str(cell.is_outside).lower(),
    }


def _rounded(value: float | None) -> float | None:
    """Return a number without the last binary digits, which only differences of decimals have; None for NaN."""
    return None if value is None or math.isnan(value) else round(value, 6)


def render_json(tables: Sequence[Table], reference: Reference, left_out: Sequence[LeftOut]) -> str:
    """Return everything as one JSON object.

    {"format", "schema", "tables": [TABLE], "left_out": [{"path", "reason"}]}.
    TABLE: {"task", "recipe", "title", "metrics", "rows": [ROW], "remarks", "citations", "notes"}; a paper's table has
    {"paper_table": id, "groups": [{"title", "task", "recipe", "columns": {key: metric}}]} instead of task and recipe.
    ROW: {"kind", "pretraining", "epochs", "cells": {key: CELL}, "citations", "notes"}, with "variant" and
    "published_in" if it is published, with "weights_sha256", "config_digest", "departures" and "runs" if it is ours.
    In a paper's table "measurements" holds a list of the last three, each with its "task".
    CELL: {"value", "std", "num_runs", "supervised", "difference_to_supervised", "published", "allowed_difference",
    "outside_noise"}.
    """
    content = {
        "format": FORMAT,
        "schema": SCHEMA,
        "tables": [_json_table(table, reference) for table in tables],
        "left_out": [{"path": str(item.path), "reason": item.reason} for item in left_out],
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _json_table(table: Table, reference: Reference) -> dict[str, Any]:
    return {
        **(_json_groups(table) if table.id else {"task": table.task, "recipe": table.recipe}),
        "title": table.title,
        "metrics": list(table.metrics),
        "rows": [_json_row(table, row, reference) for row in table.rows],
        "remarks": list(table.all_remarks),
        "citations": {str(number): text for number, text in table.citations},
        "notes": dict(table.notes),
    }


def _json_groups(table: Table) -> dict[str, Any]:
    groups = [
        {
            "title": group.title,
            "task": group.task,
            "recipe": group.recipe,
            "columns": dict(zip(group.keys, group.heads, strict=True)),
        }
        for group in table.groups
    ]
    return {"paper_table": table.id, "groups": groups}


def _json_row(table: Table, row: Row, reference: Reference) -> dict[str, Any]:
    content: dict[str, Any] = {
        "kind": row.kind,
        "pretraining": row.name,
        "epochs": row.epochs,
        "cells": {
            metric: {**_cell_fields(cell), "outside_noise": cell.is_outside} for metric, cell in row.cells.items()
        },
        "citations": list(row.citations),
        "notes": list(row.notes),
    }
    if row.entries:
        content["variant"] = row.entries[0].variant
        content["published_in"] = [
            {
                "task": entry.task,
                "paper": entry.paper,
                "citation": reference.papers[entry.paper].citation,
                "table": entry.table,
                "source": reference.sources[entry.source],
                "confidence": entry.confidence,
            }
            for entry in row.entries
        ]
    if row.measurements:
        content["weights_sha256"] = row.measurements[0].first.weights_sha256
        measured = [_json_measurement(item) for item in row.measurements]
        if table.id:
            content["measurements"] = [
                {"task": item.first.task, **fields} for item, fields in zip(row.measurements, measured, strict=True)
            ]
        else:
            content.update(measured[0])
    return content


def _json_measurement(measurement: Measurement) -> dict[str, Any]:
    return {
        "config_digest": measurement.first.config_digest,
        "departures": list(measurement.first.departures),
        "runs": [
            {"path": str(item.path), "seed": item.seed, "hours": item.hours, "metrics": dict(item.metrics)}
            for item in measurement.runs
        ],
    }
