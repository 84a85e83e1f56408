"""What Detectron2's model zoo lacks. Nothing is registered on import: call `register_models`."""

from typing import Any

from transfer.modeling import fcn16s, fcos, res5_extra_norm, sparse_rcnn


def add_model_config(cfg: Any) -> None:
    """Add the config keys of our models to Detectron2's."""
    for module in (fcn16s, fcos, sparse_rcnn):
        module.add_config(cfg)


def register_models() -> None:
    """Let MODEL.META_ARCHITECTURE, MODEL.ROI_HEADS.NAME and MODEL.SEM_SEG_HEAD.NAME find our models. Idempotent."""
    for module in (res5_extra_norm, fcn16s, fcos, sparse_rcnn):
        module.register()
