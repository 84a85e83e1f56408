"""All findings of a settings check: so that one run of it names every mistake, not the first only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

WARNING = "WARNING: "


@dataclass
class Findings:
    """What checks have said so far.

    Attributes:
        errors: Why the run is refused; empty if it is not.
        notes: For the log.
    """

    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, check: Callable[..., Sequence[str] | None], *args: Any, **named: Any) -> None:
        """Run one check, and keep its notes or the message of the ValueError or FileNotFoundError that it raises."""
        try:
            self.notes += check(*args, **named) or []
        except (ValueError, FileNotFoundError) as error:
            self.errors.append(str(error))
