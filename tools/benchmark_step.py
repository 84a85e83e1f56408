"""What the training step costs beyond the passes through ResNet-50: figures S1, S2, S3 and M1 as JSON lines.

S1  the step over its bound. The step is all that a run does once it has the views of a batch: EMA, forward, backward,
    finite check, optimiser, queues. The bound is the bare passes: query views forward and backward, key views forward,
    in the same precision, memory layout and BatchNorm groups.
S2  the parts of the difference, each measured alone, and the rest that none of them explains. On a GPU, parts of many
    small kernels cost less within a step, where the host runs ahead.
S3  lightly over ours: the step of MoCo v2 from the building blocks of the package lightly, as in its example, against
    ours; left out if lightly is not installed.
M1  peak memory of DetCo's step over that of its bound, each in a process of its own: networks, queues, optimiser,
    gradients and activations.

The views are noise that lies on the device. All that is compared is measured by turns, and every round gives a ratio; a
figure is the median of the rounds. With one thread on a CPU, the process's own seconds are counted, else those of the
clock on the wall.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmarking import alternate, machine_name, ratios, summarise, tell
from lightly_step import LightlyStep, is_available
from measured_step import MEASURABLE, Passes, Setting, Step, Work, parts_of
from peak_memory import can_measure, peak_mebibytes

from pretrain.compile import compiler_trouble

PARTS = ("bound", "lightly", "memory")
STEP_BARS = {"moco_v2": "<= 1.10", "detco": "<= 1.15"}
MEMORY_BARS = {"detco": "<= 1.5"}
LIGHTLY_BARS = {"cpu": ">= 1.0", "cuda": ">= 1.2"}
MILLISECONDS = 1000.0

EPILOG = """examples:
  python tools/benchmark_step.py                                     both methods, sizes for this device
  python tools/benchmark_step.py --parts bound --methods detco --batch-size 32 --threads 1
  python tools/benchmark_step.py --precision bf16 --compile off > step.jsonl
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line, with what depends on the device filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--methods", nargs="+", choices=MEASURABLE, default=["moco_v2", "detco"], help="(default: both)"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="bound is S1 and S2 (default: all)"
    )
    parser.add_argument("--batch-size", type=int, help="images (default: 256 on a GPU, 8 on a CPU)")
    parser.add_argument("--memory-batch-size", type=int, help="of M1 (default: 256 on a GPU, 32 on a CPU)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="(default: bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument("--compile", choices=("on", "off"), help="networks, also the bound's (default: on a GPU)")
    parser.add_argument("--queue-size", type=int, default=65536, help="keys per queue (default: 65536)")
    parser.add_argument("--global-size", type=int, default=224, help="side of a view, pixels (default: 224)")
    parser.add_argument("--patch-size", type=int, default=64, help="side of a patch, pixels (default: 64)")
    parser.add_argument("--rounds", type=int, help="measurements per figure (default: 5 on a GPU, 3 on a CPU)")
    parser.add_argument("--min-seconds", type=float, default=0.5, help="least duration of one (default: 0.5)")
    parser.add_argument("--threads", type=int, help="of torch on the CPU (default: as torch has it)")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    args = parser.parse_args(argv)

    args.device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    on_gpu = args.device.type == "cuda"
    args.batch_size = (256 if on_gpu else 8) if args.batch_size is None else args.batch_size
    args.memory_batch_size = (256 if on_gpu else 32) if args.memory_batch_size is None else args.memory_batch_size
    args.precision = args.precision or ("bf16" if on_gpu else "fp32")
    args.compile = args.compile or ("on" if on_gpu and _can_compile(args.device) else "off")
    args.rounds = (5 if on_gpu else 3) if args.rounds is None else args.rounds
    for size in (args.batch_size, args.memory_batch_size):
        if size < 1:
            parser.error(f"a batch of {size} images was asked for; at least one is needed")
        if args.queue_size % size:
            parser.error(f"--queue-size {args.queue_size} is not a multiple of the batch of {size}: change one of them")
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; at least one is needed")
    return args


def _can_compile(device: torch.device) -> bool:
    trouble = compiler_trouble(device)
    if trouble:
        tell(f"networks are not compiled, because torch.compile does not work here: {trouble}")
    return trouble is None


class Bench:
    """Measures and prints the figures of one setting."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.setting = Setting(
            device=args.device,
            batch_size=args.batch_size,
            global_size=args.global_size,
            patch_size=args.patch_size,
            queue_size=args.queue_size,
            is_bf16=args.precision == "bf16",
            is_compiled=args.compile == "on",
        )
        self._memory_setting = self.setting._replace(batch_size=args.memory_batch_size)
        self._rounds, self._min_seconds = args.rounds, args.min_seconds

    def measure_bound(self, method: str) -> None:
        """S1 and S2."""
        step, passes = Step(method, self.setting), Passes(method, self.setting)
        contestants: dict[str, Work] = {"step": step, "bound": passes}
        if passes.num_groups > 1:
            contestants["bound of one group"] = Passes(method, self.setting, is_grouped=False)
        parts = parts_of(step, self.setting)
        seconds = self._take_turns(contestants | parts)

        bar = STEP_BARS[method]
        self._show(ratios(seconds["step"], seconds["bound"]), "S1", method, "step / bound", unit="x", bar=bar)
        if "bound of one group" in seconds:
            name = "step / bound, whose BatchNorm has one group"
            self._show(ratios(seconds["step"], seconds["bound of one group"]), "S1", method, name, unit="x")
        for name in contestants:
            self._show_ms(seconds[name], "S1", method, name)
        for name in parts:
            self._show_ms(seconds[name], "S2", method, name)
        explained = zip(*(seconds[name] for name in ("bound", *parts)), strict=True)
        rest = [step_s - sum(others) for step_s, others in zip(seconds["step"], explained, strict=True)]
        self._show_ms(rest, "S2", method, "rest")

    def measure_lightly(self) -> None:
        """S3."""
        if not is_available():
            tell("S3 is left out: lightly is not installed (pip install lightly, or the extra bench)")
            return
        contestants: dict[str, Work] = {"ours": Step("moco_v2", self.setting), "lightly": LightlyStep(self.setting)}
        if self.setting.is_compiled:
            contestants["lightly compiled"] = LightlyStep(self.setting, is_compiled=True)
        seconds = self._take_turns(contestants)

        for name in list(contestants)[1:]:
            bar = LIGHTLY_BARS[self.setting.device.type] if name == "lightly" else None
            self._show(ratios(seconds[name], seconds["ours"]), "S3", "moco_v2", f"{name} / ours", unit="x", bar=bar)
        for name in contestants:
            self._show_ms(seconds[name], "S3", "moco_v2", name)

    def measure_memory(self, method: str) -> None:
        """M1."""
        setting = self._memory_setting
        if not can_measure(setting.device):
            tell("M1 is left out: the peak memory of a process can only be known under Linux, or on a GPU")
            return
        contestants: dict[str, Callable[..., Work]] = {"step": Step, "bound": Passes}
        peaks = {
            name: peak_mebibytes(make, method, setting, device=setting.device) for name, make in contestants.items()
        }
        about: dict[str, Any] = {"figure": "M1", "method": method, "device": setting.device}
        name = f"peak memory of step / bound{_words(setting)}"
        summarise([peaks["step"] / peaks["bound"]], name=name, unit="x", bar=MEMORY_BARS[method], **about).print()
        for name, peak in peaks.items():
            summarise([peak], name=f"peak memory of {name}{_words(setting)}", unit="MiB", **about).print()

    def _take_turns(self, contestants: dict[str, Work]) -> dict[str, list[float]]:
        has_one_thread = self.setting.device.type == "cpu" and torch.get_num_threads() == 1
        return alternate(
            contestants,
            rounds=self._rounds,
            min_seconds=self._min_seconds,
            device=self.setting.device,
            clock=time.process_time if has_one_thread else time.perf_counter,
        )

    def _show_ms(self, seconds: Sequence[float], figure: str, method: str, name: str) -> None:
        self._show([value * MILLISECONDS for value in seconds], figure, method, name, unit="ms")

    def _show(
        self, values: Sequence[float], figure: str, method: str, name: str, *, unit: str, bar: str | None = None
    ) -> None:
        name, device = name + _words(self.setting), self.setting.device
        summarise(values, figure=figure, method=method, name=name, unit=unit, device=device, bar=bar).print()


def _words(setting: Setting) -> str:
    """What distinguishes a setting from others, for the names of its figures."""
    precision = "bf16" if setting.is_bf16 else "fp32"
    return f", {precision}{', compiled' if setting.is_compiled else ''}, batch {setting.batch_size}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures of all parts that are wanted."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    tell(f"step: {machine_name(args.device)}, {torch.get_num_threads()} threads")
    bench = Bench(args)
    for method in args.methods:
        if "bound" in args.parts:
            bench.measure_bound(method)
        if "memory" in args.parts and method in MEMORY_BARS:
            bench.measure_memory(method)
    if "lightly" in args.parts and "moco_v2" in args.methods:
        bench.measure_lightly()
    return 0


if __name__ == "__main__":
    sys.exit(main())
