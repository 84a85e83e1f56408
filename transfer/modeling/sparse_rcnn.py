"""Sparse R-CNN (arXiv:2011.12450)."""

from typing import Any


def add_config(cfg: Any) -> None:
    """Add its config keys."""


def register() -> None:
    """Let the config find it. Idempotent."""
