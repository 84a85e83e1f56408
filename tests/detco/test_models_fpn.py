"""The pyramid: sizes that are no powers of two, a slow reference, and the names that the converter reads."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detco.models.fpn import FPN, Pyramid
from detco.models.resnet import ResNetTrunk, Stages
from transfer.naming import TABLES, account_for
from transfer.sources.parts import fpn_shapes


@pytest.fixture(scope="module")
def fpn():
    """In evaluation, with BatchNorms that do something."""
    torch.manual_seed(0)
    fpn = FPN().eval()
    for norm in (module for module in fpn.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return fpn


def make_stages(sizes, images=2):
    generator = torch.Generator().manual_seed(1)
    widths = ResNetTrunk.channels.values()
    return Stages(*(torch.randn(images, c, *size, generator=generator) for c, size in zip(widths, sizes, strict=True)))


def test_a_view_of_112_px_gives_levels_28_14_7_and_4_wide():
    trunk, fpn = ResNetTrunk(), FPN()
    with torch.no_grad():
        pyramid = fpn(trunk(torch.randn(2, 3, 112, 112)))
    assert isinstance(pyramid, Pyramid)
    assert [level.shape for level in pyramid] == [(2, 256, side, side) for side in (28, 14, 7, 4)]


def normalised(x, block):
    x = F.conv2d(x, block.conv.weight, padding=block.conv.weight.shape[-1] // 2)
    norm = block.bn
    x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
    return x * norm.weight[:, None, None] + norm.bias[:, None, None]


def pixel_by_pixel(fpn, stages):
    """A level's pixel is its stage's and the one of the coarser level that covers its upper left corner."""
    levels, coarser = [], None
    for i in (3, 2, 1, 0):
        level = normalised(stages[i], fpn.lateral_convs[i])
        height, width = level.shape[-2:]
        if coarser is not None:
            rows, columns = coarser.shape[-2:]
            for y in range(height):
                for x in range(width):
                    level[:, :, y, x] += coarser[:, :, y * rows // height, x * columns // width]
        coarser = level
        levels.insert(0, normalised(level, fpn.fpn_convs[i]))
    return levels


@pytest.mark.parametrize(
    "sizes",
    [[(8, 8), (4, 4), (2, 2), (1, 1)], [(28, 28), (14, 14), (7, 7), (4, 4)], [(11, 18), (6, 9), (3, 5), (2, 3)]],
    ids=["factors of 2", "112 px", "odd"],
)
def test_it_equals_a_slow_reference(fpn, sizes):
    stages = make_stages(sizes, images=1)
    with torch.no_grad():
        torch.testing.assert_close(list(fpn(stages)), pixel_by_pixel(fpn, stages), rtol=1e-4, atol=1e-4)


def test_every_level_knows_the_coarser_ones_and_none_of_the_finer():
    fpn, stages = FPN(), make_stages([(8, 8), (4, 4), (2, 2), (1, 1)])
    for stage in stages:
        stage.requires_grad_()
    for i, level in enumerate(fpn(stages)):
        gradients = torch.autograd.grad(level.square().sum(), stages, retain_graph=True, allow_unused=True)
        assert [gradient is not None for gradient in gradients] == [j >= i for j in range(4)]


def test_names_and_shapes_are_those_the_converter_knows(fpn):
    state = fpn.state_dict()
    counters = {name for name in state if name.endswith("num_batches_tracked")}
    assert len(counters) == 8
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in counters}
    assert shapes == fpn_shapes(range(4), range(4), has_norm=True)

    account = account_for((f"fpn/{name}" for name in state), TABLES)
    assert not account.unexplained
    assert set(account.dropped) == {f"fpn/{name}" for name in counters}


def test_convolutions_start_kaiming_normal():
    fpn = FPN()
    for convs, kernel in ((fpn.lateral_convs, 1), (fpn.fpn_convs, 3)):
        for block in convs:
            deviation = math.sqrt(2 / (256 * kernel**2))
            assert block.conv.weight.std().item() == pytest.approx(deviation, rel=0.02)
            # A normal has 4.6 % beyond two deviations, a uniform of that deviation none.
            beyond = (block.conv.weight.abs() > 2 * deviation).float().mean().item()
            assert beyond == pytest.approx(0.0455, abs=0.005)
