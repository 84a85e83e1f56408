"""Selective search as SoCo's authors ran it: graph segmentation, then greedy merging of the most similar neighbours.

Shape legend:
    R  regions of the segmentation
    B  regions in all, first ones and merged ones: B < 2R
    C  bins of a region's histogram, 55: brightness 25, texture 3 x 10

What it reproduces, from hologerry/SoCo@624a70d selective_search/selective_search.py (a modified
AlpacaDB/selectivesearch), which made the boxes of the released weights:

* Segmentation by scikit-image's `felzenszwalb` on the image at its own resolution. Regions are numbered by their first
  pixel in reading order.
* Colour: a histogram of HSV with 25 bins over 0..255 per channel, of which H and S, in 0..1, fall into the first bin
  of all regions alike. Only V = max(R, G, B) tells regions apart, so only V is computed.
* Texture: local binary patterns (8 points, radius 1) of each RGB channel, 10 bins over 0..255.
* Neighbours: a corner of the later region's bounding box lies strictly inside the earlier region's. A region that
  pokes into a later one's box without taking in one of its corners is no neighbour; touching pixels play no part. A
  merged region inherits the neighbours of both its parts.
* Similarity: the overlap of the colour and texture histograms, + 1 - (joint area / image area)
  + 1 - (joint box - joint area) / image area. The joint areas cancel, and what is left of the last two is
  2 - joint box / image area. Here constants are left out.
* The boxes of all regions, first and merged ones, duplicates kept.

Departures: boxes are true extents, x2 - x1 = width (the official ones are one pixel short in both directions, and
shorter by another when read; the similarity keeps that, so that the same regions are merged). The terms of the
similarity are rounded to multiples of 2^-32: sums are then exact in any order, so the merges are the same on every
machine. Equal similarities: the pair with the newest region is merged, among these the one whose other region is the
newest; the official code takes the pair that it met last.
"""

import heapq
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

NUM_BRIGHTNESS_BINS = 25
NUM_TEXTURE_BINS = 10
LBP_POINTS = 8
LBP_RADIUS = 1.0

UNIT = 2.0**-32
"""Similarities are multiples of this. They are below 2^3, so 35 of a double's 53 bits hold them and any sum of them."""


def selective_search(image: NDArray[np.uint8], *, scale: float, sigma: float, min_size: int) -> NDArray[np.int64]:
    """Propose boxes for the objects of an image.

    Args:
        image: RGB, (H, W, 3).
        scale: Of the segmentation; higher means larger first regions.
        sigma: Blur before the segmentation, pixels.
        min_size: Least area of a first region, pixels.

    Returns:
        (B, 4), (x1, y1, x2, y2), edges in image pixels: first regions in reading order, then merged ones as they arose.

    Raises:
        ImportError: If scikit-image is missing; `backends.check_available` says what to do.
    """
    from skimage.segmentation import felzenszwalb  # an optional dependency

    labels = felzenszwalb(image, scale=scale, sigma=sigma, min_size=min_size)
    return group(labels, image.max(2), texture_codes(image))


def texture_codes(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Local binary patterns of each channel of an image (H, W, 3): (H, W, 3) in 0..255."""
    from skimage.feature import local_binary_pattern  # an optional dependency

    channels = [local_binary_pattern(channel, LBP_POINTS, LBP_RADIUS) for channel in np.moveaxis(image, 2, 0)]
    return np.stack(channels, axis=2).astype(np.uint8)


def group(labels: NDArray[np.int64], brightness: NDArray[np.uint8], texture: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Merge the most similar neighbours until no region has one.

    Args:
        labels: (H, W), region of each pixel: 0..R-1, in any order, each of them somewhere.
        brightness: (H, W), V of HSV in 0..255.
        texture: (H, W, 3), local binary patterns of the RGB channels.

    Returns:
        (B, 4), boxes of all regions, as those of `selective_search`.
    """
    labels = _number_in_reading_order(labels)
    regions = _Regions(labels, brightness, texture)
    neighbours = dict(enumerate(_first_neighbours(regions.boxes[: regions.count])))
    candidates = {region: _best_first(regions, region, around) for region, around in neighbours.items()}
    heads: list[tuple[float, int, int]] = []  # (-similarity, -newer region, -older region): the best pair is the least

    def offer_next(newer: int) -> None:
        for similarity, older in candidates[newer]:
            if older in neighbours:  # else it has been merged since
                heapq.heappush(heads, (-similarity, -newer, -older))
                return

    for region in neighbours:
        offer_next(region)
    while heads:
        _, minus_newer, minus_older = heapq.heappop(heads)
        newer, older = -minus_newer, -minus_older
        if newer not in neighbours:
            continue
        if older not in neighbours:
            offer_next(newer)
            continue
        merged = regions.merge(older, newer)
        del candidates[older], candidates[newer]  # on noise they are long
        around = (neighbours.pop(older) | neighbours.pop(newer)) - {older, newer}
        for region in around:
            theirs = neighbours[region]
            theirs.discard(older)
            theirs.discard(newer)
            theirs.add(merged)
        neighbours[merged] = around
        candidates[merged] = _best_first(regions, merged, around)
        offer_next(merged)
    return regions.boxes[: regions.count]


class _Regions:
    """Arrays with a row per region; a merged one takes the next free row.

    Attributes:
        count: Rows in use.
        boxes: (2R, 4) int64, edges.
    """

    def __init__(self, labels: NDArray[np.int64], brightness: NDArray[np.uint8], texture: NDArray[np.uint8]) -> None:
        self.count = int(labels.max()) + 1
        self.boxes = np.zeros((2 * self.count, 4), np.int64)
        self.boxes[: self.count] = _boxes(labels, self.count)
        self._image_area = labels.size
        self._pixels = np.zeros((2 * self.count, NUM_BRIGHTNESS_BINS + 3 * NUM_TEXTURE_BINS), np.int32)
        self._pixels[: self.count] = np.concatenate(
            [
                _histograms(labels, brightness, NUM_BRIGHTNESS_BINS),
                *(_histograms(labels, channel, NUM_TEXTURE_BINS) for channel in np.moveaxis(texture, 2, 0)),
            ],
            axis=1,
        )
        self._shares = np.zeros(self._pixels.shape)
        self._shares[: self.count] = _shares(self._pixels[: self.count])

    def similarity(self, region: int, others: NDArray[np.int64]) -> NDArray[np.float64]:
        """How well `region` goes with each of `others`, a multiple of `UNIT`."""
        common = np.minimum(self._shares[region], self._shares[others]).sum(axis=1)
        low = np.minimum(self.boxes[region, :2], self.boxes[others, :2])
        high = np.maximum(self.boxes[region, 2:], self.boxes[others, 2:])
        joint_box = (high - low - 1).prod(axis=1)  # from first to last pixel, one short, as the authors count
        similarity: NDArray[np.float64] = common - _to_unit(joint_box / self._image_area)
        return similarity

    def merge(self, one: int, other: int) -> int:
        """Add the union of two regions; returns its row."""
        new = self.count
        self.boxes[new, :2] = np.minimum(self.boxes[one, :2], self.boxes[other, :2])
        self.boxes[new, 2:] = np.maximum(self.boxes[one, 2:], self.boxes[other, 2:])
        self._pixels[new] = self._pixels[one] + self._pixels[other]
        self._shares[new] = _shares(self._pixels[new])
        self.count += 1
        return new


def _best_first(regions: _Regions, newer: int, neighbours: set[int]) -> Iterator[tuple[float, int]]:
    """(similarity, region) of the neighbours that are older than `newer`, the most similar first."""
    older = np.array([region for region in neighbours if region < newer], np.int64)
    similarity = regions.similarity(newer, older)
    order = np.lexsort((older, similarity))[::-1]
    return zip(similarity[order].tolist(), older[order].tolist(), strict=True)


def _first_neighbours(boxes: NDArray[np.int64]) -> list[set[int]]:
    """For each region the regions that share a corner with it, by the rule of the module's docstring."""
    neighbours: list[set[int]] = [set() for _ in boxes]
    left, top, right, bottom = boxes.T - np.array([[0], [0], [1], [1]])  # first and last pixels
    # In reading order tops never fall, so the boxes that begin above the bottom of this one are those up to here.
    ends = np.searchsorted(top, bottom)
    for earlier, end in enumerate(ends.tolist()):
        later = slice(earlier + 1, end)
        is_beside = _is_between(left[later], left[earlier], right[earlier])
        is_beside |= _is_between(right[later], left[earlier], right[earlier])
        is_level = _is_between(top[later], top[earlier], bottom[earlier])
        is_level |= _is_between(bottom[later], top[earlier], bottom[earlier])
        for region in (np.flatnonzero(is_beside & is_level) + earlier + 1).tolist():
            neighbours[earlier].add(region)
            neighbours[region].add(earlier)
    return neighbours


def _is_between(values: NDArray[np.int64], low: np.int64, high: np.int64) -> NDArray[np.bool_]:
    return (low < values) & (values < high)


def _number_in_reading_order(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number regions by their first pixel, row by row (as the segmentation of scikit-image 0.26 does itself)."""
    first = np.full(int(labels.max()) + 1, labels.size)
    np.minimum.at(first, labels.ravel(), np.arange(labels.size))
    rank = np.empty_like(first)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[labels]


def _boxes(labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """(R, 4), edges of each region's bounding box."""
    rows, columns = (places.ravel() for places in np.indices(labels.shape))
    low, high = np.full((2, count), labels.size), np.zeros((2, count), np.int64)
    for axis, places in enumerate((columns, rows)):
        np.minimum.at(low[axis], labels.ravel(), places)
        np.maximum.at(high[axis], labels.ravel(), places + 1)
    boxes: NDArray[np.int64] = np.concatenate([low, high]).T
    return boxes


def _histograms(labels: NDArray[np.int64], values: NDArray[np.uint8], num_bins: int) -> NDArray[np.int64]:
    """Pixels of each region in equal bins over 0..255, 255 in the last: (R, num_bins)."""
    bin_of_value = np.minimum(np.arange(256) * num_bins // 255, num_bins - 1)
    num_regions = int(labels.max()) + 1
    counts = np.bincount((labels * num_bins + bin_of_value[values]).ravel(), minlength=num_regions * num_bins)
    return counts.reshape(num_regions, num_bins)


def _shares(pixels: NDArray[np.int32]) -> NDArray[np.float64]:
    """Histograms (..., C) as shares of the region's pixels, which are the sum over the bins of one channel."""
    return _to_unit(pixels / pixels[..., :NUM_BRIGHTNESS_BINS].sum(axis=-1, keepdims=True))


def _to_unit(values: NDArray[np.float64]) -> NDArray[np.float64]:
    rounded: NDArray[np.float64] = np.rint(values / UNIT) * UNIT
    return rounded
