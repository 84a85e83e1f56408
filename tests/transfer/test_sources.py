import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from detco.artifact import IMAGENET_RGB, Artifact, ArtifactError, Preprocess, write_artifact
from transfer.safe_read import UnsafeFileError
from transfer.sources import SourceError, read_source, resnet50_shapes
from transfer.sources.resnet50 import fits_pixels_from_0_to_1

Weights = dict[str, Tensor]


class Hostile:
    """Creates `witness` when a careless reader unpickles it."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.witness),)  # Pickled as one global, posix.mkdir.


@pytest.fixture(scope="module")
def weights() -> Weights:
    """Random numbers that differ between tensors only, so that files stay small."""
    with torch.device("meta"):
        names = models.resnet50(weights=None).state_dict()
    return {name: torch.rand(()).expand(value.shape) for name, value in names.items()}


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def save(folder: Path, content: Any, name: str = "in.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def our_checkpoint(weights: Weights) -> dict[str, Any]:
    return {
        "format": "detco-checkpoint",
        "schema": 1,
        "model": prefixed("query.trunk.", weights) | {"query.head.weight": torch.ones(2)},
        "transfer_parts": {"backbone": "query.trunk"},
        "preprocess": IMAGENET_RGB.as_dict(),
        "provenance": {"steps": 3},
    }


def test_the_shape_table_is_torchvisions_resnet50(weights: Weights) -> None:
    expected = {
        name: tuple(value.shape)
        for name, value in weights.items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    assert resnet50_shapes() == expected
    assert len(expected) == 265


@pytest.mark.parametrize("outer", ["state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.encoder."])
def test_a_state_dict_is_recognised_under_any_prefix(
    weights: Weights, tmp_path: Path, outer: str | None, prefix: str
) -> None:
    content = prefixed(prefix, weights)
    source = read_source(save(tmp_path, {outer: content, "epoch": 3} if outer else content))
    assert source.kind == "ResNet-50 state dict"
    assert source.network == "backbone"
    assert source.tensors.keys() == {f"backbone/{name}" for name in weights}
    assert torch.equal(source.tensors["backbone/conv1.weight"], weights["conv1.weight"])
    assert source.unexplained == ()
    assert source.preprocess == IMAGENET_RGB
    assert not source.preprocess_is_recorded


def test_the_query_network_goes_before_the_key_network_in_either_order(weights: Weights, tmp_path: Path) -> None:
    key = {name: value + 1 for name, value in weights.items()}
    query_state, key_state = prefixed("module.encoder_q.", weights), prefixed("module.encoder_k.", key)
    for state in (query_state | key_state, key_state | query_state):
        source = read_source(save(tmp_path, {"state_dict": state | {"module.queue": torch.ones(2)}}, "in.pth.tar"))
        assert (source.kind, source.network) == ("checkpoint of MoCo v1 or v2", "query")
        assert torch.equal(source.tensors["backbone/conv1.weight"], weights["conv1.weight"])
        assert source.left_out.keys() == {*key_state, "module.queue"}


def test_a_file_with_only_the_key_network_says_so(weights: Weights, tmp_path: Path) -> None:
    assert read_source(save(tmp_path, {"state_dict": prefixed("module.encoder_k.", weights)})).network == "key"


def test_two_networks_without_a_rule_between_them_are_refused(weights: Weights, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"2 ResNets, at 'student\.', 'teacher\.'"):
        read_source(save(tmp_path, prefixed("student.", weights) | prefixed("teacher.", weights)))


def test_what_lies_beside_a_network_without_a_known_reason_is_unexplained(weights: Weights, tmp_path: Path) -> None:
    beside = {name: torch.ones(2) for name in ("module.encoder_k.conv1.weight", "module.queue_ptrs", "queue")}
    source = read_source(save(tmp_path, {"state_dict": prefixed("module.encoder_q.", weights) | beside}))
    assert source.unexplained == ("module.queue_ptrs",)
    assert set(source.left_out) == {"module.encoder_k.conv1.weight", "queue"}


def replace_in(weights: Weights, name: str, *shape: int) -> Weights:
    return weights | {name: torch.ones(shape)}


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("resnet18", "no ResNet-50 under torchvision's names: it is another ResNet"),
        ("resnet34", "it is another ResNet"),
        ("resnet101", r"not a ResNet-50 .*layer3\.10 is a block too many"),
        ("wide_resnet50_2", r"layer1\.0\.conv1\.weight has shape \(128, 64, 1, 1\), not \(64, 64, 1, 1\)"),
        ("resnext50_32x4d", r"layer1\.0\.conv1\.weight has shape \(128, 64, 1, 1\)"),
        (
            "vgg11",
            r"no ResNet-50 under torchvision's names\. It holds\n  \(top level\): 22 tensors\n"
            r"  most frequent starts of the 22 names: features\.0 \(2\)",
        ),
    ],
)
def test_other_networks_are_refused_with_what_they_are(tmp_path: Path, network: str, message: str) -> None:
    with torch.device("meta"):
        state = models.get_model(network, weights=None).state_dict()
    zeros = {name: torch.zeros(()).expand(value.shape) for name, value in state.items()}
    with pytest.raises(SourceError, match=message):
        read_source(save(tmp_path, zeros))


def test_a_deep_stem_a_small_stem_and_a_missing_tensor_are_refused(weights: Weights, tmp_path: Path) -> None:
    without_stem = {name: value for name, value in weights.items() if name != "conv1.weight"}
    with pytest.raises(SourceError, match="ResNet-50-D"):
        read_source(save(tmp_path, replace_in(without_stem, "conv1.0.weight", 32, 3, 3, 3)))
    with pytest.raises(SourceError, match="stem that is not 64x3x7x7"):
        read_source(save(tmp_path, replace_in(weights, "conv1.weight", 64, 3, 3, 3)))
    without_norm = {name: value for name, value in weights.items() if name != "layer3.4.bn2.running_mean"}
    with pytest.raises(SourceError, match=r"layer3\.4\.bn2\.running_mean is missing"):
        read_source(save(tmp_path, without_norm))


def test_an_artifact_of_another_network_is_refused(tmp_path: Path) -> None:
    part = nn.Linear(2, 2).state_dict()
    write_artifact(tmp_path / "in.safetensors", Artifact({"backbone": part}, IMAGENET_RGB, {}))
    with pytest.raises(SourceError, match=r"not a ResNet-50 .*conv1\.weight is missing.*and 261 more"):
        read_source(tmp_path / "in.safetensors")


def test_a_part_of_detectron2s_resnet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"weights under Detectron2's names\) is not a ResNet-50.*bn1\.weight is missing"
    ):
        read_source(save(tmp_path, {"model": {"stem.conv1.weight": torch.ones(64, 3, 7, 7)}}))


def test_detectron2s_own_model_zoo_is_sent_to_model_weights(tmp_path: Path) -> None:
    (tmp_path / "in.pkl").write_bytes(pickle.dumps({"res2_0_branch2a_w": np.ones(2), "conv1_w": np.ones(2)}))
    with pytest.raises(SourceError, match=r"Caffe2's names.*MODEL\.WEIGHTS"):
        read_source(tmp_path / "in.pkl")


def test_a_file_without_tensors_is_refused_with_its_keys(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"nor any tensor\. It holds\n  \(top level\): 1 dict, 1 int\n  optimizer: empty"
    ):
        read_source(save(tmp_path, {"optimizer": {}, "epoch": 3}))
    with pytest.raises(SourceError, match="holds a list"):
        read_source(save(tmp_path, [torch.ones(2)]))


def test_our_checkpoint_gives_its_transfer_parts_and_record(weights: Weights, tmp_path: Path) -> None:
    bgr = Preprocess("BGR", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), stride_in_1x1=False)
    source = read_source(save(tmp_path, our_checkpoint(weights) | {"preprocess": bgr.as_dict()}))
    assert source.tensors.keys() == {f"backbone/{name}" for name in weights}
    assert set(source.left_out) == {"query.head.weight"}
    assert (source.network, source.preprocess, source.preprocess_is_recorded) == ("query", bgr, True)
    assert source.provenance == {"steps": 3}


def test_our_checkpoint_of_an_unknown_schema_or_with_missing_fields_is_refused(
    weights: Weights, tmp_path: Path
) -> None:
    checkpoint = our_checkpoint(weights)
    with pytest.raises(SourceError, match="schema 2; only 1 is known"):
        read_source(save(tmp_path, checkpoint | {"schema": 2}))
    for name in ("model", "transfer_parts", "preprocess", "provenance"):
        with pytest.raises(SourceError, match=f"without {name}"):
            read_source(save(tmp_path, {key: value for key, value in checkpoint.items() if key != name}))
    with pytest.raises(ArtifactError, match="channel_order"):
        read_source(save(tmp_path, checkpoint | {"preprocess": IMAGENET_RGB.as_dict() | {"channel_order": "X"}}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("transfer_parts", {"backbone": 3}, "transfer_parts are no names"),
        ("transfer_parts", {1: "query.trunk"}, "transfer_parts are no names"),
        ("model", {1: 2, "query.trunk.conv1.weight": 3}, r"conv1\.weight is missing"),
        ("schema", torch.ones(2), "schema of type Tensor; only 1 is known"),
        ("schema", [[1], [1]], "schema of type list; only 1 is known"),
    ],
)
def test_our_checkpoint_with_values_of_another_type_is_refused(
    weights: Weights, tmp_path: Path, name: str, value: object, message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        read_source(save(tmp_path, our_checkpoint(weights) | {name: value}))


def without_content(kind: str) -> Tensor:
    if kind == "sparse":
        return torch.ones(64).to_sparse()
    if kind == "meta":
        return torch.ones(64, device="meta")
    return torch.ones(1).expand(1_500_000_000)


@pytest.mark.parametrize("kind", ["sparse", "meta", "huge"])
@pytest.mark.parametrize("name", ["bn1.running_mean", "layer1.0.bn1.weight"])
def test_a_tensor_that_is_not_plain_or_of_a_huge_shape_is_refused(
    weights: Weights, tmp_path: Path, kind: str, name: str
) -> None:
    path = save(tmp_path, {"state_dict": weights | {name: without_content(kind)}})
    with pytest.raises(SourceError, match=f"{name} (is missing|has shape)"):
        read_source(path)


@pytest.mark.parametrize("name", ["conv1.weight", "bn1.running_mean"])
def test_the_stems_statistics_are_read_only_if_they_have_its_shapes(
    weights: Weights, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def count(tensor: Tensor) -> Tensor:
        raise AssertionError("its elements were looked at")

    stem = {"conv1.weight": weights["conv1.weight"], "bn1.running_mean": weights["bn1.running_mean"]}
    monkeypatch.setattr(Tensor, "isfinite", count)
    assert not fits_pixels_from_0_to_1(stem | {name: torch.ones(1).expand(1_500_000_000)})


def test_damaged_files_are_refused(weights: Weights, tmp_path: Path) -> None:
    path = save(tmp_path, {"state_dict": weights})
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"hello", b"<html>not found</html>"):
        path.write_bytes(content)
        with pytest.raises(UnsafeFileError, match="Copy or download it again"):
            read_source(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        read_source(tmp_path / "absent.pth")


def test_settings_beside_the_weights_are_read_without_their_class(weights: Weights, tmp_path: Path) -> None:
    path = save(tmp_path, {"model": weights, "opt": argparse.Namespace(lr=0.1)})
    assert len(read_source(path).tensors) == 320


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["in.pth", "in.pth.tar", "in.pkl"])
def test_a_hostile_torch_file_is_named_and_not_executed(
    weights: Weights, tmp_path: Path, name: str, zipped: bool
) -> None:
    witness = tmp_path / "witness"
    content = {"state_dict": {"a": torch.ones(2)}, "epoch": Hostile(witness)}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafeFileError, match=r"needs posix\.mkdir"):
        read_source(tmp_path / name)
    assert not witness.exists()
    torch.load(tmp_path / name, weights_only=False)
    assert witness.exists(), "the file was not hostile, so the test shows nothing"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["in.pth", "in.pth.tar", "in.pkl"])
def test_a_hostile_plain_pickle_is_not_executed(tmp_path: Path, name: str, protocol: int) -> None:
    witness = tmp_path / "witness"
    content = pickle.dumps({"model": Hostile(witness)}, protocol=protocol)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnsafeFileError, match=r"needs posix\.mkdir"):
        read_source(tmp_path / name)
    assert not witness.exists()
    pickle.loads(content)
    assert witness.exists(), "the file was not hostile, so the test shows nothing"


def test_a_hostile_file_with_the_suffix_of_an_artifact_is_not_executed(tmp_path: Path) -> None:
    torch.save(Hostile(tmp_path / "witness"), tmp_path / "in.safetensors")
    with pytest.raises(ArtifactError, match="not a complete safetensors file"):
        read_source(tmp_path / "in.safetensors")
    assert not (tmp_path / "witness").exists()
