"""DetCo: contrast whole images and sets of patches, within and across, at every stage of the network.

Shape legend:
    N  images of this process
    G  images of all processes
    S  stages that are contrasted, shallow first (4 with multi-level supervision, else 1)
    T  embeddings per image: S global, then S local if the local branch is on (8 in full DetCo)
    D  embedding dimension
    K  keys in a queue

Source: Xie et al., arXiv:2102.04803, Sec. 3. The authors published no pretraining code.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from detco.distributed import world_size
from detco.losses import Contrast, info_nce
from detco.methods.base import Method, StepOutput
from detco.models.batch_shuffle import draw_permutation, own_rows, shuffle_rows, unshuffle_rows
from detco.models.ema import frozen_copy, update_ema
from detco.models.encoder import Encoder
from detco.models.norm import count_groups
from detco.models.queue import KeyQueue, check_capacity
from detco.models.resnet import ResNetTrunk
from detco.views.base import ViewRecipe
from detco.views.detco import DetCoRecipe, DetCoViews
from detco.views.moco import MoCoRecipe, MoCoViews

STAGES = tuple(ResNetTrunk.channels)


class DetCo(Method):
    """DetCo and, by its two switches, the rows of the paper's ablation (Table 12).

    ============  =====  ==========================  =========
    multi_level   local  contrasted                  is
    ============  =====  ==========================  =========
    False         False  g-g at res5                 MoCo v2
    True          False  g-g at res2..res5           MLS only
    False         True   g-g, l-l, g-l at res5       GLC only
    True          True   g-g, l-l, g-l at all four   DetCo
    ============  =====  ==========================  =========

    Heads and queues that a mode does not use are not built.

    Attributes:
        query: The encoder that is trained.
        key: Its moving average, trunk and heads; no gradient, BatchNorm buffers of its own.
        queues_global, queues_local: One `KeyQueue` per contrasted stage.
        weights: Weight in the loss of each contrasted stage.

    Departures:
        The paper does not state the stage weights (0.1, 0.4, 0.7, 1.0 are from a third party with access to it), the
        hidden width of the heads (here the channels of the stage, as MoCo v2 at res5), the pooling of shallow stages
        (here global average) or whether ShuffleBN covers patches (here it does, by image).
    """

    transfer_parts: ClassVar[Mapping[str, str]] = {"backbone": "query.trunk"}

    def __init__(
        self,
        *,
        multi_level: bool = True,
        local: bool = True,
        stage_weights: Sequence[float] = (0.1, 0.4, 0.7, 1.0),
        queue_size: int = 65536,
        dim: int = 128,
        head_hidden: int | None = None,
        temperature: float = 0.2,
        ema_decay: float = 0.999,
        bn_group: int = 32,
    ) -> None:
        """Build both encoders and the queues from torch's global generator: seed it alike on every process.

        Args:
            multi_level: Contrast at res2..res5 (the paper's multi-level supervision, Eq. 3) instead of res5 alone.
            local: Add the patch sets (the paper's global and local contrast, Eq. 4 and 5).
            stage_weights: w of Eq. 1 for res2..res5. Read only if `multi_level`; a single stage weighs 1.
            queue_size: K of every queue; a multiple of the total batch.
            dim: D.
            head_hidden: Hidden width of every head; None: as many as the stage has channels.
            temperature: tau, above 0.
            ema_decay: m, in [0, 1].
            bn_group: Images per BatchNorm group. A process with more splits its batch into groups of this size.

        Raises:
            ValueError: If an argument is out of range.
        """
        super().__init__()
        if len(stage_weights) != len(STAGES) or any(weight < 0 for weight in stage_weights):
            raise ValueError(
                f"stage_weights must be {len(STAGES)} numbers of at least 0, for {', '.join(STAGES)}, "
                f"but is {tuple(stage_weights)}"
            )
        _check_positive(queue_size=queue_size, dim=dim, temperature=temperature, bn_group=bn_group)
        if head_hidden is not None:
            _check_positive(head_hidden=head_hidden)
        if not 0 <= ema_decay <= 1:
            raise ValueError(f"ema_decay must be in [0, 1], but is {ema_decay}")

        self.local = local
        self.queue_size = queue_size
        self.temperature = temperature
        self.ema_decay = ema_decay
        self.bn_group = bn_group
        self.weights = dict(zip(STAGES, stage_weights, strict=True)) if multi_level else {STAGES[-1]: 1.0}
        self.query = Encoder(tuple(self.weights), local=local, dim=dim, head_hidden=head_hidden, bn_group=bn_group)
        self.key = frozen_copy(self.query)
        self.queues_global = nn.ModuleDict({stage: KeyQueue(dim, queue_size) for stage in self.weights})
        self.queues_local = nn.ModuleDict({stage: KeyQueue(dim, queue_size) for stage in self.weights if local})
        self._new_keys: list[Tensor] = []  # one per forward since the last commit, each (G, T, D)

    @classmethod
    def recipe_for(cls, *, local: bool = True, **method_options: Any) -> type[ViewRecipe[Any, Any]]:
        """Global views alone, or with patch sets if `local`."""
        return DetCoRecipe if local else MoCoRecipe

    def check_batch(self, images_per_process: int) -> None:
        """Refuse a batch this method cannot train on. `forward` does so itself, before any work.

        Args:
            images_per_process: N.

        Raises:
            ValueError: If the queue is not a multiple of the total batch, or N does not split into BatchNorm groups.
        """
        check_capacity(self.queue_size, images_per_process * world_size())
        count_groups(images_per_process, self.bn_group)

    def before_step(self, progress: float) -> None:
        """Move the key encoder towards the query encoder (MoCo, Eq. 2); the decay is constant."""
        update_ema(self.key, self.query, self.ema_decay)

    def forward(self, views: DetCoViews | MoCoViews) -> StepOutput:
        """Eq. 1: the weighted sum over stages of g-g (Eq. 2), l-l (Eq. 5) and g-l (Eq. 4).

        Collective: every process must call it with the same N.

        Args:
            views: `DetCoViews`, or `MoCoViews` if there is no local branch.

        Raises:
            ValueError: If `check_batch` refuses N.
        """
        self.check_batch(len(views.global_query))

        # Keys first, before the queries' activations fill the memory: they wait for the backward pass.
        keys_of_all = self._encode_keys(self._key_views(views))  # (G, T, D)
        queries = self.query(*self._query_views(views))  # (N, T, D)
        keys = own_rows(keys_of_all, len(queries))  # (N, T, D), of the same images as the queries

        terms = self.contrast(queries, keys)
        loss = torch.stack([self.weights[stage] * term.loss for (_, stage), term in terms.items()]).sum()

        # The queues still hold what the loss was computed against; `commit` adds these after the backward pass.
        self._new_keys.append(keys_of_all)
        metrics = {f"loss_{pair}/{stage}": term.loss.detach() for (pair, stage), term in terms.items()}
        metrics |= {f"top1_{pair}/{stage}": term.top1 for (pair, stage), term in terms.items()}
        return StepOutput(loss, metrics)

    def contrast(self, queries: Tensor, keys: Tensor) -> dict[tuple[str, str], Contrast]:
        """All terms of the loss, unweighted.

        Args:
            queries: Unit length, shape (N, T, D).
            keys: Of the same images, unit length, no gradient, shape (N, T, D).

        Returns:
            (pair, stage) -> term, with the pairs "gg", "ll" and "gl" (the paper's L_g<->l: a local query
            against a global key) and the stages that are contrasted.
        """
        num_stages = len(self.weights)
        q_global, q_local = queries[:, :num_stages], queries[:, num_stages:]
        k_global, k_local = keys[:, :num_stages], keys[:, num_stages:]

        terms = {}
        for i, stage in enumerate(self.weights):
            negatives_global = _keys_in(self.queues_global, stage)
            terms["gg", stage] = info_nce(q_global[:, i], k_global[:, i], negatives_global, self.temperature)
            if self.local:
                negatives_local = _keys_in(self.queues_local, stage)
                terms["ll", stage] = info_nce(q_local[:, i], k_local[:, i], negatives_local, self.temperature)
                terms["gl", stage] = info_nce(q_local[:, i], k_global[:, i], negatives_global, self.temperature)
        return terms

    @torch.no_grad()
    def commit(self) -> None:
        """Push the keys of all `forward`s since the last `commit`, of all processes, into the queues, oldest first.

        Raises:
            RuntimeError: If there was no `forward` since the last `commit`.
        """
        if not self._new_keys:
            raise RuntimeError("commit() without a forward() since the last commit(): there are no keys to push")
        queues = [*self.queues_global.values(), *self.queues_local.values()]
        for new_keys in self._new_keys:
            for queue, keys in zip(queues, new_keys.unbind(dim=1), strict=True):
                cast(KeyQueue, queue).push(keys)
        self._new_keys = []

    def forward_transfer(self, views: DetCoViews | MoCoViews) -> None:
        """Run the query trunk on whole images: patches have other BatchNorm statistics."""
        self.query.trunk(views.global_query)

    @torch.no_grad()
    def _encode_keys(self, views: Sequence[Tensor]) -> Tensor:
        """Keys of all processes, (G, T, D), computed on shuffled images and back in the images' order."""
        permutation = draw_permutation(len(views[0]) * world_size())
        shuffled_keys = self.key(*(shuffle_rows(view, permutation) for view in views))
        return unshuffle_rows(shuffled_keys, permutation)

    def _query_views(self, views: DetCoViews | MoCoViews) -> list[Tensor]:
        local = [cast(DetCoViews, views).local_query] if self.local else []
        return [views.global_query, *local]

    def _key_views(self, views: DetCoViews | MoCoViews) -> list[Tensor]:
        local = [cast(DetCoViews, views).local_key] if self.local else []
        return [views.global_key, *local]


def _keys_in(queues: nn.ModuleDict, stage: str) -> Tensor:
    return cast(KeyQueue, queues[stage]).keys


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name} must be above 0, but is {value}")
