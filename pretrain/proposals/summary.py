"""What the maker of a store is told at its end."""

import numpy as np
from numpy.typing import NDArray

from pretrain.images import ImageList
from pretrain.proposals.columns import MAX_SIDE_PX
from pretrain.proposals.store import ProposalStore

MAX_NAMES = 5


def summary(store: ProposalStore, images: ImageList) -> str:
    """A few lines: images, boxes, what fell to which filter stage, what could not be read, and the file.

    Args:
        store: Finished.
        images: Those it was made of.
    """
    counts = store.header["counts"]
    num_images = counts["images"]
    unique, all_boxes = counts["boxes"] / num_images, counts["boxes_with_duplicates"] / num_images
    lines = [
        f"{store.path}: {num_images:,} images, {unique:.1f} boxes per image ({all_boxes:.1f} with duplicates), "
        f"{store.path.stat().st_size / 1e6:,.3f} MB"
    ]
    strict, relaxed, any_shape, none = counts["stages"]
    if "filters" in store.header["record"]:
        lines.append(
            f"filters: {strict:,} images with boxes that pass; of those without, {relaxed:,} take boxes of any size, "
            f"{any_shape:,} of any shape, {none:,} none (the whole image is the object)"
        )
    else:
        lines.append(f"without a box: {none:,} images (the whole image is the object)")
    longest = store.columns.sizes.max(axis=1)
    if counts["unreadable"]:
        names = _names(images, np.flatnonzero(longest == 0))
        lines.append(f"unreadable: {counts['unreadable']:,} images (training replaces them): {names}")
    if counts["too_long"]:
        names = _names(images, np.flatnonzero(longest > MAX_SIDE_PX))
        lines.append(f"without boxes, as a side is above {MAX_SIDE_PX:,} px: {counts['too_long']:,} images: {names}")
    return "\n".join(lines)


def _names(images: ImageList, indices: NDArray[np.intp]) -> str:
    names = ", ".join(images.name(int(index)) for index in indices[:MAX_NAMES])
    return names + (", ..." if len(indices) > MAX_NAMES else "")
