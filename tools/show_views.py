"""Draw what a method sees: a PNG sheet with one row per image and one column per view.

The sheet shows exactly what training shows the network: the views of image number `index` of the folder in a given
epoch, for a given seed. Normalisation is undone for the eye; nothing else is.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Run as a file, Python looks for packages beside it; those of the suite lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import default_collate

from detco.artifact import Preprocess
from detco.views import decode, sample_generator
from pretrain.config import build_recipe, load_config
from pretrain.images import list_images

GAP = 6
"""Pixels between the patches of a set."""

MARGIN = 16
HEADING_HEIGHT = 44
ORIGINAL_SIZE = 224
BACKGROUND = (228, 230, 234)
INK = (40, 40, 40)

EPILOG = """examples:
  python tools/show_views.py photos -o views.png --method detco
  python tools/show_views.py photos -o views.png --config-file configs/pretrain/detco_r50_200ep.yaml \\
      --num-images 8 VIEWS.RAND_AUGMENT True VIEWS.PATCH_ORDER grid
"""


def denormalise(views: Tensor, preprocess: Preprocess) -> Tensor:
    """Turn normalised pixels (..., 3, H, W) back into RGB, uint8."""
    mean = torch.tensor(preprocess.mean_255)[:, None, None]
    std = torch.tensor(preprocess.std_255)[:, None, None]
    pixels = (views * std + mean).round().clamp(0, 255).to(torch.uint8)
    return pixels.flip(-3) if preprocess.channel_order == "BGR" else pixels


def to_picture(pixels: Tensor) -> Image.Image:
    """A view (3, H, W) as it is, or a set of views (K, 3, H, W) as a square grid with gaps; RGB, uint8."""
    if pixels.ndim == 3:
        return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    columns = math.ceil(math.sqrt(len(pixels)))
    height, width = pixels.shape[-2] + GAP, pixels.shape[-1] + GAP
    size = (columns * width - GAP, math.ceil(len(pixels) / columns) * height - GAP)
    picture = Image.new("RGB", size, BACKGROUND)
    for index, patch in enumerate(pixels):
        picture.paste(to_picture(patch), (index % columns * width, index // columns * height))
    return picture


def draw_sheet(columns: dict[str, list[Image.Image]]) -> Image.Image:
    """Set pictures out: a heading and one picture per row for each column."""
    widths = [max(picture.width for picture in pictures) for pictures in columns.values()]
    rows = list(zip(*columns.values(), strict=True))
    heights = [max(picture.height for picture in row) for row in rows]
    size = (sum(widths) + MARGIN * (len(widths) + 1), HEADING_HEIGHT + sum(heights) + MARGIN * (len(heights) + 1))
    sheet = Image.new("RGB", size, BACKGROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    left = MARGIN
    for heading, pictures, width in zip(columns, columns.values(), widths, strict=True):
        pen.multiline_text((left, MARGIN // 2), heading, fill=INK, font=font)
        top = HEADING_HEIGHT + MARGIN
        for picture, height in zip(pictures, heights, strict=True):
            sheet.paste(picture, (left, top))
            top += height + MARGIN
        left += width + MARGIN
    return sheet


def pick_indices(num_images: int, wanted: int) -> list[int]:
    """Up to `wanted` indices, evenly spread, so that a sorted folder shows its variety."""
    count = min(num_images, wanted)
    return [position * num_images // count for position in range(count)]


def make_sheet(root: Path, recipe: Any, *, num_images: int, seed: int, epoch: int) -> Image.Image:
    """Draw the views of some images of a folder by one recipe."""
    images = list_images(root)
    originals, samples = [], []
    for index in pick_indices(len(images), num_images):
        image = decode(images.path(index).read_bytes())
        original = to_picture(image)
        original.thumbnail((ORIGINAL_SIZE, ORIGINAL_SIZE))
        originals.append(original)
        samples.append(recipe.draw(image, sample_generator(seed=seed, epoch=epoch, index=index)))
    columns = {"image": originals}
    for name, views in recipe.render(default_collate(samples))._asdict().items():
        shape = "x".join(map(str, views.shape[1:]))
        columns[f"{name}\n{shape}"] = [to_picture(pixels) for pixels in denormalise(views, recipe.preprocess)]
    return draw_sheet(columns)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description="Draw a PNG sheet of a method's views.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = result.add_argument_group("what to draw")
    what.add_argument("images", type=Path, metavar="IMAGES", help="folder of images, or a text file listing them")
    what.add_argument("--num-images", type=int, default=4, metavar="N", help="rows of the sheet (default: 4)")
    what.add_argument("--seed", type=int, metavar="S", help="seed of the samples (default: SEED of the config)")
    what.add_argument("--epoch", type=int, default=0, metavar="E", help="epoch of the samples (default: 0)")
    how = result.add_argument_group("how the views are made")
    how.add_argument("--config-file", type=Path, metavar="FILE", help="a pretraining config (default: none)")
    how.add_argument("--method", metavar="NAME", help="method, instead of the config's METHOD.NAME (default: none)")
    how.add_argument(
        "overrides", nargs="*", metavar="KEY VALUE", help="config keys to change, such as VIEWS.BLUR_PROB 1"
    )
    out = result.add_argument_group("output")
    out.add_argument("-o", "--output", type=Path, required=True, metavar="PNG", help="file to write")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 on success, 2 on wrong input."""
    arguments = parser().parse_intermixed_args(argv)
    method = [] if arguments.method is None else ["METHOD.NAME", arguments.method]
    try:
        if arguments.num_images < 1:
            raise ValueError(f"--num-images is {arguments.num_images}; it must be at least 1")
        config = load_config(arguments.config_file, [*method, *arguments.overrides])
        seed = config.SEED if arguments.seed is None else arguments.seed
        recipe = build_recipe(config)
        sheet = make_sheet(arguments.images, recipe, num_images=arguments.num_images, seed=seed, epoch=arguments.epoch)
        sheet.save(arguments.output, format="PNG")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.output}: {sheet.width}x{sheet.height} px")
    return 0


if __name__ == "__main__":
    sys.exit(main())
