"""SoCo's head on pooled boxes: four convolutions and a linear layer, as in a detector of the 4conv1fc kind.

Its state dict has SoCo's names, which `transfer.naming` reads.

Shape legend:
    R  boxes

Source: SoCo, hologerry/SoCo@624a70d contrast/models/fast_rcnn_conv_fc_head.py; the paper, arXiv:2106.02637, says only
"as in Mask R-CNN".
"""

from torch import Tensor, nn

from detco.models.fpn import WIDTH

CELLS = 7
"""Side of what RoIAlign makes of a box, in cells."""
FEATURES = 1024
"""Width of the output."""


class BoxHead(nn.Module):
    """Four times 3x3 convolution without bias, BatchNorm, ReLU; then flattened, a linear layer and a ReLU.

    Departures: none known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(), nn.BatchNorm2d(WIDTH)
        self.conv2, self.bn2 = _conv(), nn.BatchNorm2d(WIDTH)
        self.conv3, self.bn3 = _conv(), nn.BatchNorm2d(WIDTH)
        self.conv4, self.bn4 = _conv(), nn.BatchNorm2d(WIDTH)
        self.fc1 = nn.Linear(WIDTH * CELLS * CELLS, FEATURES)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, pooled: Tensor) -> Tensor:
        """Describe boxes.

        Args:
            pooled: Shape (R, 256, 7, 7).

        Returns:
            Shape (R, 1024), at least 0.
        """
        x = self.relu(self.bn1(self.conv1(pooled)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.relu(self.bn3(self.conv3(x)))
        x = self.relu(self.bn4(self.conv4(x)))
        features: Tensor = self.relu(self.fc1(x.flatten(start_dim=1)))
        return features


def _conv() -> nn.Conv2d:
    return nn.Conv2d(WIDTH, WIDTH, kernel_size=3, padding=1, bias=False)
