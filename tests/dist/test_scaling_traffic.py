"""The traffic that `tools/estimate_scaling.py` counts in two processes is what MoCo v2 is known to send."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from detco.methods import MoCoV2

pytestmark = pytest.mark.dist
TOOLS = Path(__file__).parents[2] / "tools"
VIEW_PX, DIM = 32, 64


def load_tool():
    sys.path.insert(0, str(TOOLS))
    spec = importlib.util.spec_from_file_location("estimate_scaling", TOOLS / "estimate_scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(rank, world_size):
    tool = load_tool()
    before = dist.all_reduce
    with tool.Recorder() as recorder:
        dist.all_reduce(torch.zeros(5))
        dist.broadcast(torch.zeros(3, dtype=torch.float64), src=0)
        dist.all_gather([torch.zeros(2) for _ in range(world_size)], torch.ones(2))
    assert dist.all_reduce is before
    step = tool.record_step("moco_v2", ["VIEWS.GLOBAL_SIZE", str(VIEW_PX), "METHOD.DIM", str(DIM)])
    return recorder.calls, step


@pytest.fixture(scope="module")
def results(run_distributed):
    return run_distributed(record, 2)


def test_calls_are_noted_with_the_bytes_that_a_process_gives(results):
    for calls, _ in results:
        assert calls == [("sum", 20), ("broadcast", 24), ("gather", 8)]


def test_a_step_sends_its_key_images_in_bfloat16_its_keys_and_its_gradients(results):
    parameters = list(MoCoV2(dim=DIM, queue_size=8).query.parameters())
    for _, (few, more, gradients) in results:
        for calls, images in ((few, 2), (more, 4)):
            assert dict(calls) == {"exchange": images * 3 * VIEW_PX**2 * 2, "gather": images * DIM * 4}
            assert len(calls) == 2
        assert gradients == 4 * sum(parameter.numel() for parameter in parameters)
