"""The file format of the official code: one JSON object, from an image's file stem to a list of [x, y, width, height].

The list repeats a box as often as the generator made it; a store has it once, with its multiplicity. Exporting puts
the copies of a box side by side, at the place of the first, so that importing again gives the same store.

Source: hologerry/SoCo@624a70d selective_search/filter_ss_proposals_json.py. Departures: a box ends at x + width, as
its format says, where the official loader reads x + width - 1 and its generator wrote one pixel less than the true
extent; and stems that two images share are refused, where there both are given the boxes of one.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detco.artifact import open_atomically
from pretrain.images import ImageList
from pretrain.proposals.columns import MAX_SIDE_PX, ImageProposals, ProposalsError, no_proposals, stack
from pretrain.proposals.filters import FilterParams, filter_boxes
from pretrain.proposals.folder import ProposalFolder
from pretrain.proposals.image_sizes import decoded_size
from pretrain.proposals.progress import Progress
from pretrain.proposals.store import ProposalStore, file_digest

MAX_NAMES_IN_MESSAGE = 5
NUM_READERS = 16
"""Threads that read images: they wait for the disk most of the time."""
IMAGES_AT_ONCE = 10_000

KEEP_ALL = FilterParams(min_side_px=1, max_aspect=math.inf, min_size=0.0, max_size=1.0)
"""The boxes of such a file have been filtered already."""


def import_json(file: Path, images: ImageList, path: Path) -> ProposalStore:
    """Make the store of `images` in the folder `path` from an official file. Its text is held in memory.

    Returns:
        The new store, or the one that was made before of the same file and images.

    Raises:
        FileNotFoundError: If there is no such file.
        ProposalsError: If it is not of this format, lacks images, two images share a stem, or a box leaves its image.
        ValueError: If the folder holds other proposals, cannot be written to, or has too little room.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file} to take proposals from")
    stems = unique_stems(images)
    record = {
        "images": {"digest": images.digest, "count": len(images)},
        "search": {"backend": "official_json", "sha256": file_digest(file)},
    }
    folder = ProposalFolder(path, record)
    store = folder.finished_store()
    if store:
        return store
    folder.claim()
    try:
        rows = _read_rows(file, stems, images)
    except ProposalsError:
        folder.give_up()  # so that the corrected file, which is another record, can be imported here
        raise
    return folder.write_store(stack(rows))


def _read_rows(file: Path, stems: Sequence[str], images: ImageList) -> list[ImageProposals]:
    """What an official file says of each image, which `stems` names.

    Raises:
        ProposalsError: If it is not of this format, lacks images, or a box leaves its image.
    """
    boxes_of = _read_boxes(file, set(stems))
    _refuse("has no entry for", file, [stem for stem in stems if stem not in boxes_of], len(stems))
    sizes = _decoded_sizes(images)
    rows: list[ImageProposals] = []
    outlying: list[str] = []
    for stem, (width, height) in zip(stems, sizes, strict=True):
        try:
            rows.append(_row(boxes_of[stem], width, height))
        except ValueError as error:
            outlying.append(f"{stem} ({error})")
    _refuse("does not fit", file, outlying, len(stems))
    return rows


def export_json(store: ProposalStore, images: ImageList, file: Path) -> None:
    """Write a store as an official file, atomically.

    Raises:
        ProposalsError: If the store is damaged or of other images, or two images share a stem.
    """
    if store.images_digest != images.digest or len(store) != len(images):
        raise ProposalsError(
            f"{store.path} holds the proposals of {len(store):,} other images than the {len(images):,} of {images.root}"
        )
    stems = unique_stems(images)
    with open_atomically(file) as stream:
        for index, stem in enumerate(stems):
            entry = store.entry(index)
            boxes = np.repeat(entry.boxes_image_px.astype(np.int64), entry.multiplicity, axis=0)
            boxes[:, 2:] -= boxes[:, :2]
            stream.write(f"{', ' if index else '{'}{json.dumps(stem)}: {json.dumps(boxes.tolist())}".encode())
        stream.write(b"}\n")


def unique_stems(images: ImageList) -> list[str]:
    """File names without folder and suffix, by which the format knows images.

    Raises:
        ProposalsError: If two images share one.
    """
    stems = [PurePath(images.name(index)).stem for index in range(len(images))]
    counts = Counter(stems)
    shared = [stem for stem, count in counts.items() if count > 1]
    if shared:
        raise ProposalsError(
            f"the official JSON knows images by their file stems, and {len(shared):,} stems of {images.root} belong to "
            f"several images: {_first(shared)}. Give these files different names"
        )
    return stems


def _decoded_sizes(images: ImageList) -> list[tuple[int, int]]:
    """(width, height) of each."""
    progress = Progress("image sizes", len(images))
    sizes: list[tuple[int, int]] = []
    with ThreadPoolExecutor(NUM_READERS) as readers:
        # In stretches, as the readers take up all that they are given at once.
        for start in range(0, len(images), IMAGES_AT_ONCE):
            stretch = range(start, min(start + IMAGES_AT_ONCE, len(images)))
            for size in readers.map(partial(_decoded_size, images), stretch):
                sizes.append(size)
                progress.count()
    return sizes


def _decoded_size(images: ImageList, index: int) -> tuple[int, int]:
    try:
        return decoded_size(images.read(index))
    except OSError:
        return 0, 0


def _row(boxes_xywh: NDArray[np.int64], width: int, height: int) -> ImageProposals:
    if width == 0 or max(width, height) > MAX_SIDE_PX:
        return no_proposals(width, height)
    boxes = np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)
    kept = filter_boxes(boxes, width, height, KEEP_ALL)
    return ImageProposals(width, height, kept.boxes.astype(np.uint16), kept.multiplicity.astype(np.int32), kept.stage)


def _read_boxes(file: Path, wanted: set[str]) -> dict[str, NDArray[np.int64]]:
    """The [x, y, width, height] of the wanted stems, int64, shape (R, 4) each."""
    boxes_of: dict[str, NDArray[np.int64]] = {}
    try:
        for stem, value in _entries(file.read_text(encoding="utf-8")):
            if stem in boxes_of:
                raise ValueError(f"{stem!r} stands there twice")
            if stem in wanted:
                boxes_of[stem] = _as_boxes(stem, value)
    except (ValueError, RecursionError) as error:
        raise ProposalsError(
            f"{file} is not a file of proposals in the official format, one object of "
            f'{{"file stem": [[x, y, width, height], ...], ...}}: {error}'
        ) from error
    return boxes_of


def _entries(text: str) -> Iterator[tuple[str, Any]]:
    """The pairs of a JSON object one by one: all at once, as Python objects, take six times the memory of the text."""
    decode = json.JSONDecoder().raw_decode

    def skip(mark: str, position: int) -> int:
        match = re.compile(rf"\s*({mark})\s*").match(text, position)
        if not match:
            raise ValueError(f"expected {mark} at character {position:,}, found {text[position : position + 20]!r}")
        return match.end()

    position = skip(r"\{", 0)
    while not text.startswith("}", position):
        stem, position = decode(text, position)
        if not isinstance(stem, str):
            raise ValueError(f"{stem!r} is no file stem")
        value, position = decode(text, skip(":", position))
        yield stem, value
        position = skip(r",|(?=\})", position)
    if text[position + 1 :].strip():
        raise ValueError("there is more after the object")


def _as_boxes(stem: str, value: Any) -> NDArray[np.int64]:
    try:
        boxes = np.array(value if value else np.empty((0, 4)), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{stem!r} has no list of boxes ({error})") from error
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not (np.abs(boxes) < 2**31).all() or (boxes != boxes.round()).any():
        raise ValueError(f"{stem!r} has boxes that are not four whole numbers each")
    return boxes.astype(np.int64)


def _refuse(what: str, file: Path, names: Sequence[str], num_images: int) -> None:
    if names:
        raise ProposalsError(
            f"{file} {what} {len(names):,} of the {num_images:,} images: {_first(names)}. It must have been made of "
            f"these very images; correct IMAGES or take another file"
        )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMES_IN_MESSAGE]) + (", ..." if len(names) > MAX_NAMES_IN_MESSAGE else "")
