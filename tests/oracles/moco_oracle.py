"""MoCo v2 restated from the paper's pseudocode, for one process. Slow, obvious, and shares no code with the suite.

Source: arXiv:1911.05722, Alg. 1, with the MLP head and temperature of arXiv:2003.04297. As in the authors' code, the
key network moves before it encodes.
"""

import torch
import torchvision
from torch import Tensor, nn


class MoCoOracle:
    """f_q, f_k: networks; queue: C x K; m: key momentum; t: temperature."""

    def __init__(self, f_q: nn.Module, f_k: nn.Module, queue: Tensor, m: float, t: float) -> None:
        self.f_q, self.f_k, self.queue, self.m, self.t = f_q, f_k, queue, m, t
        self.oldest = 0
        self.optimiser = torch.optim.SGD(f_q.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)

    def step(self, x_q: Tensor, x_k: Tensor) -> float:
        """One iteration of Alg. 1 on two views of N images; returns the loss."""
        with torch.no_grad():
            for theta_k, theta_q in zip(self.f_k.parameters(), self.f_q.parameters(), strict=True):
                theta_k.copy_(self.m * theta_k + (1 - self.m) * theta_q)

        q = unit_rows(self.f_q(x_q))  # N x C
        with torch.no_grad():
            k = unit_rows(self.f_k(x_k))  # N x C

        l_pos = torch.bmm(q.unsqueeze(1), k.unsqueeze(2)).squeeze(2)  # N x 1
        l_neg = torch.mm(q, self.queue)  # N x K
        logits = torch.cat([l_pos, l_neg], dim=1)  # N x (1 + K)
        labels = torch.zeros(len(logits), dtype=torch.int64)
        loss = nn.functional.cross_entropy(logits / self.t, labels)

        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()

        self.queue = self.queue.clone()
        for key in k:  # enqueue and dequeue
            self.queue[:, self.oldest] = key
            self.oldest = (self.oldest + 1) % self.queue.shape[1]
        return loss.item()


def unit_rows(x: Tensor) -> Tensor:
    return x / x.square().sum(dim=1, keepdim=True).sqrt()


def resnet50_with_mlp(dim: int) -> nn.Module:
    """ResNet-50 whose classifier is MoCo v2's two-layer head."""
    network = torchvision.models.resnet50()
    network.fc = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, dim))
    return network
