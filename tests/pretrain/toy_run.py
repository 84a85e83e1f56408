"""A fourth method, and `detco-pretrain` that knows it: run as a script by the trainer's tests.

TOY_TROUBLE="9@0.5" makes the process send itself signal 9 when half of its steps are done, "nan@0.5" makes the loss
of the step after that NaN.
"""

import copy
import os
import sys
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from detco.artifact import IMAGENET_RGB
from detco.methods import METHODS
from detco.methods.base import Method, StepOutput
from detco.views.base import ProposalRecipe, Proposals, ViewRecipe
from detco.views.host import CropBox
from detco.views.photo import Photo
from pretrain.__main__ import main


class ToySample(NamedTuple):
    crop: Tensor


class ToyRecipe(ViewRecipe[ToySample, Tensor]):
    preprocess = IMAGENET_RGB

    def __init__(self, *, size: int = 16) -> None:
        self.size = size

    def draw(self, photo: Photo, rng: np.random.Generator) -> ToySample:
        top, left = (int(rng.integers(side - self.size + 1)) for side in (photo.height, photo.width))
        return ToySample(*photo.crops([(CropBox(top, left, self.size, self.size), self.size)]))

    def render(self, batch: ToySample) -> Tensor:
        return batch.crop.float() / 255


class ToyBoxRecipe(ProposalRecipe[ToySample, Tensor]):
    """The crop begins where the first box does, as far as there is room."""

    preprocess = IMAGENET_RGB

    def __init__(self, *, size: int = 16) -> None:
        self.size = size

    def draw_with_proposals(self, photo: Photo, proposals: Proposals, rng: np.random.Generator) -> ToySample:
        left, top = (int(corner) for corner in proposals.boxes_image_px[0, :2])
        top, left = min(top, photo.height - self.size), min(left, photo.width - self.size)
        return ToySample(*photo.crops([(CropBox(top, left, self.size, self.size), self.size)]))

    def render(self, batch: ToySample) -> Tensor:
        return batch.crop.float() / 255


class Toy(Method):
    """A student predicts its moving average through noise; the queue remembers targets."""

    transfer_parts: ClassVar = {"backbone": "student.0"}

    def __init__(
        self,
        *,
        width: int = 8,
        ema_decay: float = 0.9,
        queue_size: int = 12,
        batch_norm: bool = True,
        dropout: float = 0.2,
        boxes: bool = False,
    ) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        trunk = nn.Sequential(nn.Conv2d(3, width, 3, 2), norm, nn.ReLU())
        head = nn.Linear(width, 4)
        self.student = nn.Sequential(trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), head)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.ema_decay = ema_decay
        self.register_buffer("queue", torch.zeros(queue_size, 4))
        self.targets: list[Tensor] = []

    @classmethod
    def recipe_for(cls, *, boxes: bool = False, **method_options: Any) -> type[ViewRecipe[Any, Any]]:
        return ToyBoxRecipe if boxes else ToyRecipe

    def check_batch(self, images_per_process: int) -> None:
        if len(self.queue) % images_per_process:
            raise ValueError(f"queue_size {len(self.queue)} is not a multiple of {images_per_process}")

    def before_step(self, progress: float) -> None:
        trouble, _, at = os.environ.get("TOY_TROUBLE", "none@9").partition("@")
        is_now = progress == float(at)
        self.spoiler = float("nan") if is_now and trouble == "nan" else 1.0
        if is_now and trouble.isdigit():
            os.kill(os.getpid(), int(trouble))
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.lerp_(fast.detach(), 1 - self.ema_decay)

    def forward(self, views: Tensor) -> StepOutput:
        with torch.no_grad():
            self.targets.append(self.teacher(views).float())
        goal = 1 + 0.1 * self.targets[-1].tanh() + 0.1 * self.queue.mean(dim=0).tanh()
        error = (self.student(views).float() - goal).square().mean()
        return StepOutput(error * self.spoiler, {"loss_toy/only": error.detach()})

    def commit(self) -> None:
        self.queue = torch.cat([*self.targets, self.queue])[: len(self.queue)]
        self.targets.clear()

    def forward_transfer(self, views: Tensor) -> None:
        self.student[0](views)


if __name__ == "__main__":
    METHODS["toy"] = Toy
    sys.exit(main())
