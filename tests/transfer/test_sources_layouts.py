"""Every released layout (tests/oracles/released_checkpoints.py) is recognised, converted and computed with."""

import argparse
import importlib.util
import os
import pickle
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from detco.artifact import IMAGENET_RGB
from detco.models.resnet import ResNetTrunk
from transfer import d2
from transfer.convert import ConversionReport, convert, main
from transfer.naming import account_for
from transfer.safe_read import load_torch
from transfer.sources import SourceError, load_layouts, read_source
from transfer.sources.nesting import value_at
from transfer.sources.recognise import recognise
from transfer.sources.resnet50 import fits_pixels_from_0_to_1, input_mean
from transfer.weights import read_record

Weights = dict[str, Tensor]
needs_d2 = pytest.mark.skipif(d2.info() is None, reason=f"Detectron2 is not installed: {d2.INSTALL_COMMAND}")


def _load_released() -> ModuleType:
    """Load tests/oracles/released_checkpoints.py by its path: the tests are no package."""
    path = Path(__file__).parents[1] / "oracles" / "released_checkpoints.py"
    spec = importlib.util.spec_from_file_location("released_checkpoints", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


released = _load_released()
RECOGNISED, TAKEN, OTHER, WITH_FC = released.RECOGNISED, released.TAKEN, released.OTHER, released.WITH_FC
FPN_AND_HEAD, LEGACY = released.FPN_AND_HEAD, released.LEGACY
below, ddp, norm, side, small = released.below, released.ddp, released.norm, released.side, released.small
moco, simclr_tf, soco = released.moco, released.simclr_tf, released.soco


def save(folder: Path, case: str) -> Path:
    content = RECOGNISED[case][0]()
    is_pickle = isinstance(content, dict) and "__author__" in content
    path = folder / ("in.pkl" if is_pickle else "in.pth.tar")
    if is_pickle:
        path.write_bytes(pickle.dumps(content, protocol=4))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=case not in LEGACY)
    return path


def expected_of(case: str) -> Weights:
    return TAKEN | {"bn1.running_mean": simclr_tf()["state_dict"]["bn1.running_mean"]} if case == "simclr_tf" else TAKEN


@pytest.mark.parametrize("case", list(RECOGNISED))
def test_a_released_checkpoint_is_recognised_without_flags(case: str, tmp_path: Path) -> None:
    _, name, network, provenance = RECOGNISED[case]
    source = read_source(save(tmp_path, case))
    assert (source.name, source.network, source.provenance) == (name, network, provenance)
    account = account_for(source.tensors)
    assert (source.unexplained, account.unexplained, account.colliding) == ((), (), {})
    assert len(account.converted) == 265 + FPN_AND_HEAD.get(case, 0)
    expected = {f"backbone/{name}": value for name, value in expected_of(case).items()}
    for ours in account_for(expected).converted:
        assert torch.equal(source.tensors[ours], expected[ours]), ours


# Each another way through the files: zip, legacy, pickle; two prefixes, a Namespace, FPN and head.
WRITTEN = ("moco_v2", "torchvision", "detco_pkl", "insloc_c4", "soco_fpn")


def convert_case(folder: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> ConversionReport:
    monkeypatch.setattr(os, "fsync", lambda file: None)
    return convert(save(folder, case), folder / "out.pth")


@pytest.mark.parametrize("case", WRITTEN)
def test_a_released_checkpoint_is_converted_with_its_record(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, name, network, provenance = RECOGNISED[case]
    report = convert_case(tmp_path, case, monkeypatch)
    record = read_record(str(tmp_path / "out.pth"))
    source = record.provenance.pop("source")
    assert (record.provenance, record.preprocess) == (provenance, IMAGENET_RGB)
    assert (source["name"], source["network"], source["sha256"]) == (name, network, report.source.sha256)
    assert source["project"] == (load_layouts()[name].project if name in load_layouts() else "")
    converted = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert len(converted) == 265 + FPN_AND_HEAD.get(case, 0)
    for ours, theirs in account_for(f"backbone/{name}" for name in TAKEN).converted.items():
        assert torch.equal(converted[theirs], TAKEN[ours.removeprefix("backbone/")]), theirs


@pytest.mark.parametrize("case", list(FPN_AND_HEAD))
def test_fpn_and_box_head_come_from_the_same_network(case: str) -> None:
    tensors = recognise(RECOGNISED[case][0]()).tensors
    parts = {name: value for name, value in tensors.items() if not name.startswith("backbone/")}
    kernels = [value for name, value in parts.items() if name.endswith(("conv.weight", "conv1.weight", "fc1.weight"))]
    assert kernels
    first = kernels[0].flatten()[0]
    assert all(value.flatten()[0] == first == value.flatten()[-1] for value in kernels)
    assert account_for(parts).unexplained == ()


def test_statistics_that_fit_pixels_from_0_to_1_decide_nothing_without_the_source(tmp_path: Path) -> None:
    path = save(tmp_path, "simclr_tf")
    guess = read_source(path)
    assert (guess.name, guess.preprocess) == ("resnet50", IMAGENET_RGB)
    assert "fit pixels in 0..1 that were not normalised" in guess.cautions[0]
    assert "--source simclr_tf" in guess.cautions[0]
    source = read_source(path, "simclr_tf")
    assert (source.preprocess.mean_255, source.preprocess.std_255) == ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0))
    assert not any("pixels in 0..1" in caution for caution in source.cautions)


@pytest.mark.parametrize(("scale", "is_unit"), [((0.0, 1.0), True), ((-2.0, 4.5), False), ((0.0, 255.0), False)])
def test_the_mean_of_the_pixels_is_read_off_the_stem(scale: tuple[float, float], is_unit: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    colours = torch.tensor([0.5, 0.45, 0.4]).view(3, 1, 1)
    pixels = scale[0] + scale[1] * (torch.rand(4, 3, 96, 96, generator=generator) * 2 * colours)
    kernels = torch.randn(64, 3, 7, 7, generator=generator)
    outputs = nn.functional.conv2d(pixels, kernels, stride=2, padding=3)
    stem = {"conv1.weight": kernels, "bn1.running_mean": outputs.mean(dim=(0, 2, 3))}
    means, explained = input_mean(stem)
    np.testing.assert_allclose(means, pixels.mean(dim=(0, 2, 3)), rtol=0.1, atol=0.02)
    assert explained > 0.9
    assert fits_pixels_from_0_to_1(stem) is is_unit
    broken = {**stem, "bn1.running_mean": torch.full((64,), float("nan"))}
    assert not fits_pixels_from_0_to_1(broken)


def test_an_input_that_contradicts_the_statistics_is_warned_of(tmp_path: Path) -> None:
    torch.save(simclr_tf()["state_dict"], tmp_path / "bare.pth")
    assert "with --source simclr_tf" in read_source(tmp_path / "bare.pth").cautions[0]
    torch.save({"state_dict": TAKEN}, tmp_path / "usual.pth")
    forced = read_source(tmp_path / "usual.pth", "simclr_tf")
    assert "not those of pixels in 0..1" in forced.cautions[-1]
    assert read_source(tmp_path / "usual.pth").cautions == ()


@pytest.mark.parametrize("case", ["swav", "moco_v3", "byol_yaox12"])
def test_weights_of_unusual_scale_come_with_a_caution(case: str, tmp_path: Path) -> None:
    assert "learning rate may not fit" in read_source(save(tmp_path, case)).cautions[0]


BARE = ("barlow_twins", "vicreg", "vicregl", "dino", "byol", "torchvision", "timm", "sela_v2")
FORCED = ("detco", "moco", "simclr_tf", *BARE)


@pytest.mark.parametrize("name", FORCED)
def test_a_source_that_the_file_does_not_tell_can_be_forced(name: str, tmp_path: Path) -> None:
    bare = TAKEN if name in BARE else {"state_dict": TAKEN}
    found = recognise(bare, name)
    assert found.layout is not None
    assert found.layout.name == name
    assert found.unexplained == ()
    assert torch.equal(found.tensors["backbone/conv1.weight"], TAKEN["conv1.weight"])


def test_forcing_a_source_that_does_not_fit_is_refused_with_what_was_expected() -> None:
    with pytest.raises(SourceError, match=r"not as SoCo saves it \(model: encoder\..*It holds\n"):
        recognise(moco(), "soco")
    with pytest.raises(SourceError, match="no source 'mocov2'; the known ones are detco, moco"):
        recognise(moco(), "mocov2")


def test_forcing_a_source_on_our_own_file_is_refused(tmp_path: Path) -> None:
    checkpoint = {
        "format": "detco-checkpoint",
        "schema": 1,
        "model": below("query.trunk.", TAKEN),
        "transfer_parts": {"backbone": "query.trunk"},
        "preprocess": IMAGENET_RGB.as_dict(),
        "provenance": {},
    }
    torch.save(checkpoint, tmp_path / "in.pth")
    with pytest.raises(SourceError, match="give no --source"):
        read_source(tmp_path / "in.pth", "moco")


def test_every_known_source_is_tried() -> None:
    recognised = {name for _, name, _, _ in RECOGNISED.values()}
    assert set(load_layouts()) - recognised - set(FORCED) == {"pycontrast_cmc"}


@pytest.mark.parametrize(
    ("case", "names"),
    [("pycontrast", {"model_ema", "contrast"}), ("dino_full", {"student"}), ("vissl", {"heads"})],
)
def test_networks_in_dicts_beside_the_one_taken_are_accounted_for(case: str, names: set[str]) -> None:
    found = recognise(RECOGNISED[case][0]())
    assert names <= set(found.left_out)


def test_cmc_is_refused_with_the_reason() -> None:
    state = below("encoder1.", TAKEN) | below("encoder2.", OTHER) | side("head1.0.weight", "head2.0.weight")
    with pytest.raises(SourceError, match="CMC by PyContrast, which is not converted: it holds two networks"):
        recognise({"model": ddp(state)})


def test_several_networks_without_a_rule_are_refused_with_their_places() -> None:
    with pytest.raises(SourceError, match=r"2 ResNets, at 'nets: a', 'nets: b'|2 ResNets, at 'nets: a\.', 'nets: b\.'"):
        recognise({"nets": below("a.", TAKEN) | below("b.", OTHER)})


def test_an_unknown_layout_is_refused_with_its_nesting() -> None:
    content = {"net": {"body": side("block.0.w", "block.1.w")}, "opt": argparse.Namespace(), "epoch": 3}
    with pytest.raises(SourceError) as error:
        recognise(content)
    assert "net.body: 2 tensors" in str(error.value)
    assert "(top level): 1 dict, 1 Namespace, 1 int" in str(error.value)
    assert "most frequent starts of the 2 names: block.0 (1), block.1 (1)" in str(error.value)


@pytest.mark.parametrize("name", ["module.encoder_x.weight", "module.queue3", "module.neck_k.0.weight"])
def test_a_name_that_the_layout_does_not_have_is_unexplained(name: str) -> None:
    content = moco()
    content["state_dict"][name] = torch.ones(2)
    assert recognise(content).unexplained == (name,)


def test_settings_are_plain_numbers_and_words(tmp_path: Path) -> None:
    content = soco(has_fpn=False) | {"epoch": np.int64(100)}
    content["opt"].model = ["no", "name"]
    torch.save(content, tmp_path / "in.pth")
    provenance = read_source(tmp_path / "in.pth").provenance
    assert provenance == {"method": "soco", "epochs": 100}
    assert type(provenance["epochs"]) is int


def test_dotted_paths_go_through_options_and_end_where_nothing_is(tmp_path: Path) -> None:
    torch.save({"opt": argparse.Namespace(lr=0.5)}, tmp_path / "in.pth")
    content = load_torch(tmp_path / "in.pth")
    assert value_at(content, "opt.lr") == 0.5
    assert value_at(content, "opt.lr.x") is None
    assert value_at(content, "a.b") is None
    assert value_at(content, "") is content


def test_a_converted_file_converts_again_with_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_case(tmp_path, "moco_v2", monkeypatch)
    report = convert(tmp_path / "out.pth", tmp_path / "again.pkl")
    record = read_record(str(tmp_path / "again.pkl"))
    assert report.source.preprocess_is_recorded
    assert (record.provenance["method"], record.provenance["epochs"]) == ("moco_v2", 200)
    assert record.provenance["source"]["earlier"]["name"] == "moco"
    first = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    again = pickle.loads((tmp_path / "again.pkl").read_bytes())["model"]
    assert first.keys() == again.keys()
    assert all(np.array_equal(again[name], value.numpy()) for name, value in first.items())


def test_a_safetensors_file_of_another_project_is_read(tmp_path: Path) -> None:
    save_file({name: value.contiguous() for name, value in (TAKEN | WITH_FC).items()}, tmp_path / "model.safetensors")
    source = read_source(tmp_path / "model.safetensors")
    assert source.name == "resnet50"
    assert torch.equal(source.tensors["backbone/conv1.weight"], TAKEN["conv1.weight"])


def test_the_list_of_sources_names_each_with_its_input(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--list-sources"])
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{printed}" for name in load_layouts())
    assert "mean 0/0/0, std 255/255/255" in printed
    assert "layout not verified" in printed


@pytest.fixture(scope="module")
def detectron2_resnet() -> nn.Module:
    d2.require()
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import build_resnet_backbone

    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = 50
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    resnet: nn.Module = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    return resnet.eval()


@pytest.fixture(scope="module")
def trunk() -> nn.Module:
    return ResNetTrunk().eval()


@pytest.mark.d2
@needs_d2
@pytest.mark.parametrize("case", list(RECOGNISED))
def test_detectron2_computes_the_network_of_a_released_checkpoint(
    case: str, detectron2_resnet: nn.Module, trunk: nn.Module
) -> None:
    found = recognise(RECOGNISED[case][0]())
    names = account_for(found.tensors).converted
    ours = {theirs: found.tensors[name] for name, theirs in names.items() if name.startswith("backbone/")}
    for value in detectron2_resnet.state_dict().values():
        value.fill_(float("nan"))
    detectron2_resnet.load_state_dict(ours, strict=True)
    expected = expected_of(case)
    trunk.load_state_dict({name: expected[name] for name in trunk.state_dict()})
    image = torch.randn(1, 3, 33, 47, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features, theirs = trunk(image)._asdict(), detectron2_resnet(image)
    for stage in ("res2", "res3", "res4", "res5"):
        assert features[stage].isfinite().all()
        assert features[stage].std() > 0
        assert torch.equal(theirs[stage], features[stage]), stage


def soco_in_full(seed: int) -> Weights:
    """An FPN and a box head of SoCo's shapes, as on the query side."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"neck.lateral_convs.{i}": (256, 256 * 2**i, 1, 1) for i in range(4)}
    shapes |= {f"neck.fpn_convs.{i}": (256, 256, 3, 3) for i in range(4)}
    state: Weights = {}
    for name, shape in shapes.items():
        state[f"{name}.conv.weight"] = small(*shape, generator=generator)
        state |= {part: small(256, generator=generator) for part in norm(f"{name}.bn")}
    for n in range(1, 5):
        state[f"head.conv{n}.weight"] = small(256, 256, 3, 3, generator=generator)
        state |= {part: small(256, generator=generator) for part in norm(f"head.bn{n}")}
    fc = {"head.fc1.weight": torch.rand(1024, 1, generator=generator).expand(1024, 12544)}
    return state | fc | {"head.fc1.bias": small(1024, generator=generator)}


@pytest.mark.d2
@needs_d2
def test_soco_fills_all_but_34_tensors_of_its_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    d2.require()
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    monkeypatch.setattr(os, "fsync", lambda file: None)
    content = soco(has_fpn=True)
    ours = soco_in_full(2)
    content["model"] |= ddp(ours)
    torch.save(content, tmp_path / "in.pth")
    convert(tmp_path / "in.pth", tmp_path / "out.pth")
    stages, levels = [f"res{n}" for n in range(2, 6)], [f"p{n}" for n in range(2, 6)]
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.MASK_ON = "cpu", True
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RESNETS.OUT_FEATURES = "build_resnet_fpn_backbone", stages
    cfg.MODEL.RESNETS.STRIDE_IN_1X1, cfg.MODEL.RESNETS.NORM = False, "BN"
    cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.NORM = stages, "BN"
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.RPN.IN_FEATURES, cfg.MODEL.ROI_HEADS.IN_FEATURES = [*levels, "p6"], levels
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_BOX_HEAD.NAME = "StandardROIHeads", "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_CONV, cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 4, 1
    cfg.MODEL.ROI_BOX_HEAD.NORM = cfg.MODEL.ROI_MASK_HEAD.NORM = "BN"
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION, cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 7, 14
    cfg.MODEL.ROI_MASK_HEAD.NAME, cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = "MaskRCNNConvUpsampleHead", 4
    model = build_model(cfg)
    skip = ("num_batches_tracked", "pixel_mean", "pixel_std")
    state = {
        name: value
        for name, value in model.state_dict().items()
        if not name.endswith(skip) and "anchor_generator" not in name
    }
    for value in state.values():
        value.fill_(-77.0)
    DetectionCheckpointer(model).load(str(tmp_path / "out.pth"))
    untouched = [name for name, value in state.items() if bool((value == -77.0).all())]
    # With their 65 step counters, which are dropped, these are the 392 of the authors' own conversion.
    assert len(state) - len(untouched) == 265 + 40 + 22 == 392 - 65
    assert len(untouched) == 34
    assert {name.split(".")[1] for name in untouched} == {"rpn_head", "box_predictor", "mask_head"}
    for theirs, name in (
        ("backbone.fpn_lateral4.norm.running_var", "neck.lateral_convs.2.bn.running_var"),
        ("backbone.fpn_output5.weight", "neck.fpn_convs.3.conv.weight"),
        ("roi_heads.box_head.conv3.norm.bias", "head.bn3.bias"),
        ("roi_heads.box_head.fc1.weight", "head.fc1.weight"),
    ):
        assert torch.equal(state[theirs], ours[name]), theirs
