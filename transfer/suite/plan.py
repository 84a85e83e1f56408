"""suite.yaml -> jobs: weights x tasks x seeds.

    name: my_suite                       # for people
    output: runs/suites/my_suite         # where the jobs go; --output-dir
    datasets_root: datasets              # --datasets-root; without it $DETECTRON2_DATASETS, else datasets
    seeds: [0]                           # of every task that gives none
    overrides: [SOLVER.IMS_PER_BATCH, 8] # KEY VALUE pairs for every run
    weights:                             # the rows of the tables
      random: {init: random}
      supervised: {init: supervised}
      detco: {file: detco.pkl}           # made by convert-to-d2; without `file` --weights detco=FILE gives it
      soco: {init: soco, label: SoCo}    # the *_soco.yaml configs where the task has them, else *_converted.yaml
    tasks:                               # the columns
      - coco_maskrcnn_fpn_1x             # a protocol of transfer/tasks.yaml
      - {task: voc0712_fasterrcnn_c4_24k, seeds: [0, 1, 2, 3, 4], weights: [random, detco], overrides: [KEY, VALUE]}
      - {config: "my/task_{init}.yaml"}  # a config of your own; beside the suite file, {init} as above

Paths in `config` start at the suite file, as _BASE_ does in a config; all others at the current folder.
"""

import difflib
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from transfer.digest import sha256_of
from transfer.suite.inputs import config_files
from transfer.suite.jobs import Job
from transfer.tasks import Task, config_file, load_tasks

INITS = ("random", "supervised", "converted", "soco")
NEEDS_FILE = ("converted", "soco")
PUBLISHED_GPUS = 8
NAME = re.compile(r"[A-Za-z0-9.+-]+(_[A-Za-z0-9.+-]+)*")  # no "__": it separates the parts of a job's id
SUITE_KEYS = ("name", "output", "datasets_root", "seeds", "overrides", "weights", "tasks")
WEIGHTS_KEYS = ("init", "file", "label")
TASK_KEYS = ("task", "config", "name", "seeds", "overrides", "weights")
URL = "://"
TRAIN = (sys.executable, "-u", "-m", "transfer.train_net")


class SuiteError(ValueError):
    """A suite file or command line that cannot be run; the message says what to change."""


@dataclass(frozen=True)
class Weights:
    """A row of the tables.

    Attributes:
        name: Its name in the suite.
        init: One of INITS.
        file: A file made by convert-to-d2; "" if none was given (yet), or none is needed.
        label: TRANSFER.LABEL; "" leaves the name of the row to the file's provenance.
        is_added: Whether the command line added it to the suite.
    """

    name: str
    init: str
    file: str = ""
    label: str = ""
    is_added: bool = False


@dataclass(frozen=True)
class SuiteTask:
    """A column of the tables.

    Attributes:
        name: Its name in the suite.
        protocol: Name in transfer/tasks.yaml; "" if it is a config of the user's own.
        config: Pattern of the config files with "{init}"; "" for a protocol.
        seeds: SEED of its runs.
        overrides: KEY VALUE words.
        weights: Names of the weights that it is for; None is all.
    """

    name: str
    protocol: str
    config: str
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]
    weights: tuple[str, ...] | None


@dataclass(frozen=True)
class Suite:
    """A suite file, with what the command line changed."""

    name: str
    output: Path
    datasets_root: str
    weights: tuple[Weights, ...]
    tasks: tuple[SuiteTask, ...]


def load_suite(path: Path) -> Suite:
    """Read and check a suite file.

    Raises:
        SuiteError: If it does not exist, or something in it is unknown, missing or of the wrong kind.
    """
    if not path.is_file():
        raise SuiteError(f"no suite file {path}; the ready ones are in configs/suites/")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SuiteError(f"{path} is not YAML: {error}") from error
    content = _mapping(content, SUITE_KEYS, str(path))
    for key in ("output", "tasks"):
        if not content.get(key):
            raise SuiteError(f"{path} has no {key!r}")
    seeds = _seeds(content.get("seeds", [0]), str(path))
    overrides = _words(content.get("overrides"), str(path))
    rows = content.get("weights") or {}
    if not isinstance(rows, Mapping):
        raise SuiteError(f"{path}: weights is {rows!r}, expected NAME: {{{', '.join(WEIGHTS_KEYS)}}}, ...")
    weights = tuple(_weights(name, fields, path) for name, fields in rows.items())
    tasks = tuple(_task(item, seeds, overrides, path) for item in _list(content["tasks"], f"{path}: tasks"))
    root = content.get("datasets_root") or os.environ.get("DETECTRON2_DATASETS", "datasets")
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SuiteError(f"{path}: task {', '.join(twice)} is there twice; give one of them a `name`")
    for task in tasks:
        _known(task.weights or (), [item.name for item in weights], f"{path}: weights of {task.name}")
    return Suite(
        name=str(content.get("name", path.stem)),
        output=Path(_text(content["output"], f"{path}: output")),
        datasets_root=_text(root, f"{path}: datasets_root"),
        weights=weights,
        tasks=tasks,
    )


def with_weights(suite: Suite, given: Sequence[str]) -> Suite:
    """The suite with NAME=FILE of the command line: files for its weights, or rows that it did not have.

    A row that is added takes part in every task.

    Raises:
        SuiteError: If a word is not NAME=FILE, or the suite's weights of that name take no file.
    """
    rows = {item.name: item for item in suite.weights}
    for word in given:
        name, equals, file = word.partition("=")
        if not (equals and file and NAME.fullmatch(name)):
            raise SuiteError(f"--weights {word} is not NAME=FILE with a name of letters, digits and . + - _")
        row = rows.get(name, Weights(name, "converted", is_added=True))
        if row.init not in NEEDS_FILE:
            raise SuiteError(
                f"--weights {word}: {name} is {row.init} in this suite and takes no file; use another name"
            )
        rows[name] = replace(row, file=file)
    return replace(suite, weights=tuple(rows.values()))


def make_jobs(suite: Suite, *, only: Sequence[str], num_gpus: int, auto_scale: bool) -> list[Job]:
    """Every weights x task x seed, in the order of the tasks.

    Args:
        suite: With all files.
        only: Patterns of job ids; none means all.
        num_gpus: GPUs of each job; 0 is the CPU.
        auto_scale: Whether train_net adapts the published 8-GPU recipe.

    Raises:
        SuiteError: If a file or config is missing, or no job is left.
    """
    chosen = _choose(suite, only)
    rows = list(dict.fromkeys(row for _, (_, row, _) in chosen))
    if lacking := [row.name for row in rows if row.init in NEEDS_FILE and not row.file]:
        raise SuiteError(
            f"no file for the weights {', '.join(lacking)}; add "
            + " ".join(f"--weights {name}=FILE" for name in lacking)
            + " (made by convert-to-d2), or leave them out with --only"
        )
    digest = lru_cache(maxsize=None)(sha256_of)  # for this once: until the next call a file may change
    files = {row: _weights_file(row) for row in rows}
    jobs = []
    for index, (task, row, seed) in chosen:
        name = _job_id(task, row, seed)
        folder = suite.output.resolve() / name
        protocol = load_tasks()[task.protocol] if task.protocol else None
        config = _config(task, protocol, row)
        words = ["--config-file", str(config), "--resume", "--num-gpus", str(num_gpus)]
        words += ["--auto-scale"] * auto_scale
        words += ["--datasets-root", str(Path(suite.datasets_root).expanduser().resolve())]
        words += ["--output-dir", str(folder / "run")]
        words += [*task.overrides, *_weights_words(row), "SEED", str(seed)]
        jobs.append(
            Job(
                id=name,
                index=index,
                task=task.name,
                protocol=task.protocol,
                weights=row.name,
                inputs={str(path): digest(path) for path in (*config_files(config), *files[row])},
                seed=seed,
                command=(*TRAIN, *words),
                num_gpus=num_gpus,
                iterations=_iterations(task, protocol, scaled_to=num_gpus if auto_scale else 0),
                folder=folder,
            )
        )
    return jobs


def _choose(suite: Suite, only: Sequence[str]) -> list[tuple[int, tuple[SuiteTask, Weights, int]]]:
    """The combinations that fit a pattern, each with its position in the suite.

    Raises:
        SuiteError: If there is none.
    """
    chosen = [entry for entry in enumerate(_combinations(suite)) if _matches(_job_id(*entry[1]), only)]
    if not chosen and only:
        raise SuiteError(
            f"no job of {suite.name} fits --only {' '.join(only)}; ids are TASK__WEIGHTS__seedN, * stands for anything"
        )
    if not chosen:
        raise SuiteError(f"{suite.name} has no weights; name a checkpoint with --weights NAME=FILE")
    return chosen


def job_ids(suite: Suite) -> list[str]:
    """Ids of all jobs of a suite, whether their files are there or not."""
    return [_job_id(*entry) for entry in _combinations(suite)]


def shown(job: Job) -> str:
    """The command of a job as its user would type it."""
    return shlex.join(["detco-transfer", *train_words(job)])


def train_words(job: Job) -> tuple[str, ...]:
    """The words after `python -m transfer.train_net`."""
    return job.command[len(TRAIN) :]


def _combinations(suite: Suite) -> Iterator[tuple[SuiteTask, Weights, int]]:
    for task in suite.tasks:
        for row in suite.weights:
            if task.weights is None or row.name in task.weights or row.is_added:
                yield from ((task, row, seed) for seed in task.seeds)


def _job_id(task: SuiteTask, row: Weights, seed: int) -> str:
    """Readable, and good as a folder's name."""
    return f"{task.name.replace('/', '-')}__{row.name}__seed{seed}"


def _weights_words(row: Weights) -> list[str]:
    words = ["MODEL.WEIGHTS", row.file if URL in row.file else str(Path(row.file).resolve())] if row.file else []
    return words + (["TRANSFER.LABEL", row.label] if row.label else [])


def _config(task: SuiteTask, protocol: Task | None, row: Weights) -> Path:
    """The config file of a task for one kind of weights."""
    inits = (row.init, "converted") if row.init == "soco" else (row.init,)
    if protocol is None:
        paths = [Path(task.config.replace("{init}", init)) for init in inits]
        for path in paths:
            if path.is_file():
                return path
        raise SuiteError(f"task {task.name} has no config for the weights {row.name}: no file {paths[-1]}")
    try:
        return config_file(protocol, inits[0])
    except FileNotFoundError as error:
        if len(inits) == 1:
            raise SuiteError(f"task {task.name}, weights {row.name}: {error}") from error
        return config_file(protocol, inits[1])


def _iterations(task: SuiteTask, protocol: Task | None, *, scaled_to: int) -> int | None:
    """Iterations of a run, by the linear rule for `scaled_to` GPUs (0: as they are); None if only its config knows."""
    given = dict(zip(task.overrides[0::2], task.overrides[1::2], strict=True))
    known = given.get("SOLVER.MAX_ITER") or (protocol.values.get("SOLVER.MAX_ITER") if protocol else None)
    try:
        iterations = int(known) if known else None
    except ValueError as error:
        raise SuiteError(f"task {task.name}: SOLVER.MAX_ITER is {known!r}, expected a number of iterations") from error
    return iterations * PUBLISHED_GPUS // scaled_to if iterations and scaled_to else iterations


def _weights_file(row: Weights) -> list[Path]:
    """The weights' local file, if they have one."""
    if not row.file or URL in row.file:
        return []
    path = Path(row.file)
    if not path.is_file():
        raise SuiteError(f"weights {row.name}: there is no file {path}; make it with: convert-to-d2 CHECKPOINT {path}")
    return [path.resolve()]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    # Not fnmatch: a task's name may hold nothing but * to be special here.
    return not patterns or any(
        re.fullmatch(".*".join(map(re.escape, pattern.replace("/", "-").split("*"))), name) for pattern in patterns
    )


def _weights(name: Any, fields: Any, path: Path) -> Weights:
    where = f"{path}: weights {name}"
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise SuiteError(f"{where}: the name must be letters, digits and . + - with single _ between")
    fields = _mapping(fields, WEIGHTS_KEYS, where)
    init, file = str(fields.get("init", "converted")), str(fields.get("file") or "")
    _known([init], INITS, f"{where}: init")
    if file and init not in NEEDS_FILE:
        raise SuiteError(f"{where}: init {init} takes no file")
    return Weights(name, init, file, str(fields.get("label") or ""))


def _task(item: Any, seeds: tuple[int, ...], overrides: tuple[str, ...], path: Path) -> SuiteTask:
    fields = _mapping({"task": item} if isinstance(item, str) else item, TASK_KEYS, f"{path}: task {item}")
    protocol, pattern = str(fields.get("task") or ""), str(fields.get("config") or "")
    if bool(protocol) == bool(pattern):
        raise SuiteError(f"{path}: task {item}: give either `task`, a protocol's name, or `config`")
    if protocol:
        _known([protocol], list(load_tasks()), f"{path}: task")
    elif "{init}" not in pattern:
        raise SuiteError(f"{path}: config {pattern} must hold {{init}}, which becomes {', '.join(INITS)}")
    name = str(fields.get("name") or protocol or Path(pattern).stem.replace("_{init}", ""))
    if not NAME.fullmatch(name.replace("/", "-")):
        raise SuiteError(f"{path}: task {name}: the name must be letters, digits and . + - with single _ between")
    only = fields.get("weights")
    return SuiteTask(
        name=name,
        protocol=protocol,
        config=str((path.parent / pattern).resolve()) if pattern else "",
        seeds=_seeds(fields["seeds"], f"{path}: {name}") if "seeds" in fields else seeds,
        overrides=(*overrides, *_words(fields.get("overrides"), f"{path}: {name}")),
        weights=None if only is None else tuple(map(str, _list(only, f"{path}: weights of {name}"))),
    )


def _mapping(content: Any, keys: Sequence[str], where: str) -> Mapping[str, Any]:
    content = {} if content is None else content
    if not isinstance(content, Mapping):
        raise SuiteError(f"{where}: expected a mapping with {', '.join(keys)}, got {content!r}")
    _known([str(key) for key in content], keys, where)
    return content


def _known(words: Sequence[str], valid: Sequence[str], where: str) -> None:
    for word in words:
        if word not in valid:
            near = difflib.get_close_matches(word, valid, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid: {', '.join(valid)}"
            raise SuiteError(f"{where}: {word!r} is not known; {hint}")


def _list(given: Any, where: str) -> list[Any]:
    if not isinstance(given, list):
        raise SuiteError(f"{where}: expected a list, got {given!r}")
    return given


def _text(given: Any, where: str) -> str:
    if not isinstance(given, str):
        raise SuiteError(f"{where}: expected a path, got {given!r}")
    return given


def _seeds(given: Any, where: str) -> tuple[int, ...]:
    is_list = isinstance(given, list) and given and all(type(seed) is int and seed >= 0 for seed in given)
    if not is_list or len(set(given)) != len(given):
        raise SuiteError(f"{where}: seeds is {given!r}, expected a list of different numbers from 0")
    return tuple(given)


def _words(given: Any, where: str) -> tuple[str, ...]:
    given = [] if given is None else given
    if not isinstance(given, list) or len(given) % 2:
        raise SuiteError(f"{where}: overrides is {given!r}, expected a list of KEY, VALUE, KEY, VALUE, ...")
    return tuple(str(word) for word in given)
