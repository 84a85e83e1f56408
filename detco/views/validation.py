"""Checks of view settings: every message names the setting, its value and what is allowed."""

from collections.abc import Sequence


def check_positive_int(name: str, value: int) -> int:
    """A size or count of at least 1.

    Raises:
        ValueError: If it is not a whole number above 0.
    """
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
    return int(value)


def check_probability(name: str, value: float) -> float:
    """A number in [0, 1].

    Raises:
        ValueError: If it lies outside.
    """
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value!r}; a probability lies between 0 and 1")
    return float(value)


def check_range(
    name: str, value: Sequence[float], *, low: float, high: float, low_open: bool = False
) -> tuple[float, float]:
    """A pair (least, most) inside [low, high], or inside (low, high] if `low_open`.

    Raises:
        ValueError: If it is not a pair, not in ascending order, or reaches outside.
    """
    interval = f"{'(' if low_open else '['}{low:g}, {high:g}]"
    if len(value) != 2:
        raise ValueError(f"{name} is {tuple(value)!r}; it must be two numbers (least, most) in {interval}")
    least, most = float(value[0]), float(value[1])
    if not (low <= least <= most <= high) or (low_open and least == low):
        raise ValueError(f"{name} is ({least:g}, {most:g}); it must be (least, most) with both in {interval}")
    return least, most


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """One of a few words.

    Raises:
        ValueError: If it is another word.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}")
    return value
