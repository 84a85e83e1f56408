"""The contract between a pretraining method and whatever trains it.

One step is: `before_step` -> (`forward` -> backward) -> finite check -> optimiser -> `commit`.

With gradient accumulation the part in brackets runs once per micro-batch. A method sees each micro-batch alone:
BatchNorm statistics, and what `forward` compares, never span two of them.

Before a step the trainer seeds torch's generators: that of the CPU alike on every process, that of CUDA with the rank.
So what a method draws on the CPU, as often on every process, is the same everywhere without a collective: a permutation
of the images of all processes. What should differ between the processes is drawn on the GPU.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from detco.views.base import ViewRecipe


class StepOutput(NamedTuple):
    """What one forward pass hands to the trainer."""

    loss: Tensor
    """Scalar, weighted: the only thing that is differentiated."""

    metrics: dict[str, Tensor]
    """Detached scalars, unweighted, for logging. Names are `family/item`, as in `loss_gg/res5`; a family's items
    share one column group of the console line."""


class Method(nn.Module, ABC):
    """A self-supervised method: networks, loss and teacher, without optimiser, data or files.

    The keyword arguments of a subclass's constructor, with their defaults, are the `METHOD.*` keys of the training
    config (in upper case there). A new method is a subclass and one line in `detco.methods.METHODS`.
    """

    transfer_parts: ClassVar[Mapping[str, str]]
    """What is worth keeping after training: role -> attribute path, as in {"backbone": "query.trunk"}."""

    @classmethod
    @abstractmethod
    def recipe_for(cls, **method_options: Any) -> type[ViewRecipe[Any, Any]]:
        """The class that makes the views for a method built with these options (absent ones at their default)."""

    def check_batch(self, images_per_process: int) -> None:
        """Refuse a batch that the method cannot train on; called once, before any work, in the running process group.

        Any batch is accepted by default.

        Args:
            images_per_process: Of one `forward`.

        Raises:
            ValueError: Naming the values and what to change.
        """

    @abstractmethod
    def before_step(self, progress: float) -> None:
        """Update what changes with time (the EMA teacher). `progress` in [0, 1) is the share of steps done."""

    @abstractmethod
    def forward(self, views: Any) -> StepOutput:
        """The paper's algorithm box for one batch of views. Writes no persistent state except BN statistics.

        Called once per micro-batch, so any number of times before `commit`.
        """

    @abstractmethod
    def commit(self) -> None:
        """Write what all `forward`s since the last `commit` produced (keys into queues), in their order.

        Called once per step, and only after loss and gradients were finite.
        """

    @abstractmethod
    def forward_transfer(self, views: Any) -> None:
        """Run the transferred parts on the views whose BN statistics a probe should see, for precise BN."""
