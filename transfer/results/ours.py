"""Our rows of a table: against our own supervised row, and against the published row of the same method and epochs."""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from transfer.results.identity import Identity, identify
from transfer.results.published import citation
from transfer.results.reference import SUPERVISED, Noise, Reference
from transfer.results.repeats import Measurement
from transfer.results.runs import Run, common_value, data_of, is_on_subset, trained_on
from transfer.results.table import Cell, Legend, Row


def our_rows(
    reference: Reference,
    measurements: Sequence[Measurement],
    published: Sequence[Row],
    legend: Legend,
    *,
    where: str = "",
    tells_baselines: bool = True,
) -> list[Row]:
    """Return our rows that follow the published protocol, then those that depart from it.

    Args:
        reference: The published numbers, for the known noise.
        measurements: Ours, all of one task and recipe.
        published: Rows that ours may be compared with; empty for no comparison.
        legend: Takes the notes.
        where: What the notes begin with, to tell the columns that they belong to.
        tells_baselines: Whether the notes say what is particular about the differences; False where none are shown.
    """
    measurements = sorted(measurements, key=rank)  # stable: the order given within a rank
    following = [item for item in measurements if not item.first.departures]
    departing = [item for item in measurements if item.first.departures]
    usual = reference.usual_weight_decay
    rows = []
    for items in (following, departing):
        supervised = supervised_of(items)
        for item in items:
            baseline = own_baseline(supervised, item, usual)
            told = f"{where}{_conditions(item, usual)}"
            if tells_baselines:
                told += _baseline_note(item, baseline, supervised, usual)
            if item.first.departures:
                rows.append(_departing_row(item, baseline, legend, told))
            else:
                rows.append(_following_row(reference, item, baseline, published, legend, told))
    return rows


def rank(item: Measurement) -> int:
    """Return the place of a row: random init, supervised, the rest, as in the papers."""
    identity = identify(item.first)
    if identity.pretrain_method == "random_init":
        return 0
    return 1 if identity.is_supervised else 2


def weight_decay(item: Measurement, usual: float) -> float:
    """Return the weight decay of the fine-tuning; runs that do not record it used the usual one."""
    return float(item.first.schedule.get("weight_decay", usual))


def supervised_of(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Return the measurements of supervised weights."""
    return [item for item in measurements if identify(item.first).is_supervised]


def own_baseline(supervised: Sequence[Measurement], ours: Measurement, usual: float) -> Measurement | None:
    """Return our own supervised row that a row of ours is measured against, None if there is none.

    It was fine-tuned on the same data with the same departures, on as many images and with the same lr per image (which
    Detectron2's scaling to other numbers of GPUs keeps). One with the same weight decay goes before one with another
    (SoCo's 2.5e-5 is measured against supervised rows with the usual one), then MSRA's weights, which the papers use,
    before others. On subsets it has at least one run on the same images as the row.

    Args:
        supervised: Where to look for it.
        ours: The row.
        usual: Weight decay of runs that do not record theirs.
    """
    alike = _alike(supervised, ours)
    if is_on_subset(ours.first):
        alike = [item for item in alike if _pairs(ours, item)]
    own = weight_decay(ours, usual)

    def distance(item: Measurement) -> tuple[bool, bool]:
        return weight_decay(item, usual) != own, identify(item.first).pretrain_method != SUPERVISED

    return min(alike, key=distance, default=None)


def _alike(supervised: Sequence[Measurement], ours: Measurement) -> list[Measurement]:
    """Return the supervised measurements with the protocol of a row of ours, but for weight decay and GPUs."""

    def protocol(item: Measurement) -> tuple[object, ...]:
        schedule = item.first.schedule
        iterations, batch, lr = (schedule.get(key, 0) for key in ("iterations", "batch_size", "base_lr"))
        return item.first.departures, item.first.datasets, iterations * batch, round(lr / max(batch, 1), 9)

    wanted = protocol(ours)
    return [item for item in supervised if protocol(item) == wanted]


def _pairs(ours: Measurement, baseline: Measurement) -> list[tuple[Run, Run]]:
    """Return the runs on subsets of a row and of its baseline that saw the same images: those of the same seed."""
    return [
        (mine, other)
        for mine in ours.runs
        for other in baseline.runs
        if mine.seed is not None and (mine.seed, mine.subsets) == (other.seed, other.subsets)
    ]


def _baseline_note(
    ours: Measurement, baseline: Measurement | None, supervised: Sequence[Measurement], usual: float
) -> str:
    """Return what to say if the supervised row has another weight decay or other images, else ""."""
    if identify(ours.first).is_supervised:
        return ""
    if baseline is None:
        missing = " No difference: no supervised run of ours saw the same images, those of the same seed."
        return missing if _alike(supervised, ours) else ""
    own, other = weight_decay(ours, usual), weight_decay(baseline, usual)
    note = "" if own == other else f" Our supervised row has weight decay {other:g}, this one {own:g}."
    if is_on_subset(ours.first):
        seeds = [str(run.seed) for run, _ in _pairs(ours, baseline)]
        if len(seeds) < max(len(ours.runs), len(baseline.runs)):
            which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(seeds)}"
            note += f" Difference to our supervised row over {which} alone: other seeds have other images."
    return note


def _cells(ours: Measurement, baseline: Measurement | None) -> dict[str, Cell]:
    """Return the cells with the differences to our supervised row, which has none itself."""
    supervised = baseline if baseline and not identify(ours.first).is_supervised else None
    return {metric: _cell(metric, ours, supervised) for metric in ours.metrics}


def _cell(metric: str, ours: Measurement, supervised: Measurement | None) -> Cell:
    """Return the cell of a metric; on subsets the difference is over the images that both rows saw."""
    cell = Cell(ours.mean(metric), std=ours.std(metric), num_runs=len(ours.values(metric)))
    if supervised is None or metric not in supervised.metrics:
        return cell
    if not is_on_subset(ours.first):
        return replace(cell, supervised=supervised.mean(metric))
    both = [
        (mine, other) for mine, other in _pairs(ours, supervised) if metric in mine.metrics and metric in other.metrics
    ]
    if not both:
        return cell
    matched = statistics.fmean(mine.metrics[metric] for mine, _ in both)
    return replace(
        cell,
        supervised=statistics.fmean(other.metrics[metric] for _, other in both),
        matched=matched if len(both) < cell.num_runs else None,
    )


def _following_row(
    reference: Reference,
    ours: Measurement,
    baseline: Measurement | None,
    published: Sequence[Row],
    legend: Legend,
    told: str,
) -> Row:
    identity = identify(ours.first)
    cells = _cells(ours, baseline)
    twin = None
    if identity.obstacle is None:
        twin = next((row for row in published if any(identity.names(entry) for entry in row.entries)), None)
    if twin:
        noise = reference.noise_of(ours.first.task)
        cells = {metric: _compared(metric, cell, twin, noise) for metric, cell in cells.items()}
    comparison = _comparison(reference, identity, cells, twin, legend) if published else ""
    if ours.first.task not in reference.tasks:
        comparison = f"Data: {data_of(ours.first)}."
    note = legend.note(f"{told} {comparison}".strip())
    return Row("ours", ours.first.label, identity.epochs, cells, notes=(note,), measurements=(ours,))


def _departing_row(ours: Measurement, baseline: Measurement | None, legend: Legend, told: str) -> Row:
    departures = "; ".join(ours.first.departures)
    notes = (
        legend.note(f"{told} Data: {data_of(ours.first)}."),
        legend.note(f"Departs from the published protocol, so it is compared with no published number: {departures}."),
    )
    epochs = identify(ours.first).epochs
    return Row("departed", ours.first.label, epochs, _cells(ours, baseline), notes=notes, measurements=(ours,))


def _compared(metric: str, cell: Cell, twin: Row, noise: Noise | None) -> Cell:
    """Return the cell with the published number of the same method and epochs, and what noise explains."""
    if metric not in twin.cells:
        return cell
    num_published = max(entry.trials or 1 for entry in twin.entries)
    allowed = noise.allowed_difference(metric, num_ours=cell.num_runs, num_published=num_published) if noise else None
    return replace(cell, published=twin.cells[metric].value, allowed=allowed)


def _comparison(
    reference: Reference, identity: Identity, cells: dict[str, Cell], twin: Row | None, legend: Legend
) -> str:
    """Return a sentence on how the row compares with the published one."""
    if identity.obstacle:
        return f"Not compared with a published row: {identity.obstacle}."
    if twin is None:
        after = f" after {identity.epochs:.6g} epochs" if identity.epochs else ""
        return f"No published row of {identity.pretrain_method}{after} with this recipe."
    epochs = f", {twin.epochs} epochs" if twin.epochs else ""
    shared = [metric for metric in reference.metrics if metric in cells and cells[metric].published is not None]
    phrases: list[str] = []
    for metric in shared:
        cell = cells[metric]
        if cell.is_outside and cell.published is not None and cell.allowed is not None:
            away = cell.value - cell.published
            side = "above" if away > 0 else "below"
            phrases.append(
                f"{reference.metrics[metric]} is {abs(away):.2f} {side} {cell.published:.1f}, "
                f"noise explains {cell.allowed:.2f}"
            )
    inside = [reference.metrics[metric] for metric in shared if cells[metric].is_outside is False]
    unjudged = [reference.metrics[metric] for metric in shared if cells[metric].is_outside is None]
    phrases += [f"within known noise: {', '.join(inside)}"] if inside else []
    phrases += [f"noise not known: {', '.join(unjudged)}"] if unjudged else []
    sources = ",".join(map(str, sorted({legend.cite(citation(reference, entry)) for entry in twin.entries})))
    told = "; ".join(phrases) or "no metric in common"
    return f'Against the published row "{twin.name}"{epochs} [{sources}]: {told}.'


def _conditions(ours: Measurement, usual: float) -> str:
    """Return how the runs were made: repeats, weights, GPUs, schedule, duration, versions."""
    run = ours.first
    parts = [_repeats(ours), f"on {trained_on(run)}" if is_on_subset(run) else "", _weights(run)]
    parts.append(_schedule(run.schedule, usual))
    hours = [run.hours for run in ours.runs if run.hours is not None]
    if hours:
        each = " each" if len(ours.runs) > 1 else ""
        parts.append(f"{_duration(statistics.fmean(hours))}{each}")
    hardware = common_value([run.hardware for run in ours.runs])
    parts.append(f"on {hardware}" if hardware else "")
    detectron2 = common_value([run.versions.get("detectron2") for run in ours.runs])
    # A commit is named by its first digits.
    parts.append("Detectron2 " + re.sub(r"\b([0-9a-f]{8})[0-9a-f]{32}\b", r"\1", detectron2) if detectron2 else "")
    return ", ".join(part for part in parts if part) + "."


def _repeats(ours: Measurement) -> str:
    seeds = ["none" if run.seed is None else str(run.seed) for run in ours.runs]
    if len(seeds) == 1:
        return f"1 run (seed {seeds[0]})"
    own = ", each with its own images" if is_on_subset(ours.first) else ""
    return f"mean of {len(seeds)} runs (seeds {', '.join(seeds)}{own})"


def _weights(run: Run) -> str:
    if not run.weights_path:
        return "random initialisation"
    path = run.weights_path.split("?")[0]
    name = path if "://" in path else PurePosixPath(path).name
    digest = f" (sha256 {run.weights_sha256[:8]})" if run.weights_sha256 else ""
    # Of a backbone alone, as nearly all weights are, nothing is said.
    parts = f" for {', '.join(run.transferred)}" if len(run.transferred) > 1 else ""
    return f"weights {name}{digest}{parts}"


def _schedule(schedule: Mapping[str, Any], usual: float) -> str:
    """Return the schedule, the weight decay if it is not the usual one, and whether Detectron2 scaled the schedule."""
    num_gpus = schedule.get("num_gpus")
    parts = []
    if num_gpus is not None:
        parts.append("CPU" if num_gpus == 0 else f"{num_gpus} GPU{'s' if num_gpus != 1 else ''}")
    if schedule.get("batch_size") is not None:
        parts.append(f"batch {schedule['batch_size']}")
    if schedule.get("base_lr") is not None:
        parts.append(f"lr {schedule['base_lr']:g}")
    if schedule.get("iterations") is not None:
        parts.append(f"{schedule['iterations']} iterations")
    if schedule.get("weight_decay", usual) != usual:
        parts.append(f"weight decay {schedule['weight_decay']:g}")
    if schedule.get("auto_scaled"):
        parts.append("auto-scaled from the published 8-GPU schedule by the linear rule")
    return ", ".join(parts)


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min"
