"""Values that no run can have are refused by name, before anything is computed from them."""

from pathlib import Path

import pytest

from transfer import d2, train_net

pytestmark = pytest.mark.d2

d2.require()

from transfer.checks.network import check_parts  # noqa: E402
from transfer.checks.schedule import check_batch  # noqa: E402
from transfer.checks.values import check_values  # noqa: E402
from transfer.config import load_config  # noqa: E402
from transfer.modeling import register_models  # noqa: E402
from transfer.tasks import CONFIGS  # noqa: E402

CONFIG = CONFIGS / "coco" / "mask_rcnn_r50_fpn_1x_random.yaml"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("SOLVER.IMS_PER_BATCH", "0", "IMS_PER_BATCH is 0; give 1 or more"),
        ("SOLVER.IMS_PER_BATCH", "-8", "IMS_PER_BATCH is -8"),
        ("SOLVER.MAX_ITER", "0", "MAX_ITER is 0"),
        ("SOLVER.CHECKPOINT_PERIOD", "0", "CHECKPOINT_PERIOD is 0"),
        ("SOLVER.BASE_LR", "-0.02", "BASE_LR is -0.02"),
        ("SOLVER.MOMENTUM", "9.0", "MOMENTUM is 9"),
        ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosinLR", "must be one of WarmupMultiStepLR, WarmupCosineLR"),
        ("DATALOADER.SAMPLER_TRAIN", "Foo", "must be one of TrainingSampler"),
        ("DATALOADER.NUM_WORKERS", "-1", "NUM_WORKERS is -1"),
        ("TEST.DETECTIONS_PER_IMAGE", "0", "DETECTIONS_PER_IMAGE is 0"),
        ("MODEL.PIXEL_MEAN", "[123.675, 116.28]", r"PIXEL_MEAN is \[123.675, 116.28\]; give three numbers"),
    ],
)
def test_an_impossible_value_is_named(key: str, value: str, said: str) -> None:
    check_values(load_config(CONFIG))
    with pytest.raises(ValueError, match=said):
        check_values(load_config(CONFIG, [key, value]))


def test_the_program_refuses_it_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--check", "--config-file", str(CONFIG), "--datasets-root", str(tmp_path), "SOLVER.IMS_PER_BATCH", "0"]
    assert train_net.main(words) == 2
    assert "SOLVER.IMS_PER_BATCH is 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "typo", "near"),
    [
        ("MODEL.ROI_HEADS.NAME", "StandartROIHeads", "StandardROIHeads"),
        ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbon", "build_resnet_fpn_backbone"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "RPM", "RPN"),
    ],
)
def test_a_part_that_does_not_exist_is_named_with_the_nearest(key: str, typo: str, near: str) -> None:
    register_models()
    assert check_parts(load_config(CONFIG)) == []
    with pytest.raises(ValueError, match=f"{key} is {typo}, which Detectron2 does not have; did you mean {near}"):
        check_parts(load_config(CONFIG, [key, typo]))


def test_the_linear_rule_is_not_held_against_adamw() -> None:
    cfg = load_config(CONFIGS / "coco" / "sparse_rcnn_r50_300pro_3x_random.yaml", ["SOLVER.IMS_PER_BATCH", "2"])
    published = {"SOLVER.IMS_PER_BATCH": 16, "SOLVER.BASE_LR": 0.000025}
    assert check_batch(cfg, published, 8) == []
    cfg.TRANSFER.OPTIMIZER = "sgd"
    assert "linear scaling" in check_batch(cfg, published, 8)[0]
