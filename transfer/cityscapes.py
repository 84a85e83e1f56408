"""Cityscapes' instance evaluation without the file that cityscapesscripts leaves in the current folder."""

import importlib
import sys
from typing import Any

from transfer import d2

d2.require()

from detectron2.evaluation import CityscapesInstanceEvaluator  # noqa: E402


class InstanceEvaluator(CityscapesInstanceEvaluator):  # type: ignore[misc]  # Detectron2 is not followed
    """Detectron2's evaluator, less a dump that nobody reads.

    cityscapesscripts 2.3.0 writes every match into "matches.json", wherever the program was started; numpy 2's numbers
    among them end the evaluation with an AttributeError.
    """

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """{"segm": {"AP", "AP50"}} in per cent on rank 0, None on the others. Collective."""
        # Newer versions of Detectron2 import the same files under Meta's name.
        package = d2.CITYSCAPES_ALIAS if d2.CITYSCAPES_ALIAS in sys.modules else "cityscapesscripts"
        module: Any = importlib.import_module(f"{package}.evaluation.evalInstanceLevelSemanticLabeling")
        write = module.writeDict2JSON
        module.writeDict2JSON = lambda contents, file: None
        try:
            result: dict[str, dict[str, float]] | None = super().evaluate()
        finally:
            module.writeDict2JSON = write
        return result
