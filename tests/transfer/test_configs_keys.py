"""load_config: what it refuses, and the digest that tells repeated runs."""

from pathlib import Path
from typing import Any

import pytest

from transfer import d2

if d2.info() is None:
    pytest.skip("needs Detectron2 (python tools/install_detectron2.py)", allow_module_level=True)

from transfer.config import config_digest, load_config
from transfer.tasks import CONFIGS

pytestmark = pytest.mark.d2


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
    assert digest() == digest("DATALOADER.NUM_WORKERS", "9", "SOLVER.CHECKPOINT_PERIOD", "7", "VIS_PERIOD", "5")
    assert digest() == digest("SOLVER.REFERENCE_WORLD_SIZE", "8", "MODEL.DEVICE", "cpu", "CUDNN_BENCHMARK", "True")
    assert digest() != digest("TRANSFER.LABEL", "another row")
    assert digest() != digest(data="other")
    assert digest() != digest("SOLVER.MAX_ITER", "23999")
