"""FCOS (arXiv:2006.09214), where the installed Detectron2 has it.

Upstream has the model, but reaches it from Python configs only (configs/common/models/fcos.py@c69939aa). This is the
way to it from a YAML config: keys of MODEL.FCOS, and FPN levels p6 and p7 made from p5 instead of res5.
"""

import importlib
import importlib.util
from typing import Any

from torch import nn

from transfer import d2

d2.require()

from detectron2.config import CfgNode  # noqa: E402
from detectron2.layers import ShapeSpec  # noqa: E402
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_backbone  # noqa: E402
from detectron2.modeling.backbone import FPN, build_resnet_backbone  # noqa: E402
from detectron2.modeling.backbone.fpn import LastLevelP6P7  # noqa: E402

UPSTREAM = "detectron2.modeling.meta_arch.fcos"


def add_config(cfg: CfgNode) -> None:
    """Add MODEL.FCOS. Defaults are those of upstream's configs/COCO-Detection/fcos_R_50_FPN_1x.py@c69939aa."""
    cfg.MODEL.FCOS = CfgNode()
    # Classes without the background.
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    # Levels of the pyramid, finest first: objects are assigned to them by size, from 4 to 8 times the stride.
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # 3x3 convolutions of each of the two subnets, and the norm after each. The levels share the subnets, so a norm with
    # running statistics would see several distributions; GN has none.
    cfg.MODEL.FCOS.NUM_CONVS = 4
    cfg.MODEL.FCOS.NORM = "GN"
    # Probability of an object at the start of training.
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01
    # A location is positive within this many strides of an object's centre.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    # Of the square root of class score times centreness.
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
    # Candidates per level before NMS.
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6


def check_available() -> None:
    """Refuse FCOS where it is missing.

    Raises:
        ValueError: If the installed Detectron2 has no FCOS; says which one it is and how to get one that has.
    """
    if importlib.util.find_spec(UPSTREAM) is None:
        found = d2.require()
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is FCOS, which the installed Detectron2 {found.version} ({found.path}) does not "
            "have: it came after v0.5. Install upstream's commit c69939aa (it calls itself 0.6) by the route git: "
            f"{d2.INSTALL_COMMAND} --from git"
        )


def build_fcos_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """ResNet and FPN with p6 and p7 from p5 (section 2.2 of the paper), for MODEL.BACKBONE.NAME."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return FPN(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelP6P7(channels, channels, in_feature="p5"),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def FCOS(cfg: CfgNode) -> nn.Module:
    """Upstream's FCOS with the settings of MODEL.FCOS. Named as META_ARCHITECTURE finds it.

    Raises:
        ValueError: If the installed Detectron2 has no FCOS.
    """
    check_available()
    upstream: Any = importlib.import_module(UPSTREAM)
    settings = cfg.MODEL.FCOS
    backbone = build_backbone(cfg)
    shapes = [backbone.output_shape()[name] for name in settings.IN_FEATURES]
    head = upstream.FCOSHead(
        input_shape=shapes,
        num_classes=settings.NUM_CLASSES,
        conv_dims=[shapes[0].channels] * settings.NUM_CONVS,
        norm=settings.NORM,
        prior_prob=settings.PRIOR_PROB,
    )
    model: nn.Module = upstream.FCOS(
        backbone=backbone,
        head=head,
        head_in_features=settings.IN_FEATURES,
        num_classes=settings.NUM_CLASSES,
        center_sampling_radius=settings.CENTER_SAMPLING_RADIUS,
        focal_loss_alpha=settings.FOCAL_LOSS_ALPHA,
        focal_loss_gamma=settings.FOCAL_LOSS_GAMMA,
        test_score_thresh=settings.SCORE_THRESH_TEST,
        test_topk_candidates=settings.TOPK_CANDIDATES_TEST,
        test_nms_thresh=settings.NMS_THRESH_TEST,
        max_detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )
    return model


def register() -> None:
    """Let MODEL.META_ARCHITECTURE and MODEL.BACKBONE.NAME find the model. Idempotent.

    Also where it is not available, so that building it says what is missing.
    """
    if FCOS.__name__ not in META_ARCH_REGISTRY:
        META_ARCH_REGISTRY.register(FCOS)
        BACKBONE_REGISTRY.register(build_fcos_resnet_fpn_backbone)
