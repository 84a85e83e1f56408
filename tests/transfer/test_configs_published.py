"""Every file of configs/transfer against the values of the published protocols."""

from pathlib import Path
from typing import Any

import pytest

from transfer import d2

if d2.info() is None:
    pytest.skip("needs Detectron2 (python tools/install_detectron2.py)", allow_module_level=True)

from transfer.config import config_digest, load_config
from transfer.tasks import departures, load_init_values, load_tasks, value_at

pytestmark = pytest.mark.d2

CONFIGS = Path(__file__).parents[2] / "configs" / "transfer"
PUBLISHED = sorted([*CONFIGS.glob("voc/*.yaml"), *CONFIGS.glob("coco/*.yaml")])


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_config_resolves_to_the_published_values(path: Path) -> None:
    cfg = load_config(path)
    assert departures(load_tasks()[cfg.TRANSFER.TASK].values, cfg) == []
    assert departures(load_init_values()[cfg.TRANSFER.INIT], cfg) == []
    assert path.stem.endswith(cfg.TRANSFER.INIT)


def test_every_task_has_a_config_of_every_kind_of_weights() -> None:
    found = {(cfg.TRANSFER.TASK, cfg.TRANSFER.INIT) for cfg in map(load_config, PUBLISHED)}
    assert found == {(task, init) for task in load_tasks() for init in load_init_values()}
    assert len(PUBLISHED) == len(found)


def test_file_names_tell_the_task() -> None:
    for path in PUBLISHED:
        detector, schedule = path.stem.rsplit("_", 1)[0].rsplit("_", 1)
        task = load_config(path).TRANSFER.TASK
        assert task.endswith(f"_{schedule}")
        short = {"faster_rcnn_r50_c4": "fasterrcnn_c4", "retinanet_r50_fpn": "retinanet"}.get(
            detector, detector.replace("mask_rcnn_r50", "maskrcnn")
        )
        assert short in task


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("SOLVER.MAX_ITER", "30", "SOLVER.MAX_ITER is 30, the task's is 90000"),
        ("MODEL.FPN.NORM", "''", 'MODEL.FPN.NORM is "", the task\'s is SyncBN'),
        ("SOLVER.STEPS", "(60000,)", "SOLVER.STEPS is [60000], the task's is [60000, 80000]"),
        ("SOLVER.BASE_LR", "0.021", "SOLVER.BASE_LR is 0.021, the task's is 0.02"),
        ("TEST.PRECISE_BN.ENABLED", "False", "TEST.PRECISE_BN.ENABLED is False, the task's is True"),
    ],
)
def test_a_changed_value_is_named_as_a_departure(key: str, value: str, sentence: str) -> None:
    cfg = load_config(CONFIGS / "coco/mask_rcnn_r50_fpn_1x_converted.yaml", [key, value])
    assert departures(load_tasks()["coco_maskrcnn_fpn_1x"].values, cfg) == [sentence]


def test_msra_and_ssl_columns_differ_in_all_four_input_settings() -> None:
    inits = load_init_values()
    keys = set(inits["supervised"]) - {"MODEL.WEIGHTS"}
    assert keys == {"INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1"}
    assert all(inits["supervised"][key] != inits["converted"][key] for key in keys)


def test_retinanet_anchors_are_three_per_octave() -> None:
    sizes = load_config(CONFIGS / "coco/retinanet_r50_fpn_1x_random.yaml").MODEL.ANCHOR_GENERATOR.SIZES
    for row, x in zip(sizes, (32, 64, 128, 256, 512), strict=True):
        assert row == pytest.approx([x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)])


def test_quick_configs_inherit_a_task_and_say_what_they_changed() -> None:
    quick = sorted(CONFIGS.glob("quick/*_*_*.yaml"))
    assert len(quick) >= 6
    for path in quick:
        cfg = load_config(path)
        named = departures(load_tasks()[cfg.TRANSFER.TASK].values, cfg)
        assert any(sentence.startswith("SOLVER.MAX_ITER is ") for sentence in named)
        assert cfg.INPUT.MIN_SIZE_TEST <= 160
        assert cfg.DATALOADER.NUM_WORKERS <= 2
        assert departures(load_init_values()[cfg.TRANSFER.INIT], cfg) == []


def test_an_unknown_key_is_refused_with_the_nearest_one() -> None:
    config = CONFIGS / "voc/faster_rcnn_r50_c4_24k_random.yaml"
    with pytest.raises(ValueError, match=r"unknown config key SOLVER\.BASELR in the command line.*SOLVER\.BASE_LR"):
        load_config(config, ["SOLVER.BASELR", "0.1"])
    with pytest.raises(ValueError, match=r"unknown config key MODEL\.RPN .*such as MODEL\.RPN\."):
        load_config(config, ["MODEL.RPN", "0.1"])
    with pytest.raises(ValueError, match="odd number of words"):
        load_config(config, ["SOLVER.BASE_LR"])
    with pytest.raises(ValueError, match="options go before the KEY VALUE pairs: move --resume"):
        load_config(config, ["SOLVER.BASE_LR", "0.1", "--resume"])


def test_an_unknown_key_in_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("VERSION: 2\nTRANSFER:\n  TASKS: voc\n")
    with pytest.raises(ValueError, match=r"TRANSFER\.TASKS in .*mine\.yaml; the nearest valid key is TRANSFER\.TASK"):
        load_config(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["TRANSFER.TASK", "voc"], "TRANSFER.TASK is voc"),
        (["TRANSFER.INIT", "moco"], "TRANSFER.INIT is moco"),
        (["SEED", "-1"], "SEED is -1"),
        (["SOLVER.MAX_ITER", "many"], "Type mismatch"),
    ],
)
def test_impossible_values_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(CONFIGS / "voc/faster_rcnn_r50_c4_24k_random.yaml", overrides)


def test_config_file_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('VERSION: 2\nSEED: !!python/object/apply:eval ["1 + 1"]\n')
    with pytest.raises(Exception, match="python/object/apply"):
        load_config(path)


def test_digest_ignores_what_differs_between_repeated_runs() -> None:
    def digest(*overrides: Any, data: str = "mine") -> str:
        cfg = load_config(CONFIGS / "voc/faster_rcnn_r50_c4_24k_converted.yaml", overrides)
        return config_digest(cfg, {"train": [data], "test": []})

    assert digest() == digest("SEED", "3", "OUTPUT_DIR", "x", "MODEL.WEIGHTS", "y.pkl")
    assert digest() != digest(data="other")
    assert digest() != digest("SOLVER.MAX_ITER", "23999")


def test_every_published_value_of_a_config_names_its_source() -> None:
    for path in CONFIGS.glob("base/*.yaml"):
        for line in path.read_text().splitlines():
            is_value = ": " in line.split("#")[0] and not line.strip().startswith(("#", "_BASE_", "VERSION"))
            assert not is_value or "#" in line, f"{path.name}: {line}"


def test_value_at_raises_for_unknown_keys() -> None:
    with pytest.raises(KeyError):
        value_at({"A": {"B": 1}}, "A.C")
