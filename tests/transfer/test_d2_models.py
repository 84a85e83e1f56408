"""The installed Detectron2, whichever it is: the detectors of this suite train and predict on a CPU."""

import pytest
import torch

from transfer import d2

if d2.info() is None:
    pytest.skip("Detectron2 is not installed: python tools/install_detectron2.py", allow_module_level=True)

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.events import EventStorage

pytestmark = pytest.mark.d2
SIDE = 128


def small_config() -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = 3
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 16
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 32
    return cfg


def faster_rcnn_c4() -> CfgNode:
    return small_config()  # Detectron2's defaults are a C4 detector


def use_fpn(cfg: CfgNode, out_features: list[str]) -> None:
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = out_features


def mask_rcnn_fpn() -> CfgNode:
    cfg = small_config()
    use_fpn(cfg, ["res2", "res3", "res4", "res5"])
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 2
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    return cfg


def retinanet() -> CfgNode:
    cfg = small_config()
    use_fpn(cfg, ["res3", "res4", "res5"])
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    return cfg


def labelled_image() -> dict[str, object]:
    target = Instances((SIDE, SIDE))
    target.gt_boxes = Boxes(torch.tensor([[10.0, 20.0, 90.0, 100.0]]))
    target.gt_classes = torch.tensor([1])
    target.gt_masks = BitMasks(torch.ones(1, SIDE, SIDE, dtype=torch.bool))
    image = torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8)
    return {"image": image, "height": SIDE, "width": SIDE, "instances": target}


@pytest.mark.parametrize(
    ("make_config", "losses"),
    [
        (faster_rcnn_c4, {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}),
        (mask_rcnn_fpn, {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc", "loss_mask"}),
        (retinanet, {"loss_cls", "loss_box_reg"}),
    ],
)
def test_a_detector_trains_and_predicts(make_config, losses) -> None:
    torch.manual_seed(0)
    cfg = make_config()
    model = build_model(cfg)
    with EventStorage():
        found = model([labelled_image()])
    assert set(found) == losses
    sum(found.values()).backward()
    stem = model.backbone.bottom_up.stem if hasattr(model.backbone, "bottom_up") else model.backbone.stem
    trained = [p for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(p.grad).all() for p in trained)
    assert stem.conv1.weight.grad is None  # Detectron2 freezes it by default: FREEZE_AT 2
    model.eval()
    with torch.no_grad():
        (prediction,) = model([labelled_image()])
    assert prediction["instances"].pred_boxes.tensor.shape[1] == 4


def test_a_detector_is_saved_and_loaded(tmp_path) -> None:
    model = build_model(retinanet())
    DetectionCheckpointer(model, save_dir=str(tmp_path)).save("detector", iteration=7)
    other = build_model(retinanet())
    rest = DetectionCheckpointer(other).load(str(tmp_path / "detector.pth"))
    assert rest["iteration"] == 7
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_environment_report_of_every_training_can_be_made() -> None:
    assert "detectron2" in collect_env_info()


def test_require_answers_the_same_each_time() -> None:
    assert d2.require() is d2.require() is d2.info()
    assert d2.require().path.name == "detectron2"
