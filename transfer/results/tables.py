"""Tables of one task and one recipe each: published rows, our rows, and what a reader must know to compare them."""

from collections.abc import Sequence

from transfer.results.ours import our_rows, own_baseline, supervised_of
from transfer.results.published import published_rows
from transfer.results.reference import Noise, Reference
from transfer.results.repeats import Measurement
from transfer.results.runs import is_on_subset
from transfer.results.table import Group, Legend, Row, Table

NO_RECIPE = "none"

# Shown for tasks of which nothing is published; sizes and single classes stay in the run directory and in csv and json.
HEADLINE_SUFFIXES = ("AP", "AP50", "AP75", "mIoU", "mAP", "top1", "top5")


def build_tables(
    reference: Reference,
    measurements: Sequence[Measurement],
    *,
    tasks: Sequence[str] = (),
    recipes: Sequence[str] = (),
    with_published: bool = True,
) -> list[Table]:
    """Return one table per task and recipe, in the order of the reference's tasks; two recipes never share one.

    Args:
        reference: The published numbers.
        measurements: Ours.
        tasks: Only these; empty = the tasks of the measurements. One without a measurement is shown if named here.
        recipes: Only these, NO_RECIPE for results that state none; empty = all.
        with_published: Whether published rows are shown and compared with.
    """
    keys = dict.fromkeys((item.first.task, item.first.recipe) for item in measurements)
    measured_tasks = {task for task, _ in keys}
    if with_published:
        for task in tasks:
            if task not in measured_tasks:
                keys.update(dict.fromkeys((task, recipe) for recipe in reference.recipes_of(task)))
    order = list(reference.tasks)
    wanted = [
        (task, recipe)
        for task, recipe in keys
        if (not tasks or task in tasks) and (not recipes or (recipe or NO_RECIPE) in recipes)
    ]
    wanted.sort(key=lambda key: order.index(key[0]) if key[0] in order else len(order))
    return [_table(reference, measurements, task, recipe, with_published) for task, recipe in wanted]


def _table(
    reference: Reference, measurements: Sequence[Measurement], task: str, recipe: str | None, with_published: bool
) -> Table:
    legend = Legend()
    selected = [item for item in measurements if (item.first.task, item.first.recipe) == (task, recipe)]
    entries = reference.rows(task, recipe) if with_published else []
    only_departing = bool(selected) and all(item.first.departures for item in selected)
    if only_departing:  # nothing to compare with: one paper is enough to see what the published protocol gives
        entries = [entry for entry in entries if entry.paper == entries[0].paper]
    published = published_rows(entries, reference, legend)
    ours = our_rows(reference, selected, published, legend)
    metrics = _columns(reference, task, recipe, [*published, *ours])
    heads = {metric: reference.metrics.get(metric, metric) for metric in metrics}
    return Table(
        title=reference.tasks.get(task, task),
        about=(_about(reference, task, recipe),),
        groups=(Group("", task, recipe, heads),),
        rows=(*published, *ours),
        remarks=tuple(_remarks(reference, task, recipe, published, ours, selected, with_published)),
        citations=tuple((number, text) for text, number in legend.citations.items()),
        notes=tuple((letter, text) for text, letter in legend.notes.items()),
    )


def _about(reference: Reference, task: str, recipe: str | None) -> str:
    """Return task id and recipe, with what the recipe is."""
    explained = reference.recipes.get(recipe or "")
    return f"task {task}, recipe {recipe or 'not stated'}" + (f": {explained}" if explained else "")


def _columns(reference: Reference, task: str, recipe: str | None, rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the metrics to show: those published for the table, else the headline metrics of ours."""
    published = {metric for row in reference.rows(task, recipe) for metric in row.metrics}
    ours = dict.fromkeys(metric for row in rows for metric in row.cells)
    shown = published or {metric for metric in ours if metric.endswith(HEADLINE_SUFFIXES)} or set(ours)
    known = [metric for metric in reference.metrics if metric in shown]
    return (*known, *(metric for metric in ours if metric in shown and metric not in reference.metrics))


def _remarks(
    reference: Reference,
    task: str,
    recipe: str | None,
    published: Sequence[Row],
    ours: Sequence[Row],
    measurements: Sequence[Measurement],
    with_published: bool,
) -> list[str]:
    """Return what holds for the whole table, general things first."""
    remarks = [*_difference_remarks(published, measurements, reference.usual_weight_decay)]
    remarks += repeats_remarks(measurements)
    if any(row.kind == "ours" for row in ours) and published:
        remarks.append(noise_remark(reference, reference.noise_of(task)))
    if with_published and not published:
        remarks.append("No published numbers for this task and recipe.")
    departing = [item.first for item in measurements if item.first.departures]
    if len({str(run.datasets) for run in departing}) > 1:
        remarks.append("Not all rows with another protocol saw the same data: their notes name it.")
    if published and all(row.kind == "departed" for row in ours) and ours:
        shown = reference.papers[published[0].entries[0].paper].label
        remarks.append(f"Of the published rows only those of {shown} are shown: no run here follows their protocol.")
    if any(not entry.recipe_is_stated for row in published for entry in row.entries) and recipe is not None:
        remarks.append(f"Recipe by convention: {reference.recipe_reasons[task]}.")
    is_unpublished = not reference.recipes_of(task)
    return remarks + (reference.notes(task, recipe) if published or (with_published and is_unpublished) else [])


def repeats_remarks(measurements: Sequence[Measurement]) -> list[str]:
    """Return what the standard deviations of ours are."""
    repeated = [item.first for item in measurements if len(item.runs) > 1]
    remarks = ["Standard deviations are those of a sample (n - 1) over our runs."] if repeated else []
    if any(is_on_subset(run) for run in repeated):
        remarks.append(
            "Repeats over seeds are repeats over subsets: every seed trains on images of its own; deviations hold both."
        )
    return remarks


def _difference_remarks(published: Sequence[Row], measurements: Sequence[Measurement], usual: float) -> list[str]:
    """Return what the numbers in brackets are measured against."""
    remarks = []
    if any(cell.supervised is not None for row in published for cell in row.cells.values()):
        remarks.append(
            "In brackets: difference to the published supervised row of this recipe, if possible of the same paper."
        )
    elif published:
        remarks.append("No supervised row is published for this recipe: published rows have no difference.")
    following = [item for item in measurements if not item.first.departures]
    departing = [item for item in measurements if item.first.departures]
    for items, whose in ((following, "Our rows"), (departing, "Our rows with another protocol")):
        supervised = supervised_of(items)
        baselines = [own_baseline(supervised, item, usual) for item in items if item not in supervised]
        if not baselines:
            continue
        labels = list(dict.fromkeys(f'"{item.first.label}"' for item in baselines if item))
        if labels:
            remarks.append(f"{whose}: difference to our own supervised row, {' or '.join(labels)}.")
        if None in baselines:
            which = whose if not labels else "Some of them"
            same = "protocol and images" if any(is_on_subset(item.first) for item in items) else "protocol"
            remarks.append(f"{which} have no difference: there is no supervised run of ours with the same {same}.")
    return remarks


def noise_remark(reference: Reference, noise: Noise | None) -> str:
    """Return what the mark means, or that nothing can be marked."""
    if noise is None:
        return "Nobody has measured the run-to-run noise of this task: no number of ours is marked."

    def listed(values: dict[str, float]) -> str:
        return ", ".join(f"{reference.metrics[metric]} {value:g}" for metric, value in values.items())

    if noise.std:
        return (
            "* is further from the published number of the same method and epochs than run-to-run noise explains: "
            "|difference| > 2 s sqrt(1/n + 1/m), n our runs, m the published ones (1 if not stated), "
            f"s: {listed(dict(noise.std))} ({noise.source})."
        )
    return (
        "* is further from the published number of the same method and epochs than run-to-run noise explains: "
        f"|difference| > {listed(dict(noise.difference))} ({noise.source}); other metrics are not judged."
    )
