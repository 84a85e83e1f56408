"""How a method would scale from one GPU to hundreds, estimated from one GPU's rate, its traffic and stated link speeds.

The traffic is counted, not known in advance: two processes on the CPU make a step of the method, once with few images
and once with more, and every call of a collective is recorded, as are the gradients, which are as large as the trained
parameters. What does not grow with the images is a fixed cost.

The model: GPUs in nodes of --gpus-per-node, all of which send at once, --node-gbs within the node and --network-gbs
through a network card each (GB per second, in each direction, as reached and not as advertised).

    sum of B bytes      2 (g-1)/g B / node + 2 (m-1)/m B/g / network      g GPUs in each of m nodes, n = g m
    gather of B each    (n-1) B / node + (m-1) B / network                every card brings in its share for the node
    exchange of B each  (g-1)/n B / node + (n-g)/n B / network            B/n to every other GPU

and --latency-us per call and hop (log2 n of them). Gradients travel while the backward pass goes on, in buckets; what
does not fit into --backward-share of the step, and the last bucket in any case, is waited for. All other traffic is
waited for in full. The data is as many photos per second as are trained, which the storage has to give.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Run as a file, Python looks for packages beside it; those of the suite lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

EPILOG = """examples:
  python tools/estimate_scaling.py detco --images-per-second 1400 --images-per-gpu 256
  python tools/estimate_scaling.py moco_v2 --images-per-second 2400 --images-per-gpu 32 --network-gbs 20
"""
FEW_IMAGES, MORE_IMAGES = 2, 4
"""Images of a process in the two recorded steps."""

GRADIENTS = "gradients"
SUM, GATHER, EXCHANGE, SPREAD = "sum", "gather", "exchange", "broadcast"
COLLECTIVES = {
    "all_reduce": (SUM, 0),
    "all_gather": (GATHER, 1),
    "all_gather_into_tensor": (GATHER, 1),
    "all_to_all_single": (EXCHANGE, 1),
    "broadcast": (SPREAD, 0),
}
"""Function of torch.distributed -> what it does, and which of its arguments this process sends."""

BUCKET_BYTES = 25 * 2**20
"""Of DistributedDataParallel, by default."""

PHOTO_BYTES = 110e3
"""Mean of ImageNet's."""


class Traffic(NamedTuple):
    """What one process sends in a step by one kind of collective.

    Attributes:
        kind: One of SUM, GATHER, EXCHANGE, SPREAD; or GRADIENTS, a sum that overlaps with the backward pass.
        calls: Per step.
        fixed_bytes: Whatever the number of images.
        bytes_per_image: For each image of the process.
    """

    kind: str
    calls: int
    fixed_bytes: float
    bytes_per_image: float

    def bytes(self, images_per_gpu: int) -> float:
        """Per step and process."""
        return self.fixed_bytes + self.bytes_per_image * images_per_gpu


class Links(NamedTuple):
    """How GPUs are connected: GB/s in each direction, seconds per hop."""

    gpus_per_node: int
    node_gbs: float
    network_gbs: float
    latency_s: float

    def seconds(self, kind: str, num_bytes: float, calls: int, num_gpus: int) -> float:
        """Duration of `calls` collectives of one kind that send `num_bytes` together."""
        within = min(self.gpus_per_node, num_gpus)
        nodes = num_gpus / within
        if kind in (SUM, GRADIENTS):
            near, far = 2 * (within - 1) / within, 2 * (nodes - 1) / nodes / within
        elif kind == GATHER:
            near, far = num_gpus - 1, nodes - 1
        elif kind == EXCHANGE:
            near, far = (within - 1) / num_gpus, (num_gpus - within) / num_gpus
        else:
            near, far = float(within > 1), float(nodes > 1)
        hops = math.ceil(math.log2(num_gpus)) if num_gpus > 1 else 0
        moving = num_bytes * (near / self.node_gbs + far / self.network_gbs) / 1e9
        return moving + calls * hops * self.latency_s


class Estimate(NamedTuple):
    """One number of GPUs.

    Attributes:
        num_gpus: How many.
        waited_ms: What a step waits for collectives other than the gradients'.
        gradients_ms: What it waits for these, beyond what overlaps.
        images_per_second: Over all GPUs.
        efficiency: Share of as many single GPUs' rate, in (0, 1].
    """

    num_gpus: int
    waited_ms: float
    gradients_ms: float
    images_per_second: float
    efficiency: float


def estimate(
    traffic: Sequence[Traffic],
    links: Links,
    num_gpus: int,
    *,
    images_per_gpu: int,
    images_per_second: float,
    backward_share: float,
) -> Estimate:
    """The rate of `num_gpus`, each with as many images as the one that was measured.

    Args:
        traffic: Of a step.
        links: Between the GPUs.
        num_gpus: How many.
        images_per_gpu: In a step.
        images_per_second: Of one GPU alone.
        backward_share: Of its step, in which gradients travel unnoticed.
    """
    step_s = images_per_gpu / images_per_second
    waited_s = gradients_s = 0.0
    for item in traffic:
        seconds = links.seconds(item.kind, item.bytes(images_per_gpu), item.calls, num_gpus)
        if item.kind == GRADIENTS:
            last_s = links.seconds(SUM, min(BUCKET_BYTES, item.fixed_bytes), 1, num_gpus)
            gradients_s = max(last_s, seconds - backward_share * step_s)
        else:
            waited_s += seconds
    step_of_many_s = step_s + waited_s + gradients_s
    rate = num_gpus * images_per_gpu / step_of_many_s
    return Estimate(num_gpus, 1e3 * waited_s, 1e3 * gradients_s, rate, step_s / step_of_many_s)


def count_traffic(method: str, overrides: Sequence[str]) -> list[Traffic]:
    """What a step of a method sends, counted in two processes on this machine.

    Args:
        method: A name of `detco.methods.METHODS`.
        overrides: Keys of the training config, KEY, VALUE, KEY, ...
    """
    import torch
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_record_main, (folder, method, tuple(overrides)), nprocs=2, start_method="spawn")
        few, more, parameters_bytes = torch.load(Path(folder) / "recorded.pt")
    traffic = [Traffic(GRADIENTS, math.ceil(parameters_bytes / BUCKET_BYTES), parameters_bytes, 0.0)]
    for kind in (SUM, GATHER, EXCHANGE, SPREAD):
        of_few, of_more = ([size for what, size in calls if what == kind] for calls in (few, more))
        slope = (sum(of_more) - sum(of_few)) / (MORE_IMAGES - FEW_IMAGES)
        if of_few:
            traffic.append(Traffic(kind, len(of_few), sum(of_few) - slope * FEW_IMAGES, slope))
    return traffic


def _record_main(rank: int, folder: str, method: str, overrides: tuple[str, ...]) -> None:
    """A process of `count_traffic`; the first one writes recorded.pt."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        recorded = record_step(method, overrides)
        if rank == 0:
            torch.save(recorded, Path(folder) / "recorded.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def record_step(method: str, overrides: Sequence[str]) -> tuple[list[tuple[str, int]], list[tuple[str, int]], int]:
    """Make two steps in the running process group.

    Returns:
        The collectives of a step of FEW_IMAGES and of one of MORE_IMAGES (what each does and the bytes that this
        process gives), and the bytes of the gradients.
    """
    import torch

    from pretrain.config import build_method, build_recipe, load_config

    sizes = {"METHOD.BN_GROUP": FEW_IMAGES, "METHOD.QUEUE_SIZE": 4 * MORE_IMAGES}
    has_groups = "BN_GROUP" in load_config(None, ["METHOD.NAME", method, *overrides]).METHOD
    words = [str(word) for pair in sizes.items() for word in pair] if has_groups else []
    cfg = load_config(None, ["METHOD.NAME", method, *overrides, *words])
    torch.manual_seed(0)  # alike on both processes, as in a run: they draw the same shuffling
    trained, recipe = build_method(cfg), build_recipe(cfg)
    recorded = []
    for images in (FEW_IMAGES, MORE_IMAGES):
        views = draw_views(recipe, images)
        with Recorder() as recorder, torch.autocast("cpu", torch.bfloat16):
            trained(views).loss.backward()
        recorded.append(recorder.calls)
    gradients = sum(4 * parameter.numel() for parameter in trained.parameters() if parameter.grad is not None)
    return recorded[0], recorded[1], gradients


def draw_views(recipe: Any, num_images: int) -> Any:
    """The views of a drawn photo, as if it were several."""
    import numpy as np
    from drawn_photos import draw_photo
    from torch.utils.data import default_collate

    from detco.views import Photo

    photo = draw_photo(500, 375, np.random.default_rng(0))
    samples = [recipe.draw(Photo.open(photo), np.random.default_rng(index)) for index in range(num_images)]
    return recipe.render(default_collate(samples))


class Recorder:
    """Notes the collectives that are called while it is entered.

    Attributes:
        calls: What each does and how many bytes this process gives, in their order.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self._replaced: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> "Recorder":
        import torch.distributed as dist

        for name in COLLECTIVES:
            self._replaced[name] = getattr(dist, name)
            setattr(dist, name, self._noting(name))
        return self

    def __exit__(self, *exception: object) -> None:
        import torch.distributed as dist

        for name, function in self._replaced.items():
            setattr(dist, name, function)

    def _noting(self, name: str) -> Callable[..., Any]:
        kind, position = COLLECTIVES[name]

        def noting(*arguments: Any, **keywords: Any) -> Any:
            self.calls.append((kind, arguments[position].nbytes))
            return self._replaced[name](*arguments, **keywords)

        return noting


def tables(traffic: Sequence[Traffic], estimates: Sequence[Estimate], images_per_gpu: int) -> str:
    """Markdown: the traffic, then the estimates."""
    rows = [("traffic of a GPU and step", "calls", "MB"), ("---",) * 3]
    rows += [(item.kind, str(item.calls), f"{item.bytes(images_per_gpu) / 1e6:,.2f}") for item in traffic]
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    heading = ("GPUs", "images/s", "efficiency", "waits per step: collectives", "gradients", "photos read")
    lines += ["", f"| {' | '.join(heading)} |", f"| {' | '.join(['---'] * len(heading))} |"]
    for one in estimates:
        cells = [str(one.num_gpus), f"{one.images_per_second:,.0f}", f"{one.efficiency:.1%}", f"{one.waited_ms:.1f} ms"]
        cells += [f"{one.gradients_ms:.1f} ms", f"{one.images_per_second * PHOTO_BYTES / 1e9:.2f} GB/s"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", help="a name of detco.methods.METHODS")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="keys of the training config to change")
    parser.add_argument("--images-per-second", type=float, required=True, help="of one GPU: E2 of benchmark_run.py")
    parser.add_argument("--images-per-gpu", type=int, default=256, help="in the step it was measured with, and here")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 16, 32, 64, 128, 256], help="(default: to 256)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="(default: 8)")
    parser.add_argument("--node-gbs", type=float, default=300.0, help="(default: 300, of NVLink 4's 450)")
    parser.add_argument("--network-gbs", type=float, default=40.0, help="(default: 40, of 400 Gbit/s per GPU)")
    parser.add_argument("--latency-us", type=float, default=10.0, help="(default: 10)")
    parser.add_argument("--backward-share", type=float, default=0.4, help="(default: 0.4; by its work it is a half)")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Count the traffic and print the tables."""
    args = parse(argv)
    from detco.methods import METHODS

    if args.method not in METHODS:
        print(f"error: method is {args.method}; it must be one of {', '.join(METHODS)}", file=sys.stderr)
        return 2
    traffic = count_traffic(args.method, args.overrides)
    links = Links(args.gpus_per_node, args.node_gbs, args.network_gbs, args.latency_us / 1e6)
    estimates = [
        estimate(
            traffic,
            links,
            num_gpus,
            images_per_gpu=args.images_per_gpu,
            images_per_second=args.images_per_second,
            backward_share=args.backward_share,
        )
        for num_gpus in args.gpus
    ]
    print(
        f"{args.method}, {args.images_per_gpu} images per GPU and step, {args.images_per_second:,.0f} images/s on one; "
        f"{args.gpus_per_node} GPUs per node, {args.node_gbs:g} GB/s within and {args.network_gbs:g} GB/s per card "
        f"between nodes, {args.latency_us:g} us per hop\n"
    )
    print(tables(traffic, estimates, args.images_per_gpu))
    return 0


if __name__ == "__main__":
    sys.exit(main())
