"""Repeated runs: equal task, recipe, weights and configuration, different seeds; as mean and standard deviation."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transfer.results.runs import LeftOut, Run


@dataclass(frozen=True)
class Measurement:
    """One row of ours: at least one run, all alike but for their seeds, in the order of their seeds."""

    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """The run that speaks for all in everything but metrics, seed, duration and time."""
        return self.runs[0]

    @property
    def metrics(self) -> list[str]:
        """Metrics that at least one run has, in the order in which they appear."""
        return list(dict.fromkeys(metric for run in self.runs for metric in run.metrics))

    def values(self, metric: str) -> list[float]:
        """Return the values of the runs that have the metric, per cent."""
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]

    def mean(self, metric: str) -> float:
        """Return the mean over the runs that have the metric, per cent; there must be one."""
        return statistics.fmean(self.values(metric))

    def std(self, metric: str) -> float | None:
        """Return the sample standard deviation (n - 1), None for a single run."""
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 else None


def group_repeats(runs: Iterable[Run]) -> tuple[list[Measurement], list[LeftOut]]:
    """Collect the runs that repeat one another.

    Of runs with one seed only the one that finished last counts, since a second one is not an independent sample. Runs
    without a seed each count.

    Returns:
        The measurements in the order of their first runs, and the duplicates that were left out.
    """
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(_identity(run), []).append(run)
    measurements: list[Measurement] = []
    left_out: list[LeftOut] = []
    for group in groups.values():
        kept: dict[int | str, Run] = {}
        for run in sorted(group, key=lambda run: run.finished):
            key = str(run.path) if run.seed is None else run.seed
            if key in kept:
                reason = f"same seed ({run.seed}) as {run.path}, which repeats it and finished later"
                left_out.append(LeftOut(kept[key].path, reason))
            kept[key] = run
        ordered = sorted(kept.values(), key=lambda run: (run.seed is None, run.seed or 0, str(run.path)))
        measurements.append(Measurement(tuple(ordered)))
    return measurements, left_out


def _identity(run: Run) -> tuple[Any, ...]:
    """Return what repeated runs share. Without a digest of the weights their path stands for them."""
    weights = run.weights_sha256 or run.weights_path
    datasets = json.dumps(run.datasets, sort_keys=True)
    return run.task, run.recipe, weights, run.config_digest, run.departures, datasets
