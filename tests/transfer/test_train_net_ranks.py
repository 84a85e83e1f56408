from types import SimpleNamespace
from typing import Any

import pytest
import torch

from transfer import d2

pytestmark = [pytest.mark.d2, pytest.mark.dist]


def _means_after_step(rank: int, world_size: int, iteration: int, period: int) -> list[float]:
    from transfer.trainer import EqualBuffers  # imports Detectron2, which may be missing where tests are collected

    model = torch.nn.BatchNorm1d(2)
    model.running_mean.fill_(10.0 + rank)
    hook = EqualBuffers(period)
    hook.trainer = SimpleNamespace(iter=iteration, max_iter=10, model=model)
    hook.after_step()
    return model.running_mean.tolist()


@pytest.mark.skipif(d2.info() is None, reason="needs Detectron2 (python tools/install_detectron2.py)")
def test_all_ranks_evaluate_with_the_statistics_that_rank_0_saves(run_distributed: Any) -> None:
    assert run_distributed(_means_after_step, 2, 9, 0) == [[10.0, 10.0], [10.0, 10.0]]
