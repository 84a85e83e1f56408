"""Pretrained weights -> a file that Detectron2's MODEL.WEIGHTS takes, with an account of every key."""

import argparse
import math
import os
import pickle
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO

import torch
from torch import Tensor

from detco import __version__
from transfer.d2 import Detectron2Missing
from transfer.naming import KeyAccount, account_for
from transfer.sources import Source, load_layouts, read_source

SUFFIXES = (".pkl", ".pth")


class ConversionError(ValueError):
    """A conversion that was refused, with nothing written; the message says why."""


class VerificationError(RuntimeError):
    """Detectron2's ResNet does not compute the same with the converted weights; nothing has been written."""


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        source: The network that was converted.
        account: What became of every key of the input.
        warnings: What looks unhealthy in the weights, though it could be converted, and what to know of their source.
        output: The file that was written.
        differences: Place and stage to the largest difference of features; empty if they were not compared.
    """

    source: Source
    account: KeyAccount
    warnings: tuple[str, ...]
    output: Path
    differences: Mapping[str, float]

    def __str__(self) -> str:
        preprocess = self.source.preprocess
        return "\n".join(
            [
                f"input        {self.source.path} ({self.source.kind})",
                f"network      {self.source.network}",
                f"preprocess   {preprocess.channel_order}, mean {_numbers(preprocess.mean_255)}, "
                f"std {_numbers(preprocess.std_255)}, stride in the {'1x1' if preprocess.stride_in_1x1 else '3x3'} "
                f"({self._where_preprocess_is_from()})",
                *(f"pretraining  {key} {value}" for key, value in self._settings().items()),
                describe_account(self.account),
                *(f"warning      {warning}" for warning in self.warnings),
                *(
                    f"verify       {place}: largest difference to the source network {difference:.3g}"
                    for place, difference in self.differences.items()
                ),
                f"written      {self.output} ({self.output.stat().st_size / 1e6:.1f} MB)",
            ]
        )

    def _where_preprocess_is_from(self) -> str:
        if self.source.preprocess_is_recorded:
            return "recorded"
        layout = load_layouts().get(self.source.name)
        is_known = layout is not None and not layout.assumes
        return f"as known of {self.source.name}" if is_known else "not recorded: the usual one is assumed"

    def _settings(self) -> dict[str, Any]:
        known = ("method", "variant", "epochs", "steps")
        return {key: self.source.provenance[key] for key in known if key in self.source.provenance}


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


def convert(
    input: Path, output: Path, *, force: bool = False, source: str | None = None, verify: bool = False
) -> ConversionReport:
    """Write the network in `input` under Detectron2's names.

    Args:
        input: Artifact or checkpoint of detco-pretrain, or a released checkpoint of a known project.
        output: A .pkl file of numpy arrays, or a .pth file of tensors, which `torch.load(weights_only=True)` reads.
            Written atomically, in float32.
        force: Replace an existing `output`.
        source: Name of the known project; None to recognise it.
        verify: Let Detectron2 compute with the file before it gets its name. Needs Detectron2.

    Raises:
        ConversionError: If `output` is refused, a key is unexplained or colliding, or a tensor is not finite.
        VerificationError: If Detectron2's features differ from the source network's.
        FileNotFoundError, ValueError: As `read_source` raises them.
            Nothing has been written then, in any of these cases.
    """
    _check_output(input, output, force=force)
    network = read_source(input, source)
    account = _account(network)
    if account.unexplained or account.colliding:
        raise ConversionError(
            f"nothing was written, because not every key of {input} ({network.kind}) is understood:\n"
            f"{describe_account(account)}"
        )
    tensors = {target: _as_float32(name, network.tensors[name]) for name, target in account.converted.items()}
    warnings = (*check_health(tensors), *network.cautions)
    # Beside the output and with its suffix, by which Detectron2 chooses how to read it.
    partial = output.with_name(f".{output.stem}.{os.getpid()}.partial{output.suffix}")
    content = _content(network, tensors)
    file = partial.open("xb")  # Not "wb", which would follow a link of that name and overwrite where it leads.
    try:
        with file:
            _write(file, content, as_arrays=partial.suffix == ".pkl")
        differences = _verify(partial, network) if verify else {}
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return ConversionReport(network, account, warnings, output, differences)


def _content(source: Source, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What goes into the file: Detectron2's three keys, and the record that the training side reads."""
    return {
        "model": dict(tensors),
        # Detectron2 takes a .pkl with an author as it is, but renames the keys of one without, losing its statistics.
        "__author__": f"detco convert-to-d2 {__version__}",
        # Matched by suffix, these names are found in detectors with and without an FPN, and in C4's roi_heads.
        "matching_heuristics": True,
        "preprocess": source.preprocess.as_dict(),
        "provenance": {**source.provenance, "source": _describe_source(source)},
    }


def _write(file: BinaryIO, content: dict[str, Any], *, as_arrays: bool) -> None:
    """Write the file and sync it, so that after a crash the name it gets later is not that of half a file."""
    if as_arrays:
        arrays = {name: tensor.numpy() for name, tensor in content["model"].items()}
        pickle.dump({**content, "model": arrays}, file, protocol=4)
    else:
        torch.save(content, file)
    file.flush()
    os.fsync(file.fileno())


def _check_output(input: Path, output: Path, *, force: bool) -> None:
    if output.suffix not in SUFFIXES:
        raise ConversionError(f"the output is {output}; its suffix must be one of {', '.join(SUFFIXES)}")
    if not output.parent.is_dir():
        raise ConversionError(f"the output is {output}, but there is no folder {output.parent}; make it first")
    if output.exists() and not output.is_file():
        raise ConversionError(f"the output {output} exists and is not a file; give another name")
    if output.exists() and input.exists() and output.samefile(input):
        raise ConversionError(f"the output {output} is the input itself; give another name")
    # A link that leads nowhere does not exist, but would be replaced.
    if (output.exists() or output.is_symlink()) and not force:
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


# Times the deviation that a convolution of its size is initialised with (He et al., arXiv:1502.01852): beyond these
# the median over all convolutions of a trained network is no longer ordinary.
USUAL_SCALE = (0.05, 5.0)


def check_health(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Look for weights that cannot be right, or that hardly can.

    Returns:
        Warnings about running variances with zeros, about ones that are the same for every channel, and about weights
        of unusual scale.

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
    statistics = tuple(
        f"{len(names)} of {len(variances)} running variances {problem}: {', '.join(names[:4])}"
        for names, problem in (
            (constant, "are the same for every channel, as before any training"),
            (zero, "hold zeros, so these channels never varied"),
        )
        if names
    )
    return (*statistics, *_unusual_scale(tensors))


def _unusual_scale(tensors: Mapping[str, Tensor]) -> list[str]:
    """Compare the size of the kernels with what they are initialised with."""
    kernels = [tensor for tensor in tensors.values() if tensor.dim() == 4]
    scales = [float(kernel.square().mean().sqrt()) / math.sqrt(2 / kernel[0].numel()) for kernel in kernels]
    scale = median(scales) if scales else 1.0
    if USUAL_SCALE[0] <= scale <= USUAL_SCALE[1]:
        return []
    largest = max(float(kernel.abs().max()) for kernel in kernels)
    return [
        f"the kernels' scale is unusual: {scale:.3g} times that of an initialised network, largest weight "
        f"{largest:.3g}; the published learning rates may not fit"
    ]


def _describe_source(source: Source) -> dict[str, Any]:
    earlier = source.provenance.get("source")
    return {
        "file": source.path.name,
        "sha256": source.sha256,
        "kind": source.kind,
        "name": source.name,
        "project": source.project,
        "network": source.network,
        "preprocess_is_recorded": source.preprocess_is_recorded,
        # Of a file that was converted before.
        **({"earlier": earlier} if earlier is not None else {}),
    }


def _verify(path: Path, source: Source) -> dict[str, float]:
    """Return the largest differences to the source network.

    Raises:
        VerificationError: If one is beyond the tolerance.
    """
    # Imported here, because everything but --verify works without Detectron2.
    from transfer.parity import TOLERANCE, measure_parity

    prefix = "backbone/"
    trunk = {name.removeprefix(prefix): value for name, value in source.tensors.items() if name.startswith(prefix)}
    differences = measure_parity(path, trunk, source.preprocess)
    # Written so that NaN fails.
    if not all(difference <= TOLERANCE for difference in differences.values()):
        listing = ", ".join(f"{place} {difference:.3g}" for place, difference in differences.items())
        raise VerificationError(
            f"Detectron2's ResNet does not compute the same with the converted weights, so nothing was written. "
            f"Largest differences: {listing}. A large difference from res3 on means that the recorded stride "
            f"convention is wrong"
        )
    return differences


def _list_sources() -> str:
    """Return the table of known projects."""
    lines = []
    for layout in load_layouts().values():
        std = layout.preprocess.std_255
        lines += [
            f"{layout.name:15} {layout.title}{' (refused)' if layout.refuse else ''}",
            f"{'':15} {layout.project}, input {layout.preprocess.channel_order}, "
            f"mean {_numbers(layout.preprocess.mean_255)}, std {_numbers(std)}",
            *dict.fromkeys(
                f"{'':15}   {form.describe()}{' (only with --source)' * form.anonymous}" for form in layout.forms
            ),
            *([] if layout.verified else [f"{'':15}   layout not verified"]),
        ]
    return "\n".join(lines)


class _ListSources(argparse.Action):
    """Prints the table of known projects and ends the program, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        print(_list_sources())
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Make the command line of `convert-to-d2`."""
    parser = argparse.ArgumentParser(
        prog="convert-to-d2",
        description="Convert a pretrained ResNet-50 to a weights file for Detectron2, accounting for every key.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  convert-to-d2 runs/detco/model.safetensors detco.pkl --verify\n"
            "  convert-to-d2 moco_v2_800ep_pretrain.pth.tar moco_v2.pkl --verify\n"
            "  convert-to-d2 resnet50.pth barlow_twins.pkl --source barlow_twins"
        ),
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "input",
        type=Path,
        metavar="IN",
        help="artifact (.safetensors) or checkpoint (.pth) of detco-pretrain, or a released ResNet-50 checkpoint of a "
        "known project (.pth, .pth.tar, .pkl, .torch, .safetensors); read without executing anything in it",
    )
    files.add_argument(
        "output", type=Path, metavar="OUT", help="file to write: .pkl (numpy arrays) or .pth (tensors), in float32"
    )
    files.add_argument("--force", action="store_true", help="replace OUT if it exists (default: refuse)")
    source = parser.add_argument_group("source")
    source.add_argument(
        "--source",
        metavar="NAME",
        choices=tuple(load_layouts()),
        help="project that IN is of, where the file does not tell: several release a bare ResNet-50 (default: "
        "recognise it; see --list-sources)",
    )
    source.add_argument(
        "--list-sources", action=_ListSources, nargs=0, help="print the known projects with their layouts, and exit"
    )
    check = parser.add_argument_group("check")
    check.add_argument(
        "--verify",
        action="store_true",
        help="before OUT gets its name, load it into Detectron2's ResNet and compare res2..res5 with the source "
        "network on random input; if they differ by more than 1e-5 nothing is written and the exit code is 1 "
        "(default: no check; needs Detectron2)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `convert-to-d2`; return its exit code: 2 for a refused input, 1 for a failure after that."""
    args = build_parser().parse_args(argv)
    try:
        if args.verify:
            # Before anything is read: without Detectron2 there is nothing to verify with.
            import transfer.parity  # noqa: F401
        report = convert(args.input, args.output, force=args.force, source=args.source, verify=args.verify)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Detectron2Missing, VerificationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
