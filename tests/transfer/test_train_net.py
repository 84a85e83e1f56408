"""detco-transfer as a user runs it: two iterations and an evaluation on four images, and every refusal."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from PIL import Image, ImageDraw

from transfer import d2, train_net
from transfer.convert import convert

if d2.info() is None:
    pytest.skip("needs Detectron2 (python tools/install_detectron2.py)", allow_module_level=True)

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from transfer import finetune
from transfer.trainer import TransferTrainer

pytestmark = pytest.mark.d2

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "transfer"
TINY = {
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MAX_SIZE_TRAIN": "96",
    "INPUT.MIN_SIZE_TEST": "64",
    "INPUT.MAX_SIZE_TEST": "96",
    "SOLVER.IMS_PER_BATCH": "2",
    "SOLVER.BASE_LR": "0.001",
    "SOLVER.MAX_ITER": "2",
    "SOLVER.STEPS": "(1,)",
    "TEST.PRECISE_BN.NUM_ITER": "1",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "8",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "4",
}
BOX = (16, 20, 60, 64)


class Finished(NamedTuple):
    """A run that ended well."""

    folder: Path
    results: dict[str, Any]
    log: str


def write_photo(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    photo = Image.new("RGB", (96, 80), (40 * seed % 256, 90, 200))
    ImageDraw.Draw(photo).rectangle(BOX, fill=(250, 30 * seed % 256, 20))
    photo.save(path)


def write_voc(folder: Path, split: str) -> None:
    x1, y1, x2, y2 = BOX
    stems = [f"{split}_{seed}" for seed in range(4)]
    for seed, stem in enumerate(stems):
        write_photo(folder / "JPEGImages" / f"{stem}.jpg", seed)
        (folder / "Annotations").mkdir(exist_ok=True)
        (folder / "Annotations" / f"{stem}.xml").write_text(
            f"<annotation><filename>{stem}.jpg</filename><size><width>96</width><height>80</height></size>"
            "<object><name>cat</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult><bndbox>"
            f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object></annotation>"
        )
    listing = folder / "ImageSets" / "Main" / f"{split}.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text("\n".join(stems) + "\n")


def write_coco(file: Path, image_dir: Path, categories: list[dict[str, Any]]) -> None:
    x1, y1, x2, y2 = BOX
    for seed in range(4):
        write_photo(image_dir / f"{seed}.jpg", seed)
    annotation = {
        "category_id": categories[0]["id"],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": 0,
        "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
    }
    content = {
        "images": [{"id": seed, "file_name": f"{seed}.jpg", "width": 96, "height": 80} for seed in range(4)],
        "annotations": [{**annotation, "id": seed + 1, "image_id": seed} for seed in range(4)],
        "categories": categories,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def datasets_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO 2017 and VOC 07+12 of four images per split, in Detectron2's layout."""
    root = tmp_path_factory.mktemp("datasets")
    write_voc(root / "VOC2007", "trainval")
    write_voc(root / "VOC2007", "test")
    write_voc(root / "VOC2012", "trainval")
    things = [{"id": item["id"], "name": item["name"]} for item in COCO_CATEGORIES if item["isthing"]]
    for split in ("train", "val"):
        write_coco(root / f"coco/annotations/instances_{split}2017.json", root / f"coco/{split}2017", things)
    return root


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """convert-to-d2's file of a torchvision ResNet-50 with random weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    state = torchvision.models.resnet50(weights=None).state_dict()
    torch.save(state, folder / "resnet50.pth")
    convert(folder / "resnet50.pth", folder / "resnet50.pkl")
    return folder / "resnet50.pkl"


def words(config: str, datasets_root: Path, output_dir: Path, *more: str, **overrides: str) -> list[str]:
    """The command line of a tiny run; `more` are options, `overrides` config values."""
    values = {**TINY, **overrides}
    options = ["--config-file", str(CONFIGS / f"quick/{config}.yaml"), "--datasets-root", str(datasets_root)]
    return [*options, "--output-dir", str(output_dir), *more, *[word for pair in values.items() for word in pair]]


def finish(argv: list[str], folder: Path) -> Finished:
    assert train_net.main(argv) == 0
    return Finished(folder, json.loads((folder / "results.json").read_text()), (folder / "log.txt").read_text())


@pytest.fixture(scope="module")
def voc_run(datasets_root: Path, converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("voc") / "run"
    argv = words("voc_faster_rcnn_c4_converted", datasets_root, folder, **{"MODEL.WEIGHTS": str(converted)})
    return finish(argv, folder)


def test_voc_c4_from_converted_weights_ends_with_results(voc_run: Finished, converted: Path) -> None:
    results = voc_run.results
    assert results["task"] == "voc0712_fasterrcnn_c4_24k"
    assert results["recipe"] == "c4_extra_norm"
    assert results["label"] == "resnet50"
    assert set(results["metrics"]) == {"box_AP", "box_AP50", "box_AP75"}
    assert results["weights"]["path"] == str(converted)
    assert len(results["weights"]["sha256"]) == 64
    assert results["weights"]["preprocess"]["channel_order"] == "RGB"
    assert results["datasets"] == {"train": ["voc_2007_trainval", "voc_2012_trainval"], "test": ["voc_2007_test"]}
    assert results["seed"] == 0
    assert results["hours"] > 0


def test_results_name_the_departures_from_the_published_protocol(voc_run: Finished) -> None:
    departures = voc_run.results["departures"]
    assert "SOLVER.MAX_ITER is 2, the task's is 24000" in departures
    assert "INPUT.MIN_SIZE_TEST is 64, the task's is 800" in departures
    assert not any(sentence.startswith(("MODEL.RESNETS", "INPUT.FORMAT", "DATASETS")) for sentence in departures)


def test_log_begins_with_the_settings_and_warns_of_departures(voc_run: Finished) -> None:
    settings = voc_run.log.index("Settings of voc0712_fasterrcnn_c4_24k: PASCAL VOC 07+12")
    warning = voc_run.log.index("not as published in voc0712_fasterrcnn_c4_24k, schedule: SOLVER.BASE_LR is 0.001, ")
    assert settings < warning < voc_run.log.index("Starting training from iteration 0")
    line = voc_run.log[voc_run.log.rindex("\n", 0, warning) : warning]
    assert "WARNING" in line
    assert "VOC 07+12 trainval has 8 images here; the published runs had 16551" in voc_run.log


def test_log_says_what_was_loaded_and_where_it_runs(voc_run: Finished) -> None:
    assert "Backbone: all 265 tensors found in" in voc_run.log
    assert "14 others (heads) start from random" in voc_run.log
    assert "Input settings agree with what" in voc_run.log
    assert ("No CUDA device: training on the CPU." in voc_run.log) == (not torch.cuda.is_available())


def test_backbone_really_starts_from_the_file(
    datasets_root: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = words("coco_retinanet_converted", datasets_root, tmp_path / "run", **{"SOLVER.BASE_LR": "0.0"})
    run = finish([*argv, "MODEL.WEIGHTS", str(converted)], tmp_path / "run")
    trained = torch.load(run.folder / "model_final.pth", weights_only=True)["model"]
    with converted.open("rb") as file:
        given = pickle.load(file)["model"]
    weights = [name for name in given if name.endswith("conv2.weight")]
    assert len(weights) == 16
    for name in weights:
        assert torch.equal(trained[f"backbone.bottom_up.{name}"].cpu(), torch.as_tensor(given[name]))
    assert run.results["recipe"] == "moco"
    assert "box_AP" in run.results["metrics"]
    assert "jit.script" not in capsys.readouterr().err


def test_mask_rcnn_fpn_trains_from_random_weights_and_reports_masks(datasets_root: Path, tmp_path: Path) -> None:
    run = finish(words("coco_mask_rcnn_fpn_random", datasets_root, tmp_path / "run"), tmp_path / "run")
    assert {"box_AP", "box_AP50", "box_AP75", "mask_AP", "mask_AP50", "mask_AP75"} <= set(run.results["metrics"])
    assert not any("-" in name for name in run.results["metrics"])
    assert run.results["label"] == "random init"
    nothing = {"path": "", "sha256": None, "provenance": {}, "preprocess": None, "transferred": []}
    assert run.results["weights"] == nothing


def test_resume_continues_and_adds_up_the_time(voc_run: Finished, datasets_root: Path, converted: Path) -> None:
    values = {"MODEL.WEIGHTS": str(converted), "SOLVER.MAX_ITER": "3"}
    argv = words("voc_faster_rcnn_c4_converted", datasets_root, voc_run.folder, "--resume", **values)
    resumed = finish(argv, voc_run.folder)
    assert "Resuming after iteration 2 of 3." in resumed.log
    assert "resuming with SOLVER.MAX_ITER 3; it was 2." in resumed.log
    assert resumed.results["schedule"]["iterations"] == 3
    assert resumed.results["hours"] > voc_run.results["hours"]


def test_short_runs_log_every_iteration(voc_run: Finished) -> None:
    lines = [json.loads(line) for line in (voc_run.folder / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "total_loss" in line][:2] == [0, 1]


def test_used_directory_is_refused_without_resume(
    voc_run: Finished, datasets_root: Path, converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = words("voc_faster_rcnn_c4_converted", datasets_root, voc_run.folder, **{"MODEL.WEIGHTS": str(converted)})
    assert train_net.main(argv) == 2
    assert "holds the checkpoints of an earlier run; add --resume" in capsys.readouterr().err


def test_resume_from_other_weights_is_refused(
    voc_run: Finished, datasets_root: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_weights(converted, tmp_path / "other.pkl", str)
    values = {"MODEL.WEIGHTS": str(other)}
    assert (
        train_net.main(words("voc_faster_rcnn_c4_converted", datasets_root, voc_run.folder, "--resume", **values)) == 2
    )
    assert "is a run that started from" in capsys.readouterr().err


def test_eval_only_reproduces_the_evaluation_of_training(
    voc_run: Finished, datasets_root: Path, tmp_path: Path
) -> None:
    weights = str(voc_run.folder / "model_final.pth")
    argv = words("voc_faster_rcnn_c4_converted", datasets_root, tmp_path, "--eval-only", **{"MODEL.WEIGHTS": weights})
    assert train_net.main(argv) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation"]

    def evaluation(folder: Path) -> str:
        return [line for line in (folder / "log.txt").read_text().splitlines() if "copypaste: " in line][-1][-20:]

    assert evaluation(tmp_path / "evaluation") == evaluation(voc_run.folder)


def test_eval_only_leaves_the_run_as_it_was_and_resumable(
    voc_run: Finished, datasets_root: Path, converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def files() -> dict[str, bytes]:
        # But for the log: in one process the training's handlers go on writing.
        paths = [path for path in voc_run.folder.iterdir() if path.is_file() and path.name != "log.txt"]
        return {path.name: path.read_bytes() for path in paths}

    before, trained = files(), {"MODEL.WEIGHTS": str(voc_run.folder / "model_final.pth")}
    argv = words("voc_faster_rcnn_c4_converted", datasets_root, voc_run.folder, "--eval-only", "--resume", **trained)
    assert train_net.main(argv) == 0
    assert files() == before
    more = ["--resume", "--check"]
    values = {"MODEL.WEIGHTS": str(converted)}
    assert train_net.main(words("voc_faster_rcnn_c4_converted", datasets_root, voc_run.folder, *more, **values)) == 0
    assert "started from" not in capsys.readouterr().err


def test_the_last_line_names_the_metrics_that_papers_report() -> None:
    assert finetune.summarize({"mIoU": 12.34, "pACC": 50.0}) == "mIoU 12.3"
    assert finetune.summarize({"box_AP": 1.0, "mask_AP75": None, "box_APs": 2.0}) == "box_AP 1.0, mask_AP75 -"


def test_eval_only_refuses_what_is_no_detector(
    datasets_root: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = words("voc_faster_rcnn_c4_converted", datasets_root, tmp_path, "--eval-only")
    assert train_net.main([*argv, "MODEL.WEIGHTS", str(converted)]) == 2
    assert "is not a trained detector of this config: 14 of" in capsys.readouterr().err
    assert train_net.main(argv) == 2
    assert "--eval-only needs a trained detector" in capsys.readouterr().err


def write_weights(converted: Path, target: Path, rename: Callable[[str], str]) -> Path:
    with converted.open("rb") as file:
        content = pickle.load(file)
    content["model"] = {rename(name): value for name, value in content["model"].items()}
    target.write_bytes(pickle.dumps(content))
    return target


def test_prefix_left_in_the_names_is_refused(
    datasets_root: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = write_weights(converted, tmp_path / "prefix.pkl", lambda name: f"module.encoder_q.{name}")
    argv = words("coco_retinanet_converted", datasets_root, tmp_path / "run", **{"MODEL.WEIGHTS": str(weights)})
    assert train_net.main(argv) == 2
    error = capsys.readouterr().err
    assert "265 of the backbone's 265 tensors are not in" in error
    assert "convert-to-d2" in error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"INPUT.FORMAT": "BGR"}, "INPUT.FORMAT is BGR, the weights need RGB"),
        ({"MODEL.PIXEL_STD": "[1.0, 1.0, 1.0]"}, "MODEL.PIXEL_STD is [1, 1, 1], the weights need [58.395,"),
        ({"MODEL.RESNETS.STRIDE_IN_1X1": "True"}, "MODEL.RESNETS.STRIDE_IN_1X1 is True, the weights need False"),
        ({"MODEL.WEIGHTS": "nowhere.pkl"}, "there is no file nowhere.pkl"),
        ({"MODEL.WEIGHTS": ""}, "MODEL.WEIGHTS is empty"),
        ({"SOLVER.BASE_LRR": "1"}, "the nearest valid key is SOLVER.BASE_LR"),
        ({"MODEL.ROI_HEADS.NUM_CLASSES": "5"}, "MODEL.ROI_HEADS.NUM_CLASSES is 5, but voc_2007_trainval has 20"),
        ({"DATASETS.TRAIN": "('voc_2007_nothing',)"}, "voc_2007_nothing"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(
    datasets_root: Path,
    converted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: dict[str, str],
    message: str,
) -> None:
    values = {"MODEL.WEIGHTS": str(converted), **overrides}
    argv = words("voc_faster_rcnn_c4_converted", datasets_root, tmp_path / "run", **values)
    assert train_net.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "run").exists()


def test_missing_datasets_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = words("coco_retinanet_random", tmp_path / "empty", tmp_path / "run")
    assert train_net.main(argv) == 2
    assert "instances_train2017.json" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_more_gpus_than_there_are_is_refused(
    datasets_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_net.main(words("coco_retinanet_random", datasets_root, tmp_path, "--num-gpus", "8")) == 2
    assert "--num-gpus is 8, but this machine has 0 CUDA devices; use --num-gpus 0" in capsys.readouterr().err


def test_own_coco_data_set_the_number_of_classes(tmp_path: Path) -> None:
    categories = [{"id": 7, "name": "fox"}, {"id": 9, "name": "hen"}]
    for split in ("train", "val"):
        write_coco(tmp_path / f"{split}.json", tmp_path / split, categories)
    data = [f"{tmp_path}/{split}.json:{tmp_path}/{split}" for split in ("train", "val")]
    more = ["--train-data", data[0], "--val-data", data[1], "--num-gpus", "0"]
    run = finish(words("coco_mask_rcnn_fpn_random", tmp_path, tmp_path / "run", *more), tmp_path / "run")
    assert "NUM_CLASSES is 2, from the data: fox, hen" in run.log
    assert run.results["datasets"] == {"train": [data[0]], "test": [data[1]]}
    assert (run.results["task"], run.results["based_on"]) == ("", "coco_maskrcnn_fpn_1x")
    assert (run.results["recipe"], run.results["departures"]) == ("moco", [])
    model = torch.load(run.folder / "model_final.pth", weights_only=True)["model"]
    assert model["roi_heads.box_predictor.cls_score.weight"].shape[0] == 3


def test_own_data_set_the_number_of_classes_of_every_detector(tmp_path: Path) -> None:
    categories = [{"id": 7, "name": "fox"}, {"id": 9, "name": "hen"}]
    for split in ("train", "val"):
        write_coco(tmp_path / f"{split}.json", tmp_path / split, categories)
    train, val = (f"{tmp_path}/{split}.json:{tmp_path}/{split}" for split in ("train", "val"))
    argv = words("coco_mask_rcnn_fpn_4conv1fc_random", tmp_path, tmp_path, "--train-data", train, "--val-data", val)
    prepared = finetune.prepare(train_net.build_parser().parse_args(argv))
    for head in ("ROI_HEADS", "RETINANET", "FCOS", "SPARSE_RCNN"):
        assert prepared.cfg.MODEL[head].NUM_CLASSES == 2
    record = finetune.build_record(prepared, {}, 0.0)
    assert (record.task, record.based_on, record.recipe) == ("", "coco_maskrcnn_fpn_1x/4conv1fc", "4conv1fc")


def test_results_carry_the_published_id_and_the_recipe_apart(datasets_root: Path, tmp_path: Path) -> None:
    argv = words("coco_mask_rcnn_fpn_4conv1fc_random", datasets_root, tmp_path)
    record = finetune.build_record(finetune.prepare(train_net.build_parser().parse_args(argv)), {}, 0.0)
    assert (record.task, record.based_on, record.recipe) == ("coco_maskrcnn_fpn_1x", "", "4conv1fc")


def test_own_data_are_refused_without_a_validation_set(
    datasets_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"{datasets_root}/VOC2007:trainval"
    argv = words("voc_faster_rcnn_c4_random", datasets_root, tmp_path / "run", "--train-data", source)
    assert train_net.main(argv) == 2
    assert "give --train-data and --val-data together" in capsys.readouterr().err


def test_auto_scale_says_what_it_changed_and_records_it(datasets_root: Path, tmp_path: Path) -> None:
    values = {"SOLVER.IMS_PER_BATCH": "8", "SOLVER.STEPS": "(3,)", "SOLVER.MAX_ITER": "4"}
    argv = words("coco_retinanet_random", datasets_root, tmp_path, "--auto-scale", "--num-gpus", "0", **values)
    prepared = finetune.prepare(train_net.build_parser().parse_args(argv))
    assert asdict(finetune.build_record(prepared, {}, 0.0).schedule) == {
        "iterations": 32,
        "batch_size": 1,
        "base_lr": 0.000125,
        "num_gpus": 0,
        "auto_scaled": True,
        "weight_decay": 0.0001,
    }
    (table,) = [note for note in prepared.notes if note.startswith("--auto-scale from 8 to 1 GPUs")]
    assert {line.split()[0] for line in table.splitlines()[1:]} >= {"SOLVER.IMS_PER_BATCH", "SOLVER.STEPS"}
    argv.remove("--auto-scale")
    assert not finetune.prepare(train_net.build_parser().parse_args(argv)).auto_scaled


def test_ranks_get_equal_statistics_between_precise_bn_and_checkpoint(datasets_root: Path, tmp_path: Path) -> None:
    argv = words("coco_retinanet_random", datasets_root, tmp_path)
    built = TransferTrainer(finetune.prepare(train_net.build_parser().parse_args(argv)).cfg).build_hooks()
    names = [type(hook).__name__ for hook in built]
    start = names.index("PreciseBN")
    assert names[start : start + 4] == ["PreciseBN", "EqualBuffers", "PeriodicCheckpointer", "EvalHook"]


def test_help_is_quick_and_needs_neither_torch_nor_detectron2() -> None:
    blocked = "import sys; sys.modules['torch'] = sys.modules['detectron2'] = None; sys.argv[0] = 'detco-transfer'; "
    code = blocked + "from transfer.train_net import main; main(['--help'])"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for text in ("--datasets-root", "--auto-scale", "default", "examples:", "MODEL.WEIGHTS"):
        assert text in shown


def test_script_runs_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "transfer" / "train_net.py"), "--help"]
    assert "detco-transfer" in subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
