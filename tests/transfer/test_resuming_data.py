"""After a resume Detectron2's training loader goes on where it was, on one process and on two."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest

from transfer import d2

pytestmark = pytest.mark.d2
needs_d2 = pytest.mark.skipif(d2.info() is None, reason="needs Detectron2 (python tools/install_detectron2.py)")

IMAGES, BATCH = 50, 4


def loader_of(*, sampler: str = "TrainingSampler", workers: int = 0, grouped: bool = False) -> Any:
    """A loader over numbers; every third image is upright, every fifth is of a rare class."""
    from detectron2.config import get_cfg
    from detectron2.data import build_detection_train_loader

    cfg = get_cfg()
    cfg.SEED = 0
    cfg.SOLVER.IMS_PER_BATCH = BATCH
    cfg.DATALOADER.SAMPLER_TRAIN = sampler
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.9
    cfg.DATALOADER.NUM_WORKERS = workers
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouped
    images = [
        {
            "image_id": number,
            "width": 50 + 50 * (number % 3 > 0),
            "height": 80,
            "annotations": [{"category_id": int(number % 5 == 0)}],
        }
        for number in range(IMAGES)
    ]
    np.random.seed(0)  # as at the start of a run: Detectron2 draws the sampler's seed from it
    return build_detection_train_loader(cfg, mapper=_itself, dataset=images)


def _itself(record: dict[str, Any]) -> dict[str, Any]:
    return record


def batches(loader: Any) -> Iterator[list[int]]:
    return ([item["image_id"] for item in batch] for batch in loader)


def continued(start_iter: int, processes: int = 1, **options: Any) -> Any:
    from transfer.resuming import continue_loader

    loader = loader_of(**options)
    continue_loader(loader, start_iter * BATCH // processes)
    return loader


@needs_d2
@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_a_run_that_was_not_interrupted(sampler: str, workers: int) -> None:
    uninterrupted = list(islice(batches(loader_of(sampler=sampler)), 40))  # some epochs
    for start_iter in (1, 7, 20):
        loader = continued(start_iter, sampler=sampler, workers=workers)
        assert list(islice(batches(loader), 12)) == uninterrupted[start_iter : start_iter + 12]


@needs_d2
@pytest.mark.parametrize("workers", [0, 2])
def test_with_grouping_no_more_images_come_twice_than_wait_for_a_partner(workers: int) -> None:
    before = {number for batch in islice(batches(loader_of(grouped=True, workers=workers)), 5) for number in batch}
    after = {number for batch in islice(batches(continued(5, grouped=True, workers=workers)), 5) for number in batch}
    # Each worker draws a batch's worth of indices before the next one does.
    assert len(before & after) <= 2 * (BATCH - 1) + BATCH * max(0, workers - 1)
    assert len(before) == 20


def _of_one_rank(rank: int, world_size: int, start_iter: int) -> tuple[list[list[int]], list[list[int]]]:
    uninterrupted = list(islice(batches(loader_of()), 20))
    return uninterrupted[start_iter:], list(islice(batches(continued(start_iter, world_size)), 20 - start_iter))


@needs_d2
@pytest.mark.dist
def test_every_rank_goes_on_with_its_own_images(run_distributed: Any) -> None:
    (first, resumed), (second, resumed_second) = run_distributed(_of_one_rank, 2, 9)
    assert first != second
    assert (resumed, resumed_second) == (first, second)
