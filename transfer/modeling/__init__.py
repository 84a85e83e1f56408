"""What Detectron2's model zoo lacks. Nothing is registered on import: call `register_heads`."""

from transfer.modeling.res5_extra_norm import Res5ROIHeadsExtraNorm, register_heads

__all__ = ["Res5ROIHeadsExtraNorm", "register_heads"]
