"""BatchNorm over other images than the batch of a process: those of all processes, or groups of its own.

torch's own SyncBatchNorm refuses tensors on the CPU, and DistributedDataParallel refuses it there. The one here is for
the CPU too, so that what is tested with two gloo processes is what runs on two GPUs; on CUDA it computes with torch's
fused kernels.

Shape legend:
    B  rows of this process: images, or boxes behind a box head; processes may hold different numbers
    G  groups of a batch that are normalised apart
    C  channels

Source: Ioffe and Szegedy, arXiv:1502.03167, Alg. 1, with the mini-batch of all processes together, or in parts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

# The fused code without the module around it, which refuses the CPU. torch has no public name for it.
from torch.nn.modules._functions import SyncBatchNorm as FusedSyncBatchNorm

from detco.distributed import is_distributed, world_size
from detco.losses import full_precision

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose training statistics are those of all processes together. State dict: that of BatchNorm.

    In one process, and in evaluation, it is plain BatchNorm. Gradients flow through the joint statistics; those of
    weight and bias are this process's share, for DistributedDataParallel to average like any other.

    It takes vectors as well as maps. It is a BatchNorm2d, so that what looks for BatchNorm, like precise BN, finds it.

    Departures: none known.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise and, in training, update the running averages.

        Collective in training: every process must call it, each with at least one value per channel.

        Args:
            input: Shape (B, C, ...).

        Returns:
            Of the shape and dtype of `input`; statistics are computed in float32 or better, even under autocast.

        Raises:
            ValueError: In training in one process, if it holds one value per channel, which has no variance.
        """
        if not (self.training and is_distributed()):
            return super().forward(input)
        self._check_input_dim(input)
        momentum = self._count_batch()
        if input.is_cuda:
            statistics = self.running_mean, self.running_var, self.eps, momentum
            normalised: Tensor = FusedSyncBatchNorm.apply(
                input, self.weight, self.bias, *statistics, dist.group.WORLD, world_size()
            )
            return normalised
        return self._normalise_jointly(input, momentum)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"BatchNorm takes rows of vectors or of maps, (B, C, ...), but got {tuple(input.shape)}")

    def _count_batch(self) -> float:
        """Count one more batch, and say what share of the running averages it is to have."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # means, as in torch, the plain average of all batches so far
                return 1.0 / self.num_batches_tracked.item()
        return self.momentum or 0.0

    def _normalise_jointly(self, input: Tensor, momentum: float) -> Tensor:
        x = full_precision(input)
        mean, variance, count = _joint_statistics(x)
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), momentum)

        per_channel = (1, -1) + (1,) * (x.dim() - 2)
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        normalised = (x - mean.view(per_channel)) * scale.view(per_channel)
        if self.affine:
            normalised = normalised + self.bias.view(per_channel)
        return normalised.to(input.dtype)


def _joint_statistics(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance per channel over all processes, shape (C,) each, and the number of values they are of.

    One all-reduce of what each process knows of its own rows. It is done in float64: the variance is a difference of
    two sums there, of which float32 would leave little where the mean is large.
    """
    own_count = x.numel() // x.shape[1]
    own_variance, own_mean = torch.var_mean(x, dim=[d for d in range(x.dim()) if d != 1], correction=0)
    own_mean, own_variance = own_mean.double(), own_variance.double()
    own_sums = torch.cat([own_mean, own_variance + own_mean.square(), own_mean.new_ones(1)]) * own_count
    sums: Tensor = _AllReduceSum.apply(own_sums)

    count = sums[-1].item()
    mean, mean_square = (sums[:-1] / count).chunk(2)
    return mean.to(x.dtype), (mean_square - mean.square()).clamp(min=0).to(x.dtype), count


class _AllReduceSum(torch.autograd.Function):
    """Sum over processes. Every process's loss depends on every process's tensor, so the gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def to_sync_batch_norm(module: ModuleT) -> ModuleT:
    """Replace every BatchNorm1d and BatchNorm2d below `module` by a `SyncBatchNorm`, in place.

    Parameters and buffers are the same tensors as before, under the same names.

    Args:
        module: A network.

    Returns:
        `module` itself.

    Raises:
        ValueError: If `module` itself is a BatchNorm, which cannot be replaced in place.
    """
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        raise ValueError(f"{module} cannot be replaced in place; give the network that it is part of")
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
            setattr(module, name, _synchronised(child))
        else:
            to_sync_batch_norm(child)
    return module


def _synchronised(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> SyncBatchNorm:
    sync = SyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    sync.weight, sync.bias = norm.weight, norm.bias
    sync.running_mean, sync.running_var = norm.running_mean, norm.running_var
    sync.num_batches_tracked = norm.num_batches_tracked
    return sync.train(norm.training)


class GroupedBatchNorm(nn.BatchNorm2d):
    """BatchNorm that normalises groups of images apart in one pass. State dict: that of BatchNorm.

    `batch_norm_groups` says what the groups are. Training gives what BatchNorm would give on one group after the
    other, outputs, gradients and running averages, but a GPU is better filled. With one group, and in evaluation, it is
    plain BatchNorm.

    Args:
        num_features: C.

    Attributes:
        group_momenta: Weight of each group in the running averages when its turn comes, so one number per group.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.group_momenta: Sequence[float] = (cast(float, self.momentum),)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise and, in training, update the running averages.

        Args:
            input: The groups one after the other, all of one size, shape (B, C, H, W).

        Returns:
            Of the shape and dtype of `input`; statistics are computed in float32 or better, even under autocast.

        Raises:
            ValueError: If B is not a multiple of the number of groups, or a group has one value per channel, which has
                no variance.
        """
        num_groups = len(self.group_momenta)
        if num_groups == 1 or not self.training:
            return super().forward(input)
        if len(input) % num_groups:
            raise ValueError(f"{len(input)} images do not split into {num_groups} BatchNorm groups of one size")
        if input[:, 0].numel() == num_groups:
            raise ValueError(
                f"a BatchNorm group of {tuple(input.shape)} in {num_groups} groups has one value per channel, which "
                f"has no variance; use larger groups or larger views"
            )
        cast(Tensor, self.num_batches_tracked).add_(num_groups)
        # A compiler makes few kernels of plain operations on all groups; without one, each would be a pass of its own.
        return self._normalise_together(input) if torch.compiler.is_compiling() else self._normalise_in_turn(input)

    def _normalise_in_turn(self, input: Tensor) -> Tensor:
        running, affine = (self.running_mean, self.running_var), (self.weight, self.bias)
        groups = zip(input.chunk(len(self.group_momenta)), self.group_momenta, strict=True)
        return torch.cat(
            [F.batch_norm(group, *running, *affine, True, momentum, self.eps) for group, momentum in groups]
        )

    def _normalise_together(self, input: Tensor) -> Tensor:
        x = full_precision(input).view(len(self.group_momenta), -1, *input.shape[1:])  # (G, B / G, C, H, W)
        variance, mean = torch.var_mean(x, dim=(1, 3, 4), correction=0, keepdim=True)
        scale = torch.rsqrt(variance + self.eps) * self.weight.view(-1, 1, 1)
        normalised = (x - mean) * scale + self.bias.view(-1, 1, 1)

        values_per_group = x[0, :, 0].numel()
        self._average(
            mean.detach().flatten(1), variance.detach().flatten(1) * values_per_group / (values_per_group - 1)
        )
        return normalised.flatten(0, 1).to(input.dtype)

    def _average(self, means: Tensor, variances: Tensor) -> None:
        """Let the running averages follow the groups, shape (G, C) each, in their order."""
        for running, of_groups in ((self.running_mean, means), (self.running_var, variances)):
            for of_group, momentum in zip(of_groups, self.group_momenta, strict=True):
                cast(Tensor, running).lerp_(of_group, momentum)


@contextmanager
def batch_norm_groups(network: nn.Module, num_groups: int, *, turn: int = 0, num_turns: int = 1) -> Iterator[None]:
    """Within, every `GroupedBatchNorm` of `network` normalises its batch in equal groups; afterwards as a whole again.

    Some views of the images may pass through the network in turn, every pass with the same groups. The running
    averages then end as if each group had made all its turns before the next group began.

    Args:
        network: What the pass is through; other layers of it are left alone.
        num_groups: G.
        turn: Which pass this is, from 0.
        num_turns: Passes with these groups.

    Raises:
        ValueError: If the momentum of a layer is None: the plain average of all batches knows no order of groups.
    """
    norms = [module for module in network.modules() if isinstance(module, GroupedBatchNorm)]
    if any(norm.momentum is None for norm in norms):
        raise ValueError("BatchNorm groups need a momentum, but that of a layer is None; give it a number in [0, 1]")
    for norm in norms:
        norm.group_momenta = _momenta(cast(float, norm.momentum), num_groups, turn, num_turns)
    try:
        yield
    finally:
        for norm in norms:
            norm.group_momenta = (cast(float, norm.momentum),)


def _momenta(momentum: float, num_groups: int, turn: int, num_turns: int) -> list[float]:
    """For each group of a pass, its share of the running averages when it is added to them.

    Of all that is averaged, a group's turn keeps the weight that the order group by group would leave it. A mean does
    not depend on the order of its terms: added in another, each has its weight's share of the weights up to it.
    """
    num_updates = num_groups * num_turns
    total = (1 - momentum) ** num_updates  # of what was there before
    shares = []
    for place in range(num_turns):
        for group in range(num_groups):
            later = num_updates - 1 - (group * num_turns + place)
            weight = momentum * (1 - momentum) ** later
            total += weight
            if place == turn:
                # At momentum 1 nothing is left of all but the last, whatever share they had.
                shares.append(weight / total if total else 1.0)
    return shares


def count_groups(num_images: int, group_size: int) -> int:
    """The number of BatchNorm groups of `group_size` in a batch; one that is within the group size is one group.

    Raises:
        ValueError: If `num_images` is above `group_size` and not a multiple of it.
    """
    if num_images > group_size and num_images % group_size:
        raise ValueError(
            f"{num_images} images per process do not split into BatchNorm groups of {group_size}; change the total "
            f"batch size, the number of processes or the BatchNorm group"
        )
    return max(1, num_images // group_size)
