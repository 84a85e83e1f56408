"""Pretrained weights -> a file that Detectron2's MODEL.WEIGHTS takes, with an account of every key."""

import argparse
import pickle
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detco import __version__
from detco.artifact import open_atomically
from transfer.d2 import Detectron2Missing
from transfer.naming import KeyAccount, account_for
from transfer.sources import Source, read_source

SUFFIXES = (".pkl", ".pth")


class ConversionError(ValueError):
    """A conversion that was refused, with nothing written; the message says why."""


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        source: The network that was converted.
        account: What became of every key of the input.
        warnings: What looks unhealthy in the weights, though it could be converted.
        output: The file that was written.
    """

    source: Source
    account: KeyAccount
    warnings: tuple[str, ...]
    output: Path

    def __str__(self) -> str:
        preprocess = self.source.preprocess
        return "\n".join(
            [
                f"input        {self.source.path} ({self.source.kind})",
                f"network      {self.source.network}",
                f"preprocess   {preprocess.channel_order}, mean {_numbers(preprocess.mean_255)}, "
                f"std {_numbers(preprocess.std_255)}, stride in the {'1x1' if preprocess.stride_in_1x1 else '3x3'} "
                f"({'recorded' if self.source.preprocess_is_recorded else 'not recorded: the usual one is assumed'})",
                describe_account(self.account),
                *(f"warning      {warning}" for warning in self.warnings),
                f"written      {self.output} ({self.output.stat().st_size / 1e6:.1f} MB)",
            ]
        )


def _numbers(values: Sequence[float]) -> str:
    return "/".join(f"{value:g}" for value in values)


def describe_account(account: KeyAccount) -> str:
    """Say in a few lines what became of the keys; unexplained and colliding ones by name."""
    lines = [f"converted    {len(account.converted)}", f"dropped      {len(account.dropped)} on purpose"]
    for reason, count in Counter(account.dropped.values()).most_common():
        lines.append(f"             {count:4d} {reason}")
    lines.append(f"unexplained  {len(account.unexplained)} {', '.join(account.unexplained)}".rstrip())
    colliding = [f"{target} from {' and '.join(names)}" for target, names in account.colliding.items()]
    lines.append(f"colliding    {len(colliding)} {'; '.join(colliding)}".rstrip())
    return "\n".join(lines)


def convert(input: Path, output: Path, *, force: bool = False) -> ConversionReport:
    """Write the network in `input` under Detectron2's names.

    Args:
        input: Artifact or checkpoint of detco-pretrain, MoCo checkpoint, or state dict of a ResNet-50.
        output: A .pkl file of numpy arrays, or a .pth file of tensors, which `torch.load(weights_only=True)` reads.
            Written atomically, in float32.
        force: Replace an existing `output`.

    Raises:
        ConversionError: If `output` is refused, a key is unexplained or colliding, or a tensor is not finite.
            Nothing has been written then.
        FileNotFoundError, ValueError: As `read_source` raises them.
    """
    _check_output(input, output, force=force)
    source = read_source(input)
    account = _account(source)
    if account.unexplained or account.colliding:
        raise ConversionError(
            f"nothing was written, because not every key of {input} is understood:\n{describe_account(account)}"
        )
    tensors = {target: _as_float32(name, source.tensors[name]) for name, target in account.converted.items()}
    warnings = check_health(tensors)
    content: dict[str, Any] = {
        "model": tensors,
        # Detectron2 takes a .pkl with an author as it is, but renames the keys of one without, losing its statistics.
        "__author__": f"detco convert-to-d2 {__version__}",
        # Matched by suffix, these names are found in detectors with and without an FPN, and in C4's roi_heads.
        "matching_heuristics": True,
        "preprocess": source.preprocess.as_dict(),
        "provenance": {**source.provenance, "source": _describe_source(source)},
    }
    with open_atomically(output) as file:
        if output.suffix == ".pkl":
            content["model"] = {name: tensor.numpy() for name, tensor in tensors.items()}
            pickle.dump(content, file, protocol=4)
        else:
            torch.save(content, file)
    return ConversionReport(source, account, warnings, output)


def _check_output(input: Path, output: Path, *, force: bool) -> None:
    if output.suffix not in SUFFIXES:
        raise ConversionError(f"the output is {output}; its suffix must be one of {', '.join(SUFFIXES)}")
    if not output.parent.is_dir():
        raise ConversionError(f"the output is {output}, but there is no folder {output.parent}; make it first")
    if output.exists() and not output.is_file():
        raise ConversionError(f"the output {output} exists and is not a file; give another name")
    if output.exists() and input.exists() and output.samefile(input):
        raise ConversionError(f"the output {output} is the input itself; give another name")
    if output.exists() and not force:
        raise ConversionError(f"the output {output} exists; give another name, or --force to replace it")


def _account(source: Source) -> KeyAccount:
    """Account for the network's tensors and for what lies beside it in the file."""
    account = account_for(source.tensors)
    return replace(
        account,
        dropped={**account.dropped, **source.left_out},
        unexplained=(*account.unexplained, *source.unexplained),
    )


def _as_float32(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise ConversionError(f"{name} holds {tensor.dtype}; weights must be floating-point numbers")
    # Cloned, so that a tensor that is a view of a larger one does not bring all of that along.
    return tensor.detach().to(torch.float32).clone(memory_format=torch.contiguous_format)


def check_health(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Look for weights that cannot be right, or that hardly can.

    Returns:
        Warnings about running variances with zeros, and about ones that are the same for every channel.

    Raises:
        ConversionError: If a value is NaN or infinite, or a running variance is negative.
    """
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ConversionError(
            f"{len(broken)} tensors hold NaN or infinite values: {', '.join(broken[:4])}. The pretraining diverged or "
            f"the file is damaged; take an earlier checkpoint"
        )
    variances = {name: tensor for name, tensor in tensors.items() if name.endswith(".running_var")}
    negative = [name for name, variance in variances.items() if variance.min() < 0]
    if negative:
        raise ConversionError(f"{len(negative)} running variances are negative: {', '.join(negative[:4])}")
    constant = [name for name, variance in variances.items() if variance.min() == variance.max()]
    zero = [name for name, variance in variances.items() if variance.min() == 0 and name not in constant]
    return tuple(
        f"{len(names)} of {len(variances)} running variances {problem}: {', '.join(names[:4])}"
        for names, problem in (
            (constant, "are the same for every channel, as before any training"),
            (zero, "hold zeros, so these channels never varied"),
        )
        if names
    )


def _describe_source(source: Source) -> dict[str, Any]:
    return {
        "file": source.path.name,
        "sha256": source.sha256,
        "kind": source.kind,
        "network": source.network,
        "preprocess_is_recorded": source.preprocess_is_recorded,
    }


def _verify(report: ConversionReport) -> bool:
    """Print the largest differences to the source network; return whether they are within the tolerance."""
    # Imported here, because everything but --verify works without Detectron2.
    from transfer.parity import TOLERANCE, measure_parity

    prefix = "backbone/"
    source = report.source
    trunk = {name.removeprefix(prefix): value for name, value in source.tensors.items() if name.startswith(prefix)}
    differences = measure_parity(report.output, trunk, source.preprocess)
    for place, difference in differences.items():
        print(f"verify       {place}: largest difference to the source network {difference:.3g}")
    # Written so that NaN fails.
    return all(difference <= TOLERANCE for difference in differences.values())


def build_parser() -> argparse.ArgumentParser:
    """Make the command line of `convert-to-d2`."""
    parser = argparse.ArgumentParser(
        prog="convert-to-d2",
        description="Convert a pretrained ResNet-50 to a weights file for Detectron2, accounting for every key.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  convert-to-d2 runs/detco/model.safetensors detco.pkl --verify\n"
            "  convert-to-d2 moco_v2_200ep_pretrain.pth.tar moco_v2.pth --force"
        ),
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "input",
        type=Path,
        metavar="IN",
        help="artifact (.safetensors) or checkpoint (.pth) of detco-pretrain, MoCo v1 or v2 checkpoint (.pth.tar), or "
        "a state dict of a torchvision ResNet-50; read without executing anything in it",
    )
    files.add_argument(
        "output", type=Path, metavar="OUT", help="file to write: .pkl (numpy arrays) or .pth (tensors), in float32"
    )
    files.add_argument("--force", action="store_true", help="replace OUT if it exists (default: refuse)")
    check = parser.add_argument_group("check")
    check.add_argument(
        "--verify",
        action="store_true",
        help="load OUT into Detectron2's ResNet and compare res2..res5 with the source network on random input; exit "
        "code 1 if they differ by more than 1e-5 (default: no check; needs Detectron2)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `convert-to-d2`; return its exit code: 2 for a refused input, 1 for a failure after that."""
    args = build_parser().parse_args(argv)
    try:
        if args.verify:
            # Before anything is written: without Detectron2 there is nothing to verify with.
            import transfer.parity  # noqa: F401
        report = convert(args.input, args.output, force=args.force)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Detectron2Missing, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report)
    if args.verify and not _verify(report):
        print(
            f"error: Detectron2's ResNet does not compute the same with {args.output}; do not use this file. A large "
            f"difference from res3 on means that the recorded stride convention is wrong",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
