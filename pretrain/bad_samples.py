"""What a run does about files it cannot read: replace and record them, warn at 0.1 %, stop at 5 %."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

WARN_ABOVE_SHARE = 0.001
STOP_ABOVE_SHARE = 0.05
MIN_BAD_TO_STOP = 20
"""A handful of bad files in the first batches says nothing about the rest: with one in fifty unreadable, as many as
this before the 400th sample (where it would be 5 %) come once in some thousand runs."""

MAX_NAMES_IN_MESSAGE = 5


class BadSample(NamedTuple):
    """A file that could not be read.

    Attributes:
        path: The file.
        reason: What the reader or decoder said.
        used_instead: The next readable file, which stands in its place.
    """

    path: str
    reason: str
    used_instead: str


class TooManyBadSamples(RuntimeError):
    """So many files cannot be read that the run would not be the one that was asked for."""


class BadSampleLog:
    """Writes unreadable files to a JSON-lines file, counts them, warns and stops.

    Rules, on the share of samples (not of distinct files) met by this object: above 0.1 % one warning; above 5 %, once
    there were `MIN_BAD_TO_STOP` bad samples, the run stops. Each distinct path is written once, also over resumed runs
    that append to the same file, which is made only when there is something to write.

    In a distributed run each process has its own log of its own samples. They may share one file: a line is appended
    in one write (so a path that two processes meet can stand there twice).

    Attributes:
        num_bad: Bad samples so far; a file met in two epochs counts twice.
    """

    def __init__(self, path: Path, num_images: int) -> None:
        """Log to `path`, for a data set of `num_images` (for the messages only)."""
        self.num_bad = 0
        self._path = path
        self._num_images = num_images
        self._has_warned = False
        self._written: dict[str, str] = {}  # path -> reason, in order
        if path.exists():
            self._written = {entry["path"]: entry["reason"] for entry in _repair_and_read(path)}

    def add(self, bad: Sequence[BadSample], samples_seen: int) -> None:
        """Record the bad samples of a batch.

        Args:
            bad: `Batch.bad`, mostly empty.
            samples_seen: Samples that this object has been told about, this batch included, bad or not. After a
                resume it begins at zero again, as the counts do.

        Raises:
            TooManyBadSamples: By the rule above. Everything has been written then.
        """
        if not bad:
            return
        self._write([sample for sample in bad if sample.path not in self._written])
        self.num_bad += len(bad)
        share = self.num_bad / samples_seen
        if share > STOP_ABOVE_SHARE and self.num_bad >= MIN_BAD_TO_STOP:
            raise TooManyBadSamples(
                f"{self._summary(samples_seen)}, more than {STOP_ABOVE_SHARE:.0%}: {self._first_names()}. "
                f"Repair or remove them (all are in {self._path}), then start again"
            )
        if share > WARN_ABOVE_SHARE and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s, more than %.1f %%: %s. Each is replaced by the next readable file; all are in %s",
                self._summary(samples_seen),
                WARN_ABOVE_SHARE * 100,
                self._first_names(),
                self._path,
            )

    def _write(self, bad: Sequence[BadSample]) -> None:
        lines = ""
        for sample in bad:
            if sample.path not in self._written:  # the same file can come twice in one batch
                self._written[sample.path] = sample.reason
                lines += json.dumps(sample._asdict()) + "\n"
        if lines:
            with self._path.open("a", encoding="ascii") as file:
                file.write(lines)

    def _summary(self, samples_seen: int) -> str:
        return (
            f"{self.num_bad:,} of {samples_seen:,} samples could not be read "
            f"({len(self._written):,} files of {self._num_images:,})"
        )

    def _first_names(self) -> str:
        shown = [f"{path} ({reason})" for path, reason in list(self._written.items())[:MAX_NAMES_IN_MESSAGE]]
        return ", ".join(shown) + (", ..." if len(self._written) > MAX_NAMES_IN_MESSAGE else "")


def _repair_and_read(path: Path) -> list[dict[str, str]]:
    """The entries of an earlier run; a line that was cut short when that run was killed is dropped from the file."""
    text = path.read_text(encoding="ascii")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="ascii")
    return [json.loads(line) for line in whole.splitlines()]
