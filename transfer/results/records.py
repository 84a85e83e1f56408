"""Tables for programs: csv with one row per number, and json. Both hold all metrics, unrounded."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from transfer.results import cells
from transfer.results.reference import Reference
from transfer.results.runs import LeftOut
from transfer.results.table import Cell, Row, Table

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
)


def render_csv(tables: Sequence[Table]) -> str:
    """Return one line per number, with CSV_FIELDS as the head; lists are joined by "; ", what is unknown is empty."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    for table in tables:
        for row in table.rows:
            for metric, cell in row.cells.items():
                writer.writerow({**_row_fields(table, row), "metric": metric, **_cell_fields(cell)})
    return stream.getvalue()


def _row_fields(table: Table, row: Row) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "task": table.task,
        "recipe": table.recipe,
        "kind": row.kind,
        "pretraining": row.name,
        "epochs": row.epochs,
    }
    if row.entries:
        first = row.entries[0]
        fields["variant"] = first.variant
        fields["paper"] = "; ".join(entry.paper for entry in row.entries)
        fields["table"] = "; ".join(entry.table or cells.NOTHING for entry in row.entries)
        fields["confidence"] = "; ".join(entry.confidence for entry in row.entries)
    if row.measurement:
        run = row.measurement.first
        fields["seeds"] = "; ".join("none" if item.seed is None else str(item.seed) for item in row.measurement.runs)
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
    """Return a number without the last binary digits, which only differences of decimals have."""
    return None if value is None else round(value, 6)


def render_json(tables: Sequence[Table], reference: Reference, left_out: Sequence[LeftOut]) -> str:
    """Return everything as one JSON object.

    {"format", "schema", "tables": [TABLE], "left_out": [{"path", "reason"}]}.
    TABLE: {"task", "recipe", "title", "metrics", "rows": [ROW], "remarks", "citations", "notes"}.
    ROW: {"kind", "pretraining", "epochs", "cells": {metric: CELL}, "citations", "notes"}, with "variant" and
    "published_in" if it is published, with "runs", "weights_sha256", "config_digest" and "departures" if it is ours.
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
        "task": table.task,
        "recipe": table.recipe,
        "title": table.title,
        "metrics": list(table.metrics),
        "rows": [_json_row(row, reference) for row in table.rows],
        "remarks": list(table.remarks),
        "citations": {str(number): text for number, text in table.citations},
        "notes": dict(table.notes),
    }


def _json_row(row: Row, reference: Reference) -> dict[str, Any]:
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
                "paper": entry.paper,
                "citation": reference.papers[entry.paper].citation,
                "table": entry.table,
                "source": reference.sources[entry.source],
                "confidence": entry.confidence,
            }
            for entry in row.entries
        ]
    if row.measurement:
        run = row.measurement.first
        content["weights_sha256"] = run.weights_sha256
        content["config_digest"] = run.config_digest
        content["departures"] = list(run.departures)
        content["runs"] = [
            {"path": str(item.path), "seed": item.seed, "hours": item.hours, "metrics": dict(item.metrics)}
            for item in row.measurement.runs
        ]
    return content
