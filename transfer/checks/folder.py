"""The run directory: an earlier run in it may be continued, not mixed with another."""

from pathlib import Path
from typing import Any

import yaml

from transfer.checks.findings import WARNING
from transfer.tasks import is_same, pairs, show, value_at


def check_earlier_run(cfg: Any, *, resume: bool) -> list[str]:
    """Refuse to mix a new run into the directory of an earlier one, or to resume one that started from other weights.

    Returns:
        Notes for the log: values that a resumed run changes.

    Raises:
        ValueError: If OUTPUT_DIR holds checkpoints and `resume` is False, or MODEL.WEIGHTS changed.
    """
    folder = Path(cfg.OUTPUT_DIR)
    if not (folder / "last_checkpoint").exists():
        return []
    if not resume:
        raise ValueError(
            f"{folder} holds the checkpoints of an earlier run; add --resume to continue it, or give another "
            "--output-dir"
        )
    earlier = _read_config(folder / "config.yaml")
    if not earlier:
        return [
            f"{WARNING}{folder / 'config.yaml'} is missing or was cut short by a kill: whether the run that is resumed "
            "has the same settings and started from the same weights cannot be checked."
        ]
    changed = [key for key, value in pairs(cfg) if key in earlier and not is_same(value, earlier[key])]
    if "MODEL.WEIGHTS" in changed and _is_same_file(cfg.MODEL.WEIGHTS, earlier["MODEL.WEIGHTS"]):
        changed.remove("MODEL.WEIGHTS")
    if "MODEL.WEIGHTS" in changed:
        raise ValueError(
            f"{folder} is a run that started from {show(earlier['MODEL.WEIGHTS'])}, but MODEL.WEIGHTS is now "
            f"{show(cfg.MODEL.WEIGHTS)}; give another --output-dir"
        )
    return [
        f"{WARNING}resuming with {key} {show(value_at(cfg, key))}; it was {show(earlier[key])}."
        for key in changed
        if key not in ("OUTPUT_DIR", "MODEL.DEVICE")
    ]


def _read_config(path: Path) -> dict[str, Any]:
    """Dotted key -> value; empty if there is no whole file."""
    try:
        contents = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (FileNotFoundError, yaml.YAMLError):
        return {}
    # Detectron2 writes the keys in alphabetical order and always has VERSION: where it is missing, so is the end.
    return dict(pairs(contents)) if isinstance(contents, dict) and "VERSION" in contents else {}


def _is_same_file(left: str, right: str) -> bool:
    """Whether two values of MODEL.WEIGHTS are spellings of one path."""
    return bool(left and right) and Path(left).expanduser().resolve() == Path(right).expanduser().resolve()
