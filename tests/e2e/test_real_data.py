"""The commands of docs/real-data.md, on a handful of the same real photos."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("DETCO_TEST_DATA", ROOT.parent / "shared/data"))
NEEDED = ("unlabelled_photos", "voc_blood_cells", "coco_animals")
NUM_UNLABELLED, NUM_LABELLED = 12, 4


def cut_photos(out: Path) -> None:
    out.mkdir()
    for photo in sorted((DATA / "unlabelled_photos").rglob("*.jpg"))[:NUM_UNLABELLED]:
        (out / photo.name).symlink_to(photo)


def cut_voc(out: Path) -> None:
    (out / "ImageSets/Main").mkdir(parents=True)
    for folder in ("Annotations", "JPEGImages"):
        (out / folder).symlink_to(DATA / "voc_blood_cells" / folder)
    for split in ("train", "val"):
        names = (DATA / f"voc_blood_cells/ImageSets/Main/{split}.txt").read_text().split()
        (out / f"ImageSets/Main/{split}.txt").write_text("\n".join(names[:NUM_LABELLED]))


def cut_coco(out: Path) -> None:
    out.mkdir()
    for split in ("train", "valid"):
        whole = json.loads((DATA / f"coco_animals/{split}.json").read_text())
        images = whole["images"][:NUM_LABELLED]
        kept = {image["id"] for image in images}
        annotations = [annotation for annotation in whole["annotations"] if annotation["image_id"] in kept]
        (out / f"{split}.json").write_text(json.dumps(whole | {"images": images, "annotations": annotations}))
        (out / split).symlink_to(DATA / "coco_animals" / split)


@pytest.mark.e2e
@pytest.mark.d2
@pytest.mark.realdata
@pytest.mark.skipif(
    not all((DATA / name).is_dir() for name in NEEDED),
    reason=f"needs {', '.join(NEEDED)} below {DATA}; set DETCO_TEST_DATA to the folder that holds them",
)
def test_the_documented_chain_runs_on_real_photos(tmp_path: Path, run_documented: Callable[..., list[str]]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    cut_photos(data / "unlabelled_photos")
    cut_voc(data / "voc_blood_cells")
    cut_coco(data / "coco_animals")

    outputs = run_documented(ROOT / "docs/real-data.md", {"DETCO_TEST_DATA": str(data)})

    assert "largest difference" in "".join(outputs)
    command = [sys.executable, "-m", "transfer.results.cli", str(tmp_path / "runs/real"), "--format", "csv"]
    rows = list(csv.DictReader(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()))
    methods = dict.fromkeys(("cells", "animals"), ("random", "moco_v2", "detco"))
    methods["animals_4conv1fc"] = ("random", "detco", "soco_fpn")
    for task, names in methods.items():
        for weights in names:
            results = json.loads((tmp_path / f"runs/real/{task}/{weights}/results.json").read_text())
            assert {"box_AP", "box_AP50"} <= results["metrics"].keys()
            assert results["weights"]["provenance"].get("method", "random") == weights
    assert len(rows) >= 9
