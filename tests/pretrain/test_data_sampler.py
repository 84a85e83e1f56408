import itertools

import pytest

from pretrain.data import BatchSampler


def batches(
    *,
    num_images: int = 50,
    batch_size_total: int = 8,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 3,
    start: int = 0,
    total: int = 18,
) -> list[list[tuple[int, int]]]:
    return list(BatchSampler(num_images, batch_size_total, rank, world_size, seed, start, total))


def test_every_epoch_meets_an_image_at_most_once_and_drops_only_the_rest() -> None:
    sampler = BatchSampler(50, 8, 0, 1, seed=3, start_step=0, total_steps=18)
    assert sampler.steps_per_epoch == 6
    assert len(sampler) == 18
    by_epoch: dict[int, list[int]] = {}
    for epoch, index in itertools.chain.from_iterable(sampler):
        by_epoch.setdefault(epoch, []).append(index)
    assert set(by_epoch) == {0, 1, 2}
    for indices in by_epoch.values():
        assert len(indices) == len(set(indices)) == 48
        assert set(indices) <= set(range(50))


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {tuple(index for _, index in itertools.chain.from_iterable(batches(seed=seed)[i : i + 6]))
              for seed in (3, 4) for i in (0, 6, 12)}  # fmt: skip
    assert len(orders) == 6


@pytest.mark.parametrize("world_size", [2, 4])
def test_slices_of_the_processes_joined_are_the_batch_of_one_process(world_size: int) -> None:
    per_rank = [batches(rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = [list(itertools.chain.from_iterable(slices)) for slices in zip(*per_rank, strict=True)]
    assert joined == batches()


@pytest.mark.parametrize("start", [1, 5, 6, 7, 17, 18])
def test_resuming_at_any_step_continues_the_sequence(start: int) -> None:
    assert batches(start=start) == batches()[start:]


def test_every_image_is_dropped_equally_often() -> None:
    seen = [index for _, index in itertools.chain.from_iterable(batches(num_images=12, total=3000))]
    counts = [seen.count(index) for index in range(12)]
    # 3000 epochs of 8 out of 12: binomial with p = 2/3, standard deviation 25.8.
    assert all(abs(count - 2000) < 5 * 25.8 for count in counts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size_total": 9, "world_size": 2}, "does not divide among 2 processes"),
        ({"num_images": 7}, "7 images do not fill one batch of SOLVER.BATCH_SIZE_TOTAL 8"),
        ({"rank": 2, "world_size": 2}, "rank 2"),
        ({"start": 19}, "start_step 19"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(**arguments)
