"""Every released layout, synthesised with its project's key names around one random ResNet-50.

The networks beside the one to take have other weights, so that taking the wrong one is noticed. Kernels are random per
output channel and position and the same for all input channels, which keeps the files small. Where each layout can be
read is in transfer/sources/known.yaml.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models import resnet50

from transfer.naming import account_for

Weights = dict[str, Tensor]


def small(*shape: int, generator: torch.Generator) -> Tensor:
    """A kernel that is random per output channel and position, expanded over the input channels; or a vector."""
    if len(shape) == 1:
        return torch.rand(shape, generator=generator) + 0.5
    kernel = torch.randn(shape[0], 1, *shape[2:], generator=generator)
    return (kernel * 2 / shape[1] / kernel[0].numel() ** 0.5).expand(shape)


def random_network(seed: int) -> Weights:
    """A ResNet-50 with torchvision's 318 names, without `fc`."""
    with torch.device("meta"):
        names = resnet50(weights=None).state_dict()
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for name, value in names.items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(seed + 1)
        elif not name.startswith("fc."):
            weights[name] = small(*value.shape, generator=generator)
            if name.endswith(("running_mean", "bias")):
                weights[name] = 0.1 * torch.randn(value.shape, generator=generator)
    return weights


TAKEN, OTHER = random_network(0), random_network(1)


def below(start: str, names: Weights) -> Weights:
    return {start + name: value for name, value in names.items()}


def side(*names: str) -> Weights:
    """Small tensors that stand for what lies beside a network."""
    return {name: torch.ones(2) for name in names}


def norm(name: str) -> list[str]:
    return [f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


def mlp(name: str) -> Weights:
    """The projection and prediction heads of PixPro and SoCo."""
    linear = [f"{name}.linear{index}.{part}" for index in (1, 2) for part in ("weight", "bias")]
    return side(*linear, *norm(f"{name}.bn1"))


def linear(name: str, *indices: int) -> list[str]:
    return [f"{name}.{index}.{part}" for index in indices for part in ("weight", "bias")]


def queue(columns: int = 65536, name: str = "queue") -> Weights:
    return {name: torch.zeros(()).expand(128, columns), f"{name}_ptr": torch.zeros(1, dtype=torch.long)}


def ddp(names: Weights) -> Weights:
    return below("module.", names)


def by_number(start: str, net: Weights) -> Weights:
    """Names of a Sequential of torchvision's children."""
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    split = {name: name.partition(".") for name in net}
    return {f"{start}{numbers[child]}.{rest}": net[name] for name, (child, _, rest) in split.items()}


def constant(value: float, *shape: int) -> Tensor:
    return torch.tensor(value).expand(shape)


def channels(*names: str) -> Weights:
    """What an FPN and a box head have per channel."""
    return {name: torch.tensor(1) if name.endswith("tracked") else constant(1.0, 256) for name in names}


def conv_module(name: str, seed: int, *shape: int) -> Weights:
    return below(f"{name}.", {"conv.weight": constant(float(seed), *shape)} | channels(*norm("bn")))


LATERAL = {f"lateral_convs.{level}": (256, 256 * 2**level, 1, 1) for level in range(4)}
OUTPUT = {f"fpn_convs.{level}": (256, 256, 3, 3) for level in range(4)}


def fpn(seed: int = 0) -> Weights:
    modules = (LATERAL | OUTPUT).items()
    return {key: value for name, shape in modules for key, value in conv_module(name, seed, *shape).items()}


def fc(name: str, seed: int = 0) -> Weights:
    return {f"{name}.weight": constant(float(seed), 1024, 256 * 49), f"{name}.bias": constant(1.0, 1024)}


def box_head(seed: int = 0) -> Weights:
    convs = {f"conv{n}.weight": constant(float(seed), 256, 256, 3, 3) for n in range(1, 5)}
    return convs | channels(*(name for n in range(1, 5) for name in norm(f"bn{n}"))) | fc("fc1", seed)


def moco_heads(version: int, start: str) -> Weights:
    if version == 1:
        return below(start, {"fc.weight": torch.zeros(()).expand(128, 2048), "fc.bias": torch.ones(128)})
    last = {"fc.2.weight": torch.zeros(()).expand(128, 2048), "fc.2.bias": torch.ones(128)}
    return below(start, side("fc.0.weight", "fc.0.bias") | last)


def moco(version: int = 2, columns: int = 65536, extra: Weights | None = None) -> dict[str, Any]:
    state = queue(columns)
    for start, net in (("encoder_q.", TAKEN), ("encoder_k.", OTHER)):
        state |= below(start, net | (extra or {})) | moco_heads(version, start)
    return {"epoch": 200, "arch": "resnet50", "state_dict": ddp(state), "optimizer": {"state": {}, "param_groups": []}}


def resim(*, has_norm: bool) -> dict[str, Any]:
    layers = {f"fpn_lateral{level}": LATERAL[f"lateral_convs.{level - 2}"] for level in (3, 4, 5)}
    layers |= {f"fpn_output{level}": OUTPUT[f"fpn_convs.{level - 2}"] for level in (3, 4)}
    extra: Weights = {}
    for layer, shape in layers.items():
        extra[f"{layer}.0.weight" if has_norm else f"{layer}.weight"] = constant(0.0, *shape)
        extra |= channels(*norm(f"{layer}.1")) if has_norm else channels(f"{layer}.bias")
    return moco(extra=extra)


def moco_v3() -> dict[str, Any]:
    head = side(*linear("fc", 0, 3), *norm("fc.1"), "fc.4.running_mean", "fc.4.num_batches_tracked")
    state = below("base_encoder.", TAKEN | head) | below("momentum_encoder.", OTHER | head)
    state |= side("predictor.0.weight", *norm("predictor.1"), "predictor.3.weight", "predictor.4.running_var")
    return {"epoch": 300, "arch": "resnet50", "state_dict": ddp(state), "optimizer": {}, "scaler": {"scale": 1.0}}


def microsoft(state: Weights, **options: Any) -> dict[str, Any]:
    """What PixPro and SoCo save, with argparse's options."""
    options |= {"epochs": 400, "lr": np.float64(0.1), "output_dir": Path("out")}
    return {"opt": argparse.Namespace(**options), "model": ddp(state), "optimizer": {}, "scheduler": {}, "epoch": 400}


def soco(*, has_fpn: bool) -> dict[str, Any]:
    state = below("encoder.", TAKEN) | below("encoder_k.", OTHER) | mlp("projector") | mlp("projector_k")
    state |= mlp("predictor")
    if has_fpn:
        for suffix, seed in (("", 5), ("_k", 6)):
            state |= below(f"neck{suffix}.", fpn(seed)) | below(f"head{suffix}.", box_head(seed))
    else:
        state |= queue(64)
    return microsoft(state, model="SoCo_FPN_Star" if has_fpn else "SoCo_C4")


def pixpro(*, has_instance_branch: bool) -> dict[str, Any]:
    state = below("encoder.", TAKEN) | below("encoder_k.", OTHER) | mlp("projector") | mlp("projector_k")
    if has_instance_branch:
        state |= side("value_transform.weight", "value_transform.bias")
        state |= mlp("projector_instance") | mlp("projector_instance_k") | mlp("predictor")
    return microsoft(state, model="PixPro")


def openmmlab(state: Weights, **meta: Any) -> dict[str, Any]:
    return {"meta": {"epoch": 200, "mmcv_version": "1.0.3", **meta}, "state_dict": state, "optimizer": {}}


def insloc(*, is_c4: bool) -> dict[str, Any]:
    state: Weights = queue(64) if is_c4 else queue(64) | {"queues": torch.ones(2)}
    for suffix, net, seed in (("", TAKEN, 5), ("_k", OTHER, 6)):
        last = {name: value for name, value in net.items() if is_c4 and name.startswith("layer4.")}
        state |= below(f"backbone{suffix}.", {name: value for name, value in net.items() if name not in last})
        head = side("bbox_head.fc_cls.weight", "bbox_head.fc_cls.bias") | below("shared_head.", last)
        if not is_c4:
            state |= below(f"neck{suffix}.", fpn(seed))
            for index in range(4):
                head |= conv_module(f"bbox_head.shared_convs.{index}", seed, 256, 256, 3, 3)
            head |= fc("bbox_head.shared_fcs.0", seed) | side(*linear("bbox_head.shared_fcs", 1))
        state |= below(f"roi_head{suffix}.", head)
    return openmmlab(state)


def densecl() -> dict[str, Any]:
    neck = side(*linear("mlp", 0, 2), *linear("mlp2", 0, 2))
    state = queue(64) | queue(64, "queue2") | below("backbone.", TAKEN)
    for start, net in (("encoder_q.", TAKEN), ("encoder_k.", OTHER)):
        state |= below(start, below("0.", net) | below("1.", neck))
    return openmmlab(state)


def mm_moco() -> dict[str, Any]:
    neck = side(*linear("mlp", 0, 2))
    state = queue(64) | below("backbone.", TAKEN) | below("neck.", neck)
    for start, net in (("encoder_q.", TAKEN), ("encoder_k.", OTHER)):
        state |= below(start, below("0.", net) | below("1.", neck))
    return openmmlab(state)


def mm_byol() -> dict[str, Any]:
    neck = side(*linear("mlp", 0, 3), *norm("mlp.1"))
    state = below("backbone.", TAKEN) | below("neck.", neck) | side(*linear("head.predictor.mlp", 0, 3))
    state |= below("target_net.module.", below("0.", OTHER) | below("1.", neck)) | side("target_net.steps")
    return openmmlab(state | images((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))


def images(mean: tuple[float, ...], std: tuple[float, ...]) -> Weights:
    """The buffers of mmengine's ImgDataPreprocessor."""
    return below(
        "data_preprocessor.", {"mean": torch.tensor(mean).view(-1, 1, 1), "std": torch.tensor(std).view(-1, 1, 1)}
    )


def pycontrast() -> dict[str, Any]:
    head = side(*linear("head", 0, 2), "head_jig.fc1.weight", "head_jig.fc2.weight")
    return {
        "model": ddp(below("encoder.", TAKEN) | head),
        "model_ema": below("encoder.", OTHER) | head,
        "contrast": {"memory": torch.ones(2, 128)},
        "optimizer": {},
        "epoch": 800,
    }


def swav(prototypes: str, *, is_released: bool) -> dict[str, Any]:
    head = side(*linear("projection_head", 0, 3), *norm("projection_head.1"), prototypes)
    state = ddp(TAKEN | head)
    return state if is_released else {"epoch": 400, "state_dict": state, "optimizer": {}, "amp": {}}


def online(start: str, net: Weights, *, levels: bool = False) -> Weights:
    if not levels:
        encoder = by_number("encoder.", net)
    else:
        places = {"conv1": "C1.0", "bn1": "C1.1"} | {f"layer{n}": f"C{n + 1}" for n in range(1, 5)}
        split = {name: name.partition(".") for name in net}
        encoder = {f"{places[child]}.{rest}": net[name] for name, (child, _, rest) in split.items()}
        encoder |= side("fpn.P5_conv1.weight", "fpn.P4_conv2.1.bias")
    head = [f"projetion.{name}" for name in ("l1.weight", "l1.bias", *norm("bn1"), "l2.weight", "l2.bias")]
    return below(start, encoder | side(*head))


def byol(*, config: dict[str, Any], levels: bool = False) -> dict[str, Any]:
    state = online("online_network.", TAKEN, levels=levels) | online("target_network.", OTHER, levels=levels)
    state |= side("predictor.predictor.l1.weight", *norm("predictor.predictor.bn1"), "predictor.predictor.l2.bias")
    return {"config": config, "epoch": 300, "steps": 93600, "model": ddp(state), "optimizer": {}, "amp": {}}


def lucidrains() -> Weights:
    head = side(*linear("projector", 0, 3), *norm("projector.1"))
    fc = side("fc.weight", "fc.bias")
    state = below("net.", TAKEN | fc) | below("online_encoder.", below("net.", TAKEN | fc) | head)
    return state | below("target_encoder.", below("net.", OTHER | fc) | head) | side(*linear("online_predictor", 0, 3))


def lightning_detcon() -> dict[str, Any]:
    state = below("network.", by_number("encoder.", TAKEN) | side(*linear("projector", 0, 3), *norm("projector.1")))
    state |= side(*linear("predictor", 0, 3), "temperature")
    return {"epoch": 9, "state_dict": state, "callbacks": {}, "hyper_parameters": {"backbone": "resnet50"}}


def simclr_tf() -> dict[str, Any]:
    """The stem's running mean is what pixels in 0..1 give; the converter's counters are those of an untrained net."""
    pixels = torch.tensor([0.48, 0.46, 0.41])
    mean = TAKEN["conv1.weight"].sum(dim=(2, 3)) @ pixels
    return {"state_dict": TAKEN | {"bn1.running_mean": mean} | side("fc.weight", "fc.bias")}


def vissl(*, is_full: bool) -> dict[str, Any]:
    trunk = below("_feature_blocks.", TAKEN)
    if not is_full:
        return {"model_state_dict": trunk}
    heads = side(*linear("0.clf", 0, 2))
    base = {"model": {"trunk": trunk, "heads": heads}, "meters": {}, "optimizer": {}}
    return {"phase_idx": 99, "iteration": 1, "classy_state_dict": {"base_model": base, "phase_idx": 99}}


def fair(backbone: Weights, *names: str) -> dict[str, Any]:
    """What Barlow Twins, VICReg and VICRegL save."""
    return {"epoch": 1000, "model": ddp(below("backbone.", backbone) | side(*names)), "optimizer": {}}


def dino() -> dict[str, Any]:
    head = side(*linear("head.mlp", 0, 2, 4), "head.last_layer.weight_g", "head.last_layer.weight_v")
    return {
        "student": ddp(below("backbone.", OTHER) | head),
        "teacher": ddp(below("backbone.", TAKEN) | head),
        "optimizer": {},
        "epoch": 800,
        "args": argparse.Namespace(arch="resnet50", output_dir="."),
        "dino_loss": {"center": torch.ones(1, 2)},
    }


def simsiam() -> dict[str, Any]:
    names = ["fc.0.weight", *norm("fc.1"), "fc.3.weight", *norm("fc.4"), "fc.6.weight", "fc.6.bias"]
    head = side(*names, "fc.7.running_mean", "fc.7.running_var", "fc.7.num_batches_tracked")
    state = below("encoder.", TAKEN | head) | side("predictor.0.weight", *norm("predictor.1"), *linear("predictor", 3))
    return {"epoch": 100, "arch": "resnet50", "state_dict": ddp(state), "optimizer": {}}


def detectron2(author: str, place: str = "") -> dict[str, Any]:
    """What MoCo's converter, and those after it, make of MoCo's names: heads and counters stay."""
    names = account_for(f"backbone/{name}" for name in TAKEN).converted
    model = {f"{place}{theirs}": TAKEN[ours.removeprefix("backbone/")].numpy() for ours, theirs in names.items()}
    model[f"{place}stem.fc.0.weight"] = np.ones(2, np.float32)
    model[f"{place}res2.0.conv1.norm.num_batches_tracked"] = np.array(1)
    return {"model": model, "__author__": author, "matching_heuristics": True}


WITH_FC = {"fc.weight": torch.zeros(()).expand(1000, 2048), "fc.bias": torch.ones(1000)}
Case = tuple[Callable[[], Any], str, str, dict[str, Any]]
# Case -> what is saved, the source that is recognised, the network that is taken, what the provenance says.
RECOGNISED: dict[str, Case] = {
    "moco_v1": (lambda: moco(1), "moco", "query", {"method": "moco_v1", "epochs": 200}),
    "moco_v2": (moco, "moco", "query", {"method": "moco_v2", "epochs": 200}),
    "moco_other_queue": (lambda: moco(2, 4096), "moco", "query", {"epochs": 200}),
    "moco_v3": (moco_v3, "moco_v3", "base", {"method": "moco_v3", "epochs": 300}),
    "pcl_v1": (lambda: moco(1, 16384), "pcl", "query", {"method": "pcl_v1", "epochs": 200}),
    "pcl_v2": (lambda: moco(2, 16384), "pcl", "query", {"method": "pcl_v2", "epochs": 200}),
    "resim": (lambda: resim(has_norm=False), "resim", "query", {"method": "resim", "epochs": 200}),
    "resim_bn": (lambda: resim(has_norm=True), "resim", "query", {"method": "resim", "epochs": 200}),
    "detco_pkl": (lambda: detectron2("DetCo"), "detectron2", "backbone", {}),
    "detco_pth": (lambda: {"state_dict": TAKEN, "meta": {"epoch": 200}}, "resnet50", "backbone", {}),
    "soco_c4": (
        lambda: soco(has_fpn=False),
        "soco",
        "online",
        {"method": "soco", "epochs": 400, "variant": "SoCo_C4"},
    ),
    "soco_fpn": (
        lambda: soco(has_fpn=True),
        "soco",
        "online",
        {"method": "soco", "epochs": 400, "variant": "SoCo_FPN_Star"},
    ),
    "pixpro": (lambda: pixpro(has_instance_branch=False), "pixpro", "online", {"method": "pixpro", "epochs": 400}),
    "pixpro_instance": (
        lambda: pixpro(has_instance_branch=True),
        "pixpro",
        "online",
        {"method": "pixpro", "epochs": 400},
    ),
    "insloc_c4": (lambda: insloc(is_c4=True), "insloc", "query", {"method": "insloc", "epochs": 200}),
    "insloc_fpn": (lambda: insloc(is_c4=False), "insloc", "query", {"method": "insloc", "epochs": 200}),
    "densecl": (densecl, "densecl", "query", {"method": "densecl", "epochs": 200}),
    "densecl_extracted": (
        lambda: {"state_dict": TAKEN, "author": "DenseCL"},
        "densecl",
        "query",
        {"method": "densecl"},
    ),
    "openselfsup_extracted": (
        lambda: {"state_dict": TAKEN, "author": "OpenSelfSup"},
        "openselfsup",
        "backbone",
        {},
    ),
    "mmselfsup_moco": (mm_moco, "openselfsup", "backbone", {"epochs": 200}),
    "mmselfsup_byol": (mm_byol, "openselfsup", "backbone", {"epochs": 200}),
    "mmselfsup_extracted": (lambda: {"state_dict": TAKEN, "author": "MMSelfSup"}, "openselfsup", "backbone", {}),
    "pycontrast": (pycontrast, "pycontrast", "online", {"epochs": 800}),
    "swav": (lambda: swav("prototypes.weight", is_released=True), "swav", "backbone", {"method": "swav"}),
    "swav_full": (
        lambda: swav("prototypes.weight", is_released=False),
        "swav",
        "backbone",
        {"method": "swav", "epochs": 400},
    ),
    "deepcluster_v2": (
        lambda: swav("prototypes.prototypes0.weight", is_released=True),
        "deepcluster_v2",
        "backbone",
        {},
    ),
    "byol_yaox12": (lambda: byol(config={"model": {}}), "byol", "online", {"method": "byol", "steps": 93600}),
    "byol_lucidrains": (lucidrains, "byol", "online", {"method": "byol"}),
    "byol_deepmind_converted": (
        lambda: {name: value for name, value in TAKEN.items() if "tracked" not in name} | WITH_FC,
        "resnet50",
        "backbone",
        {},
    ),
    "detcon": (
        lambda: byol(config={"loss": {"mask_rois": 16, "pool_size": 7}}),
        "detcon",
        "online",
        {"method": "detcon", "steps": 93600},
    ),
    "detcon_fpn": (
        lambda: byol(config={"loss": {"mask_rois": 16, "pool_size": 28}}, levels=True),
        "detcon",
        "online",
        {"method": "detcon", "steps": 93600},
    ),
    "detcon_lightning": (lightning_detcon, "detcon", "online", {"method": "detcon"}),
    "simclr_tf": (simclr_tf, "resnet50", "backbone", {}),
    "vissl": (lambda: vissl(is_full=True), "vissl", "trunk", {}),
    "vissl_model_state_dict": (lambda: vissl(is_full=False), "vissl", "trunk", {}),
    "barlow_twins_full": (
        lambda: fair(TAKEN, "projector.0.weight", *norm("projector.1"), "bn.running_mean", "bn.running_var"),
        "barlow_twins",
        "backbone",
        {"method": "barlow_twins", "epochs": 1000},
    ),
    "vicreg_full": (
        lambda: fair(TAKEN, "projector.0.weight", *norm("projector.1"), "projector.6.weight"),
        "vicreg",
        "backbone",
        {"method": "vicreg", "epochs": 1000},
    ),
    "vicregl_full": (
        lambda: fair(TAKEN, "projector.0.weight", "maps_projector.0.weight", "classifier.weight", "classifier.bias"),
        "vicregl",
        "backbone",
        {"method": "vicregl", "epochs": 1000},
    ),
    "dino_full": (dino, "dino", "teacher", {"method": "dino", "epochs": 800}),
    "simsiam": (simsiam, "simsiam", "encoder", {"method": "simsiam", "epochs": 100}),
    "released_without_head": (lambda: TAKEN, "resnet50", "backbone", {}),
    "torchvision": (lambda: TAKEN | WITH_FC, "resnet50", "backbone", {}),
    "timm_state_dict": (lambda: {"state_dict": TAKEN | WITH_FC, "arch": "resnet50"}, "resnet50", "backbone", {}),
    "linear_probe": (lambda: {"epoch": 99, "state_dict": ddp(TAKEN | WITH_FC)}, "resnet50", "backbone", {}),
    "moco_converted": (lambda: detectron2("MOCO"), "detectron2", "backbone", {}),
    "detectron2_fpn": (lambda: detectron2("x", "backbone.bottom_up."), "detectron2", "backbone", {}),
}
LEGACY = ("torchvision", "moco_v1", "soco_fpn")
"""Saved as torch before 1.6 did."""
FPN_AND_HEAD = {"soco_fpn": 40 + 22, "insloc_fpn": 40 + 22, "resim": 10, "resim_bn": 25}
