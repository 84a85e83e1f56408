"""The three variants of SoCo as a user runs them: images, proposals, pretraining, conversion, a detector, results."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BACKBONE = ["backbone.res2", "backbone.res5", "roi_heads.res5", "backbone.bottom_up.res5"]
PYRAMID = ["backbone.p2", "backbone.p5", "roi_heads.box_head"]
CHAINS = {
    "soco_c4": ("voc_faster_rcnn_c4", ["backbone"]),
    "soco_fpn": ("coco_mask_rcnn_fpn_4conv1fc", ["backbone", "fpn", "box_head"]),
    "soco_fpn_star": ("coco_retinanet", ["backbone", "fpn"]),
}


@pytest.fixture(scope="module")
def demo(load_tool: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    data, proposals = str(folder / "data"), str(folder / "proposals")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "tools")
        assert load_tool("make_demo_data").main([data, "--images", "4"]) == 0
    assert load_tool("generate_proposals").main([f"{data}/unlabelled", "-o", proposals, "--workers", "2"]) == 0
    return folder


@pytest.mark.e2e
@pytest.mark.d2
@pytest.mark.parametrize("method", CHAINS)
def test_what_soco_pretrains_reaches_the_detector_that_can_take_it(
    method: str, demo: Path, tmp_path: Path, run_small_here: Callable[..., str]
) -> None:
    task, parts = CHAINS[method]
    images = ("DATA.ROOT", str(demo / "data/unlabelled"), "DATA.PROPOSALS", str(demo / "proposals"))
    config = f"configs/pretrain/quick/{method}.yaml"
    run_small_here("detco-pretrain", "--config-file", config, "--num-gpus", "0", "--output-dir", "run", *images)

    report = run_small_here("convert-to-d2", "run/model.safetensors", "soco.pkl", "--verify")
    for place in BACKBONE if method == "soco_c4" else BACKBONE + PYRAMID:
        (line,) = [line for line in report.splitlines() if f" {place}: largest difference" in line]
        assert float(line.split()[-1]) <= 1e-5

    where = ("--num-gpus", "0", "--datasets-root", str(demo / "data"), "--output-dir", "detector")
    config = f"configs/transfer/quick/{task}_converted.yaml"
    run_small_here("detco-transfer", "--config-file", config, *where, "MODEL.WEIGHTS", "soco.pkl")

    results = json.loads((tmp_path / "detector/results.json").read_text())
    assert results["weights"]["provenance"]["method"] == method
    assert results["weights"]["transferred"] == parts
    assert "box_AP" in results["metrics"]
