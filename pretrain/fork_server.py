"""The process that loader workers are forked from, which has imported what they need and done nothing else.

Its imports take as long as those of the training process. So it is started before them: this module needs no torch.
"""

import multiprocessing
from multiprocessing import forkserver

PRELOADED_MODULES = ["torch", "pretrain.data"]
"""What is imported once, so that a worker starts in milliseconds."""


def start() -> None:
    """Start it, unless it runs already; nothing waits for its imports."""
    multiprocessing.set_forkserver_preload(PRELOADED_MODULES)
    forkserver.ensure_running()
