"""The views as the published code makes them, image by image in the loader's workers: Pillow and torchvision v1.

It is what the benchmarks compare with, so it is as fast as it can be without becoming another pipeline: an image is
decoded once for all its views, and whatever torchvision offers for Pillow images is used as it is. The settings are
read off our recipe, so the two cannot drift apart.

Source: MoCo v2's main_moco.py and moco/loader.py (https://github.com/facebookresearch/moco); DetCo has no published
code, its patches are as in its paper (arXiv:2102.04803, Sec. 3.4); SoCo's contrast/data/transform.py
(https://github.com/hologerry/SoCo at 624a70d). The order of operations is theirs.

Left out: SoCo's boxes, which have no torchvision form. That spares the reference work that our recipes do.
"""

import io
import random

import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms

from detco.views import (
    DetCoRecipe,
    MoCoRecipe,
    SoCoC4Recipe,
    SoCoFPNRecipe,
    SoCoStarRecipe,
)

SOLARISE_FROM = 128


class GaussianBlur:
    """MoCo's: a sigma of its own for every view."""

    def __init__(self, sigma):
        self.sigma = sigma

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.sigma)))


def solarise(image):
    return ImageOps.solarize(image, SOLARISE_FROM)


def open_rgb(data):
    """As torchvision's `pil_loader`, from memory."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def crop_to(size, scale, ratio):
    return transforms.RandomResizedCrop(size, scale=tuple(scale), ratio=tuple(ratio))


def to_normalised(preprocess):
    mean, std = ([value / 255 for value in values] for values in (preprocess.mean_255, preprocess.std_255))
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])


def colours(jitter, jitter_prob, grey_prob, blur_prob, blur_sigma):
    return [
        transforms.RandomApply([transforms.ColorJitter(*jitter)], p=jitter_prob),
        transforms.RandomGrayscale(p=grey_prob),
        transforms.RandomApply([GaussianBlur(blur_sigma)], p=blur_prob),
    ]


def colours_of(options):
    return colours(options.jitter, options.jitter_prob, options.grey_prob, options.blur_prob, options.blur_sigma)


class MoCoReference:
    """Query and key."""

    def __init__(self, recipe):
        if recipe.rand_augment is not None:
            raise ValueError("the reference has no RandAugment: take a recipe without")
        self.view = transforms.Compose(
            [
                crop_to(recipe.global_size, recipe.global_scale, recipe.crop_ratio),
                *colours_of(recipe.photometric),
                transforms.RandomHorizontalFlip(recipe.flip_prob),
                to_normalised(recipe.preprocess),
            ]
        )

    def views(self, image):
        return self.view(image), self.view(image)

    def __call__(self, data):
        return self.views(open_rgb(data))


class DetCoReference:
    """Two global views and two sets of patches, cut from a crop that has its colours."""

    def __init__(self, recipe):
        if recipe.patch_color != "image":
            raise ValueError(f'patch_color is {recipe.patch_color!r}; the reference has only the paper\'s "image"')
        self.moco = MoCoReference(recipe.global_views)
        self.cell_size, self.is_shuffled = recipe.cell_size, recipe.patch_order == "shuffled"
        self.window = transforms.RandomCrop(recipe.patch_size)
        self.local = transforms.Compose(
            [
                crop_to(recipe.local_size, recipe.local_scale, recipe.global_views.crop_ratio),
                transforms.RandomHorizontalFlip(recipe.global_views.flip_prob),
                *colours_of(recipe.global_views.photometric),
            ]
        )
        self.to_normalised = to_normalised(recipe.preprocess)

    def patches(self, image):
        local = self.local(image)
        cells = [(row, column) for row in range(3) for column in range(3)]
        if self.is_shuffled:
            random.shuffle(cells)
        patches = []
        for row, column in cells:
            left, top = column * self.cell_size, row * self.cell_size
            cell = local.crop((left, top, left + self.cell_size, top + self.cell_size))
            patches.append(self.to_normalised(self.window(cell)))
        return torch.stack(patches)

    def __call__(self, data):
        image = open_rgb(data)
        return *self.moco.views(image), self.patches(image), self.patches(image)


class SoCoReference:
    """The whole image squeezed, and the crops of the variant; without boxes."""

    def __init__(self, recipe):
        if recipe.crop_frame != "image" or recipe.cutout_prob:
            raise ValueError('the reference cuts crops from the "image" and blanks nothing: take a recipe that does')
        self.recipe = recipe
        self.squeeze = transforms.Resize((recipe.view_size, recipe.view_size))
        self.finish_whole = self.finish(recipe.blur_prob_whole, recipe.solarise_prob_whole)
        self.finish_crop = self.finish(recipe.blur_prob_crop, recipe.solarise_prob_crop)

    def finish(self, blur_prob, solarise_prob):
        recipe = self.recipe
        return transforms.Compose(
            [
                transforms.RandomHorizontalFlip(recipe.flip_prob),
                *colours(recipe.jitter, recipe.jitter_prob, recipe.grey_prob, blur_prob, recipe.blur_sigma),
                transforms.RandomApply([solarise], p=solarise_prob),
                to_normalised(recipe.preprocess),
            ]
        )

    def crop(self, image, size):
        return crop_to(size, self.recipe.crop_scale, self.recipe.crop_ratio)(image)

    def crops(self, image):
        return [self.crop(image, self.recipe.view_size)]

    def __call__(self, data):
        image = open_rgb(data)
        whole = self.finish_whole(self.squeeze(image))
        return whole, *(self.finish_crop(crop) for crop in self.crops(image))


class SoCoFPNReference(SoCoReference):
    """With a small crop of its own."""

    def __init__(self, recipe):
        super().__init__(recipe)
        if recipe.small_view != "crop":
            raise ValueError(f'small_view is {recipe.small_view!r}; the reference has only the code\'s "crop"')

    def crops(self, image):
        return [*super().crops(image), self.crop(image, self.recipe.small_size)]


class SoCoStarReference(SoCoReference):
    """With the crop made small, and a medium crop of its own."""

    def crops(self, image):
        (crop,) = super().crops(image)
        small = transforms.functional.resize(crop, [self.recipe.small_size] * 2)
        return [crop, small, self.crop(image, self.recipe.medium_size)]


REFERENCES = {
    DetCoRecipe: DetCoReference,
    MoCoRecipe: MoCoReference,
    SoCoC4Recipe: SoCoReference,
    SoCoFPNRecipe: SoCoFPNReference,
    SoCoStarRecipe: SoCoStarReference,
}


def reference_of(recipe):
    """A function from the bytes of an image file to the normalised views (a tuple of tensors) of a recipe of ours.

    It draws from the generators of torch and of the module `random`. Raises ValueError for a recipe, or for settings
    of one, that it does not have.
    """
    if type(recipe) not in REFERENCES:
        raise ValueError(f"there is no reference for {type(recipe).__name__}: add one to REFERENCES")
    return REFERENCES[type(recipe)](recipe)
