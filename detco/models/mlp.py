"""Projection head: Linear-ReLU-Linear with biases and no normalisation.

Source: SimCLR's head as MoCo v2 uses it, arXiv:2003.04297, Sec. 3.
"""

from torch import nn


class MLP(nn.Sequential):
    """Two linear layers with a ReLU between them: (N, in_features) -> (N, out_features). Does not normalise."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__(
            nn.Linear(in_features, hidden_features),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_features, out_features),
        )
