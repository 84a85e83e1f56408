"""detco-transfer killed with SIGKILL in the middle of an iteration, and resumed."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from transfer import d2

if d2.info() is None:
    pytest.skip("needs Detectron2 (python tools/install_detectron2.py)", allow_module_level=True)

pytestmark = pytest.mark.d2

ROOT = Path(__file__).parents[2]
TINY = {
    "INPUT.MIN_SIZE_TRAIN": "(48,64,80)",
    "INPUT.MAX_SIZE_TRAIN": "96",
    "INPUT.MIN_SIZE_TEST": "64",
    "INPUT.MAX_SIZE_TEST": "96",
    "DATALOADER.NUM_WORKERS": "0",
    "SOLVER.IMS_PER_BATCH": "2",
    "SOLVER.MAX_ITER": "6",
    "SOLVER.STEPS": "(5,)",
    "SOLVER.CHECKPOINT_PERIOD": "3",
    "TEST.PRECISE_BN.ENABLED": "False",
}
# The command with a mapper that writes down every image and the random state it met, and kills the process at the
# image of that number (0: never). The state comes first, and is not drawn from.
PROGRAM = """
import os, signal, sys, zlib
import numpy as np
import transfer.trainer as trainer
from transfer import train_net
from detectron2.data import DatasetMapper
record, kill_at = open(sys.argv[1], "w"), int(sys.argv[2])
build = trainer.build_mapper
def spying(cfg):
    mapper, seen = build(cfg) or DatasetMapper(cfg, True), []
    def spy(item):
        name, keys, place, *_ = np.random.get_state()
        record.write(f"{item['image_id']} {zlib.crc32(keys.tobytes())}-{place}\\n")
        record.flush()
        seen.append(item)
        if len(seen) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return mapper(item)
    return spy
trainer.build_mapper = spying
sys.exit(train_net.main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """COCO-style data of twelve images, as --train-data wants them."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(12):
        Image.new("RGB", (96, 80), (20 * number, 90, 200)).save(folder / f"{number}.jpg")
    box = {"category_id": 1, "bbox": [16, 20, 44, 44], "area": 1936, "iscrowd": 0}
    content = {
        "images": [{"id": number, "file_name": f"{number}.jpg", "width": 96, "height": 80} for number in range(12)],
        "annotations": [{**box, "id": number + 1, "image_id": number} for number in range(12)],
        "categories": [{"id": 1, "name": "fox"}],
    }
    (folder / "data.json").write_text(json.dumps(content))
    return f"{folder}/data.json:{folder}"


def run(data: str, folder: Path, *more: str, kill_at: int = 0) -> tuple[int, list[str], list[str]]:
    """Exit code, image ids in the order of training, and the random states that their augmentation began with."""
    record = folder.with_name(f"{folder.name}_seen.txt")
    config = str(ROOT / "configs/transfer/quick/coco_retinanet_random.yaml")
    options = ["--config-file", config, "--train-data", data, "--val-data", data, "--output-dir", str(folder)]
    values = [word for pair in TINY.items() for word in pair]
    command = [sys.executable, "-c", PROGRAM, str(record), str(kill_at), *options, "--num-gpus", "0", *more, *values]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seen = [line.split() for line in record.read_text().splitlines()]
    return finished.returncode, [image for image, _ in seen], [state for _, state in seen]


def test_a_killed_run_goes_on_with_the_images_that_come_next(data: str, tmp_path: Path) -> None:
    code, before, states_before = run(data, tmp_path / "killed", kill_at=8)  # after the checkpoint of 3 iterations
    assert code == -signal.SIGKILL
    (tmp_path / "killed" / "config.yaml").write_text("")  # as if Detectron2 had been writing it
    code, after, states_after = run(data, tmp_path / "killed", "--resume")
    assert code == 0
    assert after[:2] == before[6:8]
    assert sorted(before[:6] + after, key=int) == [str(number) for number in range(12)]  # an epoch
    assert not set(states_after) & set(states_before)
    log = (tmp_path / "killed" / "log.txt").read_text()
    assert "Resuming after iteration 3 of 6." in log
    assert "was cut short by a kill" in log
