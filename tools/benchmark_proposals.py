"""What each generator of proposals costs and finds on your images: a markdown table.

CPU seconds per image (all threads; decoding is not counted), also as a multiple of the time that scikit-image's
segmentation takes alone; boxes per image as the generator makes them, after the filter, and without duplicates; how
many images needed which stage of the filter. With annotations in COCO's format also how well the ground truth is
covered: for every ground-truth box the best overlap (IoU) of any proposal, its mean (ABO) and the shares of at least
0.5 and 0.7, once over the boxes that pass the filter themselves and once over all. Backends that are not installed
are named and left out.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# Run as a file, Python looks for packages beside it; those of the suite lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch
from benchmarking import machine_name
from numpy.typing import NDArray

from detco.views import decode
from pretrain.images import ImageList, list_images
from pretrain.proposals.backends import BACKENDS, SearchParams, check_available, propose, versions
from pretrain.proposals.filters import NUM_STAGES, FilterParams, filter_boxes, passing

EPILOG = """examples:
  python tools/benchmark_proposals.py photos
  python tools/benchmark_proposals.py data/coco/val2017 --coco-json data/coco/annotations/instances_val2017.json
  python tools/benchmark_proposals.py photos --backends skimage --scale 500 --min-size 10      the paper's parameters
"""
DEFAULTS = SearchParams()
PARSER = argparse.ArgumentParser(
    description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
)
PARSER.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="folders of images or .txt listings")
PARSER.add_argument("--coco-json", type=Path, metavar="FILE", help="ground truth; its file names end the images' paths")
PARSER.add_argument("--num-images", type=int, default=100, help="spread evenly over the images (default: 100)")
PARSER.add_argument("--backends", nargs="+", choices=tuple(BACKENDS), help="(default: all that are installed)")
PARSER.add_argument("--scale", type=float, default=DEFAULTS.scale, help="of skimage (default: 300)")
PARSER.add_argument("--min-size", type=int, default=DEFAULTS.min_size, help="of skimage, pixels (default: 100)")
PARSER.add_argument("--max-side", type=int, help="shrink longer images to this before the search (default: never)")
PARSER.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")


class Photo(NamedTuple):
    """An image, RGB (H, W, 3), and its ground-truth boxes (G, 4), edges in image pixels."""

    pixels: NDArray[np.uint8]
    truth_image_px: NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How well proposals cover ground-truth boxes."""

    num_boxes: int
    average_best_overlap: float
    recall_50: float
    recall_70: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """One row: means over the images, the search's parameters and the libraries' versions."""

    search: dict[str, object]
    versions: dict[str, str]
    num_images: int
    cpu_s: float
    segmentation_cpu_s: float | None
    raw: float
    filtered: float
    unique: float
    images_per_stage: list[int]
    truth_that_passes: Coverage | None
    all_truth: Coverage | None


def read_photos(places: Sequence[tuple[ImageList, int]], truth: dict[str, NDArray[np.float64]]) -> list[Photo]:
    """Decode them, with the boxes of the annotation whose file name ends the path."""
    photos = []
    for images, index in places:
        pixels = decode(images.read(index)).permute(1, 2, 0).contiguous().numpy()
        parts = images.name(index).split("/")
        names = ["/".join(parts[start:]) for start in range(len(parts))]
        boxes = next((truth[name] for name in names if name in truth), np.zeros((0, 4)))
        photos.append(Photo(pixels, boxes))
    return photos


def read_truth(coco_json: Path) -> dict[str, NDArray[np.float64]]:
    """Ground-truth boxes (G, 4), edges, by file name; crowds and boxes without an area are left out."""
    content = json.loads(coco_json.read_bytes())
    boxes: dict[int, list[list[float]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        if not annotation.get("iscrowd", 0) and width > 0 and height > 0:
            boxes[annotation["image_id"]].append([x, y, x + width, y + height])
    return {image["file_name"]: np.array(boxes[image["id"]]).reshape(-1, 4) for image in content["images"]}


def measure(photos: Sequence[Photo], search: SearchParams, segmentation_cpu_s: float | None) -> Measured:
    """Search and filter all photos in this process."""
    filters = FilterParams()
    stages, counts = [0] * NUM_STAGES, np.zeros(3)
    overlaps: list[NDArray[np.float64]] = []
    is_fit: list[NDArray[np.bool_]] = []
    cpu_s = 0.0
    propose(photos[0].pixels, search)  # imports and first allocations
    for pixels, truth in photos:
        start_s = time.process_time()
        raw = propose(pixels, search)
        cpu_s += time.process_time() - start_s
        height, width = pixels.shape[:2]
        filtered = filter_boxes(raw, width, height, filters)
        stages[filtered.stage] += 1
        counts += len(raw), filtered.multiplicity.sum(), len(filtered.boxes)
        overlaps.append(best_overlaps(truth, filtered.boxes))
        is_fit.append(passing(truth, width, height, filters)[0])
    best, fit = np.concatenate(overlaps), np.concatenate(is_fit)
    raw_mean, filtered_mean, unique_mean = (counts / len(photos)).tolist()
    return Measured(
        search=search.as_dict(),
        versions=versions(search),
        num_images=len(photos),
        cpu_s=cpu_s / len(photos),
        segmentation_cpu_s=segmentation_cpu_s,
        raw=raw_mean,
        filtered=filtered_mean,
        unique=unique_mean,
        images_per_stage=stages,
        truth_that_passes=coverage(best[fit]),
        all_truth=coverage(best),
    )


def best_overlaps(truth: NDArray[np.float64], boxes: NDArray[np.int64]) -> NDArray[np.float64]:
    """For each ground-truth box (G, 4) the greatest IoU with any of `boxes` (M, 4): (G,), 0 if there is none."""
    low = np.maximum(truth[:, None, :2], boxes[None, :, :2])
    high = np.minimum(truth[:, None, 2:], boxes[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(-1)
    areas_truth, areas = ((group[:, 2:] - group[:, :2]).prod(-1) for group in (truth, boxes))
    overlap = common / (areas_truth[:, None] + areas[None] - common)
    best: NDArray[np.float64] = overlap.max(axis=1, initial=0.0)
    return best


def coverage(best: NDArray[np.float64]) -> Coverage | None:
    """Summary of the best overlaps (G,); None if G is 0."""
    if not len(best):
        return None
    return Coverage(len(best), float(best.mean()), float((best >= 0.5).mean()), float((best >= 0.7).mean()))


def time_segmentation(photos: Sequence[Photo], params: SearchParams) -> float | None:
    """CPU seconds per image of scikit-image's segmentation alone; None if it is not installed."""
    try:
        check_available(SearchParams())
    except ValueError:
        return None
    from skimage.segmentation import felzenszwalb  # an optional dependency

    felzenszwalb(photos[0].pixels, scale=params.scale, sigma=params.sigma, min_size=params.min_size)
    start_s = time.process_time()
    for photo in photos:
        felzenszwalb(photo.pixels, scale=params.scale, sigma=params.sigma, min_size=params.min_size)
    return (time.process_time() - start_s) / len(photos)


def as_table(rows: Sequence[Measured]) -> str:
    """Markdown, one row per backend; the columns of ground truth only if there is any."""
    heading = ["backend", "CPU s / image", "images/s per core", "x segmentation alone", "raw / filtered / unique"]
    heading.append("images at stage 0 / 1 / 2 / 3")
    if rows[0].all_truth:
        num_fit = rows[0].truth_that_passes.num_boxes if rows[0].truth_that_passes else 0
        heading.append(f"ABO / R@.5 / R@.7 of {num_fit} boxes that pass the filter")
        heading.append(f"... of all {rows[0].all_truth.num_boxes} boxes")
    lines = [heading, ["---"] * len(heading)]
    for row in rows:
        name = ", ".join([str(row.search["backend"])] + [f"{key} {row.search[key]:g}" for key in _told(row.search)])
        ratio = "-" if row.segmentation_cpu_s is None else f"{row.cpu_s / row.segmentation_cpu_s:.2f}"
        cells = [name, f"{row.cpu_s:.3f}", f"{1 / row.cpu_s:.2f}", ratio]
        cells.append(f"{row.raw:.0f} / {row.filtered:.1f} / {row.unique:.1f}")
        cells.append(" / ".join(str(count) for count in row.images_per_stage))
        if rows[0].all_truth:
            cells += [_as_cell(row.truth_that_passes), _as_cell(row.all_truth)]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _told(search: dict[str, object]) -> list[str]:
    return [key for key, value in search.items() if key != "backend" and value is not None]


def _as_cell(found: Coverage | None) -> str:
    if found is None:
        return "-"
    return f"{found.average_best_overlap:.3f} / {found.recall_50:.3f} / {found.recall_70:.3f}"


def chosen_searches(args: argparse.Namespace) -> list[SearchParams]:
    """The backends asked for, or all that are installed; says which are left out and why."""
    searches = []
    for backend in args.backends or BACKENDS:
        own = {"scale": args.scale, "min_size": args.min_size} if backend == "skimage" else {}
        search = SearchParams(backend=backend, max_side=args.max_side, **own)
        try:
            check_available(search)
        except ValueError as reason:
            if args.backends:
                raise
            print(f"{backend} is left out: {reason}", file=sys.stderr)
        else:
            searches.append(search)
    if not searches:
        raise ValueError("no backend is installed: see the reasons above")
    return searches


def main(argv: Sequence[str] | None = None) -> int:
    """Print the machine, the versions and the table."""
    args = PARSER.parse_args(argv)
    cv2.setNumThreads(1)
    try:
        searches = chosen_searches(args)
        places = [(images, index) for images in map(list_images, args.images) for index in range(len(images))]
        chosen = np.linspace(0, len(places) - 1, min(args.num_images, len(places))).round().astype(int).tolist()
        truth = read_truth(args.coco_json) if args.coco_json else {}
        photos = read_photos([places[index] for index in chosen], truth)
    except (ValueError, FileNotFoundError) as error:
        PARSER.error(str(error))
    if truth and not any(len(photo.truth_image_px) for photo in photos):
        PARSER.error(f"{args.coco_json} has boxes for none of the {len(photos)} images: give the folder it belongs to")

    segmentation_cpu_s = time_segmentation(photos, SearchParams(scale=args.scale, min_size=args.min_size))
    rows = [measure(photos, search, segmentation_cpu_s) for search in searches]
    libraries = {name: version for row in rows for name, version in row.versions.items()}
    named = ", ".join(f"{name} {version}" for name, version in sorted(libraries.items()))
    megapixels = np.mean([photo.pixels.shape[0] * photo.pixels.shape[1] for photo in photos]) / 1e6
    machine = machine_name(torch.device("cpu"))
    print(f"{machine}; {named}; {len(photos)} images of {megapixels:.2f} megapixels in the mean\n")
    print(as_table(rows))
    if args.json:
        content = {"machine": machine, "rows": [dataclasses.asdict(row) for row in rows]}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
