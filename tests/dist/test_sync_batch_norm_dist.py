"""Joint BatchNorm on two real gloo processes against BatchNorm on the joined batch in one."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detco.models.norm import SyncBatchNorm, to_sync_batch_norm

pytestmark = pytest.mark.dist

CHANNELS = 3
STEPS = 2
# Name: norm, values per channel position, rows of the two processes.
CASES = {
    "vectors": (nn.BatchNorm1d(CHANNELS), (), (4, 4)),
    "vectors, unequal": (nn.BatchNorm1d(CHANNELS), (), (5, 2)),
    "vectors, one row here": (nn.BatchNorm1d(CHANNELS), (), (1, 3)),
    "maps": (nn.BatchNorm2d(CHANNELS), (4, 5), (2, 2)),
    "maps, unequal": (nn.BatchNorm2d(CHANNELS), (4, 5), (1, 4)),
    "no weights": (nn.BatchNorm2d(CHANNELS, affine=False), (2, 2), (2, 3)),
    "no running statistics": (nn.BatchNorm1d(CHANNELS, track_running_stats=False), (), (3, 2)),
    "average of all batches": (nn.BatchNorm1d(CHANNELS, momentum=None), (), (3, 2)),
}


def make_norm(case, dtype=torch.float64):
    norm = copy.deepcopy(CASES[case][0]).to(dtype)
    if norm.affine:
        torch.nn.init.uniform_(norm.weight, 0.5, 2, generator=torch.Generator().manual_seed(1))
        torch.nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(2))
    return norm


def joined_batch(case, step):
    """Rows of both processes, and what each value's output weighs in the loss; the halves differ much."""
    _, shape, rows = CASES[case]
    generator = torch.Generator().manual_seed(step)
    x, weights = torch.randn(2, sum(rows), CHANNELS, *shape, generator=generator, dtype=torch.float64)
    x[: rows[0]] = x[: rows[0]] * 3 + 5
    return x, weights


def share(tensor, case, rank):
    return tensor.split(CASES[case][2])[rank]


def train(norm, batches):
    """Everything that training `norm` on some (rows, weights) leaves, a list entry per step."""
    results = []
    for x, weights in batches:
        x = x.clone().requires_grad_()
        norm.zero_grad()
        output = norm(x)
        (output * weights).sum().backward()
        results.append(
            {
                "output": output.detach(),
                "input_grad": x.grad,
                "weight_grads": [parameter.grad.clone() for parameter in norm.parameters()],
                "buffers": [buffer.clone() for buffer in norm.buffers()],
            }
        )
    return results


def everything(rank, world_size):
    """All that the tests below look at, in one start of the processes, which takes longer than the work."""
    works = (every_case, large_mean, low_precision, evaluation, under_ddp, one_row_each)
    return {work.__name__: work(rank, world_size) for work in works}


@pytest.fixture(scope="module")
def results(run_distributed):
    return run_distributed(everything, 2)


def of(results, work):
    return [result[work.__name__] for result in results]


def every_case(rank, world_size):
    trained = {}
    for case in CASES:
        (norm,) = to_sync_batch_norm(nn.Sequential(make_norm(case)))
        assert type(norm) is SyncBatchNorm
        batches = [[share(tensor, case, rank) for tensor in joined_batch(case, step)] for step in range(STEPS)]
        trained[case] = train(norm, batches)
    return trained


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_batch_norm_on_the_joined_batch(results, case):
    expected = train(make_norm(case), [joined_batch(case, step) for step in range(STEPS)])
    shares = [result[case] for result in of(results, every_case)]
    for step, whole in enumerate(expected):
        first, second = (trained[step] for trained in shares)
        for name in ("output", "input_grad"):
            torch.testing.assert_close(torch.cat([first[name], second[name]]), whole[name], rtol=1e-9, atol=1e-12)
        summed = [a + b for a, b in zip(first["weight_grads"], second["weight_grads"], strict=True)]
        torch.testing.assert_close(summed, whole["weight_grads"], rtol=1e-9, atol=1e-12)
        for trained in (first, second):
            torch.testing.assert_close(trained["buffers"], whole["buffers"], rtol=1e-9, atol=1e-12)


LARGE = 1000.0


def large_batch():
    return LARGE + torch.randn(64, CHANNELS, generator=torch.Generator().manual_seed(0))


def large_mean(rank, world_size):
    (norm,) = to_sync_batch_norm(nn.Sequential(nn.BatchNorm1d(CHANNELS)))
    return norm(large_batch()[rank * 32 : (rank + 1) * 32]).detach()


def test_a_mean_far_above_the_deviation_costs_no_precision_in_float32(results):
    exact = nn.BatchNorm1d(CHANNELS).double()(large_batch().double()).float()
    # The rounding of the mean itself, 1000 to 24 bits, is all that is left.
    torch.testing.assert_close(torch.cat(of(results, large_mean)), exact, rtol=0, atol=2e-4)


def low_precision(rank, world_size):
    (norm,) = to_sync_batch_norm(nn.Sequential(make_norm("maps", torch.float32)))
    x = share(joined_batch("maps", 0)[0], "maps", rank).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = norm(x)
    return {"output": output.detach(), "mean": norm.running_mean, "variance": norm.running_var}


def test_bfloat16_rows_have_float32_statistics_and_give_bfloat16(results):
    norm = make_norm("maps", torch.float32)
    whole = norm(joined_batch("maps", 0)[0].to(torch.bfloat16).float())
    shares = of(results, low_precision)
    output = torch.cat([result["output"] for result in shares])
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, whole.to(torch.bfloat16), rtol=0.01, atol=1e-5)
    for result in shares:
        torch.testing.assert_close(result["mean"], norm.running_mean)
        torch.testing.assert_close(result["variance"], norm.running_var)


def evaluation(rank, world_size):
    (norm,) = to_sync_batch_norm(nn.Sequential(make_norm("maps")))
    norm.eval()
    if rank == 1:
        return None  # a collective on one process alone would never end
    return norm(joined_batch("maps", 0)[0]).detach()


def test_evaluation_needs_no_other_process(results):
    expected = make_norm("maps").eval()(joined_batch("maps", 0)[0])
    assert torch.equal(of(results, evaluation)[0], expected)


def make_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8 * 16, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(inplace=True),
        nn.Linear(16, 4),
    ).double()


def sgd_steps(module, images):
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        module(images).sin().mean().backward()
        optimiser.step()
        optimiser.zero_grad()


def network_images():
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def under_ddp(rank, world_size):
    network = to_sync_batch_norm(make_network())
    sgd_steps(DistributedDataParallel(network, broadcast_buffers=False), network_images()[rank * 4 : (rank + 1) * 4])
    return network.state_dict()


def test_three_steps_of_a_network_under_ddp_equal_those_of_one_process_with_the_joined_batch(results):
    network = make_network()
    sgd_steps(network, network_images())
    for state in of(results, under_ddp):
        torch.testing.assert_close(state, network.state_dict(), rtol=1e-9, atol=1e-12)


def one_row_each(rank, world_size):
    (norm,) = to_sync_batch_norm(nn.Sequential(nn.BatchNorm1d(CHANNELS)))
    return norm(torch.full((1, CHANNELS), float(rank))).detach()


def test_one_row_on_each_process_is_enough(results):
    outputs = torch.cat(of(results, one_row_each))
    torch.testing.assert_close(outputs, torch.tensor([[-1.0], [1.0]]).expand(2, CHANNELS), rtol=1e-3, atol=0)
