"""What Pillow and torchvision do to an image: the obvious, slow, one-by-one reference of the batched views."""

import numpy as np
import torch
import torchvision.transforms.functional as tv
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

FILL = (124, 116, 104)


def photo(seed, size=(120, 150)):
    """A scene with the statistics of a photo: smooth light, shapes, sensor noise. `size` is (height, width)."""
    rng = np.random.default_rng(seed)
    height, width = size
    light = Image.fromarray(rng.integers(30, 226, (4, 5, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    pen = ImageDraw.Draw(light)
    for _ in range(8):
        x, y, a, b = (int(value) for value in rng.integers(0, min(height, width), 4))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        pen.ellipse((x, y, x + a / 2 + 1, y + b / 2 + 1), fill=colour)
    noisy = np.asarray(light, dtype=np.float64) + rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def to_tensor(image):
    """uint8, shape (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_batch(images):
    """float32 of whole numbers, shape (N, 3, H, W)."""
    return torch.stack([to_tensor(image) for image in images]).float()


def jitter(image, order, factors):
    """torchvision's ColorJitter for a given order (positions of the four arguments) and given factors."""
    operations = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for index in order:
        image = operations[index](image, float(factors[index]))
    return image


def grey(image):
    return tv.to_grayscale(image, num_output_channels=3)


def blur(image, sigma):
    return image.filter(ImageFilter.GaussianBlur(radius=sigma))


def solarize_add(image, increment):
    return image.point([min(255, value + int(increment)) if value < 128 else value for value in range(256)] * 3)


def warp(image, matrix):
    return image.transform(image.size, Image.AFFINE, matrix, resample=Image.BILINEAR, fillcolor=FILL)


# As in PyContrast's RandAugment.py (op names on the left are ours).
RAND_AUGMENT = {
    "auto_contrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "invert": lambda image, _: ImageOps.invert(image),
    "posterize": lambda image, bits: ImageOps.posterize(image, int(bits)),
    "solarize": lambda image, threshold: ImageOps.solarize(image, int(threshold)),
    "solarize_add": solarize_add,
    "color": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    "rotate": lambda image, degrees: image.rotate(degrees, resample=Image.BILINEAR, fillcolor=FILL),
    "shear_x": lambda image, shear: warp(image, (1, shear, 0, 0, 1, 0)),
    "shear_y": lambda image, shear: warp(image, (1, 0, 0, shear, 1, 0)),
    "translate_x": lambda image, pixels: warp(image, (1, 0, pixels, 0, 1, 0)),
    "translate_y": lambda image, pixels: warp(image, (1, 0, 0, 0, 1, pixels)),
}
