"""Factors that change over training, as pure functions of progress, so that resuming needs no scheduler state.

A schedule maps progress, the share of training done in [0, 1], to a factor that multiplies the base value. It knows
neither epochs nor steps; `quantised` makes one that moves in a number of equal stairs, such as once per epoch.
"""

import math
from collections.abc import Callable, Sequence

Schedule = Callable[[float], float]

# Progress is a quotient such as 3 / 200, and 3 / 200 * 200 may fall just short of 3. A millionth of a stair is far
# more than the rounding error and less than one step of any run with under a million steps per stair.
_STAIR_TOLERANCE = 1e-6


def constant(progress: float) -> float:
    """1 throughout."""
    _check(progress)
    return 1.0


def cosine(progress: float) -> float:
    """Half a cosine from 1 down to 0 (SGDR, arXiv:1608.03983, without restarts): 1, 0.5, 0 at 0, 0.5, 1."""
    _check(progress)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def step(milestones: Sequence[float], gamma: float = 0.1) -> Schedule:
    """Multiply by `gamma` at every milestone reached: `step([0.6, 0.8])` gives 1, 0.1, 0.01 from 0, 0.6, 0.8 on.

    Args:
        milestones: Progress in (0, 1), increasing.
        gamma: Factor per milestone, in (0, 1].

    Raises:
        ValueError: If the milestones are not increasing within (0, 1), or gamma is outside (0, 1].
    """
    if list(milestones) != sorted(set(milestones)) or not all(0 < milestone < 1 for milestone in milestones):
        raise ValueError(f"milestones must increase within (0, 1), but are {list(milestones)}; give shares of training")
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must be in (0, 1], but is {gamma}")

    def factor(progress: float) -> float:
        _check(progress)
        return gamma ** sum(progress >= milestone for milestone in milestones)

    return factor


def warmed_up(schedule: Schedule, warmup_share: float, start: float = 0.0) -> Schedule:
    """Rise linearly from `start` to 1 during the first `warmup_share` of training, then run all of `schedule`.

    Args:
        schedule: What follows; it sees progress 0 when the warm-up ends and 1 at the end of training.
        warmup_share: Share of training in [0, 1); 0 returns `schedule`.
        start: Factor at progress 0, in [0, 1].

    Raises:
        ValueError: If an argument is outside its range.
    """
    if not 0 <= warmup_share < 1:
        raise ValueError(f"warmup_share must be in [0, 1), but is {warmup_share}; give the share of training")
    if not 0 <= start <= 1:
        raise ValueError(f"start must be in [0, 1], but is {start}")
    if warmup_share == 0:
        return schedule

    def factor(progress: float) -> float:
        _check(progress)
        if progress < warmup_share:
            return start + (1.0 - start) * progress / warmup_share
        return schedule((progress - warmup_share) / (1.0 - warmup_share))

    return factor


def quantised(schedule: Schedule, num_stairs: int) -> Schedule:
    """Hold `schedule` at the value it has where the current stair began, as MoCo holds the cosine for an epoch.

    With 200 stairs, all of epoch e (from 0) gets `schedule(e / 200)`: the last epoch of a cosine runs at 6.2e-5.

    Args:
        schedule: What is sampled.
        num_stairs: Stairs of equal length in all of training, such as its epochs; at least 1.

    Raises:
        ValueError: If `num_stairs` is below 1.
    """
    if num_stairs < 1:
        raise ValueError(f"num_stairs must be at least 1, but is {num_stairs}")

    def factor(progress: float) -> float:
        _check(progress)
        return schedule(math.floor(progress * num_stairs + _STAIR_TOLERANCE) / num_stairs)

    return factor


def _check(progress: float) -> None:
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress is the share of training done, in [0, 1], but is {progress}")
