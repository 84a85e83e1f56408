"""The contract of a view recipe: how one method's views are made from a decoded image.

The work is split where the data is smallest. The *host* half runs in loader workers: it cuts and resizes uint8 crops
and draws every random parameter of the sample. The *device* half runs in the training process, on whole batches, and
is a pure function of crops and parameters. So the number of workers, processes and devices changes no view, and any
sample can be replayed from (seed, epoch, index) alone.

Shape legend:
    N     images in a batch
    H, W  height and width of the decoded image, in pixels
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

import numpy as np
from torch import Tensor

from detco.artifact import Preprocess

SampleT = TypeVar("SampleT")
ViewsT = TypeVar("ViewsT")


class ViewRecipe(ABC, Generic[SampleT, ViewsT]):
    """Makes one method's views. Holds settings only: no state, no tensors, picklable.

    The keyword arguments of a subclass's constructor, with their defaults, are the `VIEWS.*` keys of the training
    config (in upper case there), so there is no second list of them.

    `SampleT` is a (possibly nested) `NamedTuple` of tensors for one image, that `torch.utils.data.default_collate`
    turns into the same `NamedTuple` with a leading N. `ViewsT` is the method's own `NamedTuple` of float tensors.
    """

    preprocess: ClassVar[Preprocess]
    """What `render` does to pixels last, and so what a detector must do to its images."""

    @abstractmethod
    def draw(self, image: Tensor, rng: np.random.Generator) -> SampleT:
        """Host half: cut the crops of one image and draw its parameters.

        Args:
            image: RGB, uint8, shape (3, H, W).
            rng: The only source of randomness.
        """

    @abstractmethod
    def render(self, batch: SampleT) -> ViewsT:
        """Device half: the normalised views of a collated batch, on the device its tensors live on."""
