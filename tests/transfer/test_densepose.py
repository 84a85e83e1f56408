"""DensePose: the config and the messages everywhere; data, training and evaluation where its project is installed.

The four geometry files are made up here (600 vertices, 25 to each part), because the real ones come from the network.
"""

import dataclasses
import importlib
import json
import math
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from transfer import d2, densepose, train_net
from transfer.tasks import (
    CONFIGS,
    config_file,
    departures,
    load_init_values,
    load_tasks,
    pairs,
    published_values,
    show,
)

if d2.info() is None:
    pytest.skip("needs Detectron2 (python tools/install_detectron2.py)", allow_module_level=True)

from detectron2.config import get_cfg
from detectron2.structures import Boxes, Instances

from transfer.config import add_transfer_config, load_config

pytestmark = pytest.mark.d2

ROOT = Path(__file__).parents[2]
TASK = load_tasks()["coco_densepose_fpn_s1x"]
MINIVAL = "densepose_coco_2014_minival"
GRID = 5
TINY = {
    "SOLVER.MAX_ITER": 2,
    "SOLVER.STEPS": (1,),
    "SOLVER.WARMUP_ITERS": 1,
    "SOLVER.BASE_LR": 1e-4,
    "INPUT.MIN_SIZE_TRAIN": (96,),
    "INPUT.MAX_SIZE_TRAIN": 128,
    "INPUT.MIN_SIZE_TEST": 96,
    "INPUT.MAX_SIZE_TEST": 128,
    "TEST.PRECISE_BN.NUM_ITER": 1,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 8,
    "MODEL.ROI_DENSEPOSE_HEAD.CONV_HEAD_DIM": 64,
}
installed = pytest.mark.skipif(
    not densepose.is_installed(), reason="needs the DensePose project of Detectron2 (see transfer/densepose.py)"
)


# What needs no DensePose.


@pytest.mark.parametrize("init", load_init_values())
def test_the_files_of_the_config_hold_the_published_values(init: str) -> None:
    cfg = get_cfg()
    add_transfer_config(cfg)
    cfg.set_new_allowed(True)  # the project's keys are unknown where it is not installed
    cfg.merge_from_file(str(config_file(TASK, init)), allow_unsafe=False)
    published = published_values(TASK, init)
    assert departures(published, cfg, TASK.accepts) == []
    assert sum("DENSEPOSE" in key for key in published) == 11
    assert TASK.name == cfg.TRANSFER.TASK
    assert cfg.TRANSFER.MAPPER == densepose.MAPPER


def test_the_message_without_the_project_names_what_is_absent_and_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(densepose, "PACKAGES", ("numpy", "no_such_package"))
    with pytest.raises(ValueError, match="no_such_package cannot be imported") as refused:
        load_config(config_file(TASK, "random"))
    assert densepose.how_to_install() in str(refused.value)
    assert "numpy" not in str(refused.value)


def test_a_project_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "densepose.py").write_text("from detectron2.structures import moved_elsewhere\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "densepose"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(densepose, "PACKAGES", ("densepose",))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"moved_elsewhere.*of one version"):
        load_config(config_file(TASK, "random"))


@pytest.mark.parametrize(
    ("version", "commit", "expected"),
    [
        ("0.5", None, "--branch v0.5"),
        ("0.6", None, f"@{densepose.TESTED_COMMIT}#subdirectory="),
        ("0.6", "abc123", "@abc123#subdirectory="),
    ],
)
def test_the_version_to_install_is_that_of_detectron2(
    version: str, commit: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dataclasses.replace(d2.require(), version=version, commit=commit)
    monkeypatch.setattr(d2, "require", lambda: found)
    assert expected in densepose.how_to_install()


def test_geometry_that_cannot_be_fetched_is_named_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(densepose, "GEOMETRY_URL", "http://127.0.0.1:9/body/data/")
    with pytest.raises(FileNotFoundError, match="UV_symmetry_transforms") as refused:
        densepose.fetch_geometry()
    assert str(tmp_path / "body/data") in str(refused.value)
    (note,) = densepose.check_geometry()
    assert all(name in note for name in densepose.GEOMETRY)


def test_geometry_in_the_cache_is_found_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(densepose, "GEOMETRY_URL", "http://127.0.0.1:9/other/data/")
    for name in densepose.GEOMETRY:
        path = densepose.geometry_folder() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    assert densepose.check_geometry() == []
    assert [Path(path).read_text() for path in densepose.fetch_geometry()] == list(densepose.GEOMETRY)


def test_nothing_to_measure_is_not_minus_one() -> None:
    class Says:
        def evaluate(self) -> dict[str, dict[str, float]]:
            return {"densepose_gps": {"AP": -1.0, "APm": -100.0, "AP50": 12.5, "AP75": 0.0}}

    metrics = densepose.BoxesAndPoints([Says()]).evaluate()["densepose_gps"]
    assert all(map(math.isnan, (metrics["AP"], metrics["APm"])))
    assert (metrics["AP50"], metrics["AP75"]) == (12.5, 0.0)


# The drawn data.


@pytest.fixture(scope="module")
def drawing(load_tool: Any) -> Iterator[ModuleType]:
    pytest.importorskip("pycocotools")
    sys.path.insert(0, str(ROOT / "tools"))
    yield load_tool("demo_densepose")
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory, drawing: ModuleType) -> Path:
    root = tmp_path_factory.mktemp("densepose")
    assert all(path.is_file() for path in drawing.write_densepose(root, seed=0))
    return root


def read(datasets: Path, name: str) -> Any:
    return json.loads((datasets / f"coco/annotations/densepose_{name}2014.json").read_text())


def labelled(datasets: Path, name: str) -> list[dict[str, Any]]:
    return [person for person in read(datasets, name)["annotations"] if "dp_x" in person]


@pytest.mark.parametrize("name", ["train", "valminusminival", "minival"])
def test_drawn_people_have_the_real_keys_in_the_real_ranges(datasets: Path, name: str) -> None:
    from pycocotools import mask as run_lengths

    content, people = read(datasets, name), labelled(datasets, name)
    assert people
    folder = datasets / ("coco/train2014" if name == "train" else "coco/val2014")
    assert all((folder / image["file_name"]).is_file() for image in content["images"])
    assert {person["image_id"] for person in people} <= {image["id"] for image in content["images"]}
    for person in people:
        points = np.array([person[f"dp_{key}"] for key in "xyIUV"])
        low, high = points.min(axis=1), points.max(axis=1)
        assert (low >= [0, 0, 1, 0, 0]).all()
        assert (high <= [256, 256, 24, 1, 1]).all()
        assert len(person["dp_masks"]) == 14
        masks = [run_lengths.decode(mask) if mask else np.zeros((256, 256)) for mask in person["dp_masks"]]
        assert max(np.sum(masks, axis=0).ravel()) == 1  # no place belongs to two parts
        # Torso (two of the 24 parts) and head are the first and the last of the 14 masks.
        for number, parts in ((0, (1, 2)), (13, (23, 24))):
            at = masks[number][points[1].astype(int), points[0].astype(int)]
            assert (at == np.isin(points[2], parts)).all()


def test_masks_lie_where_the_person_is(datasets: Path) -> None:
    from pycocotools import mask as run_lengths

    images = {image["id"]: image for image in read(datasets, "train")["images"]}
    for person in labelled(datasets, "train"):
        image = images[person["image_id"]]
        outline = run_lengths.frPyObjects(person["segmentation"], image["height"], image["width"])
        seen = run_lengths.decode(run_lengths.merge(outline))
        left, top, width, height = person["bbox"]
        places = (np.arange(256) + 0.5) / 256
        rows, columns = (top + places * height).astype(int), (left + places * width).astype(int)
        expected = seen[rows.clip(0, image["height"] - 1)][:, columns.clip(0, image["width"] - 1)] > 0
        found = np.max([run_lengths.decode(mask) for mask in person["dp_masks"] if mask], axis=0) > 0
        assert (expected & found).sum() > 0.93 * (expected | found).sum()


def test_the_body_is_its_own_mirror_image(drawing: ModuleType) -> None:
    # From 3 on the parts come in pairs, right and left or left and right: 3 and 4, 5 and 6, ...
    partner = {1: 1, 2: 2, **{part: part + 1 if part % 2 else part - 1 for part in range(3, 25)}}
    for row in drawing.ROWS:
        assert tuple(partner[part] for part in reversed(row)) == row
    for parts in (drawing.ROWS, drawing.BODY_PARTS):
        assert sorted(part for group in parts for part in group) == list(range(1, 25))


def test_the_shares_of_the_validation_images_are_disjoint(datasets: Path) -> None:
    images = [{image["id"] for image in read(datasets, name)["images"]} for name in ("minival", "valminusminival")]
    assert images[0]
    assert images[1]
    assert not images[0] & images[1]


def test_some_person_has_no_points(datasets: Path) -> None:
    people = read(datasets, "train")["annotations"]
    assert 0 < len(labelled(datasets, "train")) < len(people)


# What the project does with the data.


@pytest.fixture(scope="module")
def geometry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A made-up body in $FVCORE_CACHE: on each part a grid of 5 x 5 vertices, whose charts mirror U."""
    scipy_io = pytest.importorskip("scipy.io")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FVCORE_CACHE", str(tmp_path_factory.mktemp("geometry")))
        folder = densepose.geometry_folder()
        folder.mkdir(parents=True)
        v, u = np.mgrid[0:256, 0:256] / 255
        charts: dict[str, Any] = {name: np.empty((1, 24), dtype=object) for name in ("U_transforms", "V_transforms")}
        for part in range(24):
            charts["U_transforms"][0, part], charts["V_transforms"][0, part] = 1 - u, v
        scipy_io.savemat(folder / "UV_symmetry_transforms.mat", charts)
        part, down, across = (grid.ravel() for grid in np.mgrid[1:25, 0:GRID, 0:GRID])
        places = {"U_subdiv": across / (GRID - 1), "V_subdiv": down / (GRID - 1), "Part_ID_subdiv": part}
        scipy_io.savemat(folder / "SMPL_subdiv.mat", {name: values[:, None] for name, values in places.items()})
        # Of 16 bits, as Matlab stores numbers of this size.
        index = np.arange(1, part.size + 1, dtype=np.uint16)
        scipy_io.savemat(folder / "SMPL_SUBDIV_TRANSFORM.mat", {"index": index[:, None]})
        distances = [[distance(i, j)] for i in range(part.size) for j in range(i)]
        (folder / "Pdist_matrix.pkl").write_bytes(pickle.dumps({"Pdist_matrix": np.array(distances, np.float32)}))
        yield folder


def distance(first: int, second: int) -> float:
    """Metres between two vertices: 4 cm per step of the grid, 2 m to another part."""
    (part, row, column), (other, other_row, other_column) = (
        (number // GRID**2, number // GRID % GRID, number % GRID) for number in (first, second)
    )
    return 0.04 * math.hypot(row - other_row, column - other_column) if part == other else 2.0


@pytest.fixture(scope="module")
def ready(datasets: Path, geometry: Path) -> Any:
    """The config, with its datasets registered."""
    cfg = load_config(config_file(TASK, "random"), ["DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu"])
    densepose.register_datasets(datasets)
    assert len(densepose.fetch_geometry()) == 4
    return cfg


def perfect(person: dict[str, Any], side: int = 112) -> dict[str, torch.Tensor]:
    """What a network would say that knows a person: each place is like the nearest labelled point (of each part)."""
    from pycocotools import mask as run_lengths

    places = (np.arange(side) + 0.5) * 256 / side
    xs, ys = np.meshgrid(places, places)
    away = np.hypot(xs[..., None] - person["dp_x"], ys[..., None] - person["dp_y"])
    masks = [run_lengths.decode(mask) for mask in person["dp_masks"] if mask]
    inside = np.max(masks, axis=0)[ys.astype(int), xs.astype(int)] > 0
    parts = np.array(person["dp_I"])
    coarse = np.stack([~inside, inside] + [np.zeros_like(inside)] * 13)
    fine = parts[away.argmin(axis=-1)] == np.arange(25)[:, None, None]
    nearest = np.stack([np.where(parts == part, away, 1e9).argmin(axis=-1) for part in range(25)])
    charts = [np.array(person[key])[nearest] for key in ("dp_U", "dp_V")]
    named = zip(("coarse_segm", "fine_segm", "u", "v"), (coarse, fine, *charts), strict=True)
    return {name: torch.tensor(values, dtype=torch.float32)[None] for name, values in named}


def evaluate(cfg: Any, datasets: Path, folder: Path, changed: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Evaluate the ground truth of minival as if it were a network's, with some of each person's keys `changed`."""
    output = importlib.import_module("densepose.structures").DensePoseChartPredictorOutput
    densepose.build_test_loader(cfg, MINIVAL)
    evaluator = densepose.build_evaluator(cfg, MINIVAL, str(folder))
    evaluator.reset()
    content = read(datasets, "minival")
    for image in content["images"]:
        people = [item for item in labelled(datasets, "minival") if item["image_id"] == image["id"]]
        if not people:
            continue
        found = Instances((image["height"], image["width"]))
        boxes = torch.tensor([person["bbox"] for person in people])
        found.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))
        found.scores = torch.ones(len(people))
        found.pred_classes = torch.zeros(len(people), dtype=torch.int64)
        said = [
            perfect({**person, **{key: change(person[key]) for key, change in changed.items()}}) for person in people
        ]
        found.pred_densepose = output(**{name: torch.cat([item[name] for item in said]) for name in said[0]})
        evaluator.process([{"image_id": image["id"]}], [{"instances": found}])
    results: dict[str, dict[str, float]] = evaluator.evaluate()
    return results


@installed
def test_the_ground_truth_is_a_perfect_prediction(ready: Any, datasets: Path, tmp_path: Path) -> None:
    results = evaluate(ready, datasets, tmp_path, {})
    assert results["bbox"]["AP"] == pytest.approx(100)
    for metric in ("AP", "AP50", "AP75"):
        assert results["densepose_gps"][metric] > 95
    assert results["densepose_gpsm"]["AP50"] > 95


@installed
def test_wrong_parts_and_wrong_charts_are_measured_as_such(ready: Any, datasets: Path, tmp_path: Path) -> None:
    right = evaluate(ready, datasets, tmp_path, {})["densepose_gps"]["AP"]
    mirrored = {"dp_U": lambda values: [1 - value for value in values]}
    partners = {"dp_I": lambda values: [value % 24 + 1 for value in values]}
    charts, parts = (evaluate(ready, datasets, tmp_path, changed) for changed in (mirrored, partners))
    assert 0 < charts["densepose_gps"]["AP"] < right - 10
    assert parts["densepose_gps"]["AP"] == 0
    assert parts["bbox"]["AP"] == pytest.approx(100)


@installed
def test_distances_are_those_of_the_geometry_file_with_integers_of_16_bits(ready: Any, tmp_path: Path) -> None:
    densepose.build_test_loader(ready, MINIVAL)
    densepose.build_evaluator(ready, MINIVAL, str(tmp_path))
    evaluation = importlib.import_module("densepose.evaluation.evaluator").DensePoseCocoEval()
    evaluation._loadGEval()
    numbers = np.random.default_rng(0).integers(1, 24 * GRID**2 + 1, size=(2, 50)).astype(np.uint16)
    numbers[1, ::2] = (numbers[0, ::2] - 1) // GRID**2 * GRID**2 + 7  # half of them on the same part
    expected = [distance(int(first) - 1, int(second) - 1) for first, second in numbers.T]
    assert evaluation.PDIST_transform.dtype == np.uint16
    assert evaluation.getDistancesUV(*numbers) == pytest.approx(expected)


@installed
def test_a_training_sample_holds_the_points_of_the_labelled_people(ready: Any, datasets: Path) -> None:
    seen = [sample["instances"] for sample in next(iter(densepose.build_train_loader(ready)))]
    assert len(seen) == 16
    people = labelled(datasets, "train") + labelled(datasets, "valminusminival")
    numbers = {len(person["dp_x"]) for person in people}
    found = [item for instances in seen for item in instances.gt_densepose.densepose_datas if item is not None]
    assert found
    assert {len(item.x) for item in found} <= numbers


@installed
def test_it_trains_and_evaluates_as_a_user_runs_it(datasets: Path, geometry: Path, tmp_path: Path) -> None:
    densepose.register_datasets(tmp_path / "elsewhere")  # where an earlier run may have had them
    assert train_net.main(command(datasets, tmp_path / "run")) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert (results["task"], results["recipe"]) == (TASK.id, "densepose_legacy")
    assert {"box_AP", "dp_AP", "dp_AP50", "dp_AP75"} <= set(results["metrics"])
    assert "loss_densepose_U" in (tmp_path / "run/metrics.json").read_text()


@installed
def test_a_run_without_geometry_is_refused_before_it_trains(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(densepose, "GEOMETRY_URL", "http://127.0.0.1:9/absent/data/")
    assert train_net.main(command(datasets, tmp_path / "run")) == 2
    assert str(tmp_path / "cache/absent/data") in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def command(datasets: Path, folder: Path) -> list[str]:
    """Arguments of detco-transfer for two iterations."""
    quick = yaml.safe_load((CONFIGS / "quick" / "cpu.yaml").read_text())
    words = [word for key, value in {**dict(pairs(quick)), **TINY}.items() for word in (key, show(value))]
    arguments = ["--config-file", str(config_file(TASK, "random")), "--num-gpus", "0"]
    return [*arguments, "--datasets-root", str(datasets), "--output-dir", str(folder), *words]
