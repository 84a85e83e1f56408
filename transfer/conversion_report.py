"""What a conversion did, in words."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transfer.naming import KeyAccount
from transfer.sources import Source, load_layouts


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        source: The network that was converted.
        parts: Which of its parts were.
        account: What became of every key of the input.
        warnings: What looks unhealthy in the weights, though it could be converted, and what to know of their source.
        output: The file that was written.
        settings: What the detector's config must say for these weights, as a nested dict; empty if nothing.
        differences: Place and feature to the largest difference; empty if they were not compared.
        uncompared: What of the file could not be compared, and why.
    """

    source: Source
    parts: tuple[str, ...]
    account: KeyAccount
    warnings: tuple[str, ...]
    output: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    differences: Mapping[str, float] = field(default_factory=dict)
    uncompared: tuple[str, ...] = ()

    def __str__(self) -> str:
        preprocess = self.source.preprocess
        return "\n".join(
            [
                f"input        {self.source.path} ({self.source.kind})",
                f"network      {self.source.network}",
                f"parts        {', '.join(self.parts)}",
                f"preprocess   {preprocess.channel_order}, mean {show_numbers(preprocess.mean_255)}, "
                f"std {show_numbers(preprocess.std_255)}, stride in the {'1x1' if preprocess.stride_in_1x1 else '3x3'} "
                f"({self._where_preprocess_is_from()})",
                *(f"pretraining  {key} {value}" for key, value in self._pretraining().items()),
                describe_account(self.account),
                *(f"warning      {warning}" for warning in self.warnings),
                *(
                    f"verify       {place}: largest difference to the source network {difference:.3g}"
                    for place, difference in self.differences.items()
                ),
                *(f"verify       not compared: {what}" for what in self.uncompared),
                f"written      {self.output} ({self.output.stat().st_size / 1e6:.1f} MB)",
                *self._needed_settings(),
            ]
        )

    def _where_preprocess_is_from(self) -> str:
        if self.source.preprocess_is_recorded:
            return "recorded"
        layout = load_layouts().get(self.source.name)
        is_known = layout is not None and not layout.assumes
        return f"as known of {self.source.name}" if is_known else "not recorded: the usual one is assumed"

    def _pretraining(self) -> dict[str, Any]:
        known = ("method", "variant", "epochs", "steps")
        return {key: self.source.provenance[key] for key in known if key in self.source.provenance}

    def _needed_settings(self) -> list[str]:
        """The lines to put into the detector's config, in Python as MMDetection's are."""
        if not self.settings:
            return []
        return [
            "settings     the detector's config must have, or the weights are spoilt without a complaint:",
            f"load_from = {str(self.output)!r}",
            "model = {",
            *(f"    {name!r}: {value!r}," for name, value in self.settings.items()),
            "}",
        ]


def show_numbers(values: Sequence[float]) -> str:
    """Numbers with slashes between them."""
    return "/".join(f"{value:g}" for value in values)


def describe_account(account: KeyAccount) -> str:
    """Say in a few lines what became of the keys; unexplained and colliding ones by name."""
    lines = [f"converted    {len(account.converted)}", f"dropped      {len(account.dropped)} on purpose"]
    for reason, count in Counter(account.dropped.values()).most_common():
        lines.append(f"             {count:4d} {reason}")
    lines.append(f"unexplained  {len(account.unexplained)} {', '.join(account.unexplained)}".rstrip())
    colliding = [f"{target} from {' and '.join(names)}" for target, names in account.colliding.items()]
    lines.append(f"colliding    {len(colliding)} {'; '.join(colliding)}".rstrip())
    return "\n".join(lines)
