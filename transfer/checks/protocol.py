"""How a run's config stands to the published protocol that it names.

tasks.yaml holds what the papers decide; all other keys are compared with the config that is shipped for the protocol.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transfer.checks.findings import WARNING
from transfer.config import NOT_IN_DIGEST, load_config
from transfer.tasks import (
    NOTHING,
    Task,
    config_file,
    departures,
    load_init_values,
    load_tasks,
    pairs,
    published_values,
)
from transfer.weights import WeightsRecord

# First part of a key -> what it belongs to, for people.
GROUPS = {
    "MODEL": "network",
    "SOLVER": "schedule",
    "INPUT": "images",
    "DATASETS": "data",
    "DATALOADER": "data",
    "TEST": "evaluation",
    "TRANSFER": "mapper and optimiser",
}


def published_of(cfg: Any, weights: WeightsRecord) -> dict[str, Any]:
    """What the task and the kind of weights ask for, by dotted key; empty for a task of the user's own."""
    task = load_tasks().get(cfg.TRANSFER.TASK)
    return _published(task, cfg, weights) if task else {}


def departures_of(cfg: Any, weights: WeightsRecord, unscaled: Mapping[str, Any] = NOTHING) -> list[str]:
    """Where the config is not its task's published protocol, in sentences; empty for a task of the user's own.

    Compared are the values of tasks.yaml, and whatever else differs from the task's shipped config for this kind of
    weights. No departures are NOT_IN_DIGEST, the row's label, and what the task accepts.

    Args:
        cfg: Resolved config.
        weights: Record of MODEL.WEIGHTS.
        unscaled: Dotted key -> value before --auto-scale changed it. The linear rule is no departure: tables name it
            in a footnote, with batch, lr and GPUs.
    """
    task = load_tasks().get(cfg.TRANSFER.TASK)
    if task is None:
        return []
    compared = cfg.clone()
    compared.defrost()
    compared.merge_from_list([word for pair in unscaled.items() for word in pair])
    return departures({**_shipped(task, cfg), **_published(task, cfg, weights)}, compared, task.accepts)


def check_task_is_meant(cfg: Any, weights: WeightsRecord) -> list[str]:
    """Refuse a config under the name of one protocol that is exactly another: its row would stand in the wrong table.

    Raises:
        ValueError: If so; names the other one.
    """
    task = load_tasks().get(cfg.TRANSFER.TASK)
    if task is None or not departures(_published(task, cfg, weights), cfg, task.accepts):
        return []
    keys = {key for key, _ in pairs(cfg)}
    for other in load_tasks().values():
        # A protocol of a model that the installed Detectron2 lacks may have keys that this config has not.
        if keys.issuperset(other.values) and not departures(_published(other, cfg, weights), cfg, other.accepts):
            raise ValueError(
                f"TRANSFER.TASK is {cfg.TRANSFER.TASK}, but the config is exactly {other.name} ({other.title}, recipe "
                f"{other.recipe}). Append TRANSFER.TASK {other.name}"
            )
    return []


def grouped(sentences: Sequence[str]) -> dict[str, list[str]]:
    """Departures by what they belong to; the order within a group stays."""
    groups: dict[str, list[str]] = {}
    for sentence in sentences:
        groups.setdefault(GROUPS.get(sentence.split(".")[0], "others"), []).append(sentence)
    return groups


def departure_notes(task: str, sentences: Sequence[str]) -> list[str]:
    """A warning per group of departures, for the log."""
    return [
        f"{WARNING}not as published in {task}, {group}: {'; '.join(members)}."
        for group, members in grouped(sentences).items()
    ]


def _shipped(task: Task, cfg: Any) -> dict[str, Any]:
    """Values of the task's own config file that neither tasks.yaml nor the weights decide."""
    apart = {*NOT_IN_DIGEST, "TRANSFER.LABEL", *(key for values in load_init_values().values() for key in values)}
    shipped = load_config(config_file(task, cfg.TRANSFER.INIT))
    return {key: value for key, value in pairs(shipped) if key not in apart}


def _published(task: Task, cfg: Any, weights: WeightsRecord) -> dict[str, Any]:
    # The input of converted weights belongs to them, and check_preprocess compares it with their record.
    belongs_to_weights = cfg.TRANSFER.INIT == "converted" and weights.preprocess is not None
    return published_values(task, cfg.TRANSFER.INIT, with_input=not belongs_to_weights)
