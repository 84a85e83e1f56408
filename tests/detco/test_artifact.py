import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from detco.artifact import (
    IMAGENET_RGB,
    Artifact,
    ArtifactError,
    Preprocess,
    open_atomically,
    read_artifact,
    write_artifact,
)

PARTS = {
    "backbone": {"conv1.weight": torch.randn(4, 3, 2, 2), "bn1.num_batches_tracked": torch.tensor(7)},
    "fpn": {"lateral.weight": torch.randn(2, 2).bfloat16()},
}
PROVENANCE = {"method": "toy", "steps": 12, "dataset": {"root": "photos", "images": 24}}
HEADER = {
    "format": "detco-artifact",
    "schema": "1",
    "preprocess": json.dumps(IMAGENET_RGB.as_dict()),
    "provenance": "{}",
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write_artifact(path, Artifact(PARTS, IMAGENET_RGB, PROVENANCE))
    return path


def save_raw(folder: Path, header: Mapping[str, str] | None, name: str = "backbone/conv1.weight") -> Path:
    path = folder / "raw.safetensors"
    save_file({name: torch.ones(2)}, path, metadata=dict(header) if header is not None else None)
    return path


def test_reading_gives_back_what_was_written(written: Path) -> None:
    artifact = read_artifact(written)
    assert artifact.preprocess == IMAGENET_RGB
    assert artifact.provenance == PROVENANCE
    assert {role: set(part) for role, part in artifact.parts.items()} == {r: set(p) for r, p in PARTS.items()}
    for role, part in PARTS.items():
        for name, tensor in part.items():
            assert artifact.parts[role][name].dtype == tensor.dtype
            assert torch.equal(artifact.parts[role][name], tensor)


def test_views_of_one_buffer_and_parameters_with_gradients_are_written_by_value(tmp_path: Path) -> None:
    buffer = torch.arange(6.0)
    part = {"a": buffer[:3], "b": buffer[2:], "c": buffer.view(2, 3).t(), "d": torch.nn.Parameter(buffer)}
    write_artifact(tmp_path / "model.safetensors", Artifact({"backbone": part}, IMAGENET_RGB, {}))
    read = read_artifact(tmp_path / "model.safetensors").parts["backbone"]
    assert all(torch.equal(read[name], value) for name, value in part.items())


def test_writing_replaces_an_old_file_and_leaves_no_other(written: Path) -> None:
    write_artifact(written, Artifact(PARTS, IMAGENET_RGB, {"steps": 99}))
    assert read_artifact(written).provenance == {"steps": 99}
    assert list(written.parent.iterdir()) == [written]


@pytest.mark.parametrize(
    ("parts", "provenance", "message"),
    [
        ({}, {}, "at least one part"),
        ({"backbone": {}}, {}, "0 tensors"),
        ({"back/bone": PARTS["fpn"]}, {}, "without '/'"),
        ({"": PARTS["fpn"]}, {}, "needs a name"),
        (PARTS, {"when": object()}, "JSON"),
        (PARTS, {"loss": float("nan")}, "JSON"),
    ],
)
def test_an_invalid_artifact_is_refused_and_the_old_file_kept(
    written: Path, parts: Any, provenance: Any, message: str
) -> None:
    before = written.read_bytes()
    with pytest.raises(ArtifactError, match=message):
        write_artifact(written, Artifact(parts, IMAGENET_RGB, provenance))
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]


def test_an_interrupted_write_keeps_the_old_file_and_removes_the_partial_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with open_atomically(path) as file:
            file.write(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.safetensors"):
        read_artifact(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(written: Path, kept: int) -> None:
    written.write_bytes(written.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match="not a complete safetensors file"):
        read_artifact(written)


def test_a_torch_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "model.pth")
    with pytest.raises(ArtifactError, match="not a complete safetensors file"):
        read_artifact(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "not an artifact of detco-pretrain: its header says format=None"),
        (HEADER | {"format": "pt"}, "format='pt'"),
        (HEADER | {"schema": "2"}, "schema '2'; only '1' is known"),
        ({key: value for key, value in HEADER.items() if key != "preprocess"}, "no 'preprocess'"),
        ({key: value for key, value in HEADER.items() if key != "provenance"}, "no 'provenance'"),
        (HEADER | {"provenance": "{"}, "'provenance' in the header is not JSON"),
        (HEADER | {"provenance": "[]"}, "'provenance' in the header is not a JSON object"),
        (HEADER | {"preprocess": "{}"}, "preprocess must hold exactly"),
    ],
)
def test_a_safetensors_file_with_a_wrong_header_is_refused(
    tmp_path: Path, header: dict[str, str] | None, message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        read_artifact(save_raw(tmp_path, header))


@pytest.mark.parametrize("name", ["conv1.weight", "/conv1.weight", "backbone/"])
def test_a_tensor_without_role_or_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="not named 'role/name'"):
        read_artifact(save_raw(tmp_path, HEADER, name))


def test_a_file_without_parts_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors", metadata=HEADER)
    with pytest.raises(ArtifactError, match="holds no parts"):
        read_artifact(tmp_path / "empty.safetensors")


def test_the_preprocess_record_survives_json() -> None:
    assert Preprocess.from_dict(json.loads(json.dumps(IMAGENET_RGB.as_dict()))) == IMAGENET_RGB


def test_the_imagenet_record_is_torchvisions_times_255() -> None:
    assert IMAGENET_RGB.mean_255 == pytest.approx([value * 255 for value in (0.485, 0.456, 0.406)])
    assert IMAGENET_RGB.std_255 == pytest.approx([value * 255 for value in (0.229, 0.224, 0.225)])
    assert IMAGENET_RGB.channel_order == "RGB"
    assert IMAGENET_RGB.stride_in_1x1 is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channel_order": "GRB"}, "channel_order is 'GRB'"),
        ({"mean_255": [1, 2]}, "mean_255 is .* three"),
        ({"mean_255": ["a", 2, 3]}, "mean_255 is .* three"),
        ({"mean_255": 3}, "mean_255 is 3"),
        ({"std_255": [1, 0, 1]}, "std_255 is .* positive"),
        ({"std_255": [1, float("inf"), 1]}, "std_255 is .* finite"),
        ({"stride_in_1x1": 0}, "stride_in_1x1 is 0"),
        ({"gamma": 2.2}, "exactly"),
    ],
)
def test_an_invalid_preprocess_record_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Preprocess.from_dict(IMAGENET_RGB.as_dict() | change)
