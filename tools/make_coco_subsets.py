"""Draws the fixed, nested parts of COCO's training set (1, 2, 5, 10, 50 %) that the few-label tasks train on.

Writes ROOT/coco/subsets/train2017_<percent>pct_seed<seed>.txt, a list of image ids each. The same annotations and seed
give the same lists on every machine; within a seed each part contains the smaller ones. A run takes those of its SEED.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transfer.d2 import Detectron2Missing

EXAMPLES = """examples:
  python tools/make_coco_subsets.py datasets                  for seeds 0, 1 and 2
  python tools/make_coco_subsets.py datasets --seeds 0 1 2 3 4
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", metavar="ROOT", type=Path, help="folder that holds coco/ in Detectron2's layout")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="one set of lists each (default: 0 1 2)"
    )
    arguments = parser.parse_args(argv)
    if min(arguments.seeds) < 0:
        parser.error(f"--seeds {min(arguments.seeds)}: a run's SEED is 0 or more")
    try:
        from transfer.subsets import read_list, write_lists  # after parsing, so that --help needs no Detectron2

        files = write_lists(arguments.root, arguments.seeds)
    except Detectron2Missing as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for file in files:
        print(f"{file}: {len(read_list(file))} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
