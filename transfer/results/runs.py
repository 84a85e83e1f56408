"""Our own numbers: run directories of `detco-transfer`, each ending with a results.json."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = 1
RESULTS_NAME = "results.json"
# What Detectron2's trainer leaves behind before a run is finished.
RUN_TRACES = ("metrics.json", "last_checkpoint")


class RunError(ValueError):
    """A results.json that cannot be used; the message says why."""


class LeftOut(NamedTuple):
    """A folder or file that contributes nothing to the tables, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Run:
    """One fine-tuning run, finished and evaluated.

    Attributes:
        path: The run directory.
        task: Id of the published task; "own data: ..." for data of the user's own.
        recipe: Recipe of the task, None if the task has none.
        label: What the run calls its weights, e.g. "detco 200ep".
        weights_path: Path or URL that the run was started with; "" is random initialisation.
        weights_sha256: Digest of the weights file, None for a URL or random initialisation.
        provenance: What the weights file says about its pretraining.
        transferred: Parts of the detector that started from the weights; empty where the run does not say.
        metrics: Per cent by metric name; metrics without a value are absent.
        departures: How the configuration differs from the task's published protocol, one phrase each.
        config_digest: Digest of the configuration without seed, output folder and weights: equal for repeated runs.
        seed: None if the run was not seeded.
        subsets: Of each part of a training set, number of images and digest of their ids.
        hours: Duration, None if unknown.
        finished: ISO time, "" if unknown.
    """

    path: Path
    task: str
    recipe: str | None
    label: str
    weights_path: str
    weights_sha256: str | None
    provenance: Mapping[str, Any]
    metrics: Mapping[str, float]
    departures: tuple[str, ...]
    config_digest: str
    seed: int | None
    schedule: Mapping[str, Any] = field(default_factory=dict)
    datasets: Mapping[str, Any] = field(default_factory=dict)
    subsets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    transferred: tuple[str, ...] = ()
    hardware: str = ""
    hours: float | None = None
    finished: str = ""


def find_runs(paths: Iterable[Path]) -> tuple[list[Run], list[LeftOut]]:
    """Read every results.json at or below the given paths.

    Args:
        paths: Run directories, folders of run directories at any depth, or results.json files.

    Returns:
        The runs in the order of their paths, each once; and what was left out: paths without a results.json, unfinished
        run directories, and files that cannot be used.
    """
    files: dict[Path, None] = {}  # an ordered set
    left_out: list[LeftOut] = []
    for path in paths:
        found, unfinished = _results_files(path)
        files.update(dict.fromkeys(file.resolve() for file in found))
        left_out += unfinished
        if not path.exists():
            left_out.append(LeftOut(path, "does not exist"))
        elif not found and not unfinished:
            left_out.append(LeftOut(path, f"no {RESULTS_NAME} here or in any folder below"))
    runs: list[Run] = []
    for file in files:
        try:
            runs.append(read_run(file))
        except RunError as error:
            left_out.append(LeftOut(file, str(error)))
    return runs, list(dict.fromkeys(left_out))


def _results_files(path: Path) -> tuple[list[Path], list[LeftOut]]:
    """Return the results.json files at or below a path, and the run directories that never got one."""
    if path.is_file():
        return ([path], []) if path.suffix == ".json" else ([], [LeftOut(path, f"not a folder nor a {RESULTS_NAME}")])
    found = sorted(path.rglob(RESULTS_NAME))
    finished = {file.parent for file in found}
    traces = {trace.parent for name in RUN_TRACES for trace in path.rglob(name)}
    reason = f"no {RESULTS_NAME}: the run is not finished"
    return found, [LeftOut(folder, reason) for folder in sorted(traces - finished)]


def read_run(file: Path) -> Run:
    """Read and validate one results.json.

    Raises:
        RunError: If the file is not JSON, of another schema, or a field is missing or of the wrong kind.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise RunError(f"not JSON ({error}); the run may have been cut off while writing") from error
    if not isinstance(data, dict):
        raise RunError(f"holds a {type(data).__name__}, expected an object")
    if data.get("schema") != SCHEMA:
        raise RunError(f"schema is {data.get('schema')!r}, this program reads {SCHEMA}")
    weights = _get(data, "weights", dict)
    departures = _get(data, "departures", list)
    if not all(isinstance(item, str) for item in departures):
        raise RunError("'departures' holds something that is not text")
    datasets = _optional(data, "datasets", {}, dict)
    return Run(
        path=file.parent,
        task=_get(data, "task", str) or _own_task(datasets, _optional(data, "based_on", "", str)),
        recipe=_get(data, "recipe", str, type(None)) or None,
        label=_get(data, "label", str),
        weights_path=_get(weights, "path", str),
        weights_sha256=_get(weights, "sha256", str, type(None)),
        provenance=_get(weights, "provenance", dict, type(None)) or {},
        transferred=tuple(map(str, _optional(weights, "transferred", [], list))),
        metrics=_metrics(_get(data, "metrics", dict)),
        departures=tuple(departures),
        config_digest=_get(data, "config_digest", str),
        seed=_seed(_get(data, "seed", int, type(None))),
        schedule=_optional(data, "schedule", {}, dict),
        datasets=datasets,
        subsets=_subsets(_optional(data, "subsets", {}, dict)),
        versions=_optional(data, "versions", {}, dict),
        hardware=_optional(data, "hardware", "", str),
        hours=_optional(data, "hours", None, int, float),
        finished=_optional(data, "finished", "", str),
    )


def _own_task(datasets: Mapping[str, Any], based_on: str) -> str:
    """Return what stands for the task on data of the user's own: results share a table if test set and recipe agree."""
    return f"own data: {_words(datasets.get('test'))}" + (f", trained as {based_on}" if based_on else "")


def _get(data: Mapping[str, Any], key: str, *kinds: type) -> Any:
    """Return a field that must be there and of one of the kinds."""
    if key not in data:
        raise RunError(f"'{key}' is missing")
    value = data[key]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise RunError(f"'{key}' is {value!r}, expected {expected}")
    return value


def _optional(data: Mapping[str, Any], key: str, default: Any, *kinds: type) -> Any:
    """Return a field that describes the run but does not change what its numbers mean."""
    return default if data.get(key) is None else _get(data, key, *kinds)


def _metrics(data: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that have a value; evaluators report null or NaN where nothing could be measured."""
    metrics: dict[str, float] = {}
    for name, value in data.items():
        if value is None:
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise RunError(f"metric '{name}' is {value!r}, not a number")
        if math.isnan(value):
            continue
        if not 0 <= value <= 100:
            raise RunError(f"metric '{name}' is {value!r}, outside 0 to 100 per cent")
        metrics[name] = float(value)
    if not metrics:
        raise RunError("'metrics' has no value")
    return metrics


def _subsets(data: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the record of the parts of training sets, each with the number of its images."""
    for name, part in data.items():
        if not isinstance(part, dict) or not isinstance(part.get("images"), int):
            raise RunError(f"'subsets' has {part!r} for {name}, expected an object with the number of images")
    return dict(data)


def _words(names: Any) -> str:
    """Return names of datasets in one string."""
    return ", ".join(map(str, names)) if isinstance(names, list) else str(names or "not stated")


def _seed(seed: int | None) -> int | None:
    """Return the seed; Detectron2's negative seeds mean that the run was not seeded."""
    return None if seed is None or seed < 0 else seed


def data_of(run: Run) -> str:
    """Return what a run was trained and tested on, in words."""
    return f"trained on {trained_on(run)}, tested on {_words(run.datasets.get('test'))}"


def trained_on(run: Run) -> str:
    """Return the training sets, those that are a part of another with the number of their images."""
    names = run.datasets.get("train")
    counts = {name: f"{name} ({part['images']:,} images)" for name, part in run.subsets.items()}
    return _words([counts.get(str(name), name) for name in names] if isinstance(names, list) else names)


def is_on_subset(run: Run) -> bool:
    """Whether the run saw a part of a training set, drawn by its seed (coco_2017_train_5pct)."""
    names = run.datasets.get("train")
    return bool(run.subsets) or any(str(name).endswith("pct") for name in (names if isinstance(names, list) else ()))


def common_value(values: Sequence[Any]) -> Any:
    """Return the value that all share, None if they differ or there is none."""
    return values[0] if values and all(value == values[0] for value in values) else None
