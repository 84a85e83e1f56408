"""SoCo on two real gloo processes: with synchronised BatchNorm, two halves of a batch are the batch."""

from functools import partialmethod

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import ResNet

from detco.methods.soco import SoCoC4, SoCoFPN
from detco.views.object_views import BoxSet, PairedView
from detco.views.soco import SoCoFPNViews

pytestmark = pytest.mark.dist

PER_PROCESS = 2
ROUTINGS = ("all", "own")


def make_views():
    """Of 4 images with one box each. In the first half of the batch no box is on p2 or p5."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor([[1], [2], [0], [3]])
    ids = torch.zeros(4, 1)

    def boxes():
        corner = torch.rand(4, 1, 2, generator=generator) * 0.5
        return BoxSet(torch.cat([corner, corner + 0.4], dim=2), ids, levels)

    def images(size):
        return torch.randn(4, 3, size, size, generator=generator, dtype=torch.float64)

    return SoCoFPNViews(images(32), *(PairedView(images(size), boxes(), boxes()) for size in (32, 16)))


def share_of(views, rank):
    def own(item):
        if isinstance(item, torch.Tensor):
            return item[rank * PER_PROCESS : (rank + 1) * PER_PROCESS]
        return type(item)(*map(own, item))

    return own(views)


def make_method(**options):
    """All layers, but narrow ones; in the processes too, where there are no fixtures."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResNet, "__init__", partialmethod(ResNet.__init__, width_per_group=8))
        for module in ("fpn", "box_head"):
            patch.setattr(f"detco.models.{module}.WIDTH", 16)
        return SoCoFPN(dim=8, hidden=16, **options).double()  # batch statistics of 4 images make much of rounding


def step(method, module, views):
    """Loss, statistics, and the head of every gradient with its norm, which is small enough to hand over."""
    output = module(views)
    output.loss.backward()
    gradients = {
        name: torch.cat([p.grad.flatten()[:64], p.grad.norm().view(1)])
        for name, p in method.named_parameters()
        if p.requires_grad
    }
    statistics = {name: value for name, value in method.named_buffers() if "running" in name}
    return {"loss": output.loss.detach(), "gradients": gradients, "statistics": statistics}


def everything(rank, world_size):
    """All that the tests below look at, in one start of the processes, which takes longer than the work."""
    results = {}
    for routing in ROUTINGS:
        method = make_method(level_routing=routing)
        # Were a parameter without part in the loss, its gradient would be missing, and others not be averaged.
        module = DistributedDataParallel(method, broadcast_buffers=False, find_unused_parameters=False)
        results[routing] = step(method, module, share_of(make_views(), rank))
    return results | {"check": check_batch()}


def check_batch():
    with torch.device("meta"):
        together, apart = SoCoC4(dim=8, hidden=16, sync_bn=True), SoCoC4(dim=8, hidden=16, sync_bn=False)
    together.check_batch(1)
    with pytest.raises(ValueError, match=r"1 per process and forward, 2 process\(es\), sync_bn False"):
        apart.check_batch(1)
    return "one image per process is enough if BatchNorm is joint"


@pytest.fixture(scope="module")
def results(run_distributed):
    return run_distributed(everything, 2)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_two_processes_equal_one_with_the_joined_batch_in_loss_gradient_and_statistics(results, routing):
    shares = [result[routing] for result in results]
    method = make_method(level_routing=routing)
    whole = step(method, method, make_views())

    torch.testing.assert_close((shares[0]["loss"] + shares[1]["loss"]) / 2, whole["loss"])
    assert shares[0]["loss"] != shares[1]["loss"]
    for share in shares:
        for name, gradient in whole["gradients"].items():
            assert (share["gradients"][name] - gradient).norm() <= 1e-6 * gradient.norm() + 1e-9, name
        for name, value in whole["statistics"].items():
            torch.testing.assert_close(share["statistics"][name], value)


def test_one_image_per_process_is_enough_if_and_only_if_norms_are_joint(results):
    assert {result["check"] for result in results} == {"one image per process is enough if BatchNorm is joint"}
