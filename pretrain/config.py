"""The training config: defaults, YAML with `_BASE_`, `KEY VALUE` overrides, and what code is built from it.

`METHOD.*` and `VIEWS.*` have no list here: their keys, defaults and types are the constructor signatures of the method
and of its view recipe. Config stops at `pretrain.run`; everything below takes explicit arguments.
"""

import ast
import difflib
import hashlib
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from fvcore.common.config import CfgNode

from detco.methods import METHODS
from detco.methods.base import Method
from detco.views.base import ViewRecipe

# Keys that change where or how comfortably a run happens, not what it computes. The images themselves are compared by
# the digest of their list, and the proposals by that of their store, so moved ones can be resumed.
# Compiling moves the last bits, as another GPU does, and no more.
NOT_IN_DIGEST = (
    *("OUTPUT_DIR", "DATA.ROOT", "DATA.PROPOSALS", "DATA.NUM_WORKERS", "SOLVER.COMPILE", "CHECKPOINT.", "LOG."),
)

# One name per key: (type, default).
Schema = dict[str, tuple[Any, Any]]

FIXED: Schema = {
    "SEED": (int, 0),  # of weights, data order, views and everything drawn in a step
    "OUTPUT_DIR": (str, ""),  # run directory; --output-dir sets it
    "DATA.ROOT": (str, ""),  # folder (tree) of images or tar shards, .txt file listing images, or URL of shards
    "DATA.PROPOSALS": (str, ""),  # of tools/generate_proposals.py, for views that are drawn around objects
    "DATA.NUM_WORKERS": (int, 4),  # loader processes per training process; 0 loads in the training process
    "METHOD.NAME": (str, "detco"),  # a key of detco.methods.METHODS
    "SOLVER.BATCH_SIZE_TOTAL": (int, 256),  # images per step over all processes
    # Micro-batches that each process makes of its images of a step, for less memory. The gradient is that of the whole
    # batch, except that BatchNorm (also over processes) sees the images of one micro-batch.
    "SOLVER.ACCUMULATE_STEPS": (int, 1),
    "SOLVER.BASE_LR": (float, 0.03),  # at REFERENCE_BATCH_SIZE images; lr = BASE_LR * batch / reference
    "SOLVER.REFERENCE_BATCH_SIZE": (int, 256),  # images
    "SOLVER.EPOCHS": (int, 200),
    "SOLVER.OPTIMIZER": (Literal["sgd", "lars"], "sgd"),
    "SOLVER.MOMENTUM": (float, 0.9),  # of the optimiser; the teacher's decay is METHOD.EMA_DECAY
    "SOLVER.WEIGHT_DECAY": (float, 1e-4),  # sgd: on all parameters, as MoCo does; lars: on those of two and more axes
    "SOLVER.TRUST_COEFFICIENT": (float, 0.001),  # of lars: norm of an adapted gradient relative to its weight's
    "SOLVER.SCHEDULE": (Literal["cosine", "constant"], "cosine"),
    "SOLVER.SCHEDULE_UNIT": (Literal["epoch", "step"], "epoch"),  # how often the schedule moves the lr
    "SOLVER.WARMUP_EPOCHS": (float, 0.0),  # linear, moved every step; the schedule begins after it
    "SOLVER.WARMUP_START": (float, 0.01),  # lr at its first step, as a share of the peak
    "SOLVER.FINAL_LR": (float, 0.0),  # at the end of a cosine; not scaled with the batch
    "SOLVER.PRECISION": (Literal["bf16", "fp32"], "bf16"),  # of the forward pass; losses are always fp32
    "SOLVER.CHANNELS_LAST": (bool, True),  # memory layout of 4-D weights
    # torch.compile for trunks and views. auto: on CUDA, if it works; on: also on the CPU, refused if it does not work.
    "SOLVER.COMPILE": (Literal["auto", "on", "off"], "auto"),
    "SOLVER.PRECISE_BN_ITERS": (int, 0),  # batches that re-estimate BN statistics before the export; 0 is off
    "CHECKPOINT.SAVE_EVERY_MINUTES": (float, 10.0),  # wall clock; 0 saves after every step
    "CHECKPOINT.KEEP_LAST": (int, 3),  # checkpoints
    "LOG.EVERY_STEPS": (int, 20),
}

_AT_LEAST: dict[str, float] = {
    "SEED": 0,
    "DATA.NUM_WORKERS": 0,
    "SOLVER.BATCH_SIZE_TOTAL": 1,
    "SOLVER.BASE_LR": 0,
    "SOLVER.REFERENCE_BATCH_SIZE": 1,
    "SOLVER.EPOCHS": 1,
    "SOLVER.ACCUMULATE_STEPS": 1,
    "SOLVER.MOMENTUM": 0,
    "SOLVER.WEIGHT_DECAY": 0,
    "SOLVER.TRUST_COEFFICIENT": 0,
    "SOLVER.WARMUP_EPOCHS": 0,
    "SOLVER.WARMUP_START": 0,
    "SOLVER.FINAL_LR": 0,
    "SOLVER.PRECISE_BN_ITERS": 0,
    "CHECKPOINT.SAVE_EVERY_MINUTES": 0,
    "CHECKPOINT.KEEP_LAST": 1,
    "LOG.EVERY_STEPS": 1,
}


_AT_MOST: dict[str, float] = {"SOLVER.WARMUP_START": 1}


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key and what to write instead."""


def load_config(config_file: Path | None, overrides: Sequence[str] = ()) -> CfgNode:
    """Resolve defaults, then the file with its bases, then `KEY VALUE` pairs, into a frozen config.

    Args:
        config_file: YAML; `_BASE_` names a file (relative to this one) that it is a diff over. None: defaults only.
        overrides: KEY, VALUE, KEY, VALUE, ... as on the command line.

    Raises:
        ConfigError: For an unreadable file, an unknown key, or a value of the wrong type or range.
    """
    given = _read_file(config_file) if config_file else {}
    given |= _pairs(overrides)
    schema = _schema(given)
    values = {key: default for key, (_, default) in schema.items()}
    for key, value in given.items():
        if key not in schema:
            raise ConfigError(_unknown_key_message(key, schema))
        values[key] = _coerce(key, value, schema[key][0])
    for key, lowest in _AT_LEAST.items():
        if values[key] < lowest:
            raise ConfigError(f"{key} is {values[key]}; it must be at least {lowest}")
    for key, highest in _AT_MOST.items():
        if values[key] > highest:
            raise ConfigError(f"{key} is {values[key]}; it must be at most {highest}")
    cfg = CfgNode(_nest(values))
    cfg.freeze()
    return cfg


def digest(cfg: CfgNode) -> str:
    """Return the sha256 (hex) of everything in `cfg` that can change the trained weights."""
    return hashlib.sha256(yaml.safe_dump(_what_matters(cfg), sort_keys=True).encode()).hexdigest()


def differences(saved: str, cfg: CfgNode) -> list[str]:
    """Return one line per key that matters and differs between the YAML of a saved config and `cfg`.

    A key of FIXED that is younger than the saved config had its default then: that is what defaults of new keys are.
    """
    fixed = _nest({key: default for key, (_, default) in FIXED.items()})
    before, now = _what_matters(fixed) | _what_matters(yaml.safe_load(saved)), _what_matters(cfg)
    absent = "(absent)"
    return [
        f"{key}: {before.get(key, absent)} in the checkpoint, {now.get(key, absent)} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, absent) != now.get(key, absent)
    ]


def method_options(cfg: CfgNode) -> dict[str, Any]:
    """Return the constructor keywords of the method."""
    return {key.lower(): value for key, value in cfg.METHOD.items() if key != "NAME"}


def view_options(cfg: CfgNode) -> dict[str, Any]:
    """Return the constructor keywords of the view recipe."""
    return {key.lower(): value for key, value in cfg.VIEWS.items()}


def build_method(cfg: CfgNode) -> Method:
    """Build the method on the CPU. Its weights are drawn from torch's global generator."""
    return METHODS[cfg.METHOD.NAME](**method_options(cfg))


def build_recipe(cfg: CfgNode) -> ViewRecipe[Any, Any]:
    """Build the view recipe of the method."""
    recipe = METHODS[cfg.METHOD.NAME].recipe_for(**method_options(cfg))
    return recipe(**view_options(cfg))


def _schema(given: Mapping[str, Any]) -> Schema:
    """All valid keys. Which they are depends on the method, and on its options where those choose the views."""
    name = given.get("METHOD.NAME", FIXED["METHOD.NAME"][1])
    if name not in METHODS:
        raise ConfigError(f"METHOD.NAME is {name!r}; it must be one of {', '.join(sorted(METHODS))}")
    method = METHODS[name]
    of_method = _schema_of(method, "METHOD")
    options = {
        key.removeprefix("METHOD.").lower(): _coerce(key, value, of_method[key][0])
        for key, value in given.items()
        if key in of_method
    }
    return FIXED | of_method | _schema_of(method.recipe_for(**options), "VIEWS")


def _schema_of(cls: type, section: str) -> Schema:
    """The keywords of a constructor as config keys; one without a default is a mistake in the class."""
    parameters = inspect.signature(cls, eval_str=True).parameters.values()
    keywords = [p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    untyped = [p.name for p in keywords if p.annotation is p.empty or p.default is p.empty]
    assert not untyped, f"{cls.__name__}: {untyped} need a type and a default, because they are config keys"
    return {f"{section}.{p.name.upper()}": (p.annotation, p.default) for p in keywords}


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"there is no config file {path}")
    try:
        loaded: Any = CfgNode.load_yaml_with_base(str(path))
    except (yaml.YAMLError, TypeError, AssertionError, OSError, RecursionError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"cannot read the config {path}: it must hold KEY: value lines")
    return _flatten(loaded)


def _pairs(overrides: Sequence[str]) -> dict[str, Any]:
    if len(overrides) % 2:
        raise ConfigError(f"overrides are KEY VALUE pairs, but there are {len(overrides)} words: {' '.join(overrides)}")
    return dict(zip(overrides[::2], overrides[1::2], strict=True))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, key = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    return tree


def _what_matters(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Flat, JSON-like (tuples as lists), without the keys of NOT_IN_DIGEST."""
    flat = {key: value for key, value in _flatten(cfg).items() if not key.startswith(NOT_IN_DIGEST)}
    plain: dict[str, Any] = yaml.safe_load(yaml.safe_dump(flat))
    return plain


def _unknown_key_message(key: str, schema: Schema) -> str:
    by_upper_case = {valid.upper(): valid for valid in schema}
    nearest = difflib.get_close_matches(key.upper(), by_upper_case, n=1, cutoff=0.0)
    section = key.partition(".")[0] + "."
    valid = [name for name in schema if name.startswith(section)] or sorted({name.split(".")[0] for name in schema})
    return f"unknown config key {key}; did you mean {by_upper_case[nearest[0]]}? Valid: {', '.join(valid)}"


def _coerce(key: str, value: Any, expected: Any) -> Any:
    """Return `value` as the annotation `expected` wants it; words of the command line are read as literals.

    Raises:
        ConfigError: If it is of another type. Nothing is rounded, and True is no number.
    """
    if isinstance(value, str) and expected is not str and typing.get_origin(expected) is not Literal:
        value = _literal(value)
    if isinstance(value, bool) and typing.get_origin(expected) is Literal:
        value = "on" if value else "off"  # words that YAML reads as True and False
    if _matches(value, expected):
        return _converted(value, expected)
    raise ConfigError(f"{key} is {value!r}; it must be {_describe(expected)}")


def _literal(word: str) -> Any:
    named = {"true": True, "false": False, "none": None, "null": None}
    if word.lower() in named:
        return named[word.lower()]
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


def _matches(value: Any, expected: Any) -> bool:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin is not None:  # tuple[float, float], tuple[float, ...], Sequence[float], list[float]
        if not isinstance(value, (list, tuple)):
            return False
        if origin is tuple and Ellipsis not in arguments:
            return len(value) == len(arguments) and all(map(_matches, value, arguments))
        return all(_matches(item, arguments[0]) for item in value)
    if expected is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if expected is type(None) else isinstance(value, expected)


def _converted(value: Any, expected: Any) -> Any:
    """A matching value with integers as floats and lists as tuples where the annotation says so."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return _converted(value, next(option for option in arguments if _matches(value, option)))
    if origin is not None and origin is not Literal:
        of_each = arguments if origin is tuple and Ellipsis not in arguments else [arguments[0]] * len(value)
        return tuple(_converted(item, kind) for item, kind in zip(value, of_each, strict=True))
    return float(value) if expected is float else value


def _describe(expected: Any) -> str:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_describe, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple and Ellipsis not in arguments:
        return "(" + ", ".join(map(_describe, arguments)) + ")"
    if origin is not None:
        return f"a list of {_describe(arguments[0])}"
    words = {int: "an integer", float: "a number", bool: "True or False", str: "text", type(None): "None"}
    return words.get(expected, str(expected))
