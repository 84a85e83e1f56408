"""Images per second of each half of the pretraining pipeline, on this machine.

Three numbers per method: *host* (decode, crop and draw parameters, one process, one thread: multiply by the loader's
workers), *device* (colour, blur, patches and normalisation of a batch) and *step* (both encoders, losses, backward).
The slowest of host x workers, device and step is what a run can reach. Median and range over repeated measurements.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

EPILOG = """examples:
  python tools/benchmark_pretrain.py                                    drawn 400-pixel photos, on a GPU if there is one
  python tools/benchmark_pretrain.py --images /data/imagenet/val --batch-size 256 --precision bf16
"""
MIN_SECONDS = 1.0
PARSER = argparse.ArgumentParser(
    description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
)
PARSER.add_argument("--images", type=Path, help="folder of JPEGs (default: 16 drawn ones of 500 x 400 pixels)")
PARSER.add_argument("--methods", nargs="+", default=["moco_v2", "detco"], help="(default: moco_v2 detco)")
PARSER.add_argument("--batch-size", type=int, default=0, help="images (default: 128 on a GPU, 8 on a CPU)")
PARSER.add_argument("--queue-size", type=int, default=65536, help="keys per queue (default: 65536)")
PARSER.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="(default: bf16)")
PARSER.add_argument("--repeats", type=int, default=5, help="measurements per number (default: 5)")
PARSER.add_argument("--threads", type=int, default=0, help="CPU threads of device half and step (default: all)")


def drawn_photos(count: int = 16) -> list[bytes]:
    """JPEGs of the size of a typical ImageNet photo: smooth noise, so that they decode like photographs."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    photos = []
    for _ in range(count):
        coarse = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        buffer = BytesIO()
        Image.fromarray(coarse).resize((500, 400), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        photos.append(buffer.getvalue())
    return photos


def rate(work: Callable[[], Any], images: int, repeats: int, synchronize: Callable[[], None]) -> list[float]:
    """Images per second of `work`, which handles `images` of them, in each of `repeats` measurements."""
    work()
    synchronize()
    rates = []
    for _ in range(repeats):
        rounds, start = 0, time.perf_counter()
        while time.perf_counter() - start < MIN_SECONDS:
            work()
            synchronize()
            rounds += 1
        rates.append(rounds * images / (time.perf_counter() - start))
    return rates


def report(method: str, part: str, rates: list[float]) -> None:
    """One line: median and range."""
    print(f"{method:10s} {part:28s} {statistics.median(rates):9.1f} images/s  ({min(rates):.1f} to {max(rates):.1f})")


def benchmark(method_name: str, photos: list[bytes], args: argparse.Namespace) -> None:
    """Measure and print the three numbers of one method."""
    import numpy as np
    import torch
    from torch.utils.data import default_collate

    from detco.methods import METHODS
    from detco.views.host import decode

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    synchronize = torch.cuda.synchronize if cuda else (lambda: None)
    recipe = METHODS[method_name].recipe_for()()

    def host() -> list[Any]:
        return [recipe.draw(decode(photo), np.random.default_rng(i)) for i, photo in enumerate(photos)]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    report(method_name, "host half, one core", rate(host, len(photos), args.repeats, lambda: None))
    torch.set_num_threads(args.threads or threads)

    drawn = host()
    batch = default_collate([drawn[i % len(drawn)] for i in range(args.batch_size)])
    batch = _to(batch, device)
    part = f"device half, {device.type}, batch {args.batch_size}"
    report(method_name, part, rate(lambda: recipe.render(batch), args.batch_size, args.repeats, synchronize))

    method = METHODS[method_name](queue_size=args.queue_size).to(device).to(memory_format=torch.channels_last)
    views = recipe.render(batch)

    def step() -> None:
        method.before_step(0.0)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = method(views).loss
        loss.backward()
        method.zero_grad()
        method.commit()

    part = f"step, {args.precision}, batch {args.batch_size}"
    report(method_name, part, rate(step, args.batch_size, args.repeats, synchronize))


def _to(value: Any, device: Any) -> Any:
    """Move the tensors of nested named tuples."""
    if isinstance(value, tuple):
        return type(value)(*(_to(item, device) for item in value))
    return value.to(device)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the machine, then three lines per method."""
    args = PARSER.parse_args(argv)
    import torch

    cuda = torch.cuda.is_available()
    args.batch_size = args.batch_size or (128 if cuda else 8)
    if args.images:
        paths = sorted(path for path in args.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:64]
        if not paths:
            PARSER.error(f"no .jpg or .jpeg below {args.images}")
        photos = [path.read_bytes() for path in paths]
    else:
        photos = drawn_photos()
    machine = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}; {platform.machine()}; torch {torch.__version__}; {len(photos)} photos, {args.repeats} repeats")
    for method in args.methods:
        benchmark(method, photos, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
