"""MoCo v2: DetCo with both switches off.

Source: MoCo, arXiv:1911.05722, Alg. 1; MoCo v2, arXiv:2003.04297 (MLP head, temperature 0.2, cosine schedule).
"""

from typing import Any

from detco.methods.detco import DetCo
from detco.views.base import ViewRecipe
from detco.views.moco import MoCoRecipe


class MoCoV2(DetCo):
    """One global head and one queue, at res5.

    Departures: none known.
    """

    def __init__(
        self,
        *,
        queue_size: int = 65536,
        dim: int = 128,
        head_hidden: int | None = None,
        temperature: float = 0.2,
        ema_decay: float = 0.999,
        bn_group: int = 32,
    ) -> None:
        """Build both encoders and the queue; the arguments mean what they mean in `DetCo`."""
        super().__init__(
            multi_level=False,
            local=False,
            queue_size=queue_size,
            dim=dim,
            head_hidden=head_hidden,
            temperature=temperature,
            ema_decay=ema_decay,
            bn_group=bn_group,
        )

    @classmethod
    def recipe_for(cls, **method_options: Any) -> type[ViewRecipe[Any, Any]]:
        """Two global views."""
        return MoCoRecipe
