"""What Detectron2's model zoo lacks. Nothing is registered on import: call `register_models`."""

import difflib
import importlib.util
from typing import Any

from transfer import d2
from transfer.modeling import fcn16s, fcos, res5_extra_norm, sparse_rcnn

d2.require()

from detectron2.modeling import META_ARCH_REGISTRY  # noqa: E402


def check_scipy() -> None:
    """Refuse Sparse R-CNN where SciPy is missing, by which it matches proposals to objects in every iteration.

    Raises:
        ValueError: If so.
    """
    if importlib.util.find_spec("scipy") is None:
        raise ValueError(
            "MODEL.META_ARCHITECTURE is SparseRCNN, which matches with SciPy, and that is not installed: pip install "
            "scipy"
        )


# Models that need more than any Detectron2: META_ARCHITECTURE -> a check that raises ValueError.
REQUIREMENTS = {"FCOS": fcos.check_available, "SparseRCNN": check_scipy}


def add_model_config(cfg: Any) -> None:
    """Add the config keys of our models to Detectron2's."""
    for module in (fcn16s, fcos, sparse_rcnn):
        module.add_config(cfg)


def register_models() -> None:
    """Let MODEL.META_ARCHITECTURE, MODEL.ROI_HEADS.NAME and MODEL.SEM_SEG_HEAD.NAME find our models. Idempotent."""
    for module in (res5_extra_norm, fcn16s, fcos, sparse_rcnn):
        module.register()


def check_model_available(cfg: Any) -> None:
    """Refuse a config whose model cannot be built here, before anything is built.

    Raises:
        ValueError: If MODEL.META_ARCHITECTURE is unknown, or needs another Detectron2 than the installed one, or a
            package that is not installed.
    """
    register_models()
    name = cfg.MODEL.META_ARCHITECTURE
    known = [known for known, _ in META_ARCH_REGISTRY]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"MODEL.META_ARCHITECTURE is {name}, which does not exist; the nearest that does is {near}")
    if name in REQUIREMENTS:
        REQUIREMENTS[name]()
