"""convert-to-d2 with an FPN and a box head: what Detectron2's own modules compute with them, --only, MMDetection."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from detco.artifact import IMAGENET_RGB, Artifact, Preprocess, write_artifact
from detco.models.box_head import BoxHead
from detco.models.fpn import FPN
from detco.models.resnet import ResNetTrunk
from transfer import d2
from transfer.convert import ConversionError, convert, main
from transfer.sources.parts import fpn_shapes
from transfer.weights import read_record

needs_d2 = pytest.mark.skipif(d2.info() is None, reason=f"Detectron2 is not installed: {d2.INSTALL_COMMAND}")
Weights = dict[str, Tensor]
PARTS: dict[str, type[nn.Module]] = {"backbone": ResNetTrunk, "fpn": FPN, "box_head": BoxHead}


def trained(module: nn.Module) -> Weights:
    """A part with norms that differ from channel to channel, as after training."""
    weights = module.state_dict()
    for name, value in weights.items():
        if name.endswith("num_batches_tracked"):
            value.fill_(7)
        elif name.endswith(("running_mean", "bias")):
            value.normal_(0, 0.1)
        elif value.dim() == 1:
            value.uniform_(0.5, 1.5)
    return dict(weights)


@pytest.fixture(scope="module")
def parts() -> dict[str, Weights]:
    torch.manual_seed(0)
    return {role: trained(module()) for role, module in PARTS.items()}


@pytest.fixture(scope="module")
def artifact(parts: dict[str, Weights], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "model.safetensors"
    write_artifact(path, Artifact(parts, IMAGENET_RGB, {"method": "toy"}))
    return path


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are large and thrown away: waiting for the disk would be most of these tests' time."""
    monkeypatch.setattr("os.fsync", lambda file: None)


def flat(parts: dict[str, Weights]) -> Weights:
    return {f"{role}/{name}": value for role, part in parts.items() for name, value in part.items()}


COMPARED = [
    *(f"backbone.{stage}" for stage in ("res2", "res3", "res4", "res5")),
    "roi_heads.res5",
    *(f"backbone.bottom_up.{stage}" for stage in ("res2", "res3", "res4", "res5")),
    *(f"backbone.p{level}" for level in range(2, 6)),
    "roi_heads.box_head",
]


@pytest.mark.d2
@needs_d2
def test_detectron2s_fpn_and_box_head_compute_the_same_bit_for_bit_and_another_networks_do_not(
    artifact: Path, parts: dict[str, Weights], tmp_path: Path
) -> None:
    from transfer.parity import measure_parity

    report = convert(artifact, tmp_path / "out.pkl", verify=True)
    assert dict(report.differences) == dict.fromkeys(COMPARED, 0.0)
    assert (report.parts, report.uncompared) == (("backbone", "fpn", "box_head"), ())
    assert len(report.account.converted) == 265 + 40 + 22
    source = read_record(str(tmp_path / "out.pkl")).provenance["source"]
    assert source["parts"] == ["backbone", "fpn", "box_head"]
    other = flat(parts)
    for name in ("fpn/lateral_convs.3.bn.running_var", "fpn/fpn_convs.0.conv.weight", "box_head/bn4.running_mean"):
        other[name] = other[name] + 1
    differences = measure_parity(tmp_path / "out.pkl", other, IMAGENET_RGB).differences
    assert {place for place, difference in differences.items() if difference > 1e-3} == set(COMPARED[9:])


@pytest.mark.d2
@needs_d2
def test_an_fpn_with_biases_and_fewer_levels_is_compared_where_it_is_known(
    parts: dict[str, Weights], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = fpn_shapes(range(1, 4), range(1, 3), has_norm=False)  # as ReSim's
    subset = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    subset |= {name: value / value[0].numel() ** 0.5 for name, value in subset.items() if value.dim() > 1}
    path = tmp_path / "in.safetensors"
    write_artifact(path, Artifact({"backbone": parts["backbone"], "fpn": subset}, IMAGENET_RGB, {}))
    report = convert(path, tmp_path / "out.pth", verify=True)
    levels = {place: gap for place, gap in report.differences.items() if place.startswith("backbone.p")}
    assert set(levels) == {"backbone.p3", "backbone.p4"}
    assert max(levels.values()) <= 1e-5
    assert "verify       not compared: p2 and p5 of the FPN, whose convolutions are not in the source" in str(report)


@pytest.mark.parametrize(
    ("only", "count", "named"), [("backbone", 265, ["backbone"]), ("backbone+fpn", 305, ["backbone", "fpn"])]
)
def test_only_leaves_the_other_parts_out_and_says_so(
    artifact: Path, tmp_path: Path, only: str, count: int, named: list[str]
) -> None:
    report = convert(artifact, tmp_path / "out.pth", only=only)
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert len(written["model"]) == count
    assert any(name.startswith("fpn_") for name in written["model"]) == ("fpn" in named)
    assert not any(name.startswith("box_head") for name in written["model"])
    assert written["provenance"]["source"]["parts"] == list(report.parts) == named
    assert f"left out, as --only {only} asks" in str(report)
    assert len(report.account.converted) + len(report.account.dropped) == 392


def test_only_a_part_that_is_not_there_is_refused(parts: dict[str, Weights], tmp_path: Path) -> None:
    write_artifact(tmp_path / "in.safetensors", Artifact({"backbone": parts["backbone"]}, IMAGENET_RGB, {}))
    with pytest.raises(ConversionError, match=r"--only is backbone\+fpn, but .* has no fpn; it has backbone"):
        convert(tmp_path / "in.safetensors", tmp_path / "out.pkl", only="backbone+fpn")


def test_what_was_written_for_mmdetection_is_no_weights_file_here(artifact: Path, tmp_path: Path) -> None:
    convert(artifact, tmp_path / "out.pth", to="mmdet", only="backbone")
    with pytest.raises(ValueError, match=r"written for MMDetection; convert what it was made from .* without --to"):
        read_record(str(tmp_path / "out.pth"))


def test_mmdetection_gets_every_tensor_and_counter_and_the_settings(
    artifact: Path, parts: dict[str, Weights], tmp_path: Path
) -> None:
    report = convert(artifact, tmp_path / "out.pth", to="mmdet")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert set(written) == {"state_dict", "meta"}
    state = written["state_dict"]
    assert len(state) == len(report.account.converted) == 318 + 48 + 26
    expected = {f"backbone.{name}": value for name, value in parts["backbone"].items()}
    expected |= {f"neck.{name}": value for name, value in parts["fpn"].items()}
    assert all(torch.equal(state.pop(name), value) for name, value in expected.items())
    assert torch.equal(state["roi_head.bbox_head.shared_convs.3.bn.running_var"], parts["box_head"]["bn4.running_var"])
    counter = state["roi_head.bbox_head.shared_convs.0.bn.num_batches_tracked"]
    assert (counter.item(), counter.dtype) == (7, torch.int64)
    meta = written["meta"]
    assert meta["preprocess"] == IMAGENET_RGB.as_dict()
    assert meta["provenance"]["source"]["parts"] == ["backbone", "fpn", "box_head"]
    sync = {"type": "SyncBN", "requires_grad": True}
    assert meta["settings"] == report.settings
    assert report.settings["neck"] == {"norm_cfg": sync}
    assert report.settings["roi_head"] == {"bbox_head": {"type": "Shared4Conv1FCBBoxHead", "norm_cfg": sync}}
    assert report.settings["backbone"] == {
        **{"style": "pytorch", "frozen_stages": -1, "norm_eval": False, "norm_cfg": sync, "init_cfg": None}
    }
    # What is printed is Python that MMDetection's config can have as it stands.
    printed = str(report)
    pasted: dict[str, object] = {}
    exec(printed[printed.index("load_from = ") :], pasted)
    assert pasted["load_from"] == str(tmp_path / "out.pth")
    assert pasted["model"] == report.settings


def test_mmdetections_settings_follow_the_input_of_the_weights(parts: dict[str, Weights], tmp_path: Path) -> None:
    bgr = Preprocess("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), stride_in_1x1=True)
    write_artifact(tmp_path / "in.safetensors", Artifact({"backbone": parts["backbone"]}, bgr, {}))
    settings = convert(tmp_path / "in.safetensors", tmp_path / "out.pth", to="mmdet").settings
    assert settings["data_preprocessor"] == {"mean": [103.53, 116.28, 123.675], "std": [1.0] * 3, "bgr_to_rgb": False}
    assert settings["backbone"]["style"] == "caffe"
    assert set(settings) == {"data_preprocessor", "backbone"}


def test_a_neck_that_starts_at_c3_gets_the_levels_above_under_smaller_numbers(
    artifact: Path, parts: dict[str, Weights], tmp_path: Path
) -> None:
    report = convert(artifact, tmp_path / "out.pth", to="mmdet-retinanet")
    state = torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"]
    necks = {name: value for name, value in state.items() if name.startswith("neck.")}
    assert len(necks) == 36
    for level in (1, 2, 3):
        for convs in ("lateral_convs", "fpn_convs"):
            kernel = parts["fpn"][f"{convs}.{level}.conv.weight"]
            assert torch.equal(necks[f"neck.{convs}.{level - 1}.conv.weight"], kernel)
    assert len(state) == 318 + 36
    assert not any(name.startswith("roi_head") for name in state)
    assert report.parts == ("backbone", "fpn")
    assert "roi_head" not in report.settings
    assert "12 level p2 of the FPN, which a neck that starts at C3 does not have" in str(report)
    assert "26 box head, which a one-stage detector does not have" in str(report)


def test_mmdetections_files_are_pth_and_cannot_be_verified(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(artifact), str(tmp_path / "out.pkl"), "--to", "mmdet"]) == 2
    assert "its suffix must be .pth" in capsys.readouterr().err
    assert main([str(artifact), str(tmp_path / "out.pth"), "--to", "mmdet", "--verify"]) == 2
    assert "--verify is not for --to mmdet: nothing is installed here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty. Copy or download it again"),
        (b"\n<!DOCTYPE html><html>404</html>", "is a web page, not weights"),
        (b"<html><body>sign in</body>", "is a web page, not weights"),
        (None, "is a folder; give the file in it"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_a_failed_download_leaves_is_named(
    content: bytes | None, said: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"in{suffix}"
    path.mkdir() if content is None else path.write_bytes(content)
    assert main([str(path), str(tmp_path / "out.pkl")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path} {said}")
