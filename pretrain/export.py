"""What a finished run hands on: the transferred parts as one artifact, optionally with re-estimated BatchNorm."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detco.artifact import Artifact, Preprocess, write_artifact
from detco.methods.base import Method
from detco.views.base import ViewRecipe
from pretrain.data import Batch
from pretrain.prefetch import to_device


def export_artifact(file: Path, method: Method, preprocess: Preprocess, provenance: Mapping[str, Any]) -> None:
    """Write `method.transfer_parts` to `file`, atomically."""
    parts = {role: method.get_submodule(path).state_dict() for role, path in method.transfer_parts.items()}
    write_artifact(file, Artifact(parts, preprocess, provenance))


def reestimate_bn(
    method: Method, recipe: ViewRecipe[Any, Any], batches: Iterable[Batch], num_batches: int, device: torch.device
) -> None:
    """Replace the running BN statistics of the transferred parts by means over batches: of this rank, or of all ranks
    where a method synchronises its BatchNorm. Collective then.

    In training, whole images and patches alternately move the same running statistics; probes read them on whole
    images. Weights do not change.

    Source: "Rethinking Batch in BatchNorm", arXiv:2105.07576, Sec. 3.
    """
    # Imported here, because it warns about torch.jit and most runs do without it.
    from fvcore.nn.precise_bn import update_bn_stats

    method.train()
    views = (recipe.render(to_device(batch.sample, device)) for batch in batches)
    with torch.no_grad():
        update_bn_stats(_TransferredParts(method), views, num_batches)


class _TransferredParts(nn.Module):
    """Runs the whole method, but owns only the transferred parts, so that only their statistics are replaced."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.parts = nn.ModuleList(method.get_submodule(path) for path in method.transfer_parts.values())
        self._forward_transfer = method.forward_transfer  # a bound method, so not registered as a submodule

    def forward(self, views: Any) -> None:
        self._forward_transfer(views)
