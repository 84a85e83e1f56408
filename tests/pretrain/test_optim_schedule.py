"""The lr at each step: MoCo's as it always was, SoCo's with warm-up and a floor."""

import math
from itertools import pairwise

import pytest

from detco.schedules import cosine, quantised
from pretrain.config import load_config
from pretrain.optim import lr_schedule, scaled_lr


def test_socos_lr_at_the_steps_of_its_specification() -> None:
    peak = scaled_lr(1.0, 2048, 256)
    schedule = lr_schedule("cosine", "step", 100, warmup_epochs=10, warmup_start=0.01, final_factor=1e-6 / peak)
    rates = {step: peak * schedule(step / 62_500) for step in (0, 625, 3125, 6250, 34_375, 62_500)}
    expected = {0: 0.08, 625: 0.872, 3125: 4.04, 6250: 8.0, 34_375: 4.0, 62_500: 1e-6}
    assert rates == pytest.approx(expected, rel=1e-6)


def test_the_lr_rises_with_every_step_of_the_warm_up_and_falls_with_every_one_after() -> None:
    schedule = lr_schedule("cosine", "step", 4, warmup_epochs=0.5, warmup_start=0.1, final_factor=0.02)
    factors = [schedule(step / 80) for step in range(80)]  # 20 steps per epoch
    assert factors[0] == 0.1
    assert factors[10] == 1.0
    assert factors[:11] == pytest.approx([0.1 + 0.09 * step for step in range(11)])
    assert all(later < earlier for earlier, later in pairwise(factors[10:]))
    assert 0.02 < factors[-1] < 0.0205


def test_an_lr_moved_per_epoch_is_still_warmed_up_per_step() -> None:
    schedule = lr_schedule("cosine", "epoch", 4, warmup_epochs=1, warmup_start=0.0)
    factors = [schedule(step / 40) for step in range(40)]
    assert factors[:10] == pytest.approx([step / 10 for step in range(10)])
    stairs = [0.5 * (1 + math.cos(math.pi * stair / 3)) for stair in range(3)]
    assert factors[10:] == pytest.approx([stair for stair in stairs for _ in range(10)])


@pytest.mark.parametrize(("epochs", "steps_per_epoch"), [(200, 7), (100, 13), (3, 50)])
def test_without_warm_up_the_lr_is_the_cosine_to_the_bit(epochs: int, steps_per_epoch: int) -> None:
    total = epochs * steps_per_epoch
    by_epoch, by_step = (
        lr_schedule("cosine", unit, epochs, warmup_epochs=0.0, warmup_start=0.01, final_factor=0.0)
        for unit in ("epoch", "step")
    )
    for step in range(total):
        assert 0.03 * by_epoch(step / total) == 0.03 * quantised(cosine, epochs)(step / total)
        assert 0.03 * by_step(step / total) == 0.03 * cosine(step / total)


def test_a_config_that_says_nothing_has_neither_warm_up_nor_floor() -> None:
    solver = load_config(None).SOLVER
    assert (solver.OPTIMIZER, solver.WARMUP_EPOCHS, solver.FINAL_LR, solver.ACCUMULATE_STEPS) == ("sgd", 0.0, 0.0, 1)


@pytest.mark.parametrize("warmup_epochs", [4, 5.5])
def test_a_warm_up_that_leaves_nothing_is_refused(warmup_epochs: float) -> None:
    with pytest.raises(ValueError, match=r"WARMUP_EPOCHS .* leaves nothing of SOLVER\.EPOCHS 4"):
        lr_schedule("cosine", "step", 4, warmup_epochs=warmup_epochs)


def test_a_warm_up_that_ends_within_an_epoch_of_one_lr_is_refused() -> None:
    with pytest.raises(ValueError, match=r"WARMUP_EPOCHS 0\.5 ends within an epoch"):
        lr_schedule("cosine", "epoch", 4, warmup_epochs=0.5)
