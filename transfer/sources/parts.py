"""The shapes of the parts that a source may have beside its backbone, and the refusal of all others.

Source: contrast/models/{fpn,fast_rcnn_conv_fc_head}.py of hologerry/SoCo@624a70d, which InsLoc's heads equal, and
moco/models.py of Tete-Xiao/ReSim@a81a12d.
"""

from collections.abc import Iterable, Mapping

from transfer.sources.resnet50 import differences_from_resnet50

Shapes = Mapping[str, tuple[int, ...]]
WIDTH = 256
"""Channels of an FPN's levels and of the box head's convolutions."""
_NORM = ("weight", "bias", "running_mean", "running_var")
# The levels that have lateral and output convolutions, counted from res2 on: SoCo and InsLoc, then ReSim.
_LEVELS = ((range(4), range(4)), (range(1, 4), range(1, 3)))


def fpn_shapes(lateral: Iterable[int], output: Iterable[int], *, has_norm: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of an FPN over a ResNet-50: convolutions with BatchNorm or with a bias, without the step counters."""
    kernels = {f"lateral_convs.{level}": (WIDTH, WIDTH * 2**level, 1, 1) for level in lateral}
    kernels |= {f"fpn_convs.{level}": (WIDTH, WIDTH, 3, 3) for level in output}
    vectors = [f"bn.{name}" for name in _NORM] if has_norm else ["conv.bias"]
    shapes = {f"{name}.conv.weight": kernel for name, kernel in kernels.items()}
    return shapes | {f"{name}.{vector}": (WIDTH,) for name in kernels for vector in vectors}


def box_head_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of a head of four convolutions with BatchNorm and a linear layer on 7x7 cells, without step counters."""
    shapes = {f"conv{n}.weight": (WIDTH, WIDTH, 3, 3) for n in range(1, 5)}
    norms = {f"bn{n}.{name}": (WIDTH,) for n in range(1, 5) for name in _NORM}
    return shapes | norms | {"fc1.weight": (1024, WIDTH * 7 * 7), "fc1.bias": (1024,)}


def differences_from_known_parts(shapes: Shapes) -> dict[str, list[str]]:
    """Say what keeps a source's parts from being those that are converted.

    Args:
        shapes: "role/library name" to shape. Other roles than the three are not looked at: they are unexplained, and
            so stop the conversion later.

    Returns:
        What the part should be to its differences; empty if there are none.
    """
    parts: dict[str, dict[str, tuple[int, ...]]] = {"backbone": {}}
    for full_name, shape in shapes.items():
        role, _, name = full_name.partition("/")
        parts.setdefault(role, {})[name] = shape
    wrong = {"a ResNet-50 with torchvision's widths and blocks": differences_from_resnet50(parts["backbone"])}
    if "fpn" in parts:
        fpns = [fpn_shapes(*levels, has_norm=has_norm) for levels in _LEVELS for has_norm in (True, False)]
        # That of the kinds which the part comes closest to.
        wrong["an FPN of a known kind"] = min((_differences(parts["fpn"], fpn) for fpn in fpns), key=len)
    if "box_head" in parts:
        wrong["a box head of four convolutions and a linear layer"] = _differences(parts["box_head"], box_head_shapes())
    return {title: differences for title, differences in wrong.items() if differences}


def _differences(shapes: Shapes, expected: Shapes) -> list[str]:
    """Compare a part with what it should be; step counters, which are dropped, may be there or not."""
    extra = [f"{name} is too many" for name in shapes if name not in expected and not name.endswith("tracked")]
    missing = [f"{name} is missing" for name in expected if name not in shapes]
    return [
        *missing,
        *(
            f"{name} has shape {shapes[name]}, not {shape}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ),
        *extra,
    ]
