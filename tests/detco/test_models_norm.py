"""Joint BatchNorm as far as one process shows it: what it replaces, what it keeps, which code runs."""

import copy
import inspect

import pytest
import torch
import torch.distributed as dist
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from detco.models import norm as norm_module
from detco.models.mlp import MLP
from detco.models.norm import SyncBatchNorm, to_sync_batch_norm
from detco.models.resnet import ResNetTrunk


def make_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, eps=1e-3, momentum=0.3),
        nn.Sequential(nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.BatchNorm2d(4)),
        nn.Flatten(),
        nn.LayerNorm(4 * 6 * 6),
        nn.Linear(4 * 6 * 6, 5),
        nn.BatchNorm1d(5, affine=False),
    )


def kinds(network):
    return [type(module) for module in network.modules()]


def test_every_batch_norm_is_converted_and_nothing_else():
    network = make_network()
    before = kinds(network)
    assert to_sync_batch_norm(network) is network
    replaced = {nn.BatchNorm1d: SyncBatchNorm, nn.BatchNorm2d: SyncBatchNorm}
    assert kinds(network) == [replaced.get(kind, kind) for kind in before]
    assert kinds(network).count(SyncBatchNorm) == 3


def test_every_batch_norm_of_a_trunk_is_converted():
    assert kinds(to_sync_batch_norm(ResNetTrunk())).count(SyncBatchNorm) == 53


def test_a_bare_batch_norm_is_refused():
    with pytest.raises(ValueError, match=r"BatchNorm1d.* cannot be replaced in place"):
        to_sync_batch_norm(nn.BatchNorm1d(3))


def test_the_state_dict_and_the_tensors_in_it_stay_those_of_batch_norm():
    network = make_network()
    tensors, parameters = network.state_dict(keep_vars=True), list(network.parameters())
    to_sync_batch_norm(network)
    after = network.state_dict(keep_vars=True)
    assert list(after) == list(tensors)
    assert all(after[name] is tensor for name, tensor in tensors.items())
    assert all(ours is theirs for ours, theirs in zip(network.parameters(), parameters, strict=True))
    make_network().load_state_dict(network.state_dict(), strict=True)


def test_settings_and_mode_are_kept():
    network = make_network().eval()
    network[6].track_running_stats, network[6].momentum = False, None
    network = to_sync_batch_norm(network)
    assert (network[1].eps, network[1].momentum, network[1].training) == (1e-3, 0.3, False)
    assert (network[6].affine, network[6].track_running_stats, network[6].momentum) == (False, False, None)


@pytest.mark.parametrize("training", [True, False])
def test_in_one_process_it_is_batch_norm_to_the_bit(training):
    plain = make_network().train(training)
    sync = to_sync_batch_norm(copy.deepcopy(plain))
    for seed in range(2):
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        gradients = []
        for network in (plain, sync):
            output = network(images)
            gradients.append([output, *torch.autograd.grad(output.square().sum(), list(network.parameters()))])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))
    assert all(torch.equal(sync.state_dict()[name], value) for name, value in plain.state_dict().items())


def test_a_process_group_of_one_on_the_cpu_is_batch_norm_too(tmp_path):
    plain = make_network()
    sync = to_sync_batch_norm(copy.deepcopy(plain))
    images = torch.randn(4, 3, 8, 8)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        assert torch.equal(sync(images), plain(images))
    finally:
        dist.destroy_process_group()


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is on a CUDA device."""

    @property
    def is_cuda(self):
        return True


def test_with_several_processes_on_cuda_torchs_own_fused_code_is_asked(monkeypatch):
    """With what it takes, though not what it makes of it: that is torch's own affair and needs a CUDA device."""
    asked = []
    monkeypatch.setattr(norm_module, "is_distributed", lambda: True)
    monkeypatch.setattr(norm_module.FusedSyncBatchNorm, "apply", lambda *arguments: asked.append(arguments))
    (norm,) = to_sync_batch_norm(nn.Sequential(nn.BatchNorm1d(3, eps=1e-4, momentum=0.2)))
    rows = torch.randn(4, 3).as_subclass(OnCuda)
    norm(rows)
    taken = dict(
        zip(list(inspect.signature(norm_module.FusedSyncBatchNorm.forward).parameters)[1:], *asked, strict=True)
    )
    assert taken["input"] is rows
    for name in ("weight", "bias", "running_mean", "running_var", "eps", "momentum"):
        assert taken[name] is getattr(norm, name)
    assert taken["process_group"] is dist.group.WORLD
    assert taken["world_size"] == norm_module.world_size()
    assert norm.num_batches_tracked == 1

    norm.eval()(rows)
    assert len(asked) == 1


def test_precise_bn_finds_it():
    network = to_sync_batch_norm(make_network())
    assert [type(norm) for norm in get_bn_modules(network)] == [SyncBatchNorm] * 3


def test_rows_must_be_vectors_or_maps():
    with pytest.raises(ValueError, match=r"takes rows of vectors or of maps, \(B, C, ...\), but got \(3,\)"):
        to_sync_batch_norm(nn.Sequential(nn.BatchNorm1d(3)))(torch.zeros(3))


def test_a_projector_has_batch_norm_behind_its_first_layer_only_and_only_if_asked():
    torch.manual_seed(0)
    first, norm, _, last = MLP(6, 5, 4, norm=True)
    inputs = torch.randn(7, 6)
    hidden = first(inputs)
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + norm.eps).sqrt()
    torch.testing.assert_close(nn.Sequential(first, norm, nn.ReLU(), last)(inputs), last(hidden.relu()))
    assert [name for name, _ in MLP(6, 5, 4).named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert first.bias is not None
    assert last.bias is not None
