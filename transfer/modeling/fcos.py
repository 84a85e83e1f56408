"""FCOS, where the installed Detectron2 has it."""

from typing import Any


def add_config(cfg: Any) -> None:
    """Add its config keys."""


def register() -> None:
    """Let the config find it. Idempotent."""
