"""What a training run reaches on this machine: end to end from files, without the files, and the loader alone.

E1 is the real trainer fed by the real loader from JPEG files; E2 the same trainer with batches that lie on the device
already; E3 the loader with nobody waiting for its batches. A run cannot be faster than E2 or E3, so E1 over the lesser
tells what the two cost each other. They are measured by turns, E1 right after E3, which leaves the loader's queue
empty: what E1 reaches is not what was in store. With `reference`, the pipeline that others train with (Pillow and
torchvision in the workers) makes the same views of the same files with as many workers: R3.

With `start` and `memory`: the time from starting `detco-pretrain` to its first step, and the memory of a loader worker,
with long lists of images.

Keys of the training config follow as KEY VALUE; a figure of theirs has them in its name.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

EPILOG = """examples:
  python tools/benchmark_run.py                                      MoCo v2 and DetCo, sizes for this device
  python tools/benchmark_run.py METHOD.LEVEL_ROUTING own --methods soco_fpn --parts train
  python tools/benchmark_run.py METHOD.BN_GROUP 256 --images /data/imagenet/val --workers 16
  python tools/benchmark_run.py --parts start memory --paths 1300000
"""
PARTS = ("train", "reference", "start", "memory")
DISTINCT_PHOTOS = 64
"""Photos; each lies in the folder under as many names as it takes to fill some batches."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="keys of the training config to change")
    parser.add_argument("--methods", nargs="+", default=["moco_v2", "detco"], help="(default: moco_v2 detco)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="(default: all; reference only on a GPU)")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="JPEGs (default: drawn ones of ImageNet's size)")
    parser.add_argument("--batch-size", type=int, help="images (default: 256 on a GPU, 8 on a CPU)")
    parser.add_argument("--workers", type=int, help="loader processes (default: 16 on a GPU, 1 on a CPU)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements per number (default: 3)")
    parser.add_argument("--seconds", type=float, default=8.0, help="least duration of one (default: 8)")
    parser.add_argument("--paths", type=int, nargs="+", default=[1_300_000, 10_000_000], help="lengths of long lists")
    parser.add_argument("--samples", type=int, default=40_000, help="that each memory figure reads (default: 40000)")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="append what a few steps spend their time with")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    args = parser.parse_intermixed_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; at least one is needed")
    if args.batch_size is not None and args.batch_size < 1:
        parser.error(f"--batch-size is {args.batch_size}; at least one image is needed")
    import torch  # not above: loader workers import this file, and would hold more memory than in a real run

    args.device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    on_gpu = args.device.type == "cuda"
    args.batch_size = args.batch_size or (256 if on_gpu else 8)
    args.workers = (16 if on_gpu else 1) if args.workers is None else args.workers
    args.parts = args.parts or [part for part in PARTS if on_gpu or part != "reference"]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Print the JSON lines of the parts asked for."""
    args = parse(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="detco_benchmark_") as folder:
            measure(Path(folder), args)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(scratch: Path, args: argparse.Namespace) -> None:
    """Measure all parts, with files in `scratch`."""
    from benchmark_rates import measure_reference, measure_train
    from benchmark_start import measure_memory, measure_start
    from benchmarking import tell
    from drawn_photos import describe, draw_photos, read_photos
    from measured_run import BATCHES_OF_FILES, write_files

    photos = read_photos(args.images, DISTINCT_PHOTOS) if args.images else draw_photos(DISTINCT_PHOTOS)
    tell(f"{describe(photos)}; batch {args.batch_size}, {args.workers} loader workers, {args.rounds} rounds")
    write_files(scratch / "photos", photos, BATCHES_OF_FILES * args.batch_size)
    for method in args.methods:
        end_to_end = measure_train(method, scratch, args) if "train" in args.parts else []
        if "reference" in args.parts:
            measure_reference(method, scratch, args, end_to_end)
    for paths in args.paths:
        if "start" in args.parts:
            measure_start(paths, scratch, args)
        if "memory" in args.parts:
            measure_memory(paths, scratch, args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # not at once: what is known is told
    sys.exit(main())
