"""The views of DetCo: two global crops and two sets of nine local patches of each image.

A patch set is cut from a crop of its own: colours and flip on the whole crop, then a 3x3 grid of cells, the cells
shuffled, and a smaller random window inside each, so that patches never overlap.

Shape legend:
    N  images in a batch
    S  side of a global view, in pixels
    L  side of the local crop, in pixels
    P  side of a patch, in pixels

Source: DetCo, arXiv:2102.04803, Sec. 3.4: crop of 255, cells of 85 and patches of 64 pixels.
The paper lists greyscale within colour jitter; it is kept for the patches too. RandAugment, where switched on, is for
the global views alone.

Departures: those of `detco.views.moco`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from detco.artifact import IMAGENET_RGB
from detco.views.base import ViewRecipe
from detco.views.host import CropBox, draw_crop_box
from detco.views.moco import GlobalSample, MoCoRecipe, MoCoSample
from detco.views.photo import Photo
from detco.views.photometric import (
    PhotometricParams,
    apply_photometric,
    draw_flip,
    draw_photometric,
    flip,
    normalise,
)
from detco.views.rows import render_alike
from detco.views.validation import check_choice, check_positive_int, check_range

GRID = 3
NUM_PATCHES = GRID * GRID


class PatchSample(NamedTuple):
    """One patch set before the device half; after collating, every tensor has a leading N."""

    crop: Tensor
    """RGB, uint8, shape (3, L, L)."""

    is_flipped: Tensor
    """Of the whole crop; bool, shape ()."""

    photometric: PhotometricParams
    """Of the whole crop; with patch_color "patch" every field has a leading 9."""

    cell: Tensor
    """The cell that each of the nine patches is cut from, in row-major order of the grid; int64, shape (9,)."""

    offset: Tensor
    """Top and left of each patch inside its cell, in pixels; int64, shape (9, 2)."""


class PatchDraw(NamedTuple):
    """What was drawn for one patch set, before its crop is cut: see `PatchSample`."""

    box: CropBox
    is_flipped: Tensor
    photometric: PhotometricParams
    cell: Tensor
    offset: Tensor

    def with_crop(self, crop: Tensor) -> PatchSample:
        """The patch set with the pixels of its box, shape (3, L, L)."""
        return PatchSample(crop, self.is_flipped, self.photometric, self.cell, self.offset)


class DetCoSample(NamedTuple):
    """What the host half makes of one image."""

    global_query: GlobalSample
    global_key: GlobalSample
    local_query: PatchSample
    local_key: PatchSample


class DetCoViews(NamedTuple):
    """Normalised views, float32: global_* (N, 3, S, S), local_* (N, 9, 3, P, P)."""

    global_query: Tensor
    global_key: Tensor
    local_query: Tensor
    local_key: Tensor


class DetCoRecipe(ViewRecipe[DetCoSample, DetCoViews]):
    """Views of DetCo.

    The settings that it shares with `MoCoRecipe` mean what they mean there; those of colour, flip and crop ratio hold
    for the patch sets too.

    Args:
        local_size: L, a multiple of 3.
        local_scale: Share of the image's area that the local crop covers, (least, most).
        patch_size: P, at most a third of L.
        patch_order: "shuffled": a uniform permutation per patch set; "grid": row by row.
        patch_color: "image": one draw of the colours for the nine patches, before they are cut (the paper);
            "patch": one draw for each patch, after cutting (PIRL).

    Attributes:
        global_views: The recipe that draws and renders the two global views.

    Raises:
        ValueError: If a setting is outside its range.
    """

    preprocess = IMAGENET_RGB

    def __init__(
        self,
        *,
        global_size: int = 224,
        global_scale: Sequence[float] = (0.2, 1.0),
        crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
        jitter: Sequence[float] = (0.4, 0.4, 0.4, 0.1),
        jitter_prob: float = 0.8,
        grey_prob: float = 0.2,
        blur_prob: float = 0.5,
        blur_sigma: Sequence[float] = (0.1, 2.0),
        flip_prob: float = 0.5,
        rand_augment: bool = False,
        rand_augment_num_ops: int = 2,
        rand_augment_magnitude: float = 10.0,
        rand_augment_magnitude_std: float = 0.5,
        rand_augment_prob: float = 0.5,
        local_size: int = 255,
        local_scale: Sequence[float] = (0.6, 1.0),
        patch_size: int = 64,
        patch_order: str = "shuffled",
        patch_color: str = "image",
    ) -> None:
        self.global_views = MoCoRecipe(
            global_size=global_size,
            global_scale=global_scale,
            crop_ratio=crop_ratio,
            jitter=jitter,
            jitter_prob=jitter_prob,
            grey_prob=grey_prob,
            blur_prob=blur_prob,
            blur_sigma=blur_sigma,
            flip_prob=flip_prob,
            rand_augment=rand_augment,
            rand_augment_num_ops=rand_augment_num_ops,
            rand_augment_magnitude=rand_augment_magnitude,
            rand_augment_magnitude_std=rand_augment_magnitude_std,
            rand_augment_prob=rand_augment_prob,
        )
        self.local_size = check_positive_int("local_size", local_size)
        self.local_scale = check_range("local_scale", local_scale, low=0.0, high=1.0, low_open=True)
        self.patch_size = check_positive_int("patch_size", patch_size)
        self.patch_order = check_choice("patch_order", patch_order, ("shuffled", "grid"))
        self.patch_color = check_choice("patch_color", patch_color, ("image", "patch"))
        if self.local_size % GRID:
            raise ValueError(f"local_size is {local_size}; it must be a multiple of {GRID}, for equal cells")
        if self.patch_size > self.cell_size:
            raise ValueError(
                f"patch_size is {patch_size}; it must be at most {self.cell_size}, a third of local_size {local_size}"
            )

    @property
    def cell_size(self) -> int:
        """Side of a grid cell in pixels."""
        return self.local_size // GRID

    def draw(self, photo: Photo, rng: np.random.Generator) -> DetCoSample:
        """Host half: four independent crops of one image and their parameters."""
        global_draws = self.global_views.draw_views(photo, rng)
        patch_draws = self._draw_patches(photo, rng), self._draw_patches(photo, rng)
        wanted = [(draw.box, self.global_views.global_size) for draw in global_draws]
        crops = photo.crops(wanted + [(draw.box, self.local_size) for draw in patch_draws])
        return DetCoSample(
            global_query=global_draws[0].with_crop(crops[0]),
            global_key=global_draws[1].with_crop(crops[1]),
            local_query=patch_draws[0].with_crop(crops[2]),
            local_key=patch_draws[1].with_crop(crops[3]),
        )

    def render(self, batch: DetCoSample) -> DetCoViews:
        """Device half: the normalised views of a collated batch."""
        global_views = self.global_views.render(MoCoSample(batch.global_query, batch.global_key))
        local_query, local_key = render_alike(self._render_patches, batch.local_query, batch.local_key)
        return DetCoViews(global_views.global_query, global_views.global_key, local_query, local_key)

    def _draw_patches(self, photo: Photo, rng: np.random.Generator) -> PatchDraw:
        box = draw_crop_box(photo.height, photo.width, self.local_scale, self.global_views.crop_ratio, rng)
        cell = rng.permutation(NUM_PATCHES) if self.patch_order == "shuffled" else np.arange(NUM_PATCHES)
        play = self.cell_size - self.patch_size
        return PatchDraw(
            box=box,
            is_flipped=draw_flip(self.global_views.flip_prob, rng),
            photometric=self._draw_colours(rng),
            cell=torch.from_numpy(cell),
            offset=torch.from_numpy(rng.integers(play + 1, size=(NUM_PATCHES, 2))),
        )

    def _draw_colours(self, rng: np.random.Generator) -> PhotometricParams:
        options = self.global_views.photometric
        if self.patch_color == "image":
            return draw_photometric(options, rng)
        drawn = [draw_photometric(options, rng) for _ in range(NUM_PATCHES)]
        return PhotometricParams(*(torch.stack(values) for values in zip(*drawn, strict=True)))

    def _render_patches(self, sample: PatchSample) -> Tensor:
        options = self.global_views.photometric
        crops = flip(sample.crop, sample.is_flipped)
        if self.patch_color == "image":
            coloured = apply_photometric(crops.float(), sample.photometric, options)
            patches = self._cut(coloured, sample.cell, sample.offset)
        else:
            plain = self._cut(crops, sample.cell, sample.offset).flatten(0, 1).float()
            per_patch = PhotometricParams(*(values.flatten(0, 1) for values in sample.photometric))
            patches = apply_photometric(plain, per_patch, options).view(-1, NUM_PATCHES, *plain.shape[1:])
        return normalise(patches, self.preprocess)

    def _cut(self, crops: Tensor, cell: Tensor, offset: Tensor) -> Tensor:
        return cut_patches(crops, cell, offset, cell_size=self.cell_size, patch_size=self.patch_size)


def cut_patches(crops: Tensor, cell: Tensor, offset: Tensor, *, cell_size: int, patch_size: int) -> Tensor:
    """Cut nine patches out of every crop, all in one gather.

    Args:
        crops: Any dtype, shape (N, 3, L, L) with L = 3 * cell_size.
        cell: Cell of each patch, row-major in the grid, shape (N, 9).
        offset: Top and left of each patch inside its cell, in [0, cell_size - patch_size], shape (N, 9, 2).
        cell_size: Side of a cell in pixels.
        patch_size: P.

    Returns:
        Patches in the order of `cell`, shape (N, 9, 3, P, P).
    """
    top = cell // GRID * cell_size + offset[..., 0]
    left = cell % GRID * cell_size + offset[..., 1]
    image = torch.arange(len(crops), device=crops.device)[:, None]
    windows = crops.unfold(2, patch_size, 1).unfold(3, patch_size, 1)  # a view: (N, 3, tops, lefts, P, P)
    return windows[image, :, top, left]
