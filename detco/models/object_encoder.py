"""SoCo's encoders: from an image and boxes in it to one projection per box.

Both run the image through the network once (`features`) and may then be asked for any number of box sets in it
(`project`).

Shape legend:
    N     images
    K     boxes per image
    R     boxes of all images: N * K
    C     channels
    h, w  height and width of a feature map
    L     entries per box: 1, or the 4 levels if every box is looked at on every level
    F     features of a described box
    D     embedding dimension

Source: SoCo, arXiv:2106.02637, Sec. 3.3, and hologerry/SoCo@624a70d contrast/resnet.py and
contrast/models/{SoCo_C4,SoCo_FPN,box_util}.py.
"""

from abc import ABC, abstractmethod
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from detco.losses import full_precision
from detco.models.box_head import CELLS, FEATURES, BoxHead
from detco.models.fpn import FPN, Pyramid
from detco.models.mlp import MLP
from detco.models.resnet import ResNetTrunk

LevelRouting = Literal["all", "own"]
C4_CELLS = 14
"""Side of what RoIAlign makes of a box for res5, in cells; res5 halves it."""

FeaturesT = TypeVar("FeaturesT")


class ObjectEncoder(nn.Module, ABC, Generic[FeaturesT]):
    """What a method needs of an encoder, whatever its detector."""

    @abstractmethod
    def features(self, images: Tensor) -> FeaturesT:
        """Run what sees the whole image.

        Args:
            images: Normalised, shape (N, 3, H, W).

        Returns:
            What the other methods take; its kind is the encoder's own business.
        """

    @abstractmethod
    def describe(self, features: FeaturesT, boxes_view: Tensor, levels: Tensor) -> Tensor:
        """Describe boxes as a detector does, each once and on its own level: all that is transferred, but no projector.

        Args:
            features: From `features`.
            boxes_view: Edges (x1, y1, x2, y2) as fractions of the view, shape (N, K, 4).
            levels: Each box's own level, 0 for p2 to 3 for p5, or -1 for none; shape (N, K).

        Returns:
            Shape (R, F), image by image; finite for boxes without a level too, which the coarsest one describes.
        """

    @abstractmethod
    def project_each(self, features: FeaturesT, boxes_view: Tensor, levels: Tensor) -> Tensor:
        """Project boxes, on every level that looks at them. For what, like a predictor, is to see each level apart.

        Args:
            features: From `features`.
            boxes_view: As for `describe`.
            levels: As for `describe`.

        Returns:
            Not normalised, shape (L, N, K, D); finite for boxes without a level too. `own_level` chooses from it.
        """

    def project(self, features: FeaturesT, boxes_view: Tensor, levels: Tensor) -> Tensor:
        """Project boxes: what `own_level` leaves of `project_each`, which see; shape (N, K, D)."""
        return own_level(self.project_each(features, boxes_view, levels), levels)


def own_level(entries: Tensor, levels: Tensor) -> Tensor:
    """Choose each box's entry of its own level.

    Args:
        entries: Shape (L, N, K, D). With L = 1 there is nothing to choose.
        levels: In 0..3, or -1 for boxes without a level; shape (N, K).

    Returns:
        Shape (N, K, D). A box without a level has the entry of the coarsest one: it is larger than any has.
    """
    if len(entries) == 1:
        return entries[0]
    chosen = _with_level(levels)[None, :, :, None].expand(1, *entries.shape[1:])
    return entries.gather(0, chosen)[0]


def pool_boxes(feature_map: Tensor, boxes_view: Tensor, cells: int) -> Tensor:
    """RoIAlign in float32, even under autocast, with as many samples per cell as the box has feature pixels there.

    A box's place is its fractions times the size that the map really has. So no stride is assumed: the p5 of a view of
    112 px is 4 wide, not 3.5.

    Args:
        feature_map: Shape (N, C, h, w).
        boxes_view: Edges (x1, y1, x2, y2) as fractions of the view, shape (N, K, 4).
        cells: Side of the result.

    Returns:
        Image by image, shape (R, C, cells, cells). A box without a width has no samples: its cells are 0, at no cost.
    """
    feature_map = full_precision(feature_map)
    height, width = feature_map.shape[-2:]
    x1, y1, x2, y2 = boxes_view.to(feature_map.dtype).unbind(dim=2)
    image = torch.arange(len(x1), dtype=x1.dtype, device=x1.device).unsqueeze(1).expand_as(x1)
    rows = torch.stack([image, x1 * width, y1 * height, x2 * width, y2 * height], dim=2)
    # Autocast leaves it in float32: torchvision pools in no lower precision.
    pooled: Tensor = roi_align(
        feature_map, rows.flatten(0, 1), cells, spatial_scale=1.0, sampling_ratio=-1, aligned=True
    )
    return pooled


class C4Encoder(ObjectEncoder[Tensor]):
    """The encoder of SoCo-C4: boxes are pooled from res4 and go through res5, as in a C4 detector. There are no levels.

    Attributes:
        backbone: The trunk, whose `layer4` is the head on boxes.
        projector: From res5's channels to D.

    Departures: none known.
    """

    def __init__(self, dim: int = 256, hidden: int = 4096) -> None:
        """Build it from torch's global generator.

        Args:
            dim: D.
            hidden: Hidden width of the projector.
        """
        super().__init__()
        self.backbone = ResNetTrunk(zero_init_residual=True)
        self.projector = MLP(ResNetTrunk.channels["res5"], hidden, dim, norm=True)

    def features(self, images: Tensor) -> Tensor:
        """Run all stages up to res4: (N, 3, H, W) -> (N, 1024, h, w)."""
        return self.backbone.until_res4(images)

    def describe(self, features: Tensor, boxes_view: Tensor, levels: Tensor) -> Tensor:
        """See `ObjectEncoder`; F is 2048, and `levels` are not read."""
        res5: Tensor = self.backbone.layer4(pool_boxes(features, boxes_view, C4_CELLS))
        return res5.mean(dim=(2, 3))

    def project_each(self, features: Tensor, boxes_view: Tensor, levels: Tensor) -> Tensor:
        """See `ObjectEncoder`; L is 1, and `levels` are not read."""
        projected: Tensor = self.projector(self.describe(features, boxes_view, levels))
        return projected.view(1, *boxes_view.shape[:2], -1)


class FPNEncoder(ObjectEncoder[Pyramid]):
    """The encoder of SoCo-FPN and SoCo-FPN*: boxes are pooled from the pyramid and go through the box head.

    Attributes:
        backbone, fpn: What sees the whole image.
        box_head: What sees a box.
        projector: From the box head's features to D.

    Departures: none known; see `level_routing` for where paper and code differ.
    """

    def __init__(self, dim: int = 256, hidden: int = 4096, level_routing: LevelRouting = "all") -> None:
        """Build it from torch's global generator.

        Args:
            dim: D.
            hidden: Hidden width of the projector.
            level_routing: "all" looks at every box on every level, a level at a time, so that BatchNorm behind the
                pyramid sees one level with the boxes of all sizes; so does the code, which made the published weights.
                "own" looks at a box on its own level alone, boxes of all levels together; so reads the paper, and it
                costs a quarter of the work on boxes.

        Raises:
            ValueError: If `level_routing` is neither.
        """
        super().__init__()
        if level_routing not in ("all", "own"):
            raise ValueError(f'level_routing must be "all" or "own", but is {level_routing!r}')
        self.level_routing = level_routing
        self.backbone = ResNetTrunk(zero_init_residual=True)
        self.fpn = FPN()
        self.box_head = BoxHead()
        self.projector = MLP(FEATURES, hidden, dim, norm=True)

    def features(self, images: Tensor) -> Pyramid:
        """Run trunk and pyramid: (N, 3, H, W) -> p2..p5."""
        pyramid: Pyramid = self.fpn(self.backbone(images))
        return pyramid

    def describe(self, features: Pyramid, boxes_view: Tensor, levels: Tensor) -> Tensor:
        """See `ObjectEncoder`; F is 1024. `level_routing` makes no difference."""
        described: Tensor = self.box_head(_pool_on_own_level(features, boxes_view, levels))
        return described

    def project_each(self, features: Pyramid, boxes_view: Tensor, levels: Tensor) -> Tensor:
        """See `ObjectEncoder`; L is 4 if `level_routing` is "all", else 1."""
        if self.level_routing == "all":
            described = [self.box_head(pool_boxes(level, boxes_view, CELLS)) for level in features]
        else:
            described = [self.describe(features, boxes_view, levels)]
        projected = torch.stack([self.projector(boxes) for boxes in described])
        return projected.view(len(described), *boxes_view.shape[:2], -1)


def _pool_on_own_level(pyramid: Pyramid, boxes_view: Tensor, levels: Tensor) -> Tensor:
    """Pool every box from its own level: (N, K, 4) -> (R, C, 7, 7).

    Every level is given all boxes, those of other levels without a width, and the results are added up. Choosing a
    level's boxes instead would ask the device how many they are, and wait for the answer. A level without a box still
    takes part, with a gradient of 0: DistributedDataParallel would wait for that of a parameter that took no part.
    """
    own = _with_level(levels).unsqueeze(2)
    pooled = [pool_boxes(level, boxes_view * (own == index), CELLS) for index, level in enumerate(pyramid)]
    return sum(pooled[1:], start=pooled[0])


def _with_level(levels: Tensor) -> Tensor:
    """The levels, with the coarsest for boxes that have none: they are larger than any level's boxes."""
    return torch.where(levels < 0, len(Pyramid._fields) - 1, levels)
