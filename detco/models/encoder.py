"""Trunk and projection heads of DetCo: from views to unit-length embeddings.

Shape legend:
    N     images
    P     patches per image: 9
    H, W  height and width of a view, h, w of a patch, in pixels
    S     stages with heads, shallow first
    T     embeddings per image: S global ones, then S local ones if there are local heads
    D     embedding dimension

Source: DetCo, arXiv:2102.04803, Sec. 3.2 and 3.3; the width of the heads is not stated there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detco.losses import full_precision
from detco.models.mlp import MLP
from detco.models.norm import GroupedBatchNorm, batch_norm_groups, count_groups
from detco.models.resnet import ResNetTrunk

NUM_PATCHES = 9


class Encoder(nn.Module):
    """A ResNet-50 with one head per stage for the image and, if `local`, one per stage for its set of patches."""

    def __init__(self, stages: Sequence[str], *, local: bool, dim: int, head_hidden: int | None, bn_group: int) -> None:
        """Build trunk and heads.

        Args:
            stages: Which of res2, res3, res4, res5 have heads.
            local: Whether there are local heads.
            dim: D.
            head_hidden: Hidden width of every head; None: as many as the stage has channels.
            bn_group: Images per BatchNorm group. A larger batch is split into groups of this size.
        """
        super().__init__()
        self.stages = tuple(stages)
        self.bn_group = bn_group
        self.trunk = ResNetTrunk(norm=GroupedBatchNorm)

        def heads(num_inputs: int) -> nn.ModuleDict:
            widths = {stage: self.trunk.channels[stage] for stage in self.stages}
            return nn.ModuleDict(
                {stage: MLP(num_inputs * width, head_hidden or width, dim) for stage, width in widths.items()}
            )

        self.global_heads = heads(1)
        self.local_heads = heads(NUM_PATCHES) if local else nn.ModuleDict()

    def forward(self, images: Tensor, patches: Tensor | None = None) -> Tensor:
        """Embed images and their patch sets. Patches go first, so that BN's running averages end on whole images.

        Args:
            images: Shape (N, 3, H, W).
            patches: Shape (N, P, 3, h, w), given if and only if the encoder has local heads. Their order is kept: it
                is up to the views whether they are shuffled.

        Returns:
            Unit length, float32 even under autocast, shape (N, T, D).

        Raises:
            ValueError: If patches are missing or not wanted, or N does not split into BatchNorm groups.
        """
        if (patches is not None) != bool(self.local_heads):
            raise ValueError(
                f"this encoder has {len(self.local_heads)} local heads, but "
                f"{'no patches were' if patches is None else 'patches were'} given; build it with the other `local`"
            )
        num_groups = count_groups(len(images), self.bn_group)
        if patches is None:
            with batch_norm_groups(self.trunk, num_groups):
                return torch.stack(self._embed_images(images), dim=1)
        with batch_norm_groups(self.trunk, num_groups, turn=0, num_turns=2):
            local = self._embed_patches(patches)
        with batch_norm_groups(self.trunk, num_groups, turn=1, num_turns=2):
            return torch.stack(self._embed_images(images) + local, dim=1)

    def _embed_images(self, images: Tensor) -> list[Tensor]:
        pooled = self._pool(images)
        return [_unit(self.global_heads[stage](pooled[stage])) for stage in self.stages]

    def _embed_patches(self, patches: Tensor) -> list[Tensor]:
        pooled = self._pool(patches.flatten(0, 1))
        # (N * P, C) -> (N, P * C): the features of an image's patches side by side.
        return [_unit(self.local_heads[stage](pooled[stage].reshape(len(patches), -1))) for stage in self.stages]

    def _pool(self, images: Tensor) -> dict[str, Tensor]:
        features = self.trunk(images)
        # A mean with the channels last has a gradient that lies in memory as the network's own do: none is converted.
        return {stage: getattr(features, stage).permute(0, 2, 3, 1).mean(dim=(1, 2)) for stage in self.stages}


def _unit(embeddings: Tensor) -> Tensor:
    return F.normalize(full_precision(embeddings), dim=1)
