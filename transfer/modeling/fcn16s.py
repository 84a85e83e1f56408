"""FCN-16s semantic segmentation, as in MoCo's appendix."""

from typing import Any


def add_config(cfg: Any) -> None:
    """Add its config keys."""


def register() -> None:
    """Let the config find it. Idempotent."""
