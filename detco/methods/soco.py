"""SoCo: predict how another network sees the same object in another view, object by object.

Shape legend:
    N  images of this process
    K  boxes per image and view
    L  levels on which a box is looked at: 1, or 4 with level routing "all"
    D  embedding dimension

Source: Wei et al., arXiv:2106.02637, Sec. 3.3 and 4.1, and hologerry/SoCo@624a70d contrast/models/SoCo_C4.py,
SoCo_FPN.py and SoCo_FPN_Star.py.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from detco.distributed import world_size
from detco.losses import full_precision, is_same_object, object_similarity
from detco.methods.base import Method, StepOutput
from detco.models.ema import frozen_copy, update_ema
from detco.models.mlp import MLP
from detco.models.norm import to_sync_batch_norm
from detco.models.object_encoder import C4Encoder, FPNEncoder, LevelRouting, ObjectEncoder, own_level
from detco.schedules import cosine
from detco.views.base import ViewRecipe
from detco.views.object_views import BoxSet, PairedView
from detco.views.soco import (
    SoCoC4Recipe,
    SoCoC4Views,
    SoCoFPNRecipe,
    SoCoFPNViews,
    SoCoStarRecipe,
    SoCoStarViews,
)

SoCoViews = SoCoC4Views | SoCoFPNViews | SoCoStarViews


class SoCo(Method):
    """What the three variants share: all but the encoder and the views.

    Attributes:
        online: The encoder that is trained, with its projector.
        predictor: From an online projection to the target's.
        target: Moving average of `online`; no gradient. It stays in training mode: its BatchNorm normalises by its own
            batches, and its running statistics are not the online ones' average.

    Departures:
        The decay of the target depends on the share of training done. The code counts steps from where the process
        started, so that a resumed run begins the schedule anew, and to int(images / batch * epochs), of which a run
        with full batches alone takes fewer; over 100 epochs of ImageNet at batch 2048 that is 62,556 against 62,500.
        The target moves before the forward passes and not between them, which changes nothing: the weights are those
        of the step before in both cases.
        Boxes are edges, x2 - x1 wide. The code's end one pixel short.
        The mean over an image's matches is exact; the code adds 1e-6 to their number.
        Pairs are run one after the other, where the code runs all boxes of the whole image first, and in FPN* the
        medium view before the small one. Only BatchNorm's running statistics can tell.
        With gradient accumulation, BatchNorm sees one micro-batch at a time and not the batch.
    """

    def __init__(
        self,
        make_encoder: Callable[[int, int], ObjectEncoder[Any]],
        *,
        dim: int,
        hidden: int,
        ema_decay: float,
        sync_bn: bool,
    ) -> None:
        """Build the networks from torch's global generator: seed it alike on every process.

        Args:
            make_encoder: Makes `online`, given D and the hidden width of its projector.
            dim: D.
            hidden: Hidden width of the projector and the predictor.
            ema_decay: tau at the start of training, in [0, 1]; it rises to 1.
            sync_bn: Whether all BatchNorm statistics are those of all processes together.

        Raises:
            ValueError: If an argument is out of range.
        """
        super().__init__()
        for name, width in (("dim", dim), ("hidden", hidden)):
            if width < 1:
                raise ValueError(f"{name} must be above 0, but is {width}")
        if not 0 <= ema_decay <= 1:
            raise ValueError(f"ema_decay must be in [0, 1], but is {ema_decay}")

        self.ema_decay = ema_decay
        self.sync_bn = sync_bn
        self.online = make_encoder(dim, hidden)
        self.predictor = MLP(dim, hidden, dim, norm=True)
        if sync_bn:
            to_sync_batch_norm(self)
        self.target = frozen_copy(self.online)

    def check_batch(self, images_per_process: int) -> None:
        """Refuse one image per BatchNorm: what all its boxes share would be normalised away.

        Args:
            images_per_process: N.

        Raises:
            ValueError: If a BatchNorm sees fewer than two images.
        """
        images_per_norm = images_per_process * (world_size() if self.sync_bn else 1)
        if images_per_norm < 2:
            raise ValueError(
                f"BatchNorm would see {images_per_norm} image at a time, but needs at least 2 to tell images apart "
                f"({images_per_process} per process and forward, {world_size()} process(es), sync_bn {self.sync_bn}); "
                f"give every process more images, accumulate less, or turn sync_bn on where there are several processes"
            )

    def ema_decay_at(self, progress: float) -> float:
        """Tau of Sec. 4.1, after BYOL: half a cosine from `ema_decay` at progress 0 to 1 at progress 1."""
        return 1.0 - (1.0 - self.ema_decay) * cosine(progress)

    def before_step(self, progress: float) -> None:
        """Move the target towards the online network. The first time, they are equal."""
        update_ema(self.target, self.online, self.ema_decay_at(progress))

    def forward(self, views: SoCoViews) -> StepOutput:
        """Sum over the pairs (whole, other view) of Eq. 6, with either view online in turn.

        Collective if `sync_bn`: every process must call it.

        Args:
            views: The whole image, and views of parts of it with the boxes of what they share with it.
        """
        pairs = pairs_of(views)
        images = {"whole": views.whole} | {name: pair.image for name, pair in pairs.items()}

        online = {name: self.online.features(image) for name, image in images.items()}  # f^I of Eq. 1
        with torch.no_grad():
            target = {name: self.target.features(image) for name, image in images.items()}

        losses, metrics = [], {}
        for name, pair in pairs.items():
            objects = {"whole": pair.boxes_in_whole, name: pair.boxes}
            v_whole, v_other = (self._predict(online[view], boxes) for view, boxes in objects.items())
            with torch.no_grad():
                t_whole, t_other = (self._project(target[view], boxes) for view, boxes in objects.items())

            is_match = _is_match(*objects.values())  # (N, K, K), boxes of the whole image first
            loss = object_similarity(v_whole, t_other, is_match)  # L of Eq. 5 and 6
            loss = loss + object_similarity(v_other, t_whole, is_match.mT)  # L with a tilde
            losses.append(loss)
            metrics[f"loss_pair/{name}"] = loss.detach()
            metrics[f"embedding_std/{name}"] = spread(torch.cat([v_whole, v_other]))
        return StepOutput(torch.stack(losses).sum(), metrics)

    def commit(self) -> None:
        """Nothing to write: there are no queues."""

    def forward_transfer(self, views: SoCoViews) -> None:
        """Run the transferred parts on the whole images and boxes in them, every module once."""
        boxes = views.crop.boxes_in_whole
        self.online.describe(self.online.features(views.whole), boxes.boxes_view, boxes.levels)

    def _predict(self, features: Any, boxes: BoxSet) -> Tensor:
        """Online embeddings v = q(g(h)) of Eq. 2 and 4, (N, K, D). The predictor sees each level apart, as g does."""
        projected = self.online.project_each(features, boxes.boxes_view, boxes.levels)  # (L, N, K, D)
        predicted = torch.stack([self.predictor(level.flatten(0, 1)) for level in projected])
        return own_level(predicted.view_as(projected), boxes.levels)

    def _project(self, features: Any, boxes: BoxSet) -> Tensor:
        """Target embeddings v' = g(h') of Eq. 3 and 4, (N, K, D)."""
        return self.target.project(features, boxes.boxes_view, boxes.levels)


class SoCoC4(SoCo):
    """SoCo-C4: one pair of views; boxes are pooled from res4 and go through res5, as in a C4 detector.

    Departures: those of `SoCo`.
    """

    transfer_parts: ClassVar[Mapping[str, str]] = {"backbone": "online.backbone"}

    def __init__(self, *, dim: int = 256, hidden: int = 4096, ema_decay: float = 0.99, sync_bn: bool = True) -> None:
        """Build the networks; the arguments are explained in `SoCo`."""
        super().__init__(C4Encoder, dim=dim, hidden=hidden, ema_decay=ema_decay, sync_bn=sync_bn)

    @classmethod
    def recipe_for(cls, **method_options: Any) -> type[ViewRecipe[Any, Any]]:
        """The whole image and a crop."""
        return SoCoC4Recipe


class SoCoFPN(SoCo):
    """SoCo-FPN: two pairs of views, boxes pooled from the level of their size, and the head of a 4conv1fc detector.

    Departures:
        Those of `SoCo`, and: with level_routing "own", the paper's reading, each BatchNorm of head, projector and
        predictor normalises the boxes of one view's set over all levels together, each box once. The paper does not say
        how they are grouped. With "all", as in the code, it normalises a level at a time, with every box of the set on
        it, and its running statistics end on the coarsest level.
    """

    transfer_parts: ClassVar[Mapping[str, str]] = {
        "backbone": "online.backbone",
        "fpn": "online.fpn",
        "box_head": "online.box_head",
    }

    def __init__(
        self,
        *,
        dim: int = 256,
        hidden: int = 4096,
        ema_decay: float = 0.99,
        sync_bn: bool = True,
        level_routing: LevelRouting = "all",
    ) -> None:
        """Build the networks; `level_routing` is explained in `FPNEncoder`, the other arguments in `SoCo`."""
        make_encoder = partial(FPNEncoder, level_routing=level_routing)
        super().__init__(make_encoder, dim=dim, hidden=hidden, ema_decay=ema_decay, sync_bn=sync_bn)

    @classmethod
    def recipe_for(cls, **method_options: Any) -> type[ViewRecipe[Any, Any]]:
        """The whole image, a crop and a small view."""
        return SoCoFPNRecipe


class SoCoFPNStar(SoCoFPN):
    """SoCo-FPN*: SoCo-FPN with a third pair, from a view of medium size.

    Departures: those of `SoCoFPN`.
    """

    @classmethod
    def recipe_for(cls, **method_options: Any) -> type[ViewRecipe[Any, Any]]:
        """The whole image, a crop, the crop made small, and a crop of medium size."""
        return SoCoStarRecipe


def pairs_of(views: SoCoViews) -> dict[str, PairedView]:
    """The views that are paired with the whole image, by their names."""
    return {name: view for name, view in views._asdict().items() if isinstance(view, PairedView)}


@torch.no_grad()
def spread(embeddings: Tensor) -> Tensor:
    """How far the embeddings are from all being alike: a guard against collapse.

    Args:
        embeddings: Any length, shape (N, K, D).

    Returns:
        Scalar: standard deviation over all boxes of the unit-length embeddings, averaged over the dimensions. 0 if all
        point one way, at most 1 / sqrt(D), which is reached if they point everywhere.
    """
    unit = F.normalize(full_precision(embeddings.flatten(0, 1)), dim=1)
    return unit.std(dim=0, correction=0).mean()


def _is_match(a: BoxSet, b: BoxSet) -> Tensor:
    return is_same_object(a.ids, a.levels, b.ids, b.levels)
