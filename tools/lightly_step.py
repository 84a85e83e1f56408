"""MoCo v2 from the building blocks of the package `lightly`, as its own example puts them together.

Source: lightly 1.6.0, examples/pytorch/moco.py, with the settings of MoCo v2 (arXiv:2003.04297) and ResNet-50.
"""

import copy
import importlib.util

import torch
from measured_step import Setting, make_views
from torch import Tensor, nn
from torchvision.models import resnet50

NUM_STAGES = 4


def is_available() -> bool:
    """Whether lightly is installed."""
    return importlib.util.find_spec("lightly") is not None


class LightlyStep:
    """One step with torch's plain SGD, on the same views, in the same precision and memory layout as ours.

    It does less than ours: it neither asks whether loss and gradients are finite nor counts hits, and BatchNorm takes
    the whole batch of the process as one group.
    """

    def __init__(self, setting: Setting, *, is_compiled: bool = False) -> None:
        """Build it.

        Args:
            setting: What is computed, and where; whether ours is compiled does not matter here.
            is_compiled: Whether the stages of its networks are compiled, which its example does not do.
        """
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead
        from lightly.models.utils import batch_shuffle, batch_unshuffle, update_momentum

        torch.manual_seed(0)
        self._shuffle, self._unshuffle, self._update = batch_shuffle, batch_unshuffle, update_momentum
        self._trunk = nn.Sequential(*list(resnet50().children())[:-1])
        self._head = MoCoProjectionHead(2048, 2048, 128)
        self._key_trunk = copy.deepcopy(self._trunk).requires_grad_(False)
        self._key_head = copy.deepcopy(self._head).requires_grad_(False)
        self._loss = NTXentLoss(temperature=0.2, memory_bank_size=(setting.queue_size, 128)).to(setting.device)
        for network in (self._trunk, self._head, self._key_trunk, self._key_head):
            network.to(setting.device).to(memory_format=torch.channels_last).train()
        if is_compiled:
            for trunk in (self._trunk, self._key_trunk):
                for stage in trunk[-NUM_STAGES - 1 : -1]:  # the last of all is the pooling
                    stage.compile(dynamic=False)
        trained = [*self._trunk.parameters(), *self._head.parameters()]
        self._optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9, weight_decay=1e-4)
        self._views = make_views("moco_v2", setting)
        self._setting = setting

    def __call__(self) -> None:
        """Make one step."""
        self._update(self._trunk, self._key_trunk, m=0.999)
        self._update(self._head, self._key_head, m=0.999)
        with self._setting.autocast():
            query = self._head(self._trunk(self._views.global_query).flatten(start_dim=1))
            loss = self._loss(query, self._keys())
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def _keys(self) -> Tensor:
        images, order = self._shuffle(self._views.global_key)
        keys: Tensor = self._key_head(self._key_trunk(images).flatten(start_dim=1))
        unshuffled: Tensor = self._unshuffle(keys, order)
        return unshuffled
