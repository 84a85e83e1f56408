"""Draws small data sets for trying out the whole chain: unlabelled images, Pascal VOC, COCO, LVIS and Cityscapes.

Writes into OUT, in the directory layouts of the real data sets:
    unlabelled/<shape>/*.jpg      for pretraining; the folders can serve as labels for probes
    VOC2007/ VOC2012/             trainval and, for 2007, test
    coco/                         train2017/ val2017/, annotations/{instances,person_keypoints}_{train,val}2017.json
    lvis/                         lvis_v1_{train,val}.json, of the images in coco/
    cityscapes/                   leftImg8bit/{train,val}/<city>/, gtFine/{train,val}/<city>/
So OUT is a value for $DETECTRON2_DATASETS, and OUT/unlabelled one for DATA.ROOT. On one machine the same seed gives the
same bytes.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from demo_cityscapes import CITYSCAPES_SPLITS, write_cityscapes
from demo_coco import COCO_SPLITS, Shot, draw_shots, instances
from demo_keypoints import person_keypoints
from demo_layouts import write_json
from demo_lvis import lvis
from demo_unlabelled import write_unlabelled
from demo_voc import VOC2007_SPLITS, VOC2012_SPLITS, write_voc

MARKER = ".detco_demo_data.json"
FOLDERS = ("unlabelled", "VOC2007", "VOC2012", "coco", "lvis", "cityscapes")
VERSION = 2
"""To be raised when the same seed begins to give other bytes, or more files."""

EXAMPLES = """examples:
  python tools/make_demo_data.py datasets/demo
  python tools/make_demo_data.py /tmp/demo --images 1000 --seed 7
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Draw small data sets (unlabelled, VOC, COCO, LVIS, Cityscapes) for trying out the whole chain.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="new or empty folder, or one of an earlier run of this")
    options = parser.add_argument_group("what to draw")
    options.add_argument("--images", type=int, default=256, help="number of unlabelled images (default: 256)")
    options.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default: 0)")
    arguments = parser.parse_args(argv)
    try:
        make_demo_data(arguments.out, arguments.images, arguments.seed)
    except (ValueError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make_demo_data(out: Path, num_images: int, seed: int) -> None:
    """Draw everything into `out`; do nothing if it is there already with these settings.

    Raises:
        ValueError: If a number is out of range.
        FileExistsError: If `out` holds anything that an earlier run did not make. Nothing has been changed then.
    """
    if num_images < 1 or seed < 0:
        raise ValueError(f"--images {num_images} must be at least 1, --seed {seed} at least 0")
    settings = {"version": VERSION, "images": num_images, "seed": seed}
    marker = out / MARKER
    if marker.is_file():
        if json.loads(marker.read_text()) == {**settings, "complete": True}:
            print(f"{out}: the demo data is there already")
            return
        for folder in FOLDERS:
            shutil.rmtree(out / folder, ignore_errors=True)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and was not made by this program; choose a new or empty folder")
    out.mkdir(parents=True, exist_ok=True)
    # Written first, so that an interrupted run can be told from a folder of someone's own.
    marker.write_text(json.dumps({**settings, "complete": False}))
    _draw(out, num_images, seed)
    marker.write_text(json.dumps({**settings, "complete": True}))
    print(f"{out}: {num_images} unlabelled images, VOC2007, VOC2012, COCO, LVIS and Cityscapes")


def _draw(out: Path, num_images: int, seed: int) -> None:
    labelled = (VOC2007_SPLITS, VOC2012_SPLITS, COCO_SPLITS, CITYSCAPES_SPLITS)
    total = num_images + sum(split.count for splits in labelled for split in splits.values())
    files = chain(
        write_unlabelled(out / "unlabelled", num_images, seed),
        write_voc(out / "VOC2007", 2007, VOC2007_SPLITS, seed),
        write_voc(out / "VOC2012", 2012, VOC2012_SPLITS, seed),
        _write_coco_and_lvis(out, seed),
        *(write_cityscapes(out / "cityscapes", name, split, seed) for name, split in CITYSCAPES_SPLITS.items()),
    )
    _show_progress(files, total)


def _write_coco_and_lvis(out: Path, seed: int) -> Iterator[Path]:
    """Write the images of COCO and all annotations of them; yields each image file."""
    shots: dict[str, list[Shot]] = {}
    for name, split in COCO_SPLITS.items():
        shots[name] = []
        folder = out / f"coco/{name}2017"
        for shot in draw_shots(folder, split, seed):
            shots[name].append(shot)
            yield folder / shot.image["file_name"]
        annotations = out / "coco/annotations"
        write_json(annotations / f"instances_{name}2017.json", instances(shots[name]))
        write_json(annotations / f"person_keypoints_{name}2017.json", person_keypoints(shots[name]))
    for name, content in lvis(shots["train"], shots["val"], seed).items():
        write_json(out / "lvis" / f"lvis_v1_{name}.json", content)


def _show_progress(files: Iterator[Path], total: int) -> None:
    on_terminal = sys.stdout.isatty()
    every = 10 if on_terminal else max(1, total // 4)
    for count, _ in enumerate(files, start=1):
        if count % every == 0 or count == total:
            print(f"drawing: {count}/{total} images", end="\r" if on_terminal else "\n", flush=True)
    if on_terminal:
        print()


if __name__ == "__main__":
    sys.exit(main())
