"""BatchNorm groups in one pass against BatchNorm on one group after the other."""

import copy
from functools import partial

import pytest
import torch
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torchvision.models.resnet import Bottleneck

from detco.models.norm import GroupedBatchNorm, batch_norm_groups, count_groups

GROUPS, CHANNELS = 3, 4


@pytest.fixture(autouse=True)
def _no_compiled_code_of_other_tests():
    torch.compiler.reset()


def as_it_is(module):
    return module


# Traced as for a compiler, forward and backward, then run operation by operation: no C++ compiler is needed.
traced = partial(torch.compile, backend="aot_eager", fullgraph=True)
WAYS = [pytest.param(as_it_is, id="eager"), pytest.param(traced, id="traced")]


def make_norm(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    norm = GroupedBatchNorm(CHANNELS)
    nn.init.uniform_(norm.weight, 0.5, 2, generator=generator)
    nn.init.normal_(norm.bias, generator=generator)
    return norm.to(dtype)


def make_images(seed=0, rows=6, side=5):
    """Images whose groups differ much."""
    images = torch.randn(rows, CHANNELS, side, side, generator=torch.Generator().manual_seed(seed)).double()
    return images * torch.linspace(1, 3, rows).view(-1, 1, 1, 1) + torch.linspace(-2, 4, rows).view(-1, 1, 1, 1)


def plain_twin(norm):
    twin = nn.BatchNorm2d(CHANNELS).to(norm.weight.dtype)
    twin.load_state_dict(norm.state_dict(), strict=True)
    return twin


def gradients(output, inputs):
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.autograd.grad((output.double() * weights).sum(), inputs)


@pytest.mark.parametrize("way", WAYS)
def test_one_pass_equals_one_group_after_the_other_in_value_gradient_and_running_averages(way):
    norm = make_norm()
    oracle, run = plain_twin(norm), way(norm)
    for step in range(2):
        images = make_images(step).requires_grad_()
        with batch_norm_groups(norm, GROUPS):
            output = run(images)
        expected = torch.cat([oracle(group) for group in images.chunk(GROUPS)])
        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-10)
        assert not torch.allclose(output, nn.functional.batch_norm(images, None, None, training=True), atol=0.1)
        for ours, theirs in zip(
            gradients(output, (images, norm.weight, norm.bias)),
            gradients(expected, (images, oracle.weight, oracle.bias)),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(norm.state_dict(), oracle.state_dict(), rtol=1e-9, atol=1e-12)
    assert norm.num_batches_tracked.item() == 2 * GROUPS


@pytest.mark.parametrize("way", WAYS)
def test_running_averages_after_two_passes_are_those_of_group_by_group(way):
    norm = make_norm()
    oracle, run = plain_twin(norm), way(norm)
    for step in range(2):
        patches, images = make_images(2 * step, rows=12, side=3), make_images(2 * step + 1)
        for turn, views in enumerate((patches, images)):
            with batch_norm_groups(norm, GROUPS, turn=turn, num_turns=2):
                run(views)
        for patches_of_group, images_of_group in zip(patches.chunk(GROUPS), images.chunk(GROUPS), strict=True):
            oracle(patches_of_group)
            oracle(images_of_group)
    torch.testing.assert_close(norm.state_dict(), oracle.state_dict(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_in_channels_last_keeps_both_and_has_float32_statistics(way):
    norm = make_norm(dtype=torch.float32)
    exact, run = plain_twin(norm), way(norm)
    images = make_images().to(torch.bfloat16).to(memory_format=torch.channels_last)
    with batch_norm_groups(norm, GROUPS):
        output = run(images)
    expected = torch.cat([exact(group.float()) for group in images.chunk(GROUPS)])
    assert output.dtype == torch.bfloat16
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected.to(torch.bfloat16), rtol=0.01, atol=0.01)
    torch.testing.assert_close(norm.running_mean, exact.running_mean)
    torch.testing.assert_close(norm.running_var, exact.running_var)


@pytest.mark.parametrize("way", WAYS)
def test_a_residual_block_trains_alike_compiled_and_group_by_group(way):
    torch.manual_seed(0)
    block = Bottleneck(16, 4, norm_layer=GroupedBatchNorm).double()
    oracle = copy.deepcopy(block)
    images = torch.randn(6, 16, 5, 5).double()
    run = way(block)
    with batch_norm_groups(block, GROUPS):
        output = run(images)
    expected = torch.cat([oracle(group) for group in images.chunk(GROUPS)])
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(
        gradients(output, list(block.parameters())), gradients(expected, list(oracle.parameters()))
    )
    torch.testing.assert_close(block.state_dict(), oracle.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_outside_the_context_and_with_one_group_it_is_batch_norm_to_the_bit(training):
    norm = make_norm().train(training)
    oracle = plain_twin(norm).train(training)
    images = make_images()
    assert torch.equal(norm(images), oracle(images))
    with batch_norm_groups(norm, 1, turn=1, num_turns=2):
        assert torch.equal(norm(images), oracle(images))
    with pytest.raises(RuntimeError, match="midway"), batch_norm_groups(norm, GROUPS):
        raise RuntimeError("midway")
    assert torch.equal(norm(images), oracle(images))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(norm.buffers(), oracle.buffers(), strict=True))


def test_evaluation_knows_no_groups():
    norm = make_norm().eval()
    with batch_norm_groups(norm, GROUPS):
        assert torch.equal(norm(make_images()), plain_twin(norm).eval()(make_images()))


def test_its_state_is_that_of_batch_norm_and_precise_bn_finds_it():
    network = nn.Sequential(GroupedBatchNorm(CHANNELS))
    assert list(network.state_dict()) == list(nn.Sequential(nn.BatchNorm2d(CHANNELS)).state_dict())
    assert get_bn_modules(network) == [network[0]]


def test_momentum_of_precise_bn_takes_the_last_batch_alone():
    norm = make_norm()
    norm.momentum = 1.0  # what precise BN sets
    norm(make_images())
    torch.testing.assert_close(norm.running_mean, make_images().mean(dim=(0, 2, 3)))


def test_momentum_one_leaves_the_last_group_of_the_last_pass():
    norm = make_norm()
    norm.momentum = 1.0
    for turn in range(2):
        with batch_norm_groups(norm, GROUPS, turn=turn, num_turns=2):
            norm(make_images(turn))
    torch.testing.assert_close(norm.running_mean, make_images(1)[4:].mean(dim=(0, 2, 3)))


def test_groups_without_a_momentum_are_refused_and_the_layer_is_plain_batch_norm_without_groups():
    norm = make_norm()
    norm.momentum = None
    with pytest.raises(ValueError, match="need a momentum"), batch_norm_groups(norm, GROUPS):
        pass
    norm(make_images())
    torch.testing.assert_close(norm.running_mean, make_images().mean(dim=(0, 2, 3)))


@pytest.mark.parametrize("way", WAYS)
def test_a_group_may_be_one_image_but_not_one_value(way):
    norm = make_norm()
    oracle, run = plain_twin(norm), way(norm)
    with batch_norm_groups(norm, 6):
        output = run(make_images())
    torch.testing.assert_close(output, torch.cat([oracle(image) for image in make_images().split(1)]))
    torch.testing.assert_close(norm.state_dict(), oracle.state_dict())
    torch.compiler.reset()
    # Not `run`: torch 2.8 hides what an error says within a full graph. A training run asks for no full graphs either.
    for network in (norm, torch.compile(norm, backend="aot_eager")):
        with pytest.raises(ValueError, match="one value per channel"), batch_norm_groups(norm, 6):
            network(make_images(side=1))
    torch.testing.assert_close(norm.state_dict(), oracle.state_dict())


def test_images_that_do_not_split_into_groups_of_one_size_are_refused():
    norm = make_norm()
    with pytest.raises(ValueError, match="7 images do not split into 3 BatchNorm groups"), batch_norm_groups(norm, 3):
        norm(make_images(rows=7))
    assert norm.num_batches_tracked.item() == 0


def test_a_batch_within_the_group_size_is_one_group_and_a_larger_one_must_split():
    assert [count_groups(images, 32) for images in (5, 32, 64, 256)] == [1, 1, 2, 8]
    with pytest.raises(ValueError, match=r"48 images per process do not split into BatchNorm groups of 32; change"):
        count_groups(48, 32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_for_a_gpu_it_equals_the_groups_in_turn(dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    norm = make_norm(dtype=torch.float32).cuda()
    compiled = copy.deepcopy(norm)
    run = torch.compile(compiled, fullgraph=True)
    images = make_images(rows=96, side=16).to("cuda", dtype, memory_format=torch.channels_last).requires_grad_()
    with batch_norm_groups(norm, GROUPS), batch_norm_groups(compiled, GROUPS):
        outputs = norm(images), run(images)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(*outputs, **tolerance)
    weights = torch.randn_like(outputs[0])
    torch.testing.assert_close(*(torch.autograd.grad(output, images, weights)[0] for output in outputs), **tolerance)
    torch.testing.assert_close(compiled.state_dict(), norm.state_dict(), rtol=1e-4, atol=1e-5)
