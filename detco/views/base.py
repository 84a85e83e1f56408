"""The contract of a view recipe: how one method's views are made from an image.

The work is split where the data is smallest. The *host* half runs in loader workers: it draws every random parameter
of the sample and has its uint8 crops decoded, cut and resized. The *device* half runs in the training process, on whole
batches, and is a pure function of crops and parameters. So the number of workers, processes and devices changes no
view, and any sample can be replayed from (seed, epoch, index) alone.

Shape legend:
    N  images in a batch
    M  unique proposals of an image
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from detco.artifact import Preprocess
from detco.views.photo import Photo

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
    def draw(self, photo: Photo, rng: np.random.Generator) -> SampleT:
        """Host half: draw the parameters of one image and cut its crops.

        Args:
            photo: The image.
            rng: The only source of randomness.

        Raises:
            UnreadableImage: If the image turns out to be damaged.
        """

    @abstractmethod
    def render(self, batch: SampleT) -> ViewsT:
        """Device half: the normalised views of a collated batch, on the device its tensors live on."""


class Proposals(NamedTuple):
    """Boxes of one image in which an object may lie. M may be 0."""

    boxes_image_px: NDArray[np.float32]
    """Unique boxes (x1, y1, x2, y2), edges in pixels of the image, inside it, shape (M, 4)."""

    multiplicity: NDArray[np.int64]
    """How often the generator made each of them, at least 1, shape (M,)."""

    @classmethod
    def none(cls) -> "Proposals":
        """No proposal at all."""
        return cls(np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.int64))


class ProposalRecipe(ViewRecipe[SampleT, ViewsT]):
    """A recipe whose views carry boxes, chosen from proposals that were made beforehand."""

    @abstractmethod
    def draw_with_proposals(self, photo: Photo, proposals: Proposals, rng: np.random.Generator) -> SampleT:
        """Host half: choose the boxes of one image, draw its parameters and cut its crops.

        Args:
            photo: The image.
            proposals: Of this very image. Without any, the whole image is the only object.
            rng: The only source of randomness.

        Raises:
            UnreadableImage: If the image turns out to be damaged.
        """

    def draw(self, photo: Photo, rng: np.random.Generator) -> SampleT:
        """Host half without proposals: the whole image is the only object."""
        return self.draw_with_proposals(photo, Proposals.none(), rng)
