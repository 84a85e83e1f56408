"""What there is to show: the tasks with published numbers, and the papers' tables."""

from collections.abc import Mapping, Sequence

from transfer.results.paper_tables import PaperTable
from transfer.results.reference import Reference


def list_tasks(reference: Reference) -> str:
    """Return one line per task: id, number of published rows, recipes, title."""
    width = max(map(len, reference.tasks))
    lines = [f"{'task'.ljust(width)}  rows  title (published rows per recipe)"]
    for task, title in reference.tasks.items():
        counts = {recipe: len(reference.rows(task, recipe)) for recipe in reference.recipes_of(task)}
        recipes = ", ".join(f"{recipe or 'not stated'} {count}" for recipe, count in counts.items())
        lines.append(f"{task.ljust(width)}  {sum(counts.values()):4d}  {title} ({recipes or 'nothing published'})")
    return "\n".join(lines) + "\n"


def list_tables(tables: Mapping[str, PaperTable]) -> str:
    """Return the id and title of each table of the papers and, below, the protocol that fills each group of columns."""
    width = max(map(len, tables))
    lines = [f"{'table'.ljust(width)}  title; below it the TRANSFER.TASK whose runs fill the columns"]
    for table in tables.values():
        lines.append(f"{table.id.ljust(width)}  {table.title}")
        for group in table.groups:
            lines.append(f"{' ' * width}    {group.title}: {_filled_by(group.protocol, group.task, group.nearest)}")
    return "\n".join(lines) + "\n"


def _filled_by(protocol: str | None, task: str, nearest: Sequence[str]) -> str:
    if protocol is not None:
        return protocol
    if nearest:
        return f"no run of ours ({task}); nearest: {', '.join(nearest)}"
    return f"no task of detco-transfer ({task})"


def choose_tables(tables: Mapping[str, PaperTable], ids: Sequence[str]) -> list[PaperTable]:
    """Return the tables of these ids; the id of a table with sub-tables stands for all of them.

    Args:
        tables: All tables by id.
        ids: E.g. "detco/3", "soco/5" or "soco/5a"; empty for all tables.

    Raises:
        ValueError: If there is no such table.
    """
    if not ids:
        return list(tables.values())
    chosen: dict[str, PaperTable] = {}
    for name in ids:
        wanted = name.lower()
        found = [key for key in tables if key == wanted or (key[:-1] == wanted and key[-1].isalpha())]
        if not found:
            of_paper = [key for key in tables if key.startswith(f"{wanted.split('/')[0]}/")]
            hint = f"it has {', '.join(of_paper)}" if of_paper else "--list-tables lists them"
            raise ValueError(f"unknown table {name!r}; {hint}")
        chosen.update({key: tables[key] for key in found})
    return list(chosen.values())
