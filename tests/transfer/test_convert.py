import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models import resnet50

from detco.artifact import IMAGENET_RGB, Artifact, Preprocess, write_artifact
from transfer import d2
from transfer.convert import ConversionError, convert, main
from transfer.weights import read_record

PROVENANCE = {"method": "toy", "steps": 3}
Weights = dict[str, Tensor]

needs_d2 = pytest.mark.skipif(d2.info() is None, reason=f"Detectron2 is not installed: {d2.INSTALL_COMMAND}")


def random_resnet50(seed: int) -> Weights:
    """A ResNet-50 with BatchNorm statistics that differ from channel to channel, as after training."""
    torch.manual_seed(seed)
    weights = resnet50(weights=None).state_dict()
    for name, value in weights.items():
        if name.endswith(("running_mean", "bias")):
            value.normal_(0, 0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    return weights


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_resnet50(0)


@pytest.fixture(scope="module")
def backbone(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if not name.startswith("fc.")}


@pytest.fixture(scope="module")
def artifact(backbone: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "model.safetensors"
    write_artifact(path, Artifact({"backbone": backbone}, IMAGENET_RGB, PROVENANCE))
    return path


def read_pkl(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = pickle.loads(path.read_bytes())
    return content


def moco_checkpoint(path: Path, query: Weights, key: Weights) -> Path:
    """What main_moco.py of MoCo v2 saves, with small heads."""
    head = {"fc.0.weight": torch.ones(2, 2), "fc.0.bias": torch.ones(2), "fc.2.weight": torch.ones(2, 2)}
    state = {f"module.encoder_q.{name}": value for name, value in (query | head).items()}
    state |= {f"module.encoder_k.{name}": value for name, value in (key | head).items()}
    state |= {"module.queue": torch.ones(2, 4), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {"state": {}}}, path)
    return path


def test_an_artifact_becomes_265_float32_arrays_under_detectron2_names(
    artifact: Path, backbone: Weights, tmp_path: Path
) -> None:
    report = convert(artifact, tmp_path / "out.pkl")
    content = read_pkl(tmp_path / "out.pkl")
    assert len(content["model"]) == len(report.account.converted) == 265
    assert len(report.account.dropped) == 53
    assert all(type(array) is np.ndarray and array.dtype == np.float32 for array in content["model"].values())
    expected = backbone["layer3.5.bn2.running_var"].numpy()
    np.testing.assert_array_equal(content["model"]["res4.5.conv2.norm.running_var"], expected)
    assert content["matching_heuristics"] is True
    assert content["__author__"].startswith("detco convert-to-d2 ")
    assert content["preprocess"] == IMAGENET_RGB.as_dict()


def test_both_formats_hold_the_same_values_and_record(artifact: Path, tmp_path: Path) -> None:
    for name in ("out.pkl", "out.pth"):
        convert(artifact, tmp_path / name)
    arrays = read_pkl(tmp_path / "out.pkl")
    tensors = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(arrays["model"]) == list(tensors["model"])
    assert all(np.array_equal(arrays["model"][name], value.numpy()) for name, value in tensors["model"].items())
    assert {key: value for key, value in arrays.items() if key != "model"} == {
        key: value for key, value in tensors.items() if key != "model"
    }
    record = read_record(str(tmp_path / "out.pth"))
    assert record.preprocess == IMAGENET_RGB
    assert record.provenance["steps"] == 3
    assert record.provenance["source"]["file"] == "model.safetensors"
    assert len(record.provenance["source"]["sha256"]) == 64


def test_a_training_checkpoint_converts_to_the_same_weights_as_its_artifact(
    artifact: Path, backbone: Weights, tmp_path: Path
) -> None:
    model = {f"query.trunk.{name}": value for name, value in backbone.items()}
    model |= {f"key.trunk.{name}": value + 1 for name, value in backbone.items()}
    model |= {"query.global_heads.res5.0.weight": torch.ones(2, 2), "queues.res5.keys": torch.ones(2, 4)}
    checkpoint = {
        "format": "detco-checkpoint",
        "schema": 1,
        "step": 3,
        "model": model,
        "transfer_parts": {"backbone": "query.trunk"},
        "preprocess": IMAGENET_RGB.as_dict(),
        "provenance": PROVENANCE,
    }
    torch.save(checkpoint, tmp_path / "step_3.pth")
    report = convert(tmp_path / "step_3.pth", tmp_path / "checkpoint.pkl")
    convert(artifact, tmp_path / "artifact.pkl")
    ours, theirs = read_pkl(tmp_path / "checkpoint.pkl"), read_pkl(tmp_path / "artifact.pkl")
    assert ours["model"].keys() == theirs["model"].keys()
    assert all(np.array_equal(ours["model"][name], array) for name, array in theirs["model"].items())
    assert ours["preprocess"] == theirs["preprocess"]
    assert {**ours["provenance"], "source": None} == {**theirs["provenance"], "source": None}
    assert report.source.network == "query"
    assert len(report.account.dropped) == 53 + 318 + 2


def test_a_moco_checkpoint_gives_its_query_network_and_accounts_for_the_rest(backbone: Weights, tmp_path: Path) -> None:
    key = {name: value + 1 for name, value in backbone.items()}
    report = convert(moco_checkpoint(tmp_path / "moco.pth.tar", backbone, key), tmp_path / "out.pkl")
    content = read_pkl(tmp_path / "out.pkl")
    np.testing.assert_array_equal(content["model"]["stem.conv1.weight"], backbone["conv1.weight"].numpy())
    assert content["provenance"]["source"]["network"] == "query"
    assert content["provenance"]["source"]["preprocess_is_recorded"] is False
    # Counters and head of the query network, the whole key network with its head, queue and pointer.
    assert len(report.account.dropped) == (53 + 3) + (318 + 3) + 2
    assert "network      query" in str(report)
    assert "321 the key network" in str(report)


def test_bfloat16_weights_become_float32(backbone: Weights, tmp_path: Path) -> None:
    torch.save({name: value.bfloat16() for name, value in backbone.items()}, tmp_path / "in.pth")
    convert(tmp_path / "in.pth", tmp_path / "out.pkl")
    array = read_pkl(tmp_path / "out.pkl")["model"]["res2.0.conv1.weight"]
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, backbone["layer1.0.conv1.weight"].bfloat16().float().numpy())


@pytest.mark.parametrize("key", ["layer1.0.conv4.weight", "layer1.0.se.fc1.weight", "foot.weight"])
def test_an_unexplained_key_stops_the_conversion_and_writes_nothing(
    backbone: Weights, tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(backbone | {key: torch.ones(2)}, tmp_path / "in.pth")
    assert main([str(tmp_path / "in.pth"), str(tmp_path / "out.pkl")]) == 2
    assert f"unexplained  1 backbone/{key}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


def test_an_unknown_network_beside_the_query_network_stops_the_conversion(backbone: Weights, tmp_path: Path) -> None:
    path = moco_checkpoint(tmp_path / "moco.pth.tar", backbone, backbone)
    content = torch.load(path, weights_only=True)
    content["state_dict"]["module.encoder_qq.weight"] = torch.ones(2)
    torch.save(content, path)
    with pytest.raises(ConversionError, match=r"unexplained  1 module\.encoder_qq\.weight"):
        convert(path, tmp_path / "out.pkl")


def test_a_part_without_naming_rules_stops_the_conversion(backbone: Weights, tmp_path: Path) -> None:
    parts = {"backbone": backbone, "mask_head": {"conv1.weight": torch.ones(2)}}
    write_artifact(tmp_path / "in.safetensors", Artifact(parts, IMAGENET_RGB, {}))
    with pytest.raises(ConversionError, match=r"unexplained  1 mask_head/conv1\.weight"):
        convert(tmp_path / "in.safetensors", tmp_path / "out.pkl")


def test_an_existing_output_is_replaced_only_by_force(artifact: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.pkl"
    output.write_bytes(b"precious")
    with pytest.raises(ConversionError, match="--force"):
        convert(artifact, output)
    assert output.read_bytes() == b"precious"
    convert(artifact, output, force=True)
    assert len(read_pkl(output)["model"]) == 265
    assert [path.name for path in tmp_path.iterdir()] == ["out.pkl"]


def test_the_input_is_never_overwritten(backbone: Weights, tmp_path: Path) -> None:
    torch.save(backbone, tmp_path / "in.pth")
    with pytest.raises(ConversionError, match="is the input itself"):
        convert(tmp_path / "in.pth", tmp_path / "in.pth", force=True)


def test_a_failed_write_leaves_the_old_output_and_no_partial_file(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError("the disk is full")

    output = tmp_path / "out.pkl"
    output.write_bytes(b"precious")
    monkeypatch.setattr(pickle, "dump", fail)
    assert main([str(artifact), str(output), "--force"]) == 1
    assert output.read_bytes() == b"precious"
    assert [path.name for path in tmp_path.iterdir()] == ["out.pkl"]


def test_a_link_in_the_place_of_the_partial_file_is_not_followed(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    link = tmp_path / f".out.{os.getpid()}.partial.pkl"
    link.symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError, match=link.name):
        convert(artifact, tmp_path / "out.pkl")
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert {path.name for path in tmp_path.iterdir()} == {"precious", link.name}


def test_a_link_that_leads_nowhere_is_replaced_only_by_force(artifact: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.pkl"
    output.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConversionError, match="--force"):
        convert(artifact, output)
    assert output.is_symlink()
    assert len(convert(artifact, output, force=True).account.converted) == 265


@pytest.mark.parametrize(
    ("name", "message"),
    [("out.npz", r"\.pkl or \.pth"), ("out", r"\.pkl or \.pth"), ("missing/out.pkl", "no folder")],
)
def test_an_unusable_output_is_refused(artifact: Path, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        convert(artifact, tmp_path / name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(backbone: Weights, tmp_path: Path, value: float) -> None:
    broken = backbone["layer2.0.conv1.weight"].clone()
    broken[0, 0] = value
    torch.save(backbone | {"layer2.0.conv1.weight": broken}, tmp_path / "in.pth")
    with pytest.raises(ConversionError, match=r"1 tensors hold NaN or infinite values: res3\.0\.conv1\.weight"):
        convert(tmp_path / "in.pth", tmp_path / "out.pkl")
    assert not (tmp_path / "out.pkl").exists()


def test_negative_running_variances_and_integer_weights_are_refused(backbone: Weights, tmp_path: Path) -> None:
    for value, message in ((-torch.ones(64), "variances are negative"), (torch.ones(64, dtype=torch.int8), "int8")):
        torch.save(backbone | {"bn1.running_var": value}, tmp_path / "in.pth")
        with pytest.raises(ConversionError, match=message):
            convert(tmp_path / "in.pth", tmp_path / "out.pkl")


def test_running_variances_of_zero_or_of_one_value_are_warned_of(backbone: Weights, tmp_path: Path) -> None:
    dead = backbone["layer1.0.bn1.running_var"].clone()
    dead[3] = 0
    untrained = {"bn1.running_var": torch.ones(64), "layer1.0.bn1.running_var": dead}
    torch.save(backbone | untrained, tmp_path / "in.pth")
    report = convert(tmp_path / "in.pth", tmp_path / "out.pkl")
    assert len(report.warnings) == 2
    assert report.warnings[0].startswith("1 of 53 running variances are the same for every channel")
    assert "stem.conv1.norm.running_var" in report.warnings[0]
    assert "res2.0.conv1.norm.running_var" in report.warnings[1]


def test_healthy_weights_are_not_warned_of(artifact: Path, tmp_path: Path) -> None:
    assert convert(artifact, tmp_path / "out.pkl").warnings == ()


def test_a_missing_input_and_a_file_that_needs_code_exit_with_code_2_and_the_reason(
    weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "absent.pth"), str(tmp_path / "out.pkl")]) == 2
    assert "error: there is no file" in capsys.readouterr().err
    torch.save({"model": weights, "opt": Preprocess}, tmp_path / "in.pth")
    assert main([str(tmp_path / "in.pth"), str(tmp_path / "out.pkl")]) == 2
    assert "needs detco.artifact.Preprocess" in capsys.readouterr().err


def test_weights_of_unusual_scale_are_warned_of(backbone: Weights, tmp_path: Path) -> None:
    torch.save(
        {name: value * 20 if value.dim() == 4 else value for name, value in backbone.items()}, tmp_path / "in.pth"
    )
    (warning,) = convert(tmp_path / "in.pth", tmp_path / "out.pkl").warnings
    assert "the kernels' scale is unusual" in warning


def test_the_command_prints_the_account(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(artifact), str(tmp_path / "out.pkl")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "converted    265" in lines
    assert "dropped      53 on purpose" in lines
    assert "unexplained  0" in lines
    assert "colliding    0" in lines


def test_verify_without_detectron2_fails_before_anything_is_written(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise d2.Detectron2Missing(d2.INSTALL_COMMAND)

    monkeypatch.delitem(__import__("sys").modules, "transfer.parity", raising=False)
    monkeypatch.setattr(d2, "require", missing)
    assert main([str(artifact), str(tmp_path / "out.pkl"), "--verify"]) == 1
    assert d2.INSTALL_COMMAND in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.d2
@needs_d2
@pytest.mark.parametrize("name", ["out.pkl", "out.pth"])
def test_detectron2_computes_the_same_features_bit_for_bit(
    artifact: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(artifact), str(tmp_path / name), "--verify"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("verify")]
    assert [line.endswith("difference to the source network 0") for line in lines] == [True] * 9


@pytest.mark.d2
@needs_d2
def test_a_wrong_stride_convention_is_noticed_and_nothing_is_written(
    backbone: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transfer.parity import measure_parity

    wrong = Preprocess("RGB", IMAGENET_RGB.mean_255, IMAGENET_RGB.std_255, stride_in_1x1=True)
    write_artifact(tmp_path / "in.safetensors", Artifact({"backbone": backbone}, wrong, {}))
    (tmp_path / "out.pkl").write_bytes(b"precious")
    assert main([str(tmp_path / "in.safetensors"), str(tmp_path / "out.pkl"), "--force", "--verify"]) == 1
    assert "do not compute the same" in capsys.readouterr().err
    assert (tmp_path / "out.pkl").read_bytes() == b"precious"
    assert {path.name for path in tmp_path.iterdir()} == {"in.safetensors", "out.pkl"}
    convert(tmp_path / "in.safetensors", tmp_path / "out.pkl", force=True)
    tensors = {f"backbone/{name}": value for name, value in backbone.items()}
    differences = measure_parity(tmp_path / "out.pkl", tensors, wrong).differences
    assert differences["backbone.res2"] == 0
    assert min(differences[f"backbone.{stage}"] for stage in ("res3", "res4", "res5")) > 1e-3


@pytest.mark.d2
@needs_d2
def test_verify_notices_a_file_of_another_network(artifact: Path, tmp_path: Path) -> None:
    from transfer.parity import measure_parity

    convert(artifact, tmp_path / "out.pkl")
    other = {f"backbone/{name}": value for name, value in random_resnet50(1).items()}
    assert min(measure_parity(tmp_path / "out.pkl", other, IMAGENET_RGB).differences.values()) > 1e-3


STAGES, LEVELS = ["res2", "res3", "res4", "res5"], ["p2", "p3", "p4", "p5"]
# Overrides of Detectron2's defaults, which are those of a C4 detector; and what is not in a ResNet-50.
DETECTORS: dict[str, tuple[list[Any], tuple[str, ...]]] = {
    "c4": ([], ("proposal_generator.", "roi_heads.box_predictor.")),
    "fpn": (
        [
            *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.OUT_FEATURES", STAGES),
            *("MODEL.FPN.IN_FEATURES", STAGES, "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]]),
            *("MODEL.RPN.IN_FEATURES", [*LEVELS, "p6"], "MODEL.ROI_HEADS.IN_FEATURES", LEVELS),
            *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
            *("MODEL.ROI_BOX_HEAD.NUM_FC", 2, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7),
        ],
        ("backbone.fpn_", "proposal_generator.", "roi_heads.box_"),
    ),
    "retinanet": (
        [
            *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
            *("MODEL.RESNETS.OUT_FEATURES", STAGES[1:], "MODEL.FPN.IN_FEATURES", STAGES[1:]),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]]),
        ],
        ("backbone.fpn_", "backbone.top_block.", "head."),
    ),
}
UNTOUCHED = -77.0


@pytest.mark.d2
@needs_d2
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("detector", list(DETECTORS))
def test_whole_detectors_find_every_backbone_tensor(artifact: Path, tmp_path: Path, suffix: str, detector: str) -> None:
    d2.require()
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    output = tmp_path / f"out{suffix}"
    convert(artifact, output)
    overrides, not_in_a_resnet = DETECTORS[detector]
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.RESNETS.STRIDE_IN_1X1", False, *overrides])
    model = build_model(cfg)
    ours = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith(("pixel_", "anchor_generator.", "proposal_generator.anchor_generator."))
    }
    for value in ours.values():
        value.fill_(UNTOUCHED)
    DetectionCheckpointer(model).load(str(output))
    untouched = {name for name, value in ours.items() if bool((value == UNTOUCHED).all())}
    assert [name for name in untouched if not name.startswith(not_in_a_resnet)] == []
    assert len(ours) - len(untouched) == 265
