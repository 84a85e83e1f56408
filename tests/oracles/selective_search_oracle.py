"""Greedy grouping of regions, one Python object per region and a full look at all pairs before every merge.

Restated from the description in spec and paper (Uijlings et al., IJCV 2013, Sec. 3; SoCo's changes in the docstring of
`pretrain.proposals.selective_search`). Slow, obvious, and shares no code with the suite. All four terms of the
similarity and all histogram channels are spelled out, in whole numbers of 2^-32.
"""

import colorsys
from dataclasses import dataclass

ONE = 2**32


@dataclass
class Region:
    """xs, ys: first and last pixel; colour: 3 lists of 25 counts; texture: 3 lists of 10 counts."""

    size: int
    xs: tuple[int, int]
    ys: tuple[int, int]
    colour: list[list[int]]
    texture: list[list[int]]

    def box(self) -> tuple[int, int, int, int]:
        return (self.xs[0], self.ys[0], self.xs[1] + 1, self.ys[1] + 1)


def group_slowly(labels, image, texture) -> list[tuple[int, int, int, int]]:
    """Boxes (x1, y1, x2, y2), edges, of first and merged regions; nested lists or arrays (H, W) and (H, W, 3)."""
    regions = first_regions(labels, image, texture)
    area = sum(region.size for region in regions)
    neighbours = set()
    for earlier, a in enumerate(regions):
        for later in range(earlier + 1, len(regions)):
            if any(strictly_inside(x, y, a) for x in regions[later].xs for y in regions[later].ys):
                neighbours.add((earlier, later))

    known = {pair: similarity(regions[pair[0]], regions[pair[1]], area) for pair in neighbours}
    while known:
        # Equal ones: the pair with the newest region, then the one whose other region is the newest.
        older, newer = max(known, key=lambda pair: (known[pair], pair[1], pair[0]))
        merged = len(regions)
        regions.append(union(regions[older], regions[newer]))
        around = {region for pair in known if {older, newer} & set(pair) for region in pair} - {older, newer}
        known = {pair: value for pair, value in known.items() if not {older, newer} & set(pair)}
        for region in around:
            known[region, merged] = similarity(regions[region], regions[merged], area)
    return [region.box() for region in regions]


def first_regions(labels, image, texture) -> list[Region]:
    found: dict[int, Region] = {}  # in the order in which reading meets them
    for y, row in enumerate(labels):
        for x, label in enumerate(row):
            new = Region(0, (x, x), (y, y), [[0] * 25 for _ in range(3)], [[0] * 10 for _ in range(3)])
            region = found.setdefault(int(label), new)
            region.size += 1
            region.xs = (min(x, region.xs[0]), max(x, region.xs[1]))
            region.ys = (min(y, region.ys[0]), max(y, region.ys[1]))
            hue_saturation_value = colorsys.rgb_to_hsv(*(int(value) for value in image[y][x]))  # 0..1, 0..1, 0..255
            for channel in range(3):
                region.colour[channel][bin_of(hue_saturation_value[channel], 25)] += 1
                region.texture[channel][bin_of(int(texture[y][x][channel]), 10)] += 1
    return list(found.values())


def bin_of(value: float, num_bins: int) -> int:
    return min(int(value * num_bins / 255), num_bins - 1)


def strictly_inside(x: int, y: int, region: Region) -> bool:
    return region.xs[0] < x < region.xs[1] and region.ys[0] < y < region.ys[1]


def union(a: Region, b: Region) -> Region:
    return Region(
        a.size + b.size,
        (min(a.xs[0], b.xs[0]), max(a.xs[1], b.xs[1])),
        (min(a.ys[0], b.ys[0]), max(a.ys[1], b.ys[1])),
        [[p + q for p, q in zip(*channels, strict=True)] for channels in zip(a.colour, b.colour, strict=True)],
        [[p + q for p, q in zip(*channels, strict=True)] for channels in zip(a.texture, b.texture, strict=True)],
    )


def similarity(a: Region, b: Region, area: int) -> int:
    """Colour + texture + size + fill, in units of 1 / ONE."""
    total = 0
    for mine, theirs in zip(a.colour + a.texture, b.colour + b.texture, strict=True):
        for p, q in zip(mine, theirs, strict=True):
            total += min(round(p / a.size * ONE), round(q / b.size * ONE))
    joint = union(a, b)
    joint_box = (joint.xs[1] - joint.xs[0]) * (joint.ys[1] - joint.ys[0])  # one short, as the authors count
    # size: 1 - joint.size / area; fill: 1 - (joint_box - joint.size) / area. Rounded once, as their sum.
    return total + 2 * ONE - round(joint_box / area * ONE)
