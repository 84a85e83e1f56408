"""The run directory: an earlier run in it may be continued, not mixed with another."""

from pathlib import Path
from typing import Any

import yaml

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
    if not (folder / "config.yaml").exists():
        return []
    earlier = dict(pairs(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))))
    changed = [key for key, value in pairs(cfg) if key in earlier and not is_same(value, earlier[key])]
    if "MODEL.WEIGHTS" in changed:
        raise ValueError(
            f"{folder} is a run that started from {show(earlier['MODEL.WEIGHTS'])}, but MODEL.WEIGHTS is now "
            f"{show(cfg.MODEL.WEIGHTS)}; give another --output-dir"
        )
    return [
        f"WARNING: resuming with {key} {show(value_at(cfg, key))}; it was {show(earlier[key])}."
        for key in changed
        if key not in ("OUTPUT_DIR", "MODEL.DEVICE")
    ]
