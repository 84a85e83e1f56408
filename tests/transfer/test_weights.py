import argparse
import hashlib
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detco.artifact import IMAGENET_RGB, ArtifactError
from transfer.safe_read import UnsafeFileError, load_pickle
from transfer.weights import WeightsRecord, read_record

RECORD = {"preprocess": IMAGENET_RGB.as_dict(), "provenance": {"method": "toy", "source": {"network": "query"}}}


class Hostile:
    """Makes the folder `witness` when a careless reader unpickles it."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.witness),)  # Pickled as one global, posix.mkdir.


def save(path: Path, record: dict[str, Any]) -> Path:
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps({"model": {"a": np.ones(2, np.float32)}, **record}))
    else:
        torch.save({"model": {"a": torch.ones(2)}, **record}, path)
    return path


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("query", ["", "?matching_heuristics=True"])
def test_a_converted_file_gives_its_record_and_digest(tmp_path: Path, suffix: str, query: str) -> None:
    path = save(tmp_path / f"out{suffix}", RECORD)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_record(f"{path}{query}") == WeightsRecord(str(path), digest, IMAGENET_RGB, RECORD["provenance"])


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_a_file_without_a_record_has_a_digest_only(tmp_path: Path, suffix: str) -> None:
    record = read_record(str(save(tmp_path / f"out{suffix}", {})))
    assert (record.preprocess, record.provenance) == (None, {})
    assert record.sha256 is not None


def test_random_initialisation_has_an_empty_record() -> None:
    assert read_record("") == WeightsRecord("", None, None, {})


def test_the_model_zoos_msra_weights_are_bgr_with_stride_in_the_1x1() -> None:
    record = read_record("detectron2://ImageNetPretrained/MSRA/R-50.pkl")
    assert record.sha256 is None
    assert record.preprocess is not None
    assert record.preprocess.as_dict() == {
        "channel_order": "BGR",
        "mean_255": [103.53, 116.28, 123.675],
        "std_255": [1.0, 1.0, 1.0],
        "stride_in_1x1": True,
    }


def test_the_model_zoos_torchvision_weights_are_rgb_with_stride_in_the_3x3() -> None:
    url = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
    assert read_record(f"{url}?matching_heuristics=True") == WeightsRecord(url, None, IMAGENET_RGB, {})


def test_nothing_is_known_of_another_url() -> None:
    url = "https://example.org/R-50.pkl"
    assert read_record(url) == WeightsRecord(url, None, None, {})


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_a_hostile_file_is_named_and_not_executed(tmp_path: Path, suffix: str) -> None:
    witness = tmp_path / "witness"
    path = save(tmp_path / f"out{suffix}", RECORD | {"__author__": Hostile(witness)})
    with pytest.raises(UnsafeFileError, match=r"needs posix\.mkdir"):
        read_record(str(path))
    assert not witness.exists()
    if suffix == ".pkl":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert witness.exists(), "the file was not hostile, so the test shows nothing"


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"out{suffix}", RECORD)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UnsafeFileError, match=r"not a complete pickle file|damaged"):
        read_record(str(path))


def test_a_missing_file_an_artifact_and_a_list_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"MODEL\.WEIGHTS is 'absent\.pkl'"):
        read_record("absent.pkl")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"convert-to-d2 .*model\.safetensors OUT\.pkl"):
        read_record(str(tmp_path / "model.safetensors"))
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match="holds a list"):
        read_record(str(tmp_path / "list.pkl"))


def test_a_checkpoint_of_another_project_is_sent_to_the_converter(tmp_path: Path) -> None:
    path = save(tmp_path / "soco.pth", {"opt": argparse.Namespace(lr=0.1)})
    with pytest.raises(ValueError, match=r"settings \(opt\).*convert-to-d2 .*soco\.pth OUT\.pkl"):
        read_record(str(path))


def test_an_invalid_record_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "out.pkl", {"preprocess": {"channel_order": "RGB"}})
    with pytest.raises(ArtifactError, match="preprocess must hold exactly"):
        read_record(str(path))


@pytest.mark.parametrize("provenance", [3, None, ["method"], "toy"])
def test_a_provenance_that_is_no_dict_is_refused(tmp_path: Path, provenance: object) -> None:
    path = save(tmp_path / "out.pth", {"provenance": provenance})
    with pytest.raises(ValueError, match=f"provenance is of type {type(provenance).__name__}, not a dict"):
        read_record(str(path))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_scalars_and_builtin_containers_are_read_from_every_protocol(tmp_path: Path, protocol: int) -> None:
    content = OrderedDict(a=np.arange(6.0).reshape(2, 3), b=np.float32(2.5), c=[1, "x", None, (True, b"y")])
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    read = load_pickle(tmp_path / "file.pkl")
    np.testing.assert_array_equal(read["a"], content["a"])
    assert read["b"] == 2.5
    assert read["c"] == content["c"]


def test_arrays_written_by_numpy_1_are_read(tmp_path: Path) -> None:
    new = pickle.dumps({"a": np.arange(3.0)}, protocol=2)
    (tmp_path / "file.pkl").write_bytes(new.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))
    np.testing.assert_array_equal(load_pickle(tmp_path / "file.pkl")["a"], [0.0, 1.0, 2.0])


@pytest.mark.parametrize("function", [eval, getattr, print, np.load, np.frombuffer])
def test_a_function_of_builtins_or_numpy_is_refused_by_name(tmp_path: Path, function: Callable[..., Any]) -> None:
    (tmp_path / "file.pkl").write_bytes(pickle.dumps({"a": function}))
    with pytest.raises(UnsafeFileError, match=f"needs .*{function.__name__}"):
        load_pickle(tmp_path / "file.pkl")
