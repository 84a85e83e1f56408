"""Find object proposals (boxes in which an object may lie) in images, once, for methods that learn from boxes.

Writes OUT/proposals.safetensors, which DATA.PROPOSALS takes: selective search in every image, filtered as SoCo does.
Ended in whichever way, the same command goes on where it was, and the file has the same bytes in the end.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Run as a file, Python looks for packages beside it; those of the suite lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

EPILOG = """examples:
  python tools/generate_proposals.py photos -o proposals                       all cores of this machine
  python tools/generate_proposals.py photos -o shared/proposals --shard 0/4    the first of four machines, one folder
  python tools/generate_proposals.py photos -o proposals --backend opencv_fast --max-side 256
  python tools/generate_proposals.py photos -o proposals --from-json train_ratio3size0308post.json
  python tools/generate_proposals.py photos -o proposals --to-json boxes.json

exit codes: 0 done, 1 failed while running, 2 refused before any work, 128 + signal when stopped by one
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line, without reading any file."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what to do")
    what.add_argument("images", metavar="IMAGES", help="what DATA.ROOT takes: a folder, a .txt listing, tar shards")
    what.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder of the proposals")
    instead = what.add_mutually_exclusive_group()
    instead.add_argument(
        "--from-json", type=Path, metavar="FILE", help="take the boxes from a file of the official code, do not search"
    )
    instead.add_argument(
        "--to-json", type=Path, metavar="FILE", help="write what OUT holds as such a file (the boxes and nothing else)"
    )
    search = parser.add_argument_group("how to search (defaults: those of SoCo's released weights)")
    search.add_argument("--backend", help="skimage, opencv_single or opencv_fast (default: skimage)")
    search.add_argument(
        "--max-side", type=int, metavar="PX", help="shrink longer images before the search (default: search them whole)"
    )
    search.add_argument("--scale", type=float, help="skimage: larger finds larger regions (default: 300; paper: 500)")
    search.add_argument("--sigma", type=float, metavar="PX", help="skimage: blur before the search (default: 0.9)")
    search.add_argument(
        "--min-size", type=int, metavar="PIXELS", help="skimage: least area of a region (default: 100; paper: 10)"
    )
    how = parser.add_argument_group("how to run")
    how.add_argument("--workers", type=int, metavar="N", help="processes, of one thread each (default: all cores)")
    how.add_argument(
        "--shard", metavar="I/N", help="do the part I of N, each into the same OUT; the last to end joins them"
    )
    args = parser.parse_args(argv)
    if args.from_json or args.to_json:
        idle = ("backend", "max_side", "scale", "sigma", "min_size", "workers", "shard")
        given = [f"--{name.replace('_', '-')}" for name in idle if getattr(args, name) is not None]
        if given:
            parser.error(
                f"{', '.join(given)}: without effect beside --from-json or --to-json, where nothing is searched"
            )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = parse(argv)
    # The workers are the parallelism, and inherit this.
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    # Imported after parsing, so that --help answers at once.
    from pretrain.image_list import ImagesLost
    from pretrain.proposals.search import SearchError, Stopped

    try:
        if args.to_json:
            _export(args)
        else:
            _make(args)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal_number
    except KeyboardInterrupt:  # while there is nothing to lose
        return 130
    except (SearchError, ImagesLost) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _make(args: argparse.Namespace) -> None:
    """Search or import, and say what came of it."""
    from pretrain.images import list_images
    from pretrain.proposals.backends import SearchParams, check_available
    from pretrain.proposals.filters import FilterParams
    from pretrain.proposals.generate import Shard, generate
    from pretrain.proposals.official_json import import_json
    from pretrain.proposals.store import STORE_NAME
    from pretrain.proposals.summary import summary

    chosen = {name: getattr(args, name) for name in ("backend", "max_side", "scale", "sigma", "min_size")}
    search = SearchParams(**{name: value for name, value in chosen.items() if value is not None})
    shard = Shard.parse(args.shard or "0/1")
    workers = _num_cores() if args.workers is None else args.workers
    if workers < 1:
        raise ValueError(f"--workers is {workers}; it must be at least 1")
    if not args.from_json:
        check_available(search)
    started_s = time.monotonic()
    was_finished = (args.output / STORE_NAME).is_file()
    images = list_images(args.images)
    if args.from_json:
        store = import_json(args.from_json, images, args.output)
    else:
        store = generate(images, args.output, search, FilterParams(), shard=shard, num_workers=workers)
    if store:
        print("finished already" if was_finished else f"finished in {time.monotonic() - started_s:.0f} s")
        print(summary(store, images))


def _num_cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _export(args: argparse.Namespace) -> None:
    """Write the official file."""
    from pretrain.images import list_images
    from pretrain.proposals.official_json import export_json
    from pretrain.proposals.store import ProposalStore

    export_json(ProposalStore.open(args.output), list_images(args.images), args.to_json)
    print(f"{args.to_json}: {args.to_json.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
