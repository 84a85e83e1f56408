"""The table of proposals as it lies on disk: one safetensors file of five flat columns, which nothing can execute.

Shape legend:
    N  images
    T  unique boxes of all images together

The columns of a whole data set are never copied: reading maps the file, and the kernel loads what is looked at. For
the 1.28 million images of ImageNet that is some 0.3 GB on disk, where the official JSON takes 1.1 GB, and 6.7 GB and a
minute to load in every process.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from detco.artifact import open_atomically
from pretrain.proposals.filters import NUM_STAGES

SCHEMA = 1
MAX_SIDE_PX = 65_535
"""What a uint16 holds. Longer images are kept without boxes."""

_HEADER_KEY = "detco_proposals"


class ProposalsError(ValueError):
    """A file of proposals that is damaged, of another kind, or not of these images; the message says what to do."""


class ImageProposals(NamedTuple):
    """What was found in one image.

    Attributes:
        width: Of the decoded image, in pixels; 0 if it could not be read.
        height: Likewise.
        boxes_image_px: (x1, y1, x2, y2), edges, in pixels of the decoded image, unique, in order of first appearance,
            uint16, shape (M, 4).
        multiplicity: How often the generator made each, at least 1, int32, shape (M,).
        stage: `pretrain.proposals.filters.Filtered.stage`, in [0, NUM_STAGES); the last is "nothing was left".
    """

    width: int
    height: int
    boxes_image_px: NDArray[np.uint16]
    multiplicity: NDArray[np.int32]
    stage: int


class Columns(NamedTuple):
    """The proposals of N images, one after the other.

    Attributes:
        boxes_image_px: Boxes of all images, uint16, shape (T, 4), as in `ImageProposals`.
        multiplicity: int32, shape (T,).
        offsets: The boxes of image i are [offsets[i], offsets[i + 1]), int64, shape (N + 1,).
        sizes: (width, height) of each image, int32, shape (N, 2).
        stages: uint8, shape (N,).
    """

    boxes_image_px: NDArray[np.uint16]
    multiplicity: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int32]
    stages: NDArray[np.uint8]


_DTYPES = {"boxes_image_px": "U16", "multiplicity": "I32", "offsets": "I64", "sizes": "I32", "stages": "U8"}
"""In the order of `Columns`, as safetensors names them."""


def no_proposals(width: int, height: int) -> ImageProposals:
    """The entry of an image without boxes."""
    return ImageProposals(
        width, height, np.empty((0, 4), dtype=np.uint16), np.empty(0, dtype=np.int32), stage=NUM_STAGES - 1
    )


def stack(rows: Sequence[ImageProposals]) -> Columns:
    """Put images one after the other; at least one."""
    return Columns(
        boxes_image_px=np.concatenate([row.boxes_image_px for row in rows]),
        multiplicity=np.concatenate([row.multiplicity for row in rows]),
        offsets=np.cumsum([0, *(len(row.boxes_image_px) for row in rows)], dtype=np.int64),
        sizes=np.array([(row.width, row.height) for row in rows], dtype=np.int32),
        stages=np.array([row.stage for row in rows], dtype=np.uint8),
    )


def join(tables: Sequence[Columns]) -> Columns:
    """Put tables one after the other; at least one."""
    starts = np.cumsum([0, *(len(table.boxes_image_px) for table in tables)], dtype=np.int64)
    offsets = [table.offsets[1:] + start for table, start in zip(tables, starts[:-1], strict=True)]
    return Columns(
        boxes_image_px=np.concatenate([table.boxes_image_px for table in tables]),
        multiplicity=np.concatenate([table.multiplicity for table in tables]),
        offsets=np.concatenate([np.zeros(1, dtype=np.int64), *offsets]),
        sizes=np.concatenate([table.sizes for table in tables]),
        stages=np.concatenate([table.stages for table in tables]),
    )


def count(columns: Columns) -> dict[str, Any]:
    """What a summary tells, as JSON types; reads every multiplicity.

    Returns:
        "images"; "boxes" without and "boxes_with_duplicates" with their multiplicity; "unreadable" images; "too_long"
        ones, with a side above MAX_SIDE_PX; "stages", how many of the others are in each filter stage.
    """
    longest = columns.sizes.max(axis=1)
    was_searched = (longest > 0) & (longest <= MAX_SIDE_PX)
    return {
        "images": len(columns.stages),
        "boxes": len(columns.multiplicity),
        "boxes_with_duplicates": int(columns.multiplicity.sum(dtype=np.int64)),
        "unreadable": int((longest == 0).sum()),
        "too_long": int((longest > MAX_SIDE_PX).sum()),
        "stages": np.bincount(columns.stages[was_searched], minlength=NUM_STAGES).tolist(),
    }


def write_columns(path: Path, kind: str, header: Mapping[str, Any], columns: Columns) -> None:
    """Write a table atomically; the same content gives the same bytes.

    Args:
        path: File to make or replace.
        kind: What it is, checked when it is read.
        header: JSON-able account of where the boxes come from.
        columns: The boxes.
    """
    # One entry: safetensors writes several in an order that differs from process to process.
    record = json.dumps({"format": kind, "schema": SCHEMA, "header": header}, allow_nan=False, sort_keys=True)
    content = {name: np.ascontiguousarray(column) for name, column in columns._asdict().items()}
    with open_atomically(path) as file:
        file.write(save(content, metadata={_HEADER_KEY: record}))


def read_columns(path: Path, kind: str) -> tuple[dict[str, Any], Columns]:
    """Map a table that `write_columns` wrote; reads the columns of images, but not those of boxes.

    Returns:
        The header, and arrays that refuse to be written to.

    Raises:
        FileNotFoundError: If there is no such file.
        ProposalsError: If it is damaged or of another kind or schema.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        # Its numpy half copies what it reads; its torch half maps it.
        with safe_open(path, framework="pt") as file:
            header = _read_header(path, kind, file.metadata() or {})
            _refuse(path, _misfit(file))
            arrays = {name: file.get_tensor(name).numpy() for name in _DTYPES}
    except SafetensorError as error:
        raise ProposalsError(
            f"{path} is not a complete safetensors file (truncated or another format): {error}"
        ) from error
    for array in arrays.values():
        array.setflags(write=False)
    columns = Columns(**arrays)
    _refuse(path, _fault(columns))
    return header, columns


def _refuse(path: Path, fault: str) -> None:
    if fault:
        raise ProposalsError(f"{path} is damaged: {fault}. Remove it and make it again")


def _read_header(path: Path, kind: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        record = json.loads(metadata.get(_HEADER_KEY, "null"))
    except (ValueError, RecursionError) as error:
        raise ProposalsError(f"{path} is damaged: its header is not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != kind:
        found = record.get("format") if isinstance(record, dict) else None
        raise ProposalsError(f"{path} is a safetensors file, but of format {found!r}, not {kind!r}")
    if record.get("schema") != SCHEMA:
        raise ProposalsError(
            f"{path} has schema {record.get('schema')!r}; only {SCHEMA} is known. Use the version that wrote it"
        )
    header = record.get("header")
    if not isinstance(header, dict):
        raise ProposalsError(f"{path} is damaged: it has no account of where its boxes come from")
    return header


def _misfit(file: Any) -> str:
    """What is wrong with the names, types and shapes of the arrays, or nothing; reads none of them."""
    names = set(file.keys())
    if names != set(_DTYPES):
        return f"it has the columns {sorted(names)}, not {sorted(_DTYPES)}"
    found = {name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape())) for name in _DTYPES}
    num_boxes, num_images = (math.prod(found[name][1]) for name in ("multiplicity", "stages"))
    shapes = ((num_boxes, 4), (num_boxes,), (num_images + 1,), (num_images, 2), (num_images,))
    for name, shape in zip(Columns._fields, shapes, strict=True):
        if found[name] != (_DTYPES[name], shape):
            return f"{name} is {found[name]}, not {(_DTYPES[name], shape)}"
    return ""


def _fault(columns: Columns) -> str:
    """What is wrong with the values, or nothing; looks at the columns of images alone."""
    offsets, num_boxes = columns.offsets, len(columns.multiplicity)
    if offsets[0] != 0 or offsets[-1] != num_boxes or (offsets[1:] < offsets[:-1]).any():
        return f"offsets do not rise from 0 to the {num_boxes:,} boxes"
    if (columns.sizes < 0).any():
        return "an image has a negative side"
    if (columns.stages >= NUM_STAGES).any():
        return f"a filter stage is not in [0, {NUM_STAGES})"
    return ""
