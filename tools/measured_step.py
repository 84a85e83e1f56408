"""The training step of MoCo v2 and DetCo, the bare passes of ResNet-50 it is held against, and its other parts.

Every piece of work here is a callable without arguments that does the same again each time it is called: the views are
noise, made once, and the learning rate is 0, so that nothing drifts while it is measured.

Shape legend:
    N     images in the batch
    S, P  sides of a global view and of a patch, in pixels
    T     embeddings per image
    D     embedding dimension
"""

import copy
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, cast

# Imported from a file that is run, Python looks for packages beside it; those of the suite lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import get_total_norm

from detco.methods import METHODS
from detco.methods.base import StepOutput
from detco.methods.detco import DetCo
from detco.models.batch_shuffle import draw_permutation, shuffle_rows, unshuffle_rows
from detco.models.norm import GroupedBatchNorm, batch_norm_groups, count_groups
from detco.models.queue import KeyQueue
from detco.models.resnet import ResNetTrunk, Stages
from detco.views.detco import NUM_PATCHES, DetCoRecipe, DetCoViews
from detco.views.moco import MoCoViews
from pretrain.compile import compile_trunks
from pretrain.launch import World
from pretrain.optim import build_optimizer

MEASURABLE = tuple(name for name, method in METHODS.items() if issubclass(method, DetCo))
"""Methods whose step is made of the parts that are measured here."""

Work = Callable[[], object]


class Setting(NamedTuple):
    """What is computed, and where."""

    device: torch.device
    batch_size: int
    """N."""

    global_size: int
    """S."""

    patch_size: int
    """P."""

    queue_size: int
    """Keys per queue."""

    is_bf16: bool
    """Whether forward passes run in bfloat16 where autocast allows."""

    is_compiled: bool
    """Whether the stages of the networks are compiled, those of the bound as well."""

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_bf16)

    def place(self, network: nn.Module) -> None:
        """Move a network to the device, in the layout and as compiled as in a run."""
        network.to(self.device).to(memory_format=torch.channels_last).train()
        if self.is_compiled:
            compile_trunks(network, World(rank=0, size=1, local_rank=0, device=self.device), falls_back=False)


class Step:
    """All that a run does between having the views of a batch and asking for the next.

    Attributes:
        method: At its defaults, but for the size of the queues.
        optimizer: SGD over its trained parameters.
        views: Noise.
    """

    def __init__(self, name: str, setting: Setting) -> None:
        torch.manual_seed(0)
        self.method = cast(DetCo, METHODS[name](queue_size=setting.queue_size))
        setting.place(self.method)
        self.optimizer = build_optimizer(
            "sgd", self.method, lr=0.0, momentum=0.9, weight_decay=1e-4, trust_coefficient=0.001
        )
        self.views = make_views(name, setting)
        self._setting = setting

    def __call__(self) -> None:
        """Make one step.

        Raises:
            FloatingPointError: If loss or gradients are not finite.
        """
        self.method.before_step(0.0)
        with self._setting.autocast():
            output = self.method(self.views)
        output.loss.backward()
        self.check(output)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.commit()

    def check(self, output: StepOutput) -> None:
        """Read back loss, metrics and the norm of the gradient, all at once, and refuse what is not finite."""
        gradients = [parameter.grad for parameter in self.method.parameters() if parameter.grad is not None]
        numbers = [output.loss.detach(), *output.metrics.values(), get_total_norm(gradients)]
        values = torch.stack([number.double() for number in numbers]).tolist()
        if not all(map(math.isfinite, values)):
            raise FloatingPointError(f"loss, metrics or gradient norm are not finite: {values}")


class Passes:
    """The bound: the passes through ResNet-50 that the step cannot do without, and nothing else.

    Two networks without heads: key views forward, query views forward and, from res5, backward. Same views, precision,
    layout and order as in the step, and the same groups of BatchNorm.
    """

    def __init__(self, name: str, setting: Setting, *, is_grouped: bool = True) -> None:
        """Build two networks.

        Args:
            name: Of the method.
            setting: What is computed, and where.
            is_grouped: Whether BatchNorm has the method's groups; else the whole batch is one.
        """
        torch.manual_seed(0)
        self.num_groups = count_bn_groups(name, setting) if is_grouped else 1
        self._query = ResNetTrunk(norm=GroupedBatchNorm)
        self._key = ResNetTrunk(norm=GroupedBatchNorm).requires_grad_(False)
        for network in (self._query, self._key):
            setting.place(network)
        views = make_views(name, setting)
        self._query_views, self._key_views = query_views(views), key_views(views)
        self._setting = setting

    def __call__(self) -> None:
        """Make the passes of one step."""
        with self._setting.autocast():
            with torch.no_grad():
                self._forward(self._key, self._key_views)
            outputs = self._forward(self._query, self._query_views)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        self._query.zero_grad(set_to_none=True)

    def _forward(self, network: ResNetTrunk, views: Sequence[Tensor]) -> list[Tensor]:
        outputs = []
        for turn, view in enumerate(reversed(views)):  # patches first, as in the encoder
            with batch_norm_groups(network, self.num_groups, turn=turn, num_turns=len(views)):
                outputs.append(network(as_images(view)).res5)
        return outputs


class FixedFeatures(nn.Module):
    """In place of a trunk: gives the same features for all views of a size, at no cost.

    Attributes:
        leaves: The features, which take gradients.
    """

    def __init__(self, views: Sequence[Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self._by_shape = {as_images(view).shape: self._draw(as_images(view), dtype) for view in views}
        self.leaves = [feature for stages in self._by_shape.values() for feature in stages]

    def forward(self, images: Tensor) -> Stages:
        """Return the features of all stages."""
        return self._by_shape[images.shape]

    @staticmethod
    def _draw(images: Tensor, dtype: torch.dtype) -> Stages:
        features = []
        for stage, channels in ResNetTrunk.channels.items():
            side = math.ceil(images.shape[-1] / ResNetTrunk.strides[stage])
            noise = torch.rand(len(images), channels, side, side, device=images.device, dtype=dtype)
            features.append(noise.to(memory_format=torch.channels_last).requires_grad_())
        return Stages(*features)


def parts_of(step: Step, setting: Setting) -> dict[str, Work]:
    """What a step does besides the passes, each part as work of its own on tensors of the real sizes.

    Args:
        step: Whose networks, queues and optimiser are used; it can be measured itself by turns with its parts.
        setting: That it was made with.

    Returns:
        By name, in the order of the step.
    """
    method = step.method
    keys = key_views(step.views)
    num_embeddings = len(method.queues_global) + len(method.queues_local)
    dim = cast(KeyQueue, next(iter(method.queues_global.values()))).keys.shape[0]
    embeddings = F.normalize(torch.randn(setting.batch_size, num_embeddings, dim, device=setting.device), dim=2)

    def shuffle() -> None:
        permutation = draw_permutation(setting.batch_size)
        with setting.autocast():
            for view in keys:
                shuffle_rows(view, permutation)
        unshuffle_rows(embeddings, permutation)

    def losses() -> None:
        queries = embeddings.clone().requires_grad_()
        terms = method.contrast(queries, embeddings)
        loss = torch.stack([method.weights[stage] * term.loss for (_, stage), term in terms.items()]).sum()
        torch.autograd.backward(loss)

    def queues() -> None:
        all_queues = (*method.queues_global.values(), *method.queues_local.values())
        for queue, new_keys in zip(all_queues, embeddings.unbind(dim=1), strict=True):
            cast(KeyQueue, queue).push(new_keys)

    return {
        "EMA": lambda: method.before_step(0.0),
        "shuffle and unshuffle": shuffle,
        "pooling and heads": _pooling_and_heads(step, setting),
        "losses": losses,
        "finite check": _with_gradients(step, lambda: step.check(StepOutput(embeddings.sum(), {}))),
        "optimiser": _with_gradients(step, step.optimizer.step),
        "queues": queues,
    }


def _pooling_and_heads(step: Step, setting: Setting) -> Work:
    """The encoders without their trunks: forward for the keys, forward and backward for the queries."""
    query, key = query_views(step.views), key_views(step.views)
    encoder = copy.deepcopy(step.method.query)
    stub = FixedFeatures(query, torch.bfloat16 if setting.is_bf16 else torch.float32)
    encoder.add_module("trunk", stub)
    inputs = [*stub.leaves, *encoder.parameters()]

    def work() -> None:
        with setting.autocast():
            with torch.no_grad():
                encoder(*key)
            embeddings = encoder(*query)
        # Without `backward`, which would copy the features' gradients; no other step of the network reads them here.
        torch.autograd.grad(embeddings, inputs, torch.ones_like(embeddings), allow_unused=True)

    return work


def _with_gradients(step: Step, work: Work) -> Work:
    """Work on the gradients of a step, which are there while it runs and gone afterwards."""
    trained = [parameter for parameter in step.method.parameters() if parameter.requires_grad]
    gradients = [torch.zeros_like(parameter) for parameter in trained]

    def with_gradients() -> None:
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        work()
        for parameter in trained:
            parameter.grad = None

    return with_gradients


def make_views(name: str, setting: Setting) -> DetCoViews | MoCoViews:
    """Noise in the shapes that the method's recipe makes, the same in every call."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(setting.batch_size, *shape, generator=generator).to(setting.device)

    whole, patches = (3, setting.global_size, setting.global_size), (NUM_PATCHES, 3) + 2 * (setting.patch_size,)
    if METHODS[name].recipe_for() is DetCoRecipe:
        return DetCoViews(noise(*whole), noise(*whole), noise(*patches), noise(*patches))
    return MoCoViews(noise(*whole), noise(*whole))


def query_views(views: DetCoViews | MoCoViews) -> list[Tensor]:
    """What the query encoder takes: images and, if there are any, patches."""
    return [views.global_query, *([views.local_query] if isinstance(views, DetCoViews) else [])]


def key_views(views: DetCoViews | MoCoViews) -> list[Tensor]:
    """What the key encoder takes: images and, if there are any, patches."""
    return [views.global_key, *([views.local_key] if isinstance(views, DetCoViews) else [])]


def as_images(view: Tensor) -> Tensor:
    """Whole images, or patches as so many images, shape (..., 3, height, width) to (N or N * 9, 3, height, width)."""
    return view.flatten(0, -4)


def count_bn_groups(name: str, setting: Setting) -> int:
    """The number of BatchNorm groups of the batch that the method makes by default."""
    group_size = inspect.signature(METHODS[name]).parameters["bn_group"].default
    return count_groups(setting.batch_size, group_size)
