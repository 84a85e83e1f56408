"""How a dataset's records become training samples, by the name in TRANSFER.MAPPER."""

from collections.abc import Callable
from typing import Any

from transfer.resize_or_crop_mapper import resize_or_crop
from transfer.sem_seg_mapper import sem_seg_scale_crop

# One line per mapper: name -> builder from the config. "" is Detectron2's own.
MAPPERS: dict[str, Callable[[Any], Callable[[dict[str, Any]], Any]]] = {
    "sem_seg_scale_crop": sem_seg_scale_crop,
    "resize_or_crop": resize_or_crop,
}


def build_mapper(cfg: Any) -> Callable[[dict[str, Any]], Any] | None:
    """The training mapper of a config; None for Detectron2's default one.

    Raises:
        ValueError: If TRANSFER.MAPPER is not known.
    """
    name = cfg.TRANSFER.MAPPER
    if not name:
        return None
    if name not in MAPPERS:
        raise ValueError(f'TRANSFER.MAPPER is {name}; it must be "" or one of {", ".join(MAPPERS)}')
    return MAPPERS[name](cfg)
