"""What a source is refused for or comes with a caution of: parts that are not whole, second networks, its input."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

from transfer.convert import ConversionReport, convert
from transfer.sources import SourceError, read_source
from transfer.sources.recognise import recognise


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
TAKEN, below, images = released.TAKEN, released.below, released.images
mm_byol, soco = released.mm_byol, released.soco


def convert_case(folder: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> ConversionReport:
    monkeypatch.setattr(os, "fsync", lambda file: None)
    torch.save(released.RECOGNISED[case][0](), folder / "in.pth")
    return convert(folder / "in.pth", folder / "out.pth")


@pytest.mark.parametrize("place", ["neck.fpn_convs.3.conv.weight", "neck.lateral_convs.0.bn.bias", "head.fc1.weight"])
@pytest.mark.parametrize("shape", [None, (7, 5, 3), (300_000, 200_000)])
def test_a_part_that_is_not_whole_or_of_another_shape_is_refused(
    place: str, shape: tuple[int, ...] | None, tmp_path: Path
) -> None:
    content = soco(has_fpn=True)
    if shape is None:
        if place == "neck.fpn_convs.3.conv.weight":  # Without it the layout is another.
            place = "neck.fpn_convs.2.conv.weight"
        del content["model"][f"module.{place}"]
    else:
        content["model"][f"module.{place}"] = torch.zeros(()).expand(shape)
    torch.save(content, tmp_path / "in.pth")
    part = "an FPN of a known kind" if place.startswith("neck.") else "a box head of four convolutions"
    name = place.partition(".")[2].replace(".", r"\.")
    problem = "is missing" if shape is None else f"has shape {shape}".replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(SourceError, match=f"is not {part}.*: {name} {problem}"):
        read_source(tmp_path / "in.pth")


def test_a_part_with_a_norm_and_a_bias_is_refused(tmp_path: Path) -> None:
    content = soco(has_fpn=True)
    content["model"]["module.neck.fpn_convs.0.conv.bias"] = torch.ones(256)
    torch.save(content, tmp_path / "in.pth")
    with pytest.raises(SourceError, match=r"fpn_convs\.0\.conv\.bias is too many"):
        read_source(tmp_path / "in.pth")


@pytest.mark.parametrize(
    ("outer", "start", "network"),
    [
        ("state_dict", "module.encoder_k.", "key"),
        ("state_dict", "backbone_k.", "key"),
        ("state_dict", "momentum_encoder.", "momentum"),
        ("state_dict", "teacher_backbone.", "teacher"),
        ("student", "module.backbone.", "student"),
        ("model_ema", "", "EMA"),
        ("target_network", "encoder.", "target"),
    ],
)
def test_the_second_network_of_a_pair_is_named_and_cautioned_of(
    outer: str, start: str, network: str, tmp_path: Path
) -> None:
    torch.save({outer: below(start, TAKEN)}, tmp_path / "in.pth")
    source = read_source(tmp_path / "in.pth")
    assert source.network == network
    (caution,) = source.cautions
    assert f"it is the {network} network, one of a pair" in caution
    assert torch.equal(source.tensors["backbone/conv1.weight"], TAKEN["conv1.weight"])


@pytest.mark.parametrize(
    ("start", "network"), [("encoder_q.", "query"), ("backbone.", "backbone"), ("emavit.", "backbone")]
)
def test_the_first_network_of_a_pair_and_a_single_one_come_without_a_caution(start: str, network: str) -> None:
    found = recognise({"net": below(start, TAKEN)})
    assert (found.network, found.caution) == (network, "")


@pytest.mark.parametrize("case", ["moco_converted", "detectron2_fpn"])
def test_the_input_of_detectron2s_names_without_a_record_is_said_to_be_assumed(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = convert_case(tmp_path, case, monkeypatch)
    assert "RGB, torchvision's mean and std, and the stride in the 3x3 convolution are assumed" in report.warnings[-1]
    assert "(not recorded: the usual one is assumed)" in str(report)
    assert convert(tmp_path / "out.pth", tmp_path / "again.pth").source.cautions == ()


def test_the_input_of_a_known_project_is_said_to_be_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "(as known of moco)" in str(convert_case(tmp_path, "moco_v2", monkeypatch))


@pytest.mark.parametrize(
    ("mean", "std", "name"),
    [
        ((103.53, 116.28, 123.675), (58.395, 57.12, 57.375), "mean is 103.53/116.28/123.675"),
        ((123.675, 116.28, 103.53), (1.0, 1.0, 1.0), "std is 1/1/1, but 58.395/57.12/57.375"),
        ((123.675, 116.28), (58.395, 57.12, 57.375), "mean is nan/nan/nan"),
    ],
)
def test_an_input_that_the_file_states_otherwise_is_refused(
    mean: tuple[float, ...], std: tuple[float, ...], name: str
) -> None:
    content = mm_byol()
    content["state_dict"] |= images(mean, std)
    with pytest.raises(SourceError, match=f"data_preprocessor.{name}"):
        recognise(content)
