"""Detectron2's config with our few keys; unknown keys are refused with the nearest valid one."""

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transfer import d2, densepose
from transfer.modeling import add_model_config
from transfer.tasks import load_tasks, pairs

d2.require()

from detectron2.config import CfgNode, get_cfg  # noqa: E402

INITS = ("converted", "supervised", "random")
# What a run may be given without becoming another experiment: repeated runs differ in these only, so they stay out of
# the digest that finds a run's sisters. The results of some of them differ, but no more than those of two seeds do
# (NUM_WORKERS splits the random numbers of the augmentation, DEVICE and CUDNN_BENCHMARK round differently); what
# --auto-scale makes of REFERENCE_WORLD_SIZE stands in batch, lr and iterations.
NOT_IN_DIGEST = (
    *("SEED", "OUTPUT_DIR", "MODEL.WEIGHTS", "MODEL.DEVICE", "CUDNN_BENCHMARK", "VIS_PERIOD"),
    *("DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.REFERENCE_WORLD_SIZE"),
)


def add_transfer_config(cfg: CfgNode) -> None:
    """Add the keys that Detectron2 does not have, and change one default of Detectron2's: SEED."""
    cfg.TRANSFER = CfgNode()
    # Id of the published task (transfer/tasks.yaml) that results are compared with; "" for a task of your own.
    cfg.TRANSFER.TASK = ""
    # What MODEL.WEIGHTS must be: "converted" (a file, never empty), "supervised" (Detectron2's ImageNet weights) or
    # "random" (empty). Keeps a forgotten MODEL.WEIGHTS from becoming a random-init run.
    cfg.TRANSFER.INIT = "converted"
    # Name of the row in the results; "" takes method and epochs from the weights' provenance.
    cfg.TRANSFER.LABEL = ""
    # How records become training samples: "" is Detectron2's DatasetMapper; see transfer/mappers.py.
    cfg.TRANSFER.MAPPER = ""
    # "sgd" is Detectron2's; see transfer/optimizer.py.
    cfg.TRANSFER.OPTIMIZER = "sgd"
    # Detectron2's default, -1, is a different seed in every run, recorded nowhere.
    cfg.SEED = 0
    add_model_config(cfg)


def load_config(config_file: str | Path, overrides: Sequence[str] = ()) -> CfgNode:
    """Detectron2's defaults + ours + a YAML file with its bases + KEY VALUE pairs. Not frozen.

    Raises:
        FileNotFoundError: If the file or one of its bases does not exist.
        ValueError: If a key does not exist (the message names the nearest), a value has the wrong type, or a pair is
            incomplete.
    """
    cfg = get_cfg()
    add_transfer_config(cfg)
    if not Path(config_file).is_file():
        raise FileNotFoundError(f"no config file {config_file}; the suite's are in configs/transfer/")
    # Unlike Detectron2 we never load YAML that may run code.
    given = CfgNode.load_yaml_with_base(str(config_file), allow_unsafe=False)
    if given.get("TRANSFER", {}).get("MAPPER") == densepose.MAPPER:
        densepose.add_config(cfg)
    _refuse_unknown(cfg, [key for key, _ in pairs(given)], str(config_file))
    options = [word for word in overrides if word.startswith("--")]
    if options:
        raise ValueError(f"options go before the KEY VALUE pairs: move {' '.join(options)} to the front")
    if len(overrides) % 2:
        raise ValueError(f"KEY VALUE pairs expected, got an odd number of words: {' '.join(overrides)}")
    _refuse_unknown(cfg, overrides[0::2], "the command line")
    try:
        cfg.merge_from_file(str(config_file), allow_unsafe=False)
        cfg.merge_from_list(list(overrides))
    except (AssertionError, KeyError) as error:
        raise ValueError(f"{config_file}: {error}") from error
    _check_values(cfg)
    return cfg


def config_digest(cfg: CfgNode, datasets: Mapping[str, Sequence[str]]) -> str:
    """Hex sha256 of the resolved config without NOT_IN_DIGEST: repeated runs share it.

    Args:
        cfg: Resolved config.
        datasets: Names or sources by "train" and "test"; in the config all of the user's own data have the same name.
    """
    lines = [f"{key}={value!r}" for key, value in sorted(pairs(cfg)) if key not in NOT_IN_DIGEST]
    lines += [f"{name}={list(values)!r}" for name, values in sorted(datasets.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _refuse_unknown(cfg: CfgNode, keys: Sequence[str], where: str) -> None:
    valid = [key for key, _ in pairs(cfg)]
    for key in keys:
        # A key above the leaves is Detectron2's to judge; `VERSION` and the like are leaves.
        if key in valid:
            continue
        near = difflib.get_close_matches(key, valid, n=1, cutoff=0.0)[0]
        inside = [name for name in valid if re.match(re.escape(key) + r"\.", name)]
        remedy = f"give one of its keys, such as {inside[0]}" if inside else f"the nearest valid key is {near}"
        raise ValueError(f"unknown config key {key} in {where}; {remedy}")


def _check_values(cfg: Any) -> None:
    if cfg.TRANSFER.INIT not in INITS:
        raise ValueError(f"TRANSFER.INIT is {cfg.TRANSFER.INIT}; it must be one of {', '.join(INITS)}")
    tasks = load_tasks()
    if cfg.TRANSFER.TASK and cfg.TRANSFER.TASK not in tasks:
        raise ValueError(f'TRANSFER.TASK is {cfg.TRANSFER.TASK}; it must be "" or one of {", ".join(tasks)}')
    if cfg.SEED < 0:
        raise ValueError(f"SEED is {cfg.SEED}, which Detectron2 takes as 'a new one each time'; give 0 or more")
