"""The shapes of a ResNet-50, the refusal of other networks, and what a stem tells of the input it was trained on."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor


def resnet50_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the 265 tensors that make a ResNet-50, under torchvision's names: no `fc`, no step counters."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add(conv: str, norm: str, *shape: int) -> None:
        shapes[f"{conv}.weight"] = shape
        shapes.update({f"{norm}.{name}": shape[:1] for name in ("weight", "bias", "running_mean", "running_var")})

    add("conv1", "bn1", 64, 3, 7, 7)
    inputs = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for index in range(blocks):
            block = f"layer{stage}.{index}"
            add(f"{block}.conv1", f"{block}.bn1", width, inputs, 1, 1)
            add(f"{block}.conv2", f"{block}.bn2", width, width, 3, 3)
            add(f"{block}.conv3", f"{block}.bn3", 4 * width, width, 1, 1)
            if index == 0:
                add(f"{block}.downsample.0", f"{block}.downsample.1", 4 * width, inputs, 1, 1)
            inputs = 4 * width
    return shapes


def differences_from_resnet50(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Say what keeps tensors of these names and shapes from being a ResNet-50; nothing if they are one."""
    expected = resnet50_shapes()
    wrong = [f"{name} is missing" for name in expected if name not in shapes]
    wrong += [
        f"{name} has shape {shapes[name]}, not {shape}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    blocks = {name.rpartition(".conv1.")[0] for name in expected if name.startswith("layer") and ".conv1." in name}
    extra = {match[0] for name in shapes if (match := re.match(r"layer\d+\.\d+(?=\.)", name))} - blocks
    return wrong + [f"{block} is a block too many" for block in sorted(extra)]


def looks_like_a_resnet(names: Mapping[str, Tensor], start: str = "") -> bool:
    """Whether below `start` lie the first and last parts of a bottleneck ResNet with a 7x7 stem."""
    stem = names.get(f"{start}conv1.weight")
    witnesses = ("layer1.0.conv1.weight", "layer4.2.bn3.running_var")
    return stem is not None and stem.shape == (64, 3, 7, 7) and all(f"{start}{name}" in names for name in witnesses)


def input_mean(trunk: Mapping[str, Tensor]) -> tuple[tuple[float, ...], float]:
    """Return the mean of the pixels that the stem was trained on, as far as its BatchNorm statistics tell.

    The running mean of a channel is the mean of the first convolution's output, which is, but for the border, the sum
    of its kernel per colour times the mean of that colour. Least squares over the 64 channels gives the colours' means.

    Args:
        trunk: A ResNet-50 under torchvision's names.

    Returns:
        Mean per colour in the file's order and in the units the network was fed, and the share of the running means'
        squares that they explain, in [0, 1]: near 1 for a stem whose statistics belong to its kernels (0.94 to 1 on
        photos), low if the means are nearly zero, so that the border and the noise prevail.
    """
    sums = trunk["conv1.weight"].double().sum(dim=(2, 3))  # (64, 3)
    measured = trunk["bn1.running_mean"].double()
    means = torch.linalg.lstsq(sums, measured.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    total = float(measured.square().sum())
    unexplained = float((measured - sums @ means).square().sum())
    return tuple(means.tolist()), (1 - unexplained / total if total > 0 else 0.0)


def fits_pixels_from_0_to_1(trunk: Mapping[str, Tensor]) -> bool:
    """Whether the stem's statistics are those of pixels in 0..1 that were not normalised (photos: about 0.4 to 0.5)."""
    needed = [trunk[name] for name in ("conv1.weight", "bn1.running_mean") if name in trunk]
    # The shapes first: a tensor of a few bytes can say that it has any number of elements.
    if [tuple(tensor.shape) for tensor in needed] != [(64, 3, 7, 7), (64,)]:
        return False
    if not all(bool(tensor.isfinite().all()) for tensor in needed):
        return False
    means, explained = input_mean(trunk)
    return explained > 0.9 and all(0.2 < mean < 0.8 for mean in means)
