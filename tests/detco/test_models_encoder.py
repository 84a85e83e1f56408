"""Trunk and heads together: sizes, order of the embeddings, order of the passes."""

import copy

import pytest
import torch

from detco.models.encoder import Encoder

ALL = ("res2", "res3", "res4", "res5")


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def make_encoder(stages=ALL, local=True, bn_group=32):
    torch.manual_seed(0)
    return Encoder(stages, local=local, dim=16, head_hidden=8, bn_group=bn_group)


def test_parameter_counts_are_the_published_ones():
    encoder = Encoder(ALL, local=True, dim=128, head_hidden=None, bn_group=32)
    assert round(num_parameters(encoder) / 1e6, 1) == 80.2
    assert round(num_parameters(encoder.global_heads) / 1e6, 2) == 6.07
    per_stage = [round(num_parameters(head) / 1e6, 2) for head in encoder.local_heads.values()]
    assert per_stage == [0.62, 2.43, 9.57, 38.01]


def test_moco_v2_encoder_has_27_97_million_parameters():
    encoder = Encoder(("res5",), local=False, dim=128, head_hidden=None, bn_group=32)
    assert round(num_parameters(encoder) / 1e6, 2) == 27.97


def test_embeddings_are_unit_length_global_first_then_local_shallow_first():
    encoder = make_encoder().eval()
    images, patches = torch.randn(2, 3, 32, 32), torch.randn(2, 9, 3, 16, 16)
    embeddings = encoder(images, patches)
    assert embeddings.shape == (2, 8, 16)
    torch.testing.assert_close(embeddings.norm(dim=2), torch.ones(2, 8))

    image_features = encoder.trunk(images)
    for i, stage in enumerate(ALL):
        expected = encoder.global_heads[stage](getattr(image_features, stage).mean(dim=(2, 3)))
        torch.testing.assert_close(embeddings[:, i], torch.nn.functional.normalize(expected))

    for n in range(2):
        patch_features = encoder.trunk(patches[n])
        for i, stage in enumerate(ALL):
            in_a_row = torch.cat([feature.mean(dim=(1, 2)) for feature in getattr(patch_features, stage)])
            expected = torch.nn.functional.normalize(encoder.local_heads[stage](in_a_row), dim=0)
            torch.testing.assert_close(embeddings[n, 4 + i], expected)


def test_local_embedding_depends_on_the_order_of_the_patches():
    encoder = make_encoder().eval()
    images, patches = torch.randn(1, 3, 32, 32), torch.randn(1, 9, 3, 16, 16)
    moved = encoder(images, patches.roll(1, dims=1))
    original = encoder(images, patches)
    torch.testing.assert_close(moved[:, :4], original[:, :4])
    assert (moved[:, 4:] - original[:, 4:]).abs().max() > 1e-4


def test_patches_pass_first_so_that_running_averages_end_on_whole_images():
    torch.manual_seed(0)
    encoder = make_encoder()
    images, patches = torch.full((2, 3, 32, 32), 5.0), torch.full((2, 9, 3, 16, 16), -5.0)
    encoder(images, patches)
    norm, conv = encoder.trunk.bn1, encoder.trunk.conv1
    of_images, of_patches = (conv(x).mean(dim=(0, 2, 3)) for x in (images, patches.flatten(0, 1)))
    torch.testing.assert_close(norm.running_mean, 0.1 * of_images + 0.9 * 0.1 * of_patches, atol=1e-5, rtol=1e-4)


def test_embeddings_are_float32_under_autocast():
    encoder = make_encoder(("res5",), local=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encoder(torch.randn(2, 3, 32, 32)).dtype == torch.float32


@pytest.mark.parametrize("local", [True, False])
def test_patches_must_come_if_and_only_if_there_are_local_heads(local):
    encoder = make_encoder(("res5",), local=local)
    patches = None if local else torch.randn(2, 9, 3, 16, 16)
    with pytest.raises(ValueError, match="local heads"):
        encoder(torch.randn(2, 3, 32, 32), patches)


def test_unneeded_heads_are_not_built():
    assert list(make_encoder(("res5",), local=False).global_heads) == ["res5"]
    assert len(make_encoder(("res5",), local=False).local_heads) == 0
    assert list(make_encoder(("res5",), local=True).local_heads) == ["res5"]


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("local", [True, False])
def test_batch_of_several_groups_equals_one_group_after_the_other_in_embeddings_gradient_and_buffers(local):
    encoder = make_encoder(local=local, bn_group=2).double()
    in_turn = copy.deepcopy(encoder)
    for _ in range(2):
        views = [torch.randn(6, 3, 32, 32).double(), torch.randn(6, 9, 3, 16, 16).double()][: 1 + local]
        together = encoder(*views)
        apart = torch.cat([in_turn(*group) for group in zip(*(view.split(2) for view in views), strict=True)])
        torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(encoder.state_dict(), in_turn.state_dict(), rtol=1e-9, atol=1e-12)
    assert encoder.trunk.bn1.num_batches_tracked.item() == 2 * 3 * (1 + local)

    weights = torch.randn_like(together)
    gradients = [
        torch.autograd.grad((output * weights).sum(), list(network.parameters()))
        for output, network in ((together, encoder), (apart, in_turn))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("narrow")
def test_batch_that_does_not_split_into_groups_is_refused_before_any_work():
    encoder = make_encoder(("res5",), local=False, bn_group=2)
    with pytest.raises(ValueError, match="5 images per process do not split into BatchNorm groups of 2"):
        encoder(torch.randn(5, 3, 32, 32))
    assert encoder.trunk.bn1.num_batches_tracked.item() == 0
