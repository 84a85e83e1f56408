"""Draw what a method sees: a PNG sheet with one row per image and one column per view.

The sheet shows exactly what training shows the network: the views of image number `index` of the folder in a given
epoch, for a given seed. Normalisation is undone for the eye; nothing else is.

Views with boxes of objects come in pairs, and each pair has boxes of its own: the sheet repeats the whole view beside
each of its partners. One colour and number is one object, in every view of a row.
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
from view_boxes import Colour, colours_of, draw_boxes, draw_proposals, label_of

from detco.artifact import Preprocess
from detco.views import BoxSet, PairedView, Photo, Proposals, sample_generator
from pretrain.config import build_recipe, load_config
from pretrain.images import ImageList, list_images
from pretrain.proposals.store import ProposalStore
from pretrain.proposals.wanted import check_proposals_wanted, open_proposals_of

GAP = 6
"""Pixels between the patches of a set."""

MARGIN = 16
HEADING_HEIGHT = 44
ORIGINAL_SIZE = 224
CAPTION_HEIGHT = 34
BOXED_SIZE = 224
"""About how large a view with boxes is drawn, in pixels; a smaller one is enlarged by a whole factor."""

BACKGROUND = (228, 230, 234)
INK = (40, 40, 40)

OBJECTS = (
    "One colour and number is one object; training pulls its two embeddings in a pair towards each other. "
    "A view may be mirrored, a box moved a little, a square in it blanked. Edges that boxes share are dashed."
)
LEVELS = "P2 to P5: the level of the feature pyramid that a box is pooled from, by its size in that view."
PAIRS = "The whole view is the same in every pair; a pair may have other objects than the next."

EPILOG = """examples:
  python tools/show_views.py photos -o views.png --method detco
  python tools/show_views.py photos -o views.png --config-file configs/pretrain/detco_r50_200ep.yaml \\
      --num-images 8 VIEWS.RAND_AUGMENT True VIEWS.PATCH_ORDER grid
  python tools/show_views.py photos -o views.png --method soco_fpn DATA.PROPOSALS proposals
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


def draw_paired_sheet(
    originals: list[Image.Image], views: Any, preprocess: Preprocess, *, has_levels: bool
) -> Image.Image:
    """A sheet with two columns for each pair of views: the whole view and its partner, with their boxes of this pair.

    Args:
        originals: The N images with their proposals.
        views: A NamedTuple with the field `whole`, (N, 3, S, S), and a `PairedView` for each pair.
        preprocess: Of the recipe.
        has_levels: Whether the boxes are pooled from the levels of a pyramid.
    """
    pairs = {name: field for name, field in views._asdict().items() if isinstance(field, PairedView)}
    box_sets = [boxes for pair in pairs.values() for boxes in (pair.boxes_in_whole, pair.boxes)]
    colours = [colours_of(ids) for ids in torch.cat([boxes.ids for boxes in box_sets], 1).tolist()]
    columns = {"image\nand its proposals": originals}
    for number, (name, pair) in enumerate(pairs.items(), start=1):
        for title, images, boxes in (("whole", views.whole, pair.boxes_in_whole), (name, pair.image, pair.boxes)):
            factor = max(1, round(BOXED_SIZE / images.shape[-1]))
            enlarged = f", drawn x{factor}" if factor > 1 else ""
            heading = f"pair {number}: {title}\n{'x'.join(map(str, images.shape[1:]))}{enlarged}"
            columns[heading] = [
                draw_boxed(pixels, BoxSet(*row), colours_of_row, factor, has_levels=has_levels)
                for pixels, colours_of_row, *row in zip(denormalise(images, preprocess), colours, *boxes, strict=True)
            ]
    legend = [OBJECTS, *([LEVELS] if has_levels else []), *([PAIRS] if len(pairs) > 1 else [])]
    return add_legend(draw_sheet(columns), legend)


def count_proposals(proposals: Proposals, num_shown: int) -> str:
    """In words: how many proposals an image has, of which a picture shows `num_shown`."""
    num_boxes, num_made = len(proposals.boxes_image_px), int(proposals.multiplicity.sum())
    if not num_boxes:
        return "no proposals:\nthe whole image is the object"
    repeats = f" ({num_made} with repeats)" if num_made > num_boxes else ""
    return f"{num_boxes} proposals{repeats}" + (f",\n{num_shown} of them drawn" if num_shown < num_boxes else "")


def add_caption(picture: Image.Image, text: str) -> Image.Image:
    """The picture of an image with up to two lines below it."""
    result = Image.new("RGB", (ORIGINAL_SIZE, picture.height + CAPTION_HEIGHT), BACKGROUND)
    result.paste(picture, (0, 0))
    font = ImageFont.load_default(12)
    ImageDraw.Draw(result).multiline_text((0, picture.height + 3), text, fill=INK, font=font)
    return result


def draw_boxed(
    pixels: Tensor, boxes: BoxSet, colours: dict[int, Colour], factor: int, *, has_levels: bool
) -> Image.Image:
    """One view (3, S, S), uint8, enlarged by `factor`, with its boxes (K)."""
    view = to_picture(pixels)
    ids = boxes.ids.tolist()
    labels = [label_of(number, level, has_levels) for number, level in zip(ids, boxes.levels.tolist(), strict=True)]
    # Nearest: what the eye sees are the network's own pixels.
    enlarged = view.resize((factor * view.width, factor * view.height), Image.Resampling.NEAREST)
    return draw_boxes(enlarged, boxes.boxes_view.numpy(), ids, labels, colours)


def add_legend(sheet: Image.Image, sentences: Sequence[str]) -> Image.Image:
    """The sheet with text below it, each sentence from a new line on and broken to the sheet's width."""
    font = ImageFont.load_default(14)
    lines: list[str] = []
    for sentence in sentences:
        line = ""
        for word in sentence.split():
            longer = f"{line} {word}".lstrip()
            if font.getlength(longer) <= sheet.width - 2 * MARGIN:
                line = longer
            else:
                lines.append(line)
                line = word
        lines.append(line)
    result = Image.new("RGB", (sheet.width, sheet.height + 18 * len(lines) + MARGIN), BACKGROUND)
    result.paste(sheet, (0, 0))
    pen = ImageDraw.Draw(result)
    for position, line in enumerate(lines):
        pen.text((MARGIN, sheet.height + 18 * position), line, fill=INK, font=font)
    return result


def make_sheet(
    images: ImageList, recipe: Any, proposals: ProposalStore | None, *, num_images: int, seed: int, epoch: int
) -> Image.Image:
    """Draw the views of some images by one recipe; `proposals` are those of the images, for a ProposalRecipe."""
    originals, samples = [], []
    for index in pick_indices(len(images), num_images):
        photo = Photo.open(images.read(index))
        rng = sample_generator(seed=seed, epoch=epoch, index=index)
        original = to_picture(photo.pixels())
        original.thumbnail((ORIGINAL_SIZE, ORIGINAL_SIZE))
        if proposals is None:
            samples.append(recipe.draw(photo, rng))
        else:
            size = (photo.width, photo.height)
            found = proposals.of(index, *size)
            original, num_shown = draw_proposals(original, found.boxes_image_px, size)
            original = add_caption(original, count_proposals(found, num_shown))
            samples.append(recipe.draw_with_proposals(photo, found, rng))
        originals.append(original)
    all_views = recipe.render(default_collate(samples))
    if proposals is not None:
        has_levels = len(recipe.level_limits()) > 1
        return draw_paired_sheet(originals, all_views, recipe.preprocess, has_levels=has_levels)
    columns = {"image": originals}
    for name, views in all_views._asdict().items():
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
    what.add_argument("images", metavar="IMAGES", help="folder of images or tar shards, or a text file listing them")
    what.add_argument("--num-images", type=int, default=4, metavar="N", help="rows of the sheet (default: 4)")
    what.add_argument("--seed", type=int, metavar="S", help="seed of the samples (default: SEED of the config)")
    what.add_argument("--epoch", type=int, default=0, metavar="E", help="epoch of the samples (default: 0)")
    how = result.add_argument_group("how the views are made")
    how.add_argument("--config-file", type=Path, metavar="FILE", help="a pretraining config (default: none)")
    how.add_argument("--method", metavar="NAME", help="method, instead of the config's METHOD.NAME (default: none)")
    how.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY VALUE",
        help="config keys to change, such as VIEWS.BLUR_PROB 1 or DATA.PROPOSALS STORE",
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
        path = config.DATA.PROPOSALS
        check_proposals_wanted(path, recipe, method=config.METHOD.NAME, root=config.DATA.ROOT)
        images = list_images(arguments.images)
        proposals = open_proposals_of(path, images, root=str(arguments.images))
        sheet = make_sheet(images, recipe, proposals, num_images=arguments.num_images, seed=seed, epoch=arguments.epoch)
        sheet.save(arguments.output, format="PNG")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.output}: {sheet.width}x{sheet.height} px")
    return 0


if __name__ == "__main__":
    sys.exit(main())
