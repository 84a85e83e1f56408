"""Parts of COCO's training set for the few-label tasks: fixed, nested lists of image ids, one set of lists per seed.

Neither DetCo nor SoCo published theirs, nor how they drew them. Here the images stand in the order of a hash of seed
and image id, and a part is the beginning of that order: so a larger part contains the smaller ones (1 % in 2 % in 5 %
in 10 % in 50 %), no list depends on the version of a random generator, and everybody's are the same.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transfer import d2
from transfer.repairs import DatasetError

d2.require()

from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.data.datasets.coco import load_coco_json  # noqa: E402

WHOLE = "coco_2017_train"
PERCENTS = (1, 2, 5, 10, 50)
NAMES = {f"{WHOLE}_{percent}pct": percent for percent in PERCENTS}
"""Dataset name -> per cent of the images of coco_2017_train."""

TOOL = "python tools/make_coco_subsets.py"


def draw_subset(image_ids: Iterable[int], percent: float, seed: int) -> list[int]:
    """The ids of a part of the images, in ascending order.

    Args:
        image_ids: All ids, in any order.
        percent: In (0, 100]; the number of images is rounded to the nearest, and at least one.
        seed: Any integer; each gives another, independent order.
    """
    ranked = sorted(image_ids, key=lambda number: hashlib.sha256(f"{seed}:{number}".encode()).digest())
    return sorted(ranked[: max(1, round(len(ranked) * percent / 100))])


def list_file(root: Path, percent: int, seed: int) -> Path:
    """Where the ids of a part lie below the datasets' root."""
    return root / "coco" / "subsets" / f"train2017_{percent}pct_seed{seed}.txt"


def write_lists(root: Path, seeds: Sequence[int]) -> list[Path]:
    """Draw and write every part for these seeds, from coco/annotations/instances_train2017.json.

    A list that is there already is compared, never replaced.

    Returns:
        The files.

    Raises:
        FileNotFoundError: If there is no annotation file.
        DatasetError: If a list is there, but holds other ids: it was made from other annotations.
    """
    source = root / "coco" / "annotations" / "instances_train2017.json"
    if not source.is_file():
        raise FileNotFoundError(f"there is no {source}; give the folder that holds coco/")
    ids = [image["id"] for image in json.loads(source.read_bytes())["images"]]
    files = []
    for seed in seeds:
        for percent in PERCENTS:
            part, path = draw_subset(ids, percent, seed), list_file(root, percent, seed)
            if path.exists():
                if read_list(path) != part:
                    raise DatasetError(f"{path} holds other ids than {source} gives; remove it to draw it again")
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                head = f"# {len(part)} of the {len(ids)} images of {source.name}: {percent} %, seed {seed}\n"
                path.write_text(head + "".join(f"{number}\n" for number in part), encoding="utf-8")
            files.append(path)
    return files


def read_list(path: Path) -> list[int]:
    """The ids of a list, in its order; lines that begin with # are comments.

    Raises:
        DatasetError: If a line is not an id; names it.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    ids = [line for line in lines if line and not line.startswith("#")]
    if wrong := [line for line in ids if not line.isdecimal()]:
        raise DatasetError(f"{path} holds {wrong[0]!r}, which is no image id; remove the file and run: {TOOL} ROOT")
    return [int(line) for line in ids]


def register_subsets(root: Path, seed: int) -> None:
    """Let the names in NAMES mean the lists of this seed. Reads no file; coco_2017_train must be registered."""
    whole = MetadataCatalog.get(WHOLE)
    described = {key: value for key, value in whole.as_dict().items() if key != "name"}
    for name, percent in NAMES.items():
        for catalog in (DatasetCatalog, MetadataCatalog):
            if name in catalog:
                catalog.remove(name)
        path = list_file(root, percent, seed)
        DatasetCatalog.register(name, lambda name=name, path=path: _load(name, path))
        MetadataCatalog.get(name).set(**described, subset_file=str(path))


def describe_subsets(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """For the record of a run: of each part among these datasets its list, number of images and digest of the ids."""
    described: dict[str, dict[str, Any]] = {}
    for name in names:
        if name in NAMES:
            path = Path(MetadataCatalog.get(name).subset_file)
            ids = read_list(path)
            digest = hashlib.sha256("\n".join(map(str, ids)).encode()).hexdigest()
            described[name] = {"list": path.name, "images": len(ids), "sha256": digest}
    return described


def _load(name: str, path: Path) -> list[dict[str, Any]]:
    """Detectron2's records of the images of a list."""
    entry = MetadataCatalog.get(name)
    wanted = set(read_list(path))
    records: list[dict[str, Any]] = load_coco_json(entry.json_file, entry.image_root, name)
    part = [record for record in records if record["image_id"] in wanted]
    if len(part) != len(wanted):
        raise DatasetError(
            f"{len(wanted) - len(part)} of the {len(wanted)} ids of {path} are not in {entry.json_file}: the list was "
            f"made from other annotations; remove it and run: {TOOL} ROOT"
        )
    return part
