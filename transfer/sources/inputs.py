"""What a file tells of its network's input, and whether that is what its project is known to have."""

from collections.abc import Mapping

import torch
from torch import Tensor

from detco.artifact import Preprocess
from transfer.sources.layouts import Form, Layout, load_known
from transfer.sources.resnet50 import fits_pixels_from_0_to_1


def contradiction(tensors: Mapping[str, Tensor], form: Form, preprocess: Preprocess) -> str | None:
    """Compare the mean and std that lie in a file with the known ones.

    Args:
        tensors: The file's tensors by name, without the wrapper's prefix.
        form: Says under which names they lie, if at all.
        preprocess: The known ones.

    Returns:
        What differs; None if nothing does.
    """
    for part, name in (form.stated or {}).items():
        expected = torch.tensor(preprocess.as_dict()[part])
        found = tensors.get(name)
        if found is None:
            continue
        values = found.flatten().float() if found.numel() == 3 else torch.full((3,), float("nan"))
        if not torch.allclose(values, expected, atol=0.01):
            shown, known = ("/".join(f"{value:g}" for value in some.tolist()) for some in (values, expected))
            return f"its {name} is {shown}, but {known} is what such networks are known to be trained with"
    return None


def input_warnings(trunk: Mapping[str, Tensor], layout: Layout | None) -> list[str]:
    """Say what is doubtful about the input of a network whose file has no record of it.

    Args:
        trunk: The ResNet-50 under torchvision's names.
        layout: Whose it is; None if nobody knows.
    """
    warnings = []
    if layout is not None and layout.assumes:
        warnings.append(
            f"the file has no record of its input; {layout.assumes} are assumed. Detectron2's own models differ: give "
            f"those to MODEL.WEIGHTS as they are"
        )
    is_unit = layout is not None and layout.preprocess == load_known().preprocesses["unit"]
    looks_unit = fits_pixels_from_0_to_1(trunk)
    if looks_unit and not is_unit:
        warnings.append(
            "the stem's BatchNorm statistics fit pixels in 0..1 that were not normalised, and torchvision's mean and "
            "std are assumed here. Bright pixels that were normalised leave the same statistics, so nothing is decided "
            "by them: if the weights are Google's SimCLR, convert them with --source simclr_tf"
        )
    if is_unit and not looks_unit:
        warnings.append(
            "the stem's BatchNorm statistics are not those of pixels in 0..1 without normalisation, as assumed here"
        )
    return warnings
