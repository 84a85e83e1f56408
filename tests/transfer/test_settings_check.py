"""detco-transfer --check: mistakes that people make, each caught by name, and no alarm on any config of the suite."""

import importlib.util
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from detco.artifact import IMAGENET_RGB, Preprocess
from transfer import d2, train_net

if d2.info() is None:
    pytest.skip("needs Detectron2 (python tools/install_detectron2.py)", allow_module_level=True)

from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.data import DatasetCatalog, MetadataCatalog

from transfer import densepose
from transfer.checks.weights import backbone_names, missing_names, resnet50_names
from transfer.config import load_config
from transfer.datasets import register_datasets
from transfer.modeling import check_model_available
from transfer.naming import account_for
from transfer.settings_check import Prepared, SettingsError, examine, prepare
from transfer.sources.parts import box_head_shapes, fpn_shapes
from transfer.subsets import register_subsets
from transfer.tasks import load_tasks

pytestmark = pytest.mark.d2

CONFIGS = Path(__file__).parents[2] / "configs" / "transfer"
NOT_RUNS = ("base", "init", "quick")
SHIPPED = sorted(path for path in CONFIGS.glob("*/*.yaml") if path.parent.name not in NOT_RUNS)
QUICK = sorted([*CONFIGS.glob("quick/*_converted.yaml"), *CONFIGS.glob("quick/*_random.yaml")])

VOC = "voc/faster_rcnn_r50_c4_24k"
MASK_FPN = "coco/mask_rcnn_r50_fpn_1x"
LVIS = "lvis/mask_rcnn_r50_fpn_4conv1fc_1x"

SIMCLR = Preprocess("RGB", (0.0, 0.0, 0.0), (255.0, 255.0, 255.0), stride_in_1x1=False)
MSRA = Preprocess("BGR", (103.530, 116.280, 123.675), (1.0, 1.0, 1.0), stride_in_1x1=True)


def tensors(rename: Callable[[str], str] = str) -> dict[str, np.ndarray]:
    """The 265 names of a ResNet-50. The check looks at names; shapes are counted when the weights are loaded."""
    return {rename(name): np.zeros(1, np.float32) for name in resnet50_names()}


def torchvision_name(name: str) -> str:
    for theirs, ours in (("stem.", ""), (".norm.", ".bn."), ("res2", "layer1"), ("res3", "layer2")):
        name = name.replace(theirs, ours)
    return name.replace("res4", "layer3").replace("res5", "layer4")


def file_content(preprocess: Preprocess = IMAGENET_RGB, **changed: Any) -> dict[str, Any]:
    content = {
        "model": tensors(),
        "__author__": "detco convert-to-d2",
        "matching_heuristics": True,
        "preprocess": preprocess.as_dict(),
        "provenance": {"method": "detco", "epochs": 200, "source": {"file": "model.safetensors"}},
    }
    return {key: value for key, value in {**content, **changed}.items() if value is not None}


FPN = {f"fpn/{name}" for name in fpn_shapes(range(4), range(4), has_norm=True)}
FPN_WITHOUT_NORM = {f"fpn/{name}" for name in fpn_shapes(range(4), range(4), has_norm=False)}
HEAD = {f"box_head/{name}" for name in box_head_shapes()}


def pretrained(names: set[str]) -> dict[str, np.ndarray]:
    """Parts beside the backbone, under the names that they are converted to."""
    return {name: np.zeros(1, np.float32) for name in account_for(names).converted.values()}


DETECTOR = {
    "roi_heads.box_predictor.cls_score.weight": np.zeros(1),
    "proposal_generator.rpn_head.conv.weight": np.zeros(1),
}
FILES = {
    "fits": file_content(),
    "simclr": file_content(SIMCLR),
    "msra": file_content(MSRA),
    "without_record": file_content(preprocess=IMAGENET_RGB) | {"preprocess": None},
    "torchvision": file_content(model=tensors(torchvision_name)),
    "prefixed": file_content(model=tensors(lambda name: f"module.encoder_q.{name}")),
    "without_author": file_content(__author__=None),
    "without_heuristics": file_content(matching_heuristics=None),
    "full_names": file_content(matching_heuristics=None, model=tensors(lambda name: f"backbone.bottom_up.{name}")),
    "with_fpn_and_head": file_content(model=tensors() | pretrained(FPN | HEAD)),
    "with_fpn": file_content(model=tensors() | pretrained(FPN)),
    "with_fpn_without_norm": file_content(model=tensors() | pretrained(FPN_WITHOUT_NORM)),
    "detector": file_content(model=tensors(lambda name: f"backbone.bottom_up.{name}") | DETECTOR),
    "one_lost": file_content(model={name: value for name, value in tensors().items() if name != "res4.3.conv2.weight"}),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weights files by what is wrong with them."""
    folder = tmp_path_factory.mktemp("weights")
    for name, content in FILES.items():
        written = {key: value for key, value in content.items() if value is not None}
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(written))
    (folder / "raw.pth.tar").touch()
    return {"raw": str(folder / "raw.pth.tar"), **{name: str(folder / f"{name}.pkl") for name in FILES}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datasets' root with one image in everything that the suite's configs need; what is not read is empty."""
    root = tmp_path_factory.mktemp("datasets")
    register_datasets(root)
    register_subsets(root, seed=0)
    if densepose.is_installed():
        densepose.register_datasets(root)
    for name in DatasetCatalog.list():
        entry = MetadataCatalog.get(name)
        for key in ("json_file", "image_root", "subset_file", "sem_seg_root", "image_dir", "gt_dir"):
            path = Path(entry.get(key) or root)
            if path.suffix:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("1" if path.suffix == ".txt" else IMAGES)
            else:
                path.mkdir(parents=True, exist_ok=True)
        write_files(name, entry)
    return root


IMAGES = '{"images": [{"id": 1, "file_name": "train2017/1.jpg", "coco_url": "http://x/train2017/1.jpg"}]}'


def write_files(name: str, entry: Any) -> None:
    """The image of one dataset, and in VOC and Cityscapes what belongs to it."""
    files = []
    if name.startswith("voc_"):
        files = [Path(entry.dirname) / file for file in ("Annotations/000001.xml", "JPEGImages/000001.jpg")]
        listing = Path(entry.dirname) / "ImageSets" / "Main" / f"{entry.split}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("000001\n")
    elif entry.get("image_dir"):
        files = [Path(entry.image_dir) / "aachen/1_leftImg8bit.png"]
        for ending in ("polygons.json", "instanceIds.png", "labelIds.png", "labelTrainIds.png"):
            files.append(Path(entry.gt_dir) / f"aachen/1_gtFine_{ending}")
    elif entry.get("image_root"):
        files = [Path(entry.image_root) / "train2017/1.jpg"]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


MISTAKES: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("settings_mistakes.yaml").read_text())


def arguments(config: Path, datasets_root: Path, *more: str, **values: str) -> list[str]:
    options = ["--check", "--config-file", str(config), "--datasets-root", str(datasets_root)]
    return [
        *options,
        "--output-dir",
        str(datasets_root / "run"),
        *more,
        *(word for pair in values.items() for word in pair),
    ]


def examined(*args: Any, **values: str) -> Prepared:
    return examine(train_net.build_parser().parse_args(arguments(*args, **values)))


def file_of(config: str) -> Path:
    return CONFIGS / (f"{config}.yaml" if config.endswith("_random") else f"{config}_converted.yaml")


def test_thirty_mistakes_are_seeded_in_many_configs() -> None:
    assert len(MISTAKES) >= 30
    assert len({mistake["config"] for mistake in MISTAKES.values()}) >= 10


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_caught_by_name(
    mistake: dict[str, Any], root: Path, files: dict[str, str], tmp_path: Path
) -> None:
    weights = mistake.get("weights", "fits")
    values = {"MODEL.WEIGHTS": files.get(weights, weights), **mistake.get("values", {})}
    datasets_root = tmp_path if mistake.get("data") == "none there" else root
    prepared = examined(file_of(mistake["config"]), datasets_root, "--num-gpus", str(mistake.get("gpus", 8)), **values)
    warnings = [note for note in prepared.notes if note.startswith("WARNING: ")]
    said = {"error": prepared.errors, "departure": prepared.departures, "warning": warnings}
    assert any(mistake["said"] in sentence for sentence in said[mistake["kind"]]), said
    # A mistake must not hide behind others: what is merely not published is no error.
    assert (mistake["kind"] == "error") == bool(prepared.errors), prepared.errors


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_alarm_on_a_published_config(path: Path, root: Path, files: dict[str, str]) -> None:
    errors, departures, warnings = findings_of(path, root, files, "--num-gpus", "8")
    assert errors == absent_model(path)
    # The one image of the tests' VOC is rightly not what was published. Without any other warning here, and without any
    # departure, what is said of the mistakes above is about the mistakes.
    assert departures == [note for note in warnings if "VOC 07+12" not in note] == []


@pytest.mark.parametrize("path", QUICK, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_quick_configs_depart_and_are_not_refused(path: Path, root: Path, files: dict[str, str]) -> None:
    errors, departures, _ = findings_of(path, root, files, "--num-gpus", "0")
    assert errors == absent_model(path)
    if "DensePose" not in "".join(errors):  # whose config cannot be read without its project
        assert any(sentence.startswith("SOLVER.MAX_ITER is") for sentence in departures)


def findings_of(path: Path, root: Path, files: dict[str, str], *options: str) -> tuple[list[str], list[str], list[str]]:
    """Errors, departures and warnings of a config with weights that fit."""
    is_converted = path.stem.endswith(("_converted", "_soco"))
    try:
        prepared = examined(path, root, *options, **({"MODEL.WEIGHTS": files["fits"]} if is_converted else {}))
    except ValueError as refusal:
        return [str(refusal)], [], []
    return prepared.errors, prepared.departures, [note for note in prepared.notes if note.startswith("WARNING")]


def absent_model(path: Path) -> list[str]:
    """The one error that is right where FCOS or DensePose is not installed."""
    try:
        check_model_available(load_config(path))
    except ValueError as missing:
        assert "fcos" in path.stem or "densepose" in path.stem
        return [str(missing)]
    return []


def test_every_task_was_looked_at() -> None:
    stems = {
        str(path.relative_to(CONFIGS))[: -len("_random.yaml")] for path in SHIPPED if path.stem.endswith("_random")
    }
    assert stems == {task.config for task in load_tasks().values()}


def test_names_that_detectron2_finds_are_let_through(root: Path, files: dict[str, str]) -> None:
    for weights, config in (("full_names", MASK_FPN), ("with_fpn", MASK_FPN), ("with_fpn_and_head", LVIS)):
        prepared = examined(file_of(config), root, "--num-gpus", "8", **{"MODEL.WEIGHTS": files[weights]})
        assert prepared.errors == []
    asked = files["without_heuristics"] + "?matching_heuristics=True"
    assert examined(file_of(MASK_FPN), root, "--num-gpus", "8", **{"MODEL.WEIGHTS": asked}).errors == []


def test_weights_with_another_input_are_no_departure_where_the_config_follows_them(
    root: Path, files: dict[str, str]
) -> None:
    values = {"MODEL.WEIGHTS": files["simclr"], "MODEL.PIXEL_MEAN": "[0.0, 0.0, 0.0]"}
    prepared = examined(
        file_of(MASK_FPN), root, "--num-gpus", "8", **values, **{"MODEL.PIXEL_STD": "[255.0, 255.0, 255.0]"}
    )
    assert prepared.errors == prepared.departures == []


@pytest.mark.parametrize("config", [VOC, MASK_FPN])
def test_missing_names_are_those_that_detectron2_does_not_find(config: str) -> None:
    wanted = backbone_names(load_config(file_of(config)))
    assert len(set(wanted)) == 265
    generator = random.Random(0)
    prefixes = ("", "backbone.", "backbone.bottom_up.", "roi_heads.", "module.", "encoder.")
    for _ in range(4):
        names = [generator.choice(prefixes) + name for name in resnet50_names() if generator.random() < 0.9]
        loaded = align_and_update_state_dicts(
            {name: torch.zeros(1) for name in wanted},
            {name: torch.zeros(1) for name in names},
            c2_conversion=False,
        )
        lost = missing_names(wanted, names, match_suffixes=True)
        assert 0 < len(lost) < 265
        assert set(lost) == set(wanted) - set(loaded)


def test_voc_images_are_counted(root: Path, files: dict[str, str]) -> None:
    prepared = examined(file_of(VOC), root, "--num-gpus", "8", **{"MODEL.WEIGHTS": files["fits"]})
    assert "WARNING: VOC 07+12 trainval has 2 images here; the published runs had 16551." in prepared.notes


def test_sync_bn_in_one_process_is_noted(root: Path, files: dict[str, str]) -> None:
    prepared = examined(file_of(VOC), root, "--num-gpus", "1", **{"MODEL.WEIGHTS": files["fits"]})
    assert "SyncBN in one process: BN over its 16 images per step." in prepared.notes


def test_all_mistakes_of_a_run_are_named_at_once(root: Path, files: dict[str, str]) -> None:
    values = {"MODEL.WEIGHTS": files["fits"], "INPUT.FORMAT": "BGR", "MODEL.ROI_HEADS.NUM_CLASSES": "5"}
    argv = arguments(file_of(VOC), root, "--num-gpus", "8", **values, **{"SOLVER.STEPS": "(24000,)"})
    args = train_net.build_parser().parse_args(argv)
    with pytest.raises(SettingsError) as refusal:
        prepare(args)
    assert refusal.value.errors == examine(args).errors
    for said in ("INPUT.FORMAT is BGR", "NUM_CLASSES is 5", "training ends at SOLVER.MAX_ITER 24000"):
        assert sum(said in message for message in refusal.value.errors) == 1


def test_a_missing_package_of_the_evaluator_is_refused(
    root: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transfer.evaluation.importlib.util.find_spec", lambda name: None)
    prepared = examined(file_of(LVIS), root, "--num-gpus", "8", **{"MODEL.WEIGHTS": files["fits"]})
    (message,) = prepared.errors
    assert "needs lvis: pip install" in message


def test_a_dataset_without_an_evaluator_is_refused(root: Path, files: dict[str, str]) -> None:
    values = {"MODEL.WEIGHTS": files["fits"], "DATASETS.TEST": "('coco_2017_val_panoptic_separated',)"}
    prepared = examined(file_of(MASK_FPN), root, "--num-gpus", "8", **values)
    assert any("coco_panoptic_seg" in message for message in prepared.errors)


def test_the_linear_rule_is_no_departure_and_says_what_it_changed(root: Path, files: dict[str, str]) -> None:
    values = {"MODEL.WEIGHTS": files["fits"]}
    prepared = examined(file_of(MASK_FPN), root, "--num-gpus", "4", "--auto-scale", **values)
    assert prepared.errors == []
    assert prepared.auto_scaled
    assert not any(note.startswith("WARNING") for note in prepared.notes)
    assert (prepared.cfg.SOLVER.MAX_ITER, prepared.departures) == (180000, [])
    (table,) = [note for note in prepared.notes if note.startswith("--auto-scale from 8 to 4 GPUs")]
    assert "SOLVER.STEPS" in table


def test_scaling_by_hand_is_a_departure_even_beside_the_linear_rule(root: Path, files: dict[str, str]) -> None:
    values = {"MODEL.WEIGHTS": files["fits"], "SOLVER.MAX_ITER": "80000", "SOLVER.STEPS": "(60000, 70000)"}
    prepared = examined(file_of(MASK_FPN), root, "--num-gpus", "4", "--auto-scale", **values)
    assert prepared.departures[0] == "SOLVER.MAX_ITER is 80000, the task's is 90000"


def test_report_fits_a_screen_and_names_what_decides(
    root: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"MODEL.WEIGHTS": files["fits"]}
    assert train_net.main(arguments(file_of(MASK_FPN), root, "--num-gpus", "8", **values)) == 0
    shown, said = capsys.readouterr()
    lines = shown.splitlines()
    assert said == ""
    assert len(lines) <= 24
    assert lines[0] == "Settings of coco_maskrcnn_fpn_1x: COCO, Mask R-CNN FPN, 1x (90k iterations)"
    assert lines[-1] == "ready; no departures from the published recipe"
    for part in (
        *("recipe     moco, converted weights", "detco 200 epochs, made of model.safetensors", "RGB, mean [123.675,"),
        *("compared with the weights' record", "stride in the 3x3, nothing frozen", "FPN        norm SyncBN"),
        *("80 classes; box 0 conv + 2 fc, norm none; mask 4 conv", "16 images on 8 GPUs (2 on each), sgd lr 0.02"),
        *("90000 iterations, lr x 0.1 at 60000, 80000, warm-up 1000", "coco_2017_val (evaluator coco)", "seed       0"),
    ):
        assert part in shown
    assert not (root / "run").exists()


def test_check_prints_departures_by_group_and_exits_2_on_errors(
    root: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"MODEL.WEIGHTS": files["fits"], "SOLVER.BASE_LR": "0.025", "MODEL.FPN.NORM": "''"}
    assert train_net.main(arguments(file_of(MASK_FPN), root, "--num-gpus", "8", **values)) == 0
    shown = capsys.readouterr().out
    assert 'departures from the published recipe, network:\n  MODEL.FPN.NORM is "", the task' in shown
    assert "departures from the published recipe, schedule:\n  SOLVER.BASE_LR is 0.025, the task" in shown
    assert shown.splitlines()[-1] == "ready; 2 departures: results.json and tables mark such a run"
    assert (
        train_net.main(arguments(file_of(MASK_FPN), root, "--num-gpus", "8", **values, **{"INPUT.FORMAT": "BGR"})) == 2
    )
    shown, said = capsys.readouterr()
    assert shown.splitlines()[-1].startswith("refused: 1 error; 2 departures")
    assert said.startswith("error: the config contradicts what the weights")
    assert not (root / "run").exists()


def test_a_task_of_ones_own_is_compared_with_no_recipe(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = arguments(file_of(f"{MASK_FPN}_random"), root, "--num-gpus", "8", **{"TRANSFER.TASK": ""})
    assert train_net.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["Settings of a task of your own", "  recipe     none published, random weights"]
    assert lines[-1] == "ready; no published task to compare with"


def test_a_number_of_gpus_that_cannot_share_the_training_batch_may_evaluate(root: Path) -> None:
    config = file_of(f"{MASK_FPN}_random")
    scaled = {"SOLVER.REFERENCE_WORLD_SIZE": "8"}
    assert len(examined(config, root, "--num-gpus", "3", **scaled).errors) == 2
    assert examined(config, root, "--num-gpus", "3", "--eval-only", **scaled).errors == []


@pytest.mark.parametrize("config", ["cityscapes/fcn16s_r50_90k", "cityscapes/mask_rcnn_r50_fpn_24k"])
@pytest.mark.parametrize("options", [[], ["--eval-only"]])
def test_cityscapes_is_refused_on_several_machines_and_nothing_else_is(
    config: str, options: list[str], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    machines = ["--num-gpus", "4", "--num-machines", "2", "--dist-url", "tcp://first:1", *options]
    (message,) = examined(file_of(f"{config}_random"), root, *machines).errors
    assert "can be evaluated on one machine only" in message
    assert examined(file_of(f"{MASK_FPN}_random"), root, *machines).errors == []


# Keys that tasks.yaml does not list. Each changes the trained network or its result.
UNLISTED = {
    "MODEL.RPN.LOSS_WEIGHT": "2.0",
    "MODEL.FPN.FUSE_TYPE": "avg",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": "True",
    "MODEL.RESNETS.WIDTH_PER_GROUP": "128",
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": "8",
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": "False",
    "MODEL.ROI_MASK_HEAD.CONV_DIM": "512",
}


def test_every_key_outside_the_protocol_is_compared_with_the_shipped_config(root: Path, files: dict[str, str]) -> None:
    values = {"MODEL.WEIGHTS": files["fits"], **UNLISTED}
    listed = load_tasks()["coco_maskrcnn_fpn_1x"].values
    assert listed.keys().isdisjoint(UNLISTED)
    prepared = examined(file_of(MASK_FPN), root, "--num-gpus", "4", "--auto-scale", **values)
    assert [sentence.split(" is ")[0] for sentence in prepared.departures] == sorted(UNLISTED)
    assert "MODEL.RPN.LOSS_WEIGHT is 2, the task's is 1" in prepared.departures
    assert prepared.errors == []


def test_what_does_not_change_the_experiment_is_no_departure(root: Path, files: dict[str, str]) -> None:
    values = {"SEED": "0", "DATALOADER.NUM_WORKERS": "9", "SOLVER.CHECKPOINT_PERIOD": "77", "VIS_PERIOD": "5"}
    values |= {"CUDNN_BENCHMARK": "True", "TRANSFER.LABEL": "mine", "SOLVER.REFERENCE_WORLD_SIZE": "8"}
    prepared = examined(file_of(MASK_FPN), root, "--num-gpus", "8", **{"MODEL.WEIGHTS": files["fits"]}, **values)
    assert prepared.errors == prepared.departures == []


def test_a_wrong_name_is_still_told_beside_another_change(root: Path, files: dict[str, str]) -> None:
    values = {"MODEL.WEIGHTS": files["fits"], "TRANSFER.TASK": "coco_maskrcnn_fpn_1x"}
    config = file_of("coco/mask_rcnn_r50_fpn_2x")
    for more in ({}, {"MODEL.RPN.LOSS_WEIGHT": "2.0"}):
        (message,) = examined(config, root, "--num-gpus", "8", **values, **more).errors
        assert "but the config is exactly coco_maskrcnn_fpn_2x" in message


@pytest.mark.skipif(not densepose.is_installed(), reason="needs the DensePose project of Detectron2")
def test_another_detector_under_the_name_of_densepose_departs(root: Path, files: dict[str, str]) -> None:
    values = {"MODEL.WEIGHTS": files["fits"], "TRANSFER.TASK": "coco_densepose_fpn_s1x", "MODEL.RPN.LOSS_WEIGHT": "2.0"}
    prepared = examined(file_of("lvis/mask_rcnn_r50_fpn_4conv1fc_1x"), root, "--num-gpus", "8", **values)
    assert "MODEL.DENSEPOSE_ON is not set, the task's is True" in prepared.departures


def test_detcos_long_side_is_published_for_c4_up_to_2x_only(root: Path, files: dict[str, str]) -> None:
    values = {"MODEL.WEIGHTS": files["fits"], "INPUT.MAX_SIZE_TRAIN": "1200"}
    for schedule, departures in {"12k": 0, "1x": 0, "2x": 0, "4x": 1}.items():
        config = file_of(f"coco/mask_rcnn_r50_c4_{schedule}")
        assert len(examined(config, root, "--num-gpus", "8", **values).departures) == departures


def test_sparse_rcnn_without_scipy_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "scipy" else find_spec(name))
    (message,) = examined(file_of("coco/sparse_rcnn_r50_300pro_3x_random"), root, "--num-gpus", "8").errors
    assert "pip install scipy" in message
    assert examined(file_of(f"{MASK_FPN}_random"), root, "--num-gpus", "8").errors == []


@pytest.mark.parametrize(
    ("kind", "said"), [("full_model", "which Detectron2's SGD does not"), ("all", "must be one of")]
)
def test_gradient_clipping_that_the_optimiser_does_not_know_is_refused(kind: str, said: str, root: Path) -> None:
    clip = {"SOLVER.CLIP_GRADIENTS.ENABLED": "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": kind}
    (message,) = examined(file_of(f"{MASK_FPN}_random"), root, "--num-gpus", "8", **clip).errors
    assert said in message


def test_check_works_on_a_machine_with_fewer_gpus(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    argv = arguments(file_of(f"{MASK_FPN}_random"), root, "--num-gpus", "8")
    prepared = examine(train_net.build_parser().parse_args(argv))
    assert prepared.errors == []
    assert any("has 0 CUDA devices; the one that trains needs 8" in note for note in prepared.notes)
    argv.remove("--check")
    (message,) = examine(train_net.build_parser().parse_args(argv)).errors
    assert "--num-gpus is 8, but this machine has 0 CUDA devices" in message
