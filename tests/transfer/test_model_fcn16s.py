"""FCN-16s: its shape, where its predictions lie, its loss against a slow oracle, and that it learns."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transfer import d2

if d2.info() is None:
    pytest.skip("needs Detectron2 (python tools/install_detectron2.py)", allow_module_level=True)

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats

from transfer.config import load_config
from transfer.modeling import check_model_available, register_models
from transfer.modeling.fcn16s import FCN16sHead, join_cells, pad_to_cells, pixel_loss

pytestmark = pytest.mark.d2

BASES = Path(__file__).parents[2] / "configs" / "transfer"
# A ResNet-50 of 1/8 of the width: same layers, strides and dilations.
NARROW = (
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "16"),
)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., CfgNode]:
    """`config(*pairs)`: FCN-16s on Cityscapes, random weights, on the CPU."""
    register_models()
    file = tmp_path / "fcn16s.yaml"
    parts = [f"{BASES}/{part}.yaml" for part in ("base/cityscapes_semseg", "base/fcn16s", "init/random")]
    file.write_text(f"_BASE_: {parts}\n", encoding="utf-8")
    return lambda *pairs: load_config(file, ["MODEL.DEVICE", "cpu", *pairs])


@pytest.fixture
def narrow(config: Callable[..., CfgNode]) -> nn.Module:
    torch.manual_seed(0)
    return build_model(config(*NARROW))


def sample(height: int, width: int, *, seed: int = 0, with_labels: bool = True) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=rng)
    labels = torch.randint(0, 19, (height, width), generator=rng)
    labels[:3] = 255
    return {"image": image, "sem_seg": labels} if with_labels else {"image": image}


# --- Shape


def test_res5_is_dilated_in_every_block_and_a_crop_of_769_gives_49_cells(config) -> None:
    model = build_model(config()).eval().to("meta")
    assert [(block.conv2.stride, block.conv2.dilation) for block in model.backbone.res5] == [((1, 1), (2, 2))] * 3
    crops = torch.empty(1, 3, 769, 769, device="meta")
    cells = model.backbone(crops)["res5"]
    assert cells.shape == (1, 2048, 49, 49)
    logits, _ = model.sem_seg_head({"res5": cells})
    assert logits.shape == (1, 19, 769, 769)


def test_the_head_is_the_paper_s(config) -> None:
    first, second = build_model(config()).sem_seg_head.convs
    assert [(conv.in_channels, conv.out_channels) for conv in (first, second)] == [(2048, 256), (256, 256)]
    for conv in (first, second):
        assert (conv.kernel_size, conv.dilation, conv.padding, conv.bias) == ((3, 3), (6, 6), (6, 6), None)
        assert isinstance(conv.norm, nn.SyncBatchNorm)
        assert conv.activation(torch.tensor(-1.0)) == 0  # ReLU
        expected = math.sqrt(2 / (9 * 256))  # He, fan-out
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (("MODEL.RESNETS.RES5_DILATION", "1"), "stride 32, FCN-16s needs 16: set MODEL.RESNETS.RES5_DILATION 2"),
        (("MODEL.SEM_SEG_HEAD.IN_FEATURES", "['p2', 'p3']"), "reads one feature out of ['res5']"),
        (("MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res4']"), "IN_FEATURES is ['res4']"),
    ],
)
def test_a_wrong_feature_is_refused(config, pairs, words) -> None:
    with pytest.raises(ValueError, match="MODEL") as caught:
        build_model(config(*pairs))
    assert words in str(caught.value)


def test_every_detectron2_can_build_it(config) -> None:
    check_model_available(config())


# --- Where the predictions lie


def test_padding_is_the_least_that_ends_on_a_cell_and_keeps_the_content() -> None:
    for height, width in [(1, 1), (16, 17), (18, 769), (64, 128), (65, 129), (1024, 33)]:
        padded = pad_to_cells([torch.ones(height, width)], -1.0)[0]
        for got, side in zip(padded.shape, (height, width), strict=True):
            assert got % 16 == 1
            assert 0 <= got - side < 16
        assert (padded[:height, :width] == 1).all()
        assert padded.sum() == 2 * height * width - padded.numel()  # -1 everywhere else
    assert pad_to_cells([torch.ones(3, 5, 40), torch.ones(3, 33, 7)], 0.0).shape == (2, 3, 33, 49)


def test_a_cell_is_joined_to_the_next_from_centre_to_centre() -> None:
    cells = torch.randn(2, 5, 3, 4)
    pixels = join_cells(cells)
    assert pixels.shape == (2, 5, 33, 49)
    torch.testing.assert_close(pixels[:, :, ::16, ::16], cells)
    torch.testing.assert_close(pixels[:, :, 4, 0], 0.75 * cells[:, :, 0, 0] + 0.25 * cells[:, :, 1, 0])


class EverySixteenthPixel(nn.Module):
    """A backbone whose cells are the pixels on which a ResNet's cells are centred."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"res5": images[:, :, ::16, ::16]}


@pytest.mark.parametrize("size", [(65, 129), (64, 128), (70, 100), (769, 33)])
def test_predictions_lie_where_the_image_has_what_they_show(narrow, size) -> None:
    height, width = size
    ramps = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    image = torch.cat([ramps, torch.zeros(1, *size)]).float()
    narrow.backbone = EverySixteenthPixel()
    narrow.sem_seg_head.convs = narrow.sem_seg_head.predictor = nn.Identity()
    (shown,) = narrow.eval()([{"image": image}])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    # Beyond the last centre inside the image, the padding begins to count.
    inside = (slice(None), slice(0, (height - 1) // 16 * 16 + 1), slice(0, (width - 1) // 16 * 16 + 1))
    torch.testing.assert_close(shown["sem_seg"][inside], ((image - mean) / std)[inside])
    assert shown["sem_seg"].shape == image.shape


def test_a_resnet_s_cells_are_centred_on_every_16th_pixel(narrow) -> None:
    # With mirror-symmetric kernels, the mirrored image gives the mirrored prediction only if the cells' centres are
    # symmetric in the image: the first on the first pixel, the last on the last.
    with torch.no_grad():
        for weight in narrow.parameters():
            if weight.ndim == 4:
                weight.add_(weight.flip(-1)).div_(2)
    image = sample(65, 129)["image"]
    with torch.no_grad():
        plain, mirrored = (narrow.eval()([{"image": x}])[0]["sem_seg"] for x in (image, image.flip(-1)))
    assert plain.std() > 0
    torch.testing.assert_close(mirrored.flip(-1), plain, rtol=1e-3, atol=1e-5)


def test_an_image_of_1024_is_padded_with_the_mean_colour_and_cut_again(narrow) -> None:
    image = sample(64, 128)["image"].float()
    mean = narrow.pixel_mean.expand(3, 65, 129).clone()
    mean[:, :64, :128] = image
    with torch.no_grad():
        ours, by_hand = (narrow.eval()([{"image": x}])[0]["sem_seg"] for x in (image, mean))
    assert ours.shape == (19, 64, 128)
    torch.testing.assert_close(ours, by_hand[:, :64, :128])


def test_a_resized_test_image_is_answered_at_its_original_size(narrow) -> None:
    with torch.no_grad():
        (answer,) = narrow.eval()([{**sample(32, 64), "height": 64, "width": 128}])
    assert answer["sem_seg"].shape == (19, 64, 128)


# --- Loss


def slow_loss(cells: Tensor, targets: Tensor) -> float:
    """Mean cross-entropy over labelled pixels; every pixel interpolated from its four cells by hand."""
    losses = []
    for n, y, x in torch.nonzero(targets != 255).tolist():
        top, left = min(y // 16, cells.shape[2] - 2), min(x // 16, cells.shape[3] - 2)
        down, right = y / 16 - top, x / 16 - left
        logits = [
            (1 - down) * ((1 - right) * row[top][left] + right * row[top][left + 1])
            + down * ((1 - right) * row[top + 1][left] + right * row[top + 1][left + 1])
            for row in cells[n].tolist()
        ]
        losses.append(math.log(sum(map(math.exp, logits))) - logits[int(targets[n, y, x])])
    return sum(losses) / len(losses)


def small_head(norm: str = "BN", loss_weight: float = 1.0) -> FCN16sHead:
    torch.manual_seed(1)
    head = FCN16sHead(
        in_feature="res5",
        in_channels=8,
        channels=6,
        num_classes=4,
        norm=norm,
        ignore_value=255,
        loss_weight=loss_weight,
    )
    nn.init.normal_(head.predictor.weight)  # the real one hardly tells the classes apart
    return head


@pytest.mark.parametrize("loss_weight", [1.0, 0.4])
def test_the_loss_is_that_of_a_slow_loop(loss_weight) -> None:
    head = small_head(loss_weight=loss_weight)
    features = {"res5": torch.randn(2, 8, 2, 3)}
    targets = torch.randint(0, 4, (2, 17, 33))
    targets[0, :9] = 255  # the images count by their labelled pixels
    nothing, losses = head(features, targets)
    assert nothing is None
    with torch.no_grad():
        expected = slow_loss(head.predictor(head.convs(features["res5"])), targets)
    assert losses["loss_sem_seg"].item() == pytest.approx(loss_weight * expected, rel=1e-5)


def test_labels_beyond_the_image_do_not_count(narrow) -> None:
    narrow.eval()
    narrow.training = narrow.sem_seg_head.training = True  # losses, but no layer looks at the batch
    item = sample(64, 128)
    by_hand = {
        "image": pad_to_cells([item["image"].float() - narrow.pixel_mean], 0.0)[0] + narrow.pixel_mean,
        "sem_seg": pad_to_cells([item["sem_seg"]], 255)[0],
    }
    torch.testing.assert_close(narrow([item])["loss_sem_seg"], narrow([by_hand])["loss_sem_seg"])


def test_a_batch_without_labels_has_no_loss_and_no_gradient() -> None:
    logits = torch.randn(1, 4, 5, 5, requires_grad=True)
    loss = pixel_loss(logits, torch.full((1, 5, 5), 255), 255)
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


# --- Training


def test_gradients_reach_every_parameter(narrow) -> None:
    loss = narrow([sample(64, 128), sample(65, 129, seed=1)])["loss_sem_seg"]
    # 19 classes, of which the fresh classifier prefers none.
    assert loss.item() == pytest.approx(math.log(19), rel=0.05)
    loss.backward()
    for name, parameter in narrow.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert narrow.backbone.stem.conv1.weight.grad.abs().sum() > 0


def test_precise_bn_knows_every_norm_layer(narrow) -> None:
    assert len(get_bn_modules(narrow)) == 53 + 2
    with torch.no_grad():
        update_bn_stats(narrow, [[sample(64, 128, seed=seed)] for seed in range(3)], num_iters=2)
    assert all(conv.norm.running_mean.abs().sum() > 0 for conv in narrow.sem_seg_head.convs)


def halves(seed: int) -> dict[str, Any]:
    """Left half dark, class 3; right half bright, class 7; a noise on top."""
    noise = torch.randint(0, 30, (3, 64, 128), generator=torch.Generator().manual_seed(seed))
    labels = torch.full((64, 128), 3)
    labels[:, 64:] = 7
    return {"image": (noise + 200 * (labels == 7)).to(torch.uint8), "sem_seg": labels}


def test_it_learns_two_halves(narrow) -> None:
    optimizer = torch.optim.SGD(narrow.parameters(), lr=0.05, momentum=0.9)
    for step in range(40):
        loss = narrow([halves(2 * step), halves(2 * step + 1)])["loss_sem_seg"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        update_bn_stats(narrow, [[halves(seed)] for seed in range(100, 104)], num_iters=3)
        (answer,) = narrow.eval()([{"image": halves(200)["image"], "height": 64, "width": 128}])
    found = answer["sem_seg"].argmax(dim=0)
    away_from_the_edge = torch.cat([torch.arange(48), torch.arange(80, 128)])
    right = (found == halves(200)["sem_seg"])[:, away_from_the_edge]
    assert right.float().mean() > 0.95


def test_the_head_takes_the_shape_of_any_backbone_with_stride_16(config) -> None:
    head = FCN16sHead(config(*NARROW), {"res5": ShapeSpec(channels=5, stride=16)})
    logits, losses = head.eval()({"res5": torch.randn(1, 5, 2, 2)})
    assert logits.shape == (1, 19, 17, 17)
    assert losses == {}
