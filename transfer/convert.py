"""Pretrained weights -> a file that a detector's library loads, with an account of every key."""

import argparse
import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from transfer.conversion_report import ConversionReport, describe_account, show_numbers
from transfer.d2 import Detectron2Missing
from transfer.health import damage_in, oddities_in
from transfer.naming import KeyAccount, account_for
from transfer.sources import Source, load_layouts, read_source
from transfer.targets import PARTS, TARGETS, Target

ONLY = ("backbone", "backbone+fpn")
COUNTER_ENDING = ".num_batches_tracked"


class ConversionError(ValueError):
    """A conversion that was refused, with nothing written; the message says why."""


class VerificationError(RuntimeError):
    """Detectron2's modules do not compute the same with the converted weights; nothing has been written."""


def convert(
    input: Path,
    output: Path,
    *,
    to: str = "d2",
    only: str = "",
    force: bool = False,
    source: str | None = None,
    verify: bool = False,
) -> ConversionReport:
    """Write the network in `input` under the names of a library's detectors.

    Args:
        input: Artifact or checkpoint of detco-pretrain, or a released checkpoint of a known project.
        output: A .pkl file of numpy arrays, or a .pth file of tensors, which `torch.load(weights_only=True)` reads.
            Written atomically, in float32.
        to: Name of the target, see TARGETS.
        only: Parts to convert, of ONLY; "" for all that the input has.
        force: Replace an existing `output`.
        source: Name of the known project; None to recognise it.
        verify: Let Detectron2 compute with the file before it gets its name. Needs Detectron2.

    Raises:
        ConversionError: If `output` is refused, a key is unexplained or colliding, a part is not there, a tensor is not
            finite, or nothing can verify the target.
        VerificationError: If Detectron2's features differ from the source network's.
        FileNotFoundError, ValueError: As `read_source` raises them.
            Nothing has been written then, in any of these cases.
    """
    target = TARGETS[to]
    if verify and target.unverifiable:
        raise ConversionError(f"--verify is not for --to {to}: {target.unverifiable}")
    _check_output(input, output, target, force=force)
    network = _restrict(read_source(input, source), only)
    account = _account(network, target)
    if account.unexplained or account.colliding:
        raise ConversionError(
            f"nothing was written, because not every key of {input} ({network.kind}) is understood:\n"
            f"{describe_account(account)}"
        )
    tensors = {theirs: _plain(ours, network.tensors[ours]) for ours, theirs in account.converted.items()}
    if damage := damage_in(tensors):
        raise ConversionError(damage)
    converted = {name.partition("/")[0] for name in account.converted}
    parts = tuple(part for part in PARTS if part in converted)
    report = ConversionReport(
        source=network,
        parts=parts,
        account=account,
        warnings=(*oddities_in(tensors), *network.cautions),
        output=output,
        settings=target.settings(network, parts),
    )
    return _save(report, tensors, target, verify=verify)


def _save(report: ConversionReport, tensors: Mapping[str, Tensor], target: Target, *, verify: bool) -> ConversionReport:
    """Write the file, which gets its name after it was verified, if it is to be; return the report with the result."""
    output, record = report.output, target.record(report.source, report.parts)
    # Beside the output and with its suffix, by which Detectron2 chooses how to read it.
    partial = output.with_name(f".{output.stem}.{os.getpid()}.partial{output.suffix}")
    file = partial.open("xb")  # Not "wb", which would follow a link of that name and overwrite where it leads.
    try:
        with file:
            _write(file, tensors, target, record, as_arrays=partial.suffix == ".pkl")
        report = _verify(partial, report) if verify else report
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return report


def _restrict(source: Source, only: str) -> Source:
    """Leave all parts out but some.

    Raises:
        ConversionError: If one that is wanted is not there.
    """
    if not only:
        return source
    wanted = only.split("+")
    roles = {name: name.partition("/")[0] for name in source.tensors}
    if absent := [part for part in wanted if part not in roles.values()]:
        found = ", ".join(dict.fromkeys(roles.values()))
        raise ConversionError(f"--only is {only}, but {source.path} ({source.kind}) has no {absent[0]}; it has {found}")
    reason = f"left out, as --only {only} asks"
    return replace(
        source,
        tensors={name: value for name, value in source.tensors.items() if roles[name] in wanted},
        left_out={**source.left_out, **{name: reason for name, role in roles.items() if role not in wanted}},
    )


def _write(
    file: BinaryIO, tensors: Mapping[str, Tensor], target: Target, record: Mapping[str, Any], *, as_arrays: bool
) -> None:
    """Write the file and sync it, so that after a crash the name it gets later is not that of half a file."""
    if as_arrays:
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        pickle.dump({target.tensors_key: arrays, **record}, file, protocol=4)
    else:
        torch.save({target.tensors_key: dict(tensors), **record}, file)
    file.flush()
    os.fsync(file.fileno())


def _check_output(input: Path, output: Path, target: Target, *, force: bool) -> None:
    if output.suffix not in target.suffixes:
        raise ConversionError(
            f"the output is {output}; for {target.title.partition(',')[0]} its suffix must be "
            f"{' or '.join(target.suffixes)}"
        )
    if not output.parent.is_dir():
        raise ConversionError(f"the output is {output}, but there is no folder {output.parent}; make it first")
    if output.exists() and not output.is_file():
        raise ConversionError(f"the output {output} exists and is not a file; give another name")
    if output.exists() and input.exists() and output.samefile(input):
        raise ConversionError(f"the output {output} is the input itself; give another name")
    # A link that leads nowhere does not exist, but would be replaced.
    if (output.exists() or output.is_symlink()) and not force:
        raise ConversionError(f"the output {output} exists; give another name, or --force to replace it")


def _account(source: Source, target: Target) -> KeyAccount:
    """Account for the network's tensors and for what lies beside it in the file."""
    account = account_for(source.tensors, target.tables)
    return replace(
        account,
        dropped={**account.dropped, **source.left_out},
        unexplained=(*account.unexplained, *source.unexplained),
    )


def _plain(name: str, tensor: Tensor) -> Tensor:
    """A tensor in float32, or a step counter as it is, with memory of its own."""
    if not tensor.is_floating_point() and not name.endswith(COUNTER_ENDING):
        raise ConversionError(f"{name} holds {tensor.dtype}; weights must be floating-point numbers")
    dtype = torch.float32 if tensor.is_floating_point() else torch.int64
    # Cloned, so that a tensor that is a view of a larger one does not bring all of that along.
    return tensor.detach().to(dtype).clone(memory_format=torch.contiguous_format)


def _verify(path: Path, report: ConversionReport) -> ConversionReport:
    """Add the largest differences to the source network.

    Raises:
        VerificationError: If one is beyond the tolerance.
    """
    # Imported here, because everything but --verify works without Detectron2.
    from transfer.parity import TOLERANCE, measure_parity

    parity = measure_parity(path, report.source.tensors, report.source.preprocess)
    # Written so that NaN fails.
    if not all(difference <= TOLERANCE for difference in parity.differences.values()):
        listing = ", ".join(f"{place} {difference:.3g}" for place, difference in parity.differences.items())
        raise VerificationError(
            f"Detectron2's modules do not compute the same with the converted weights, so nothing was written. "
            f"Largest differences: {listing}. A large difference from res3 on means that the recorded stride "
            f"convention is wrong"
        )
    return replace(report, differences=parity.differences, uncompared=parity.uncompared)


def _list_sources() -> str:
    """Return the table of known projects."""
    lines = []
    for layout in load_layouts().values():
        std = layout.preprocess.std_255
        lines += [
            f"{layout.name:15} {layout.title}{' (refused)' if layout.refuse else ''}",
            f"{'':15} {layout.project}, input {layout.preprocess.channel_order}, "
            f"mean {show_numbers(layout.preprocess.mean_255)}, std {show_numbers(std)}",
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
        description="Convert a pretrained ResNet-50, with its FPN and box head if it has them, to a weights file for "
        "Detectron2 or MMDetection, accounting for every key.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  convert-to-d2 runs/detco/model.safetensors detco.pkl --verify\n"
            "  convert-to-d2 moco_v2_800ep_pretrain.pth.tar moco_v2.pkl --verify\n"
            "  convert-to-d2 resnet50.pth barlow_twins.pkl --source barlow_twins\n"
            "  convert-to-d2 runs/soco/model.safetensors backbone.pkl --only backbone"
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
        "output",
        type=Path,
        metavar="OUT",
        help="file to write, in float32: .pkl (numpy arrays) or .pth (tensors); for MMDetection .pth",
    )
    files.add_argument("--force", action="store_true", help="replace OUT if it exists (default: refuse)")
    result = parser.add_argument_group("what is written")
    titles = "; ".join(f"{name}: {target.title}" for name, target in TARGETS.items())
    result.add_argument(
        "--to",
        choices=tuple(TARGETS),
        default="d2",
        help=f"whose detectors OUT is for (default: %(default)s). {titles}",
    )
    result.add_argument(
        "--only",
        choices=ONLY,
        default="",
        help="leave other pretrained parts out, for detectors that have others there: the box head fits detectors of "
        "the 4conv1fc recipe only (default: everything that IN has)",
    )
    _add_how_to_read_and_check(parser)
    return parser


def _add_how_to_read_and_check(parser: argparse.ArgumentParser) -> None:
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
        help="before OUT gets its name, load it into Detectron2's ResNet, FPN and box head, and compare res2..res5, "
        "p2..p5 and the box features with the source network on random input; if they differ by more than 1e-5 nothing "
        "is written and the exit code is 1 (default: no check; needs Detectron2)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run `convert-to-d2`; return its exit code: 2 for a refused input, 1 for a failure after that."""
    args = build_parser().parse_args(argv)
    try:
        if args.verify and not TARGETS[args.to].unverifiable:
            # Before anything is read: without Detectron2 there is nothing to verify with.
            import transfer.parity  # noqa: F401
        report = convert(
            args.input,
            args.output,
            to=args.to,
            only=args.only,
            force=args.force,
            source=args.source,
            verify=args.verify,
        )
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
