"""Schedules: literal sequences, ranges, messages."""

import pytest

from detco import schedules

QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)


def test_constant_is_one_throughout():
    assert [schedules.constant(progress) for progress in QUARTERS] == [1.0] * 5


def test_cosine_falls_from_one_to_zero_with_half_its_fall_in_the_middle():
    expected = [1.0, 0.8535534, 0.5, 0.1464466, 0.0]
    assert [schedules.cosine(progress) for progress in QUARTERS] == pytest.approx(expected, abs=1e-7)


def test_step_multiplies_by_gamma_from_each_milestone_on():
    schedule = schedules.step([0.6, 0.8], gamma=0.1)
    expected = [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    assert [schedule(p) for p in (0.0, 0.599, 0.6, 0.799, 0.8, 1.0)] == pytest.approx(expected)


def test_warm_up_rises_to_one_and_then_runs_the_whole_schedule():
    schedule = schedules.warmed_up(schedules.cosine, warmup_share=0.2)
    expected = [0.0, 0.5, 1.0, 0.5, 0.0]
    assert [schedule(p) for p in (0.0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx(expected)


def test_warm_up_begins_at_start():
    schedule = schedules.warmed_up(schedules.constant, warmup_share=0.5, start=0.2)
    assert [schedule(p) for p in QUARTERS] == pytest.approx([0.2, 0.6, 1.0, 1.0, 1.0])


def test_warm_up_over_nothing_is_the_schedule_itself():
    assert schedules.warmed_up(schedules.cosine, warmup_share=0.0) is schedules.cosine


def test_quantised_cosine_moves_once_per_epoch():
    schedule = schedules.quantised(schedules.cosine, 4)
    steps = [schedule(step / 12) for step in range(12)]
    assert steps == pytest.approx([1.0] * 3 + [0.8535534] * 3 + [0.5] * 3 + [0.1464466] * 3, abs=1e-7)


def test_last_of_200_epochs_runs_at_the_published_learning_rate():
    schedule = schedules.quantised(schedules.cosine, 200)
    assert 0.03 * schedule(0.99999) == pytest.approx(1.85e-6, rel=2e-3)


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 7, 5004])
def test_quantised_is_in_the_right_epoch_at_the_first_and_last_step_of_each(steps_per_epoch):
    # The schedule is the identity, so that the factor tells the epoch; 3 / 200 * 200 must not fall into epoch 2.
    schedule = schedules.quantised(lambda progress: progress, 200)
    total = steps_per_epoch * 200
    for epoch in range(200):
        first, last = epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch - 1
        assert schedule(first / total) == epoch / 200
        assert schedule(last / total) == epoch / 200


@pytest.mark.parametrize("progress", [-0.01, 1.01])
@pytest.mark.parametrize(
    "schedule",
    [
        schedules.constant,
        schedules.cosine,
        schedules.step([0.5]),
        schedules.warmed_up(schedules.cosine, 0.1),
        schedules.quantised(schedules.cosine, 10),
    ],
)
def test_progress_outside_training_is_refused(schedule, progress):
    with pytest.raises(ValueError, match="progress is the share of training done"):
        schedule(progress)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: schedules.step([0.8, 0.6]), "milestones must increase"),
        (lambda: schedules.step([60, 80]), "milestones must increase within"),
        (lambda: schedules.step([0.5], gamma=0.0), "gamma must be in"),
        (lambda: schedules.warmed_up(schedules.cosine, 1.0), "warmup_share must be in"),
        (lambda: schedules.warmed_up(schedules.cosine, 0.1, start=2.0), "start must be in"),
        (lambda: schedules.quantised(schedules.cosine, 0), "num_stairs must be at least 1"),
    ],
)
def test_impossible_settings_are_refused_with_the_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
