"""BatchNorm over the images of all processes, on any device.

torch's own SyncBatchNorm refuses tensors on the CPU, and DistributedDataParallel refuses it there. The one here is for
the CPU too, so that what is tested with two gloo processes is what runs on two GPUs; on CUDA it computes with torch's
fused kernels.

Shape legend:
    B  rows of this process: images, or boxes behind a box head; processes may hold different numbers
    C  channels

Source: Ioffe and Szegedy, arXiv:1502.03167, Alg. 1, with the mini-batch of all processes together.
"""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

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
