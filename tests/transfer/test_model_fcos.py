"""FCOS: refused with directions where Detectron2 lacks it; where it is, its settings arrive and it learns."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from transfer import d2

if d2.info() is None:
    pytest.skip("needs Detectron2 (python tools/install_detectron2.py)", allow_module_level=True)

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats

from transfer.config import load_config
from transfer.modeling import check_model_available, fcos, register_models

pytestmark = pytest.mark.d2

BASES = Path(__file__).parents[2] / "configs" / "transfer"
IS_HERE = importlib.util.find_spec("detectron2.modeling.meta_arch.fcos") is not None
needs_fcos = pytest.mark.skipif(not IS_HERE, reason=f"Detectron2 {d2.require().version} has no FCOS")
# A ResNet-50 of 1/8 of the width, and a narrow pyramid (GN has 32 groups, and needs two values in each: p7 is 1 x 1).
NARROW = (
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.FPN.OUT_CHANNELS", "64"),
    *("MODEL.FCOS.NUM_CLASSES", "3", "MODEL.FCOS.NUM_CONVS", "2"),
)
SIDE = 128


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., CfgNode]:
    """`config(*pairs)`: FCOS 1x on COCO, random weights, on the CPU."""
    register_models()
    file = tmp_path / "fcos.yaml"
    parts = [f"{BASES}/{part}.yaml" for part in ("base/coco_1x", "base/fcos_fpn", "init/random")]
    file.write_text(f"_BASE_: {parts}\n", encoding="utf-8")
    return lambda *pairs: load_config(file, ["MODEL.DEVICE", "cpu", *pairs])


@pytest.fixture
def narrow(config: Callable[..., CfgNode]) -> nn.Module:
    torch.manual_seed(0)
    return build_model(config(*NARROW))


def scene(seed: int, *, is_empty: bool = False) -> dict[str, object]:
    """A bright square, class 1, on a dark ground with noise."""
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.randint(8, 64, (2,), generator=rng).tolist()
    image = torch.randint(0, 60, (3, SIDE, SIDE), generator=rng)
    target = Instances((SIDE, SIDE))
    target.gt_boxes = Boxes(torch.tensor([] if is_empty else [[x, y, x + 48, y + 48]], dtype=torch.float).view(-1, 4))
    target.gt_classes = torch.ones(len(target.gt_boxes), dtype=torch.long)
    if not is_empty:
        image[:, y : y + 48, x : x + 48] += 180
    return {"image": image.to(torch.uint8), "height": SIDE, "width": SIDE, "instances": target}


def losses_of(model: nn.Module, batch: list[dict[str, object]]) -> dict[str, Tensor]:
    with EventStorage():
        losses: dict[str, Tensor] = model(batch)
    return losses


# --- Where it is missing


def assert_says_what_to_do(message: str) -> None:
    assert d2.require().version in message
    assert str(d2.require().path) in message
    assert "c69939aa" in message
    assert "python tools/install_detectron2.py --from git" in message


@pytest.mark.skipif(IS_HERE, reason="this Detectron2 has FCOS")
def test_an_old_detectron2_is_named_with_the_way_to_a_newer_one(config) -> None:
    for refused in (check_model_available, build_model):
        with pytest.raises(ValueError, match="FCOS") as caught:
            refused(config())
        assert_says_what_to_do(str(caught.value))


def test_the_message_is_the_same_wherever_upstream_s_module_is_missing(config, monkeypatch) -> None:
    monkeypatch.setattr(fcos, "UPSTREAM", "detectron2.modeling.meta_arch.no_such_model")
    for refused in (check_model_available, build_model):
        with pytest.raises(ValueError, match="FCOS") as caught:
            refused(config())
        assert_says_what_to_do(str(caught.value))


def test_other_models_need_nothing_of_the_kind(config) -> None:
    check_model_available(config("MODEL.META_ARCHITECTURE", "RetinaNet"))
    check_model_available(load_config(BASES / "coco" / "mask_rcnn_r50_c4_1x_random.yaml"))


def test_an_unknown_model_is_refused_with_the_nearest_one(config) -> None:
    with pytest.raises(ValueError, match=r"META_ARCHITECTURE is RetinaNett, .* RetinaNet$"):
        check_model_available(config("MODEL.META_ARCHITECTURE", "RetinaNett"))


# --- Where it is


@needs_fcos
def test_it_is_available(config) -> None:
    check_model_available(config())


@needs_fcos
def test_the_published_model_has_the_published_size(config) -> None:
    model = build_model(config())
    # ResNet-50 without classifier 23.51 M, FPN on three levels, p6 and p7 of 256 channels, 2 x 4 convolutions.
    resnet = 23_508_032
    pyramid = 256 * (512 + 1024 + 2048) + 3 * 9 * 256 * 256 + 6 * 2 * 256  # SyncBN instead of biases
    extra = 2 * (9 * 256 * 256 + 256)
    subnets = 8 * (9 * 256 * 256 + 256 + 2 * 256)
    outputs = (80 + 4 + 1) * (9 * 256 + 1)
    assert sum(p.numel() for p in model.parameters()) == resnet + pyramid + extra + subnets + outputs
    assert model.backbone.top_block.in_feature == "p5"
    assert [model.backbone.output_shape()[name].stride for name in model.head_in_features] == [8, 16, 32, 64, 128]


@needs_fcos
def test_every_setting_of_the_config_arrives(config) -> None:
    settings = {
        "SCORE_THRESH_TEST": ("test_score_thresh", 0.11),
        "TOPK_CANDIDATES_TEST": ("test_topk_candidates", 77),
        "NMS_THRESH_TEST": ("test_nms_thresh", 0.33),
        "CENTER_SAMPLING_RADIUS": ("center_sampling_radius", 2.5),
        "FOCAL_LOSS_ALPHA": ("focal_loss_alpha", 0.44),
        "FOCAL_LOSS_GAMMA": ("focal_loss_gamma", 1.5),
    }
    pairs = [word for key, (_, value) in settings.items() for word in (f"MODEL.FCOS.{key}", str(value))]
    levels = ("MODEL.FCOS.IN_FEATURES", "['p4', 'p5']", "MODEL.FCOS.PRIOR_PROB", "0.2", "MODEL.FCOS.NORM", "")
    model = build_model(config(*NARROW, *pairs, *levels, "TEST.DETECTIONS_PER_IMAGE", "5"))
    for attribute, value in settings.values():
        assert getattr(model, attribute) == value
    assert (model.num_classes, model.max_detections_per_image, model.head_in_features) == (3, 5, ["p4", "p5"])
    assert torch.sigmoid(model.head.cls_score.bias).tolist() == pytest.approx([0.2] * 3)
    assert [type(layer) for layer in model.head.cls_subnet] == [nn.Conv2d, nn.ReLU] * 2
    assert not any(isinstance(module, nn.GroupNorm) for module in model.modules())


@needs_fcos
def test_gradients_reach_every_parameter_and_an_empty_image_is_no_obstacle(narrow) -> None:
    losses = losses_of(narrow, [scene(0), scene(1, is_empty=True)])
    assert set(losses) == {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
    sum(losses.values()).backward()
    for name, parameter in narrow.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert narrow.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0


@needs_fcos
def test_precise_bn_knows_every_norm_layer_with_statistics(narrow) -> None:
    assert len(get_bn_modules(narrow)) == 53 + 6  # ResNet-50, FPN; the subnets have GN
    with EventStorage(), torch.no_grad():
        update_bn_stats(narrow, [[scene(seed)] for seed in range(3)], num_iters=2)


@needs_fcos
def test_it_learns_to_find_a_square(narrow) -> None:
    optimizer = torch.optim.SGD(narrow.parameters(), lr=0.02, momentum=0.9)
    for step in range(60):
        loss = sum(losses_of(narrow, [scene(2 * step), scene(2 * step + 1)]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with EventStorage(), torch.no_grad():
        update_bn_stats(narrow, [[scene(seed)] for seed in range(200, 206)], num_iters=5)
        narrow.eval()
        narrow.test_score_thresh = 0.05
        found = [narrow([scene(seed)])[0]["instances"] for seed in range(300, 304)]
    for seed, instances in zip(range(300, 304), found, strict=True):
        best = int(instances.scores.argmax())
        assert instances.pred_classes[best] == 1
        error = instances.pred_boxes.tensor[best] - scene(seed)["instances"].gt_boxes.tensor[0]
        assert error.abs().max() < 12
