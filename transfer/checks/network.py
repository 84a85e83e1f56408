"""Norms, frozen layers, pixel statistics and precise BN: combinations that train, but not the network that is meant."""

import difflib
from typing import Any

from transfer import d2, densepose
from transfer.mappers import build_mapper
from transfer.optimizer import check_optimizer
from transfer.tasks import pairs, show, value_at
from transfer.weights import WeightsRecord

d2.require()

from detectron2.layers import get_norm  # noqa: E402
from detectron2.modeling import BACKBONE_REGISTRY, PROPOSAL_GENERATOR_REGISTRY, ROI_HEADS_REGISTRY  # noqa: E402

# Norms that take over the running statistics of the weights' BN layers, or at least read them.
BN_FAMILY = ("BN", "SyncBN", "FrozenBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
# Heads that one norm layer would see once per FPN level.
SHARED_HEAD = {"RetinaNet": "RETINANET", "FCOS": "FCOS"}
# moco issue 40: frozen BN diverges at 0.02 with 16 images and all layers trained. Half of it, for each image.
FROZEN_BN_LR_PER_IMAGE = 0.01 / 16
IMAGENET_MEAN_RGB = (123.675, 116.280, 103.530)


def check_norms(cfg: Any, processes: int) -> list[str]:
    """Refuse norms that do not exist or would throw the statistics of the weights away.

    Args:
        cfg: The resolved config.
        processes: GPUs of all machines together, at least 1.

    Returns:
        Notes for the log.

    Raises:
        ValueError: If so; names the key.
    """
    for key, value in pairs(cfg):
        if key.startswith("MODEL.") and key.endswith(".NORM") and isinstance(value, str):
            _check_norm_exists(key, value)
    trunk = cfg.MODEL.RESNETS.NORM
    if cfg.TRANSFER.INIT != "random" and trunk not in BN_FAMILY:
        raise ValueError(
            f"MODEL.RESNETS.NORM is {show(trunk)}, but the weights' network has BN: its statistics would be lost. "
            "Append MODEL.RESNETS.NORM SyncBN"
        )
    images = cfg.SOLVER.IMS_PER_BATCH // processes
    if trunk == "BN" and processes > 1:
        return [f"WARNING: MODEL.RESNETS.NORM is BN: each of {processes} processes normalises by its {images} images."]
    if "SyncBN" in trunk and processes == 1:
        return [f"SyncBN in one process: BN over its {images} image{'s' * (images != 1)} per step."]
    return _frozen_norm_notes(cfg) if trunk == "FrozenBN" else []


def check_frozen_layers(cfg: Any) -> list[str]:
    """Refuse to freeze layers that hold random weights.

    Raises:
        ValueError: If BACKBONE.FREEZE_AT is above 0 without pretrained weights.
    """
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if freeze_at > 0 and cfg.TRANSFER.INIT == "random":
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at} with random weights: what is frozen would never be trained. "
            "Append MODEL.BACKBONE.FREEZE_AT 0"
        )
    return []


def check_depth(cfg: Any, weights: WeightsRecord) -> list[str]:
    """Refuse another trunk than the ResNet-50 that every file of convert-to-d2 holds.

    Raises:
        ValueError: If so.
    """
    if cfg.MODEL.RESNETS.DEPTH != 50 and weights.sha256 and weights.preprocess is not None:
        raise ValueError(
            f"MODEL.RESNETS.DEPTH is {cfg.MODEL.RESNETS.DEPTH}, but {weights.path} holds a ResNet-50. Append "
            "MODEL.RESNETS.DEPTH 50"
        )
    return []


def check_extra_norm(cfg: Any) -> list[str]:
    """Warn of a C4 detector without the norm after res5, on which the published ones with SSL weights depend."""
    if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" and cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads":
        return [
            "WARNING: MODEL.ROI_HEADS.NAME is Res5ROIHeads: the features after res5 are not normalised. Published C4 "
            "detectors have one more norm there: Res5ROIHeadsExtraNorm."
        ]
    return []


def check_pixel_statistics(cfg: Any, weights: WeightsRecord) -> list[str]:
    """Refuse pixel statistics that are certainly wrong, where the weights have no record to compare them with.

    Raises:
        ValueError: If they are those of pixels in 0..1, or ImageNet's mean stands in the other channel order.
    """
    if weights.preprocess is not None:
        return []  # check_preprocess has compared them
    mean, std = list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)
    if max(std) < 0.9 or 0 < max(mean) < 1.01:
        raise ValueError(
            f"MODEL.PIXEL_MEAN is {show(mean)} and MODEL.PIXEL_STD {show(std)}, as for pixels in 0..1, but "
            "Detectron2's are in 0..255: multiply both by 255"
        )
    expected = IMAGENET_MEAN_RGB if cfg.INPUT.FORMAT == "RGB" else IMAGENET_MEAN_RGB[::-1]
    if all(abs(given - other) < 0.1 for given, other in zip(mean, expected[::-1], strict=True)):
        raise ValueError(
            f"INPUT.FORMAT is {cfg.INPUT.FORMAT}, but MODEL.PIXEL_MEAN {show(mean)} is ImageNet's in the other order"
        )
    return []


def check_precise_bn(cfg: Any) -> list[str]:
    """Refuse a precise BN that would fail, which it does after the last iteration.

    Raises:
        ValueError: If it has no iterations, or a BN of the head is used once per FPN level.
    """
    precise = cfg.TEST.PRECISE_BN
    if not precise.ENABLED:
        return []
    if precise.NUM_ITER < 1:
        raise ValueError(
            f"TEST.PRECISE_BN.NUM_ITER is {precise.NUM_ITER}; give 1 or more, or set TEST.PRECISE_BN.ENABLED False"
        )
    key = SHARED_HEAD.get(cfg.MODEL.META_ARCHITECTURE)
    norm = cfg.MODEL[key].NORM if key else ""
    if "BN" in norm and norm != "FrozenBN":
        raise ValueError(
            f"MODEL.{key}.NORM is {norm}: the head is shared by the FPN's levels, and precise BN refuses a norm that "
            f'is used several times per image, after all the training. Set MODEL.{key}.NORM ""'
        )
    return []


def check_parts(cfg: Any) -> list[str]:
    """Refuse a mapper or optimiser that does not exist or cannot be built from this config.

    Raises:
        ValueError: If so.
    """
    if cfg.TRANSFER.MAPPER != densepose.MAPPER:  # DensePose's project brings its own
        build_mapper(cfg)
    check_optimizer(cfg)
    for key, registry in _registries(cfg).items():
        if value_at(cfg, key) not in registry:
            near = difflib.get_close_matches(value_at(cfg, key), [name for name, _ in registry], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{key} is {value_at(cfg, key)}, which Detectron2 does not have{hint}")
    return []


def _registries(cfg: Any) -> dict[str, Any]:
    registries = {"MODEL.BACKBONE.NAME": BACKBONE_REGISTRY}
    if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
        registries["MODEL.ROI_HEADS.NAME"] = ROI_HEADS_REGISTRY
        registries["MODEL.PROPOSAL_GENERATOR.NAME"] = PROPOSAL_GENERATOR_REGISTRY
    return registries


def _check_norm_exists(key: str, name: str) -> None:
    try:
        get_norm(name, 32)
    except KeyError:
        known = ", ".join(name for name in (*BN_FAMILY[:3], "GN"))
        raise ValueError(f'{key} is {name}, which Detectron2 does not have; it has {known} and "" for none') from None


def _frozen_norm_notes(cfg: Any) -> list[str]:
    lr, batch = cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH
    notes = []
    if cfg.TRANSFER.INIT == "random":
        notes.append("WARNING: MODEL.RESNETS.NORM is FrozenBN with random weights: nothing is normalised.")
    if cfg.TRANSFER.OPTIMIZER == "sgd" and lr >= FROZEN_BN_LR_PER_IMAGE * batch and cfg.MODEL.BACKBONE.FREEZE_AT == 0:
        notes.append(
            f"WARNING: MODEL.RESNETS.NORM is FrozenBN with all layers trained at lr {lr:g} and {batch} images per "
            "step: that is known to diverge (NaN). Lower SOLVER.BASE_LR, or take SyncBN."
        )
    return notes
