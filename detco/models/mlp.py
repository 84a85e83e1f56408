"""Projection head: two linear layers with biases and a ReLU between them, with or without BatchNorm before the ReLU.

Source: without, SimCLR's head as MoCo v2 uses it, arXiv:2003.04297, Sec. 3; with, BYOL's projector and predictor as
SoCo uses them, arXiv:2106.02637, Sec. 4.1.
"""

from torch import nn


class MLP(nn.Sequential):
    """Two linear layers with a ReLU between them: (N, in_features) -> (N, out_features). Does not normalise its output.

    Args:
        in_features, hidden_features, out_features: Widths.
        norm: Whether the hidden layer is normalised before its ReLU. The output never is.
    """

    def __init__(self, in_features: int, hidden_features: int, out_features: int, *, norm: bool = False) -> None:
        super().__init__(
            nn.Linear(in_features, hidden_features),
            *([nn.BatchNorm1d(hidden_features)] if norm else []),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_features, out_features),
        )
