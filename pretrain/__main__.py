"""`detco-pretrain`: pretrain a network on a folder of images."""

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from pretrain import fork_server

EPILOG = """\
config keys (KEY VALUE; the config file's values are their defaults, --dry-run prints all):
  DATA.ROOT                      folder (tree) of JPEG/PNG/WebP files, a .txt file listing their paths, a folder of
                                 .tar shards, or the http(s) address of their index (docs/shards.md)
  DATA.NUM_WORKERS               loader processes per training process (4)
  DATA.PROPOSALS                 boxes of tools/generate_proposals.py, for the methods that learn from objects
  METHOD.NAME                    detco, moco_v2, soco_c4, soco_fpn or soco_fpn_star; the other METHOD.* keys are the
                                 method's own (queue, heads, EMA)
  VIEWS.*                        crops, colours, blur, patches, boxes: the method's views
  SOLVER.EPOCHS                  passes over the images (200)
  SOLVER.BATCH_SIZE_TOTAL        images per step over all processes (256)
  SOLVER.ACCUMULATE_STEPS        micro-batches that a process makes of its images of a step, for less memory (1); the
                                 gradient is that of the whole batch, but BatchNorm sees one micro-batch
  SOLVER.BASE_LR                 lr at 256 images (0.03); scaled linearly with the batch
  SOLVER.OPTIMIZER               sgd (default) or lars, with SOLVER.TRUST_COEFFICIENT (0.001)
  SOLVER.WARMUP_EPOCHS           in which the lr rises from SOLVER.WARMUP_START (0.01) of its peak (0: no warm-up)
  SOLVER.FINAL_LR                at the end of a cosine (0)
  SOLVER.COMPILE                 auto (default: on GPUs), on or off: torch.compile for trunks and views
  CHECKPOINT.SAVE_EVERY_MINUTES  wall clock (10)     CHECKPOINT.KEEP_LAST  checkpoints (3)
  LOG.EVERY_STEPS                steps per report (20)     SEED  of everything random (0)

examples:
  detco-pretrain --config-file configs/pretrain/detco_r50_200ep.yaml --num-gpus 8 --output-dir runs/detco \\
      DATA.ROOT /data/imagenet/train
  torchrun --nproc-per-node 2 -m pretrain --config-file configs/pretrain/quick/moco_v2_r50.yaml --num-gpus 0 \\
      --output-dir runs/quick DATA.ROOT photos SOLVER.EPOCHS 2
  python tools/generate_proposals.py photos -o proposals
  detco-pretrain --config-file configs/pretrain/quick/soco_fpn.yaml --num-gpus 0 --output-dir runs/soco_fpn \\
      DATA.ROOT photos DATA.PROPOSALS proposals

exit codes: 0 finished, 1 failed while running, 2 refused before any work, 143/130/138 stopped by SIGTERM/SIGINT/SIGUSR1
after a save (--resume continues).
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line, without reading any file."""
    parser = argparse.ArgumentParser(
        prog="detco-pretrain",
        description="Pretrain a network on a folder of images, without labels.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to run")
    what.add_argument("--config-file", type=Path, help="YAML under configs/pretrain (default: built-in values)")
    what.add_argument(
        "--output-dir", type=Path, help="run directory: checkpoints, metrics, model.safetensors at the end"
    )
    what.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="config keys to change, see below")
    how = parser.add_argument_group("how to run it")
    how.add_argument(
        "--num-gpus",
        type=int,
        help="GPUs of this machine, 0 for the CPU (default: all; torchrun and srun set processes)",
    )
    how.add_argument(
        "--resume", action="store_true", help="continue the run in --output-dir (default: refuse to touch it)"
    )
    how.add_argument("--dry-run", action="store_true", help="check everything, print config, steps and lr, and stop")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = parse(argv)
    # Before the imports of this process, to import beside it. A config file without workers is not read yet; then, and
    # where this process only starts others, it is for nothing and does no harm.
    if not args.dry_run and ("DATA.NUM_WORKERS", "0") not in pairwise(args.overrides):
        fork_server.start()
    # Imported after parsing, so that --help needs no torch and answers at once.
    from pretrain.config import ConfigError, load_config
    from pretrain.launch import REFUSED, is_first_process, launch
    from pretrain.run import pretrain

    overrides = [*args.overrides, *(["OUTPUT_DIR", str(args.output_dir)] if args.output_dir else [])]
    try:
        cfg = load_config(args.config_file, overrides)
    except ConfigError as error:
        if is_first_process():
            print(f"error: {error}", file=sys.stderr)
        return REFUSED
    return launch(pretrain, cfg, args.resume, args.dry_run, num_gpus=args.num_gpus)


if __name__ == "__main__":
    sys.exit(main())
