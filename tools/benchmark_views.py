"""What making views costs per core, side by side with the reference pipeline: figures V1, V2 and V3 as JSON lines.

V1  decode: the whole JPEG to RGB, against Pillow.
V2  host half: decode, crop, draw all parameters, collate: what a loader worker does.
V3  host and device half, one after the other: normalised views, ready for the network; and the device half alone.

The reference is the published way, tests/oracles/reference_views.py: Pillow and torchvision v1 transforms, the same
recipe, one decode for all views of an image, everything in the loader's worker. V2 and V3 compare with the whole of it,
collated too. SoCo's boxes are drawn by ours only (20 proposals per image); the reference has no form of them.

Everything on the CPU runs in one thread. Contestants take turns and every round gives a ratio; a figure is the median
of the rounds. Without a GPU the process's own seconds are counted, so other programs disturb little; with one, those of
the clock on the wall. All figures take about three minutes.
"""

import argparse
import importlib.util
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Run as a file, Python looks for packages beside it; those of the suite lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from benchmarking import alternate, machine_name, rates, ratios, summarise, tell
from drawn_photos import LARGE_SIZES, describe, draw_photos, read_photos
from torch.utils.data import default_collate

from detco.methods import METHODS
from detco.views import Photo, ProposalRecipe, Proposals, decode, sample_generator
from pretrain.compile import compiled, compiler_trouble

ORACLE = Path(__file__).resolve().parents[1] / "tests" / "oracles" / "reference_views.py"

PER_CORE = "images/s per core"
HOST_BARS = {"detco": ">= 6", "moco_v2": ">= 3"}
BOTH_HALVES_BAR = ">= 1.5"
"""For both halves on the CPU."""

NUM_PROPOSALS = 20
"""Unique boxes per photo, as scikit-image's selective search finds them; each made `MULTIPLICITY` times."""

MULTIPLICITY = 3

EPILOG = """examples:
  python tools/benchmark_views.py                                 drawn photos of ImageNet's size and of 12 megapixels
  python tools/benchmark_views.py --images /data/imagenet/val     64 real ones instead
  python tools/benchmark_views.py --methods detco --rounds 9 > views.jsonl

A line is {"figure": "V2", "method": "detco", "name": ..., "value": median, "unit": ..., "min": ..., "max": ...,
"runs": rounds, "machine": ..., "torch": ..., "date": ...} and, for what has to be reached, "bar": ">= 6".
On a machine that is not at rest, believe the ratios and not the rates."""
PARSER = argparse.ArgumentParser(
    description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
)
PARSER.add_argument("--images", type=Path, metavar="FOLDER", help="JPEGs to measure with (default: drawn ones)")
PARSER.add_argument("--num-photos", type=int, metavar="N", help="(default: 16 drawn ones, 64 of FOLDER)")
PARSER.add_argument("--large-photos", type=int, default=2, metavar="N", help="drawn, of 12 megapixels (default: 2)")
PARSER.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), help="(default: all)")
PARSER.add_argument("--device", choices=("cpu", "cuda"), help="of the device half (default: the GPU if there is one)")
PARSER.add_argument("--batch-size", type=int, metavar="N", help="of the device half alone (default: 128, on a CPU 16)")
PARSER.add_argument(
    "--compile", action=argparse.BooleanOptionalAction, help="the device half alone also compiled (default: on a GPU)"
)
PARSER.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements per figure (default: 5)")
PARSER.add_argument("--min-seconds", type=float, default=1.0, metavar="S", help="least duration of each (default: 1)")
LEAST = {"num_photos": 1, "large_photos": 0, "batch_size": 1, "rounds": 1, "min_seconds": 0}


class PhotoSet(NamedTuple):
    """JPEGs of one kind."""

    kind: str
    photos: list[bytes]
    has_bars: bool
    """Whether what has to be reached holds for them."""


class Setting(NamedTuple):
    """How everything is measured."""

    device: torch.device
    batch_size: int
    rounds: int
    min_seconds: float
    is_compiled: bool
    """Whether the device half alone is measured compiled as well."""

    def take_turns(self, contestants: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of one call in each round, by name."""
        return alternate(
            contestants,
            rounds=self.rounds,
            min_seconds=self.min_seconds,
            device=self.device,
            clock=time.process_time if self.device.type == "cpu" else time.perf_counter,
        )

    def show(self, values: Sequence[float], **about: Any) -> None:
        """Print a figure; `about` is what `summarise` is told of it."""
        summarise(values, device=self.device, **about).print()


def load_reference() -> Any:
    """The module of the reference pipeline, which lies among the tests.

    Raises:
        FileNotFoundError: If the tests are not there.
    """
    if not ORACLE.exists():
        raise FileNotFoundError(f"{ORACLE} is missing: run the benchmark in a checkout of the whole project")
    spec = importlib.util.spec_from_file_location(ORACLE.stem, ORACLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class OurPipeline:
    """Both halves of our views of some photos; every call draws new ones.

    Attributes:
        recipe: Of the method, at its defaults.
        photos: JPEGs.
        device: Of the device half.
    """

    def __init__(self, method: str, photos: Sequence[bytes], device: torch.device) -> None:
        self.recipe = METHODS[method].recipe_for()()
        self.photos = photos
        self.device = device
        self._proposals = [draw_proposals(photo, index) for index, photo in enumerate(photos)]
        self._calls = 0

    def host(self, batch_size: int | None = None) -> Any:
        """What a worker makes of the photos: one collated batch of all, or of as many as wanted, taken in turn."""
        self._calls += 1
        return default_collate([self._draw(index) for index in range(batch_size or len(self.photos))])

    def both(self) -> Any:
        """The normalised views of the photos, on the device."""
        return self.recipe.render(to_device(self.host(), self.device))

    def _draw(self, index: int) -> Any:
        number = index % len(self.photos)
        photo, rng = Photo.open(self.photos[number]), sample_generator(seed=0, epoch=self._calls, index=index)
        if isinstance(self.recipe, ProposalRecipe):
            return self.recipe.draw_with_proposals(photo, self._proposals[number], rng)
        return self.recipe.draw(photo, rng)


def draw_proposals(photo: bytes, index: int) -> Proposals:
    """Boxes around the middle of a photo, in number like those of selective search."""
    opened, rng = Photo.open(photo), np.random.default_rng(index)
    corners = rng.uniform((0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0), (NUM_PROPOSALS, 4))
    boxes = corners * (opened.width, opened.height, opened.width, opened.height)
    return Proposals(boxes.astype(np.float32), np.full(NUM_PROPOSALS, MULTIPLICITY, dtype=np.int64))


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors of nested named tuples."""
    if isinstance(value, tuple):
        return type(value)(*(to_device(item, device) for item in value))
    return value.to(device)


def measure_decode(photo_set: PhotoSet, setting: Setting) -> None:
    """Print V1 of some photos."""
    kind, photos, _ = photo_set
    open_rgb = load_reference().open_rgb
    seconds = setting.take_turns(
        {
            "ours": lambda: [decode(photo) for photo in photos],
            "reference": lambda: [open_rgb(photo) for photo in photos],
        }
    )
    for name, values in seconds.items():
        setting.show(rates(len(photos), values), figure="V1", name=f"{name}, {kind}", unit=PER_CORE)
    ratio = ratios(seconds["reference"], seconds["ours"])
    setting.show(ratio, figure="V1", name=f"ours / reference, {kind}", unit="x")


def measure_method(method: str, photo_set: PhotoSet, setting: Setting) -> None:
    """Print V2 of some photos and, of those with bars, V3."""
    kind, photos, has_bars = photo_set
    ours = OurPipeline(method, photos, setting.device)
    reference = load_reference().reference_of(ours.recipe)
    contestants: dict[str, Callable[[], object]] = {
        "reference": lambda: default_collate([reference(photo) for photo in photos]),
        "host half": ours.host,
    }
    if has_bars:
        contestants["host and device half"] = ours.both
    seconds = setting.take_turns(contestants)
    figures = {"host half": "V2", "host and device half": "V3"}
    bars = {"host half": HOST_BARS.get(method), "host and device half": BOTH_HALVES_BAR}
    if setting.device.type == "cuda":
        bars["host and device half"] = None
    for name, values in seconds.items():
        figure = figures.get(name, "V2")
        setting.show(rates(len(photos), values), figure=figure, method=method, name=f"{name}, {kind}", unit=PER_CORE)
        if name != "reference":
            setting.show(
                ratios(seconds["reference"], values),
                figure=figure,
                method=method,
                name=f"{name} / reference, {kind}",
                unit="x",
                bar=bars[name] if has_bars else None,
            )
    if has_bars:
        measure_device_half(method, ours, setting)


def measure_device_half(method: str, ours: OurPipeline, setting: Setting) -> None:
    """Print V3 of a batch that lies on the device: what `render` alone can do."""
    batch = to_device(ours.host(setting.batch_size), setting.device)
    render = ours.recipe.render
    contestants: dict[str, Callable[[], object]] = {"": lambda: render(batch)}
    if setting.is_compiled:
        render_compiled = compiled(render)
        contestants[", compiled"] = lambda: render_compiled(batch)
    for name, seconds in setting.take_turns(contestants).items():
        name = f"device half, {setting.device.type}, batch {setting.batch_size}{name}"
        setting.show(rates(setting.batch_size, seconds), figure="V3", method=method, name=name, unit="images/s")


def chosen_photos(args: argparse.Namespace) -> list[PhotoSet]:
    """Those of the folder, or drawn ones of both sizes."""
    if args.images:
        return [PhotoSet("given photos", read_photos(args.images, args.num_photos or 64), has_bars=True)]
    sets = [PhotoSet("ImageNet-size photos", draw_photos(args.num_photos or 16), has_bars=True)]
    if args.large_photos:
        large = draw_photos(args.large_photos, LARGE_SIZES)
        sets.append(PhotoSet("12-megapixel photos", large, has_bars=False))
    return sets


def main(argv: Sequence[str] | None = None) -> int:
    """Print V1 of every set of photos, then V2 and V3 of every method."""
    args = PARSER.parse_args(argv)
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            PARSER.error(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    if args.device == "cuda" and not torch.cuda.is_available():
        PARSER.error("--device is cuda, but torch finds no GPU here: leave the option out, or install torch for CUDA")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_cuda = device.type == "cuda"
    setting = Setting(
        device=device,
        batch_size=args.batch_size or (128 if on_cuda else 16),
        rounds=args.rounds,
        min_seconds=args.min_seconds,
        is_compiled=on_cuda if args.compile is None else args.compile,
    )
    try:
        photo_sets = chosen_photos(args)
    except (ValueError, FileNotFoundError) as error:
        PARSER.error(str(error))
    if setting.is_compiled and (trouble := compiler_trouble(device)):
        tell(f"nothing is compiled: torch.compile does not work here ({trouble})")
        setting = setting._replace(is_compiled=False)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    decoder = "simplejpeg" if importlib.util.find_spec("simplejpeg") else "Pillow (install simplejpeg for speed)"
    tell(f"{machine_name(device)}; torch {torch.__version__}; ours decodes with {decoder}")
    for photo_set in photo_sets:
        tell(f"{photo_set.kind}: {describe(photo_set.photos)}")
        measure_decode(photo_set, setting)
        for method in args.methods:
            measure_method(method, photo_set, setting)
    return 0


if __name__ == "__main__":
    sys.exit(main())
