"""Pack images into tar shards, for file systems that cannot hold or list millions of files, and for web servers.

Writes OUT/shard-*.tar (plain tars in the WebDataset layout) and OUT/image_index.npz. DATA.ROOT takes OUT, or the
http(s) address of that index; a run on the shards is the run on the images, bit for bit, and either resumes the other.
Ended in whichever way, the same command goes on where it was, and all files have the same bytes in the end.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Run as a file, Python looks for packages beside it; those of the suite lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

EPILOG = """examples:
  python tools/make_shards.py photos -o shards
  python tools/make_shards.py /data/imagenet/train -o /scratch/imagenet --shard-size 10000
  python tools/make_shards.py http://server/imagenet/image_index.npz -o /scratch/imagenet     a copy, packed anew

exit codes: 0 done, 1 failed while running, 2 refused before any work, 130 interrupted
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line, without reading any file."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", metavar="IMAGES", help="what DATA.ROOT takes: a folder, a .txt listing, tar shards")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="folder of the shards: a new or empty one"
    )
    parser.add_argument(
        "--shard-size",
        type=int,
        default=1000,
        metavar="N",
        help="images per shard (default: 1000, for ImageNet 1,282 shards of 115 MB)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    # Imported after parsing, so that --help answers at once.
    from pretrain.images import list_images
    from pretrain.shard_packing import PackError, pack

    started_s = time.monotonic()
    try:
        packed = pack(list_images(args.images), args.output, args.shard_size)
    except KeyboardInterrupt:
        print("interrupted; what is complete is kept: the same command goes on", file=sys.stderr)
        return 130
    except PackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    num_bytes = sum(file.stat().st_size for file in args.output.glob("shard-*.tar"))
    print(
        f"{args.output}: {len(packed):,} images, {num_bytes / 1e9:,.3f} GB, finished in "
        f"{time.monotonic() - started_s:.0f} s; use it as DATA.ROOT {args.output}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
