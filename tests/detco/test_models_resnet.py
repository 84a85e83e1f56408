"""The trunk: torchvision's network and names, stage outputs, and the published cost."""

import torch
import torchvision
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torchvision.models.resnet import Bottleneck

from detco.models.resnet import ResNetTrunk


def test_trunk_is_torchvision_s_resnet50_without_fc():
    torch.manual_seed(0)
    trunk, reference = ResNetTrunk().eval(), torchvision.models.resnet50().eval()
    weights = {name: value for name, value in reference.state_dict().items() if not name.startswith("fc.")}
    trunk.load_state_dict(weights, strict=True)
    images = torch.randn(2, 3, 64, 64)

    stages = trunk(images)
    logits = reference.fc(stages.res5.mean(dim=(2, 3)))
    torch.testing.assert_close(logits, reference(images))


def test_stages_have_the_published_channels_and_strides():
    trunk = ResNetTrunk().eval()
    with torch.no_grad():
        stages = trunk(torch.randn(1, 3, 64, 64))
    for name, feature in stages._asdict().items():
        side = 64 // trunk.strides[name]
        assert feature.shape == (1, trunk.channels[name], side, side)
    assert list(stages._fields) == list(trunk.channels) == list(trunk.strides)


def test_one_view_costs_4087_and_one_patch_set_3003_million_multiply_adds():
    trunk = ResNetTrunk().eval()
    counted = {
        name: FlopCountAnalysis(trunk, images).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        for name, images in {"view": torch.zeros(1, 3, 224, 224), "patches": torch.zeros(9, 3, 64, 64)}.items()
    }
    gmac = {name: count.by_operator()["conv"] / 1e9 for name, count in counted.items()}
    assert round(gmac["view"], 3) == 4.087
    assert round(gmac["patches"], 3) == 3.003
    assert round(sum(gmac.values()), 3) == 7.090


def test_downsampling_sits_in_the_3x3_convolution():
    bottleneck = ResNetTrunk().layer2[0]
    assert isinstance(bottleneck, nn.Module)
    assert bottleneck.conv1.stride == (1, 1)
    assert bottleneck.conv2.stride == (2, 2)


def test_until_res4_gives_the_same_res4_and_leaves_res5_alone():
    torch.manual_seed(0)
    trunk, images = ResNetTrunk(), torch.randn(2, 3, 64, 64)
    before = {name: value.clone() for name, value in trunk.layer4.state_dict().items()}
    res4 = trunk.until_res4(images)
    assert all(torch.equal(trunk.layer4.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(res4, trunk(images).res4)


def test_blocks_start_as_the_identity_only_if_asked():
    def last_weights(trunk):
        return torch.stack([block.bn3.weight.unique() for block in trunk.modules() if isinstance(block, Bottleneck)])

    assert torch.equal(last_weights(ResNetTrunk(zero_init_residual=True)), torch.zeros(16, 1))
    assert torch.equal(last_weights(ResNetTrunk()), torch.ones(16, 1))
