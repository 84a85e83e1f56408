"""detco-transfer: fine-tune a Detectron2 detector from pretrained weights, and evaluate it."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (
    None,
    "",
):  # `python transfer/train_net.py`: the folder that holds the package, not the package itself
    sys.path[0] = str(Path(__file__).resolve().parents[1])

EPILOG = """\
examples:
  COCO Mask R-CNN FPN 1x on 8 GPUs, from a file made by convert-to-d2:
    detco-transfer --config-file configs/transfer/coco/mask_rcnn_r50_fpn_1x_converted.yaml --num-gpus 8 \\
        --datasets-root /data --output-dir runs/detco_1x MODEL.WEIGHTS detco.pkl
  the same, but only checked, on any machine:
    detco-transfer --check --config-file configs/transfer/coco/mask_rcnn_r50_fpn_1x_converted.yaml --num-gpus 8 \\
        --datasets-root /data MODEL.WEIGHTS detco.pkl
  your own COCO-style data on the CPU, a few dozen iterations from random weights:
    detco-transfer --config-file configs/transfer/quick/coco_mask_rcnn_fpn_random.yaml --num-gpus 0 \\
        --train-data my/train.json --val-data my/val.json --output-dir runs/mine SOLVER.MAX_ITER 60

The run directory holds log.txt, config.yaml, metrics.json, TensorBoard events, checkpoints, inference/ and, at the end,
results.json, which detco-results reads.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line. Its defaults need neither torch nor Detectron2."""
    parser = argparse.ArgumentParser(
        prog="detco-transfer",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_training(parser)
    _add_data(parser)
    _add_gpus(parser)
    return parser


def _add_training(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to train")
    what.add_argument(
        "--config-file",
        required=True,
        metavar="FILE",
        help="a YAML of configs/transfer/<dataset>/ (published protocols; *_converted, *_supervised, *_random say what "
        "training starts from) or configs/transfer/quick/ (minutes on a CPU)",
    )
    what.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="config values, after all options: MODEL.WEIGHTS detco.pkl SEED 1. Keys are Detectron2's, plus "
        "TRANSFER.TASK, TRANSFER.INIT and TRANSFER.LABEL",
    )
    run = parser.add_argument_group("how to run")
    run.add_argument(
        "--check",
        action="store_true",
        help="compare the settings with the weights, the data and the published recipe, print what was found and exit: "
        "0 if training could start, 2 if not. Trains and writes nothing, needs no GPU (default: check, then train)",
    )
    run.add_argument(
        "--output-dir", metavar="DIR", help="run directory (default: OUTPUT_DIR of the config, ./output if it has none)"
    )
    run.add_argument(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint of the run directory, if there is one (default: refuse a used one)",
    )
    run.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate a trained detector, MODEL.WEIGHTS or with --resume the run's last; no training, no "
        "results.json, and a run's own files stay as they are: log, config and predictions go to DIR/evaluation, where "
        "they replace an earlier evaluation's",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--datasets-root",
        metavar="DIR",
        default=os.environ.get("DETECTRON2_DATASETS", "datasets"),
        help="folder that holds coco/, VOC2007/, VOC2012/ in Detectron2's layout (default: $DETECTRON2_DATASETS, else "
        "datasets; now: %(default)s)",
    )
    data.add_argument(
        "--train-data",
        metavar="DATA",
        help="a set of your own instead of DATASETS.TRAIN, VOC-style DIR:SPLIT or COCO-style FILE.json[:IMAGE_DIR]; "
        "the number of classes is read from it (default: none)",
    )
    data.add_argument(
        "--val-data", metavar="DATA", help="the same for evaluation, instead of DATASETS.TEST (default: none)"
    )


def _add_gpus(parser: argparse.ArgumentParser) -> None:
    gpus = parser.add_argument_group("GPUs")
    gpus.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="GPUs per machine; 0 is the CPU, in one process, which is also taken if there is no GPU "
        "(default: %(default)s)",
    )
    gpus.add_argument(
        "--auto-scale",
        action="store_true",
        help="scale batch, learning rate and iterations from the published 8 GPUs to this number by Detectron2's "
        "linear rule, 2 images per GPU, and print what changed (default: values as in the config)",
    )
    gpus.add_argument("--num-machines", type=int, default=1, metavar="N", help="machines (default: %(default)s)")
    gpus.add_argument(
        "--machine-rank", type=int, default=0, metavar="N", help="index of this machine, from 0 (default: %(default)s)"
    )
    gpus.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="rendezvous, tcp://HOST:PORT of machine 0; auto finds a free port on one machine (default: %(default)s)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run detco-transfer. Returns the exit code: 0, or 2 for wrong input, 1 for a missing Detectron2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.num_gpus < 0 or args.num_machines < 1 or not 0 <= args.machine_rank < args.num_machines:
        parser.error("--num-gpus must be 0 or more, --num-machines 1 or more, --machine-rank below --num-machines")
    if args.num_machines > 1 and args.dist_url == "auto":
        parser.error("--num-machines above 1 needs --dist-url tcp://HOST:PORT of machine 0")

    # After parsing, so that --help is quick and works without Detectron2.
    from transfer import d2

    try:
        d2.require()
    except d2.Detectron2Missing as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from detectron2.engine import launch
    from torch.multiprocessing.spawn import ProcessRaisedException

    from transfer import finetune
    from transfer.checks.report import describe_findings
    from transfer.preflight import WeightsDoNotFit
    from transfer.settings_check import SettingsError, examine
    from transfer.trainer import FolderNotShared

    try:
        # All checks once before any process is started, so that what is wrong is said once, and quickly.
        prepared = examine(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.check:
        print(prepared.settings)
        print(describe_findings(prepared.cfg.TRANSFER.TASK, prepared.departures, prepared.notes, prepared.errors))
    for message in prepared.errors:
        print(f"error: {message}", file=sys.stderr)
    if prepared.errors or args.check:
        return 2 if prepared.errors else 0
    wrong_input = (WeightsDoNotFit, FolderNotShared, SettingsError)
    try:
        launch(
            finetune.run,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except wrong_input as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ProcessRaisedException as error:  # on several GPUs
        reason = message_in(str(error), wrong_input)
        if reason is None:
            raise
        print(f"error: {reason}", file=sys.stderr)
        return 2
    return 0


def message_in(trace: str, kinds: Sequence[type[Exception]]) -> str | None:
    """The message of an exception of one of these classes that ended another process; None if it was of none.

    Args:
        trace: The text of PyTorch's ProcessRaisedException: the traceback, with the exception and its message last.
        kinds: Classes.
    """
    for kind in kinds:
        _, found, message = trace.rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")
        if found:
            return message.strip()
    return None


if __name__ == "__main__":
    sys.exit(main())
