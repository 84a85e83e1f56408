"""`tools/estimate_scaling.py`: what a step sends is counted right, and the model of many GPUs is the stated one."""

from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
GB = 1e9


@pytest.fixture
def tool(load_tool, monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return load_tool("estimate_scaling")


@pytest.fixture
def links(tool):
    return tool.Links(gpus_per_node=8, node_gbs=100.0, network_gbs=10.0, latency_s=0.0)


def test_collectives_take_the_time_of_the_stated_formulas(tool, links):
    assert links.seconds(tool.SUM, 1 * GB, 1, 8) == pytest.approx(2 * 7 / 8 / 100)
    assert links.seconds(tool.SUM, 1 * GB, 1, 32) == pytest.approx(2 * 7 / 8 / 100 + 2 * 3 / 4 / 8 / 10)
    assert links.seconds(tool.GATHER, 1 * GB, 1, 32) == pytest.approx(31 / 100 + 3 / 10)
    assert links.seconds(tool.EXCHANGE, 1 * GB, 1, 32) == pytest.approx(7 / 32 / 100 + 24 / 32 / 10)
    slow_to_start = links._replace(latency_s=1.0)
    assert slow_to_start.seconds(tool.SUM, 0, 3, 8) == pytest.approx(9)


def test_one_gpu_waits_for_nothing(tool, links):
    for kind in (tool.SUM, tool.GATHER, tool.EXCHANGE, tool.SPREAD, tool.GRADIENTS):
        assert links._replace(latency_s=1.0).seconds(kind, GB, 1, 1) == 0


def make_estimate(tool, links, num_gpus, *, gradient_gb=0.1, share=0.4):
    traffic = [tool.Traffic(tool.GRADIENTS, 4, gradient_gb * GB, 0.0), tool.Traffic(tool.EXCHANGE, 1, 0.0, 0.001 * GB)]
    return tool.estimate(traffic, links, num_gpus, images_per_gpu=10, images_per_second=100.0, backward_share=share)


def test_efficiency_falls_with_the_number_of_gpus_and_rises_with_the_network(tool, links):
    numbers = (1, 2, 8, 16, 64, 256)
    of_slow, of_fast = (
        [make_estimate(tool, one, number).efficiency for number in numbers]
        for one in (links, links._replace(network_gbs=40.0))
    )
    assert of_slow[0] == 1.0
    assert of_slow == sorted(of_slow, reverse=True)
    assert of_slow[:3] == of_fast[:3]
    assert all(fast > slow for fast, slow in zip(of_fast[3:], of_slow[3:], strict=True))


def test_gradients_hide_behind_the_backward_pass_but_for_the_last_bucket_and_what_does_not_fit(tool, links):
    hidden = make_estimate(tool, links, 8, gradient_gb=0.1)
    assert hidden.gradients_ms == pytest.approx(1e3 * links.seconds(tool.SUM, 25 * 2**20, 1, 8))
    large = make_estimate(tool, links, 8, gradient_gb=10.0)
    assert large.gradients_ms == pytest.approx(1e3 * (2 * 7 / 8 * 10 / 100 - 0.4 * 0.1))
    step_s = 0.1 + (large.gradients_ms + large.waited_ms) / 1e3
    assert large.images_per_second == pytest.approx(8 * 10 / step_s)


def test_the_table_has_a_row_per_number_of_gpus(tool, links):
    estimates = [make_estimate(tool, links, number) for number in (8, 256)]
    printed = tool.tables([tool.Traffic(tool.GATHER, 1, 5e6, 1e6)], estimates, images_per_gpu=10)
    assert "| gather | 1 | 15.00 |" in printed
    assert [line.split(" | ")[0] for line in printed.splitlines()[-2:]] == ["| 8", "| 256"]


def test_an_unknown_method_is_refused(tool, capsys):
    assert tool.main(["simclr", "--images-per-second", "1"]) == 2
    assert "method is simclr; it must be one of detco, " in capsys.readouterr().err
