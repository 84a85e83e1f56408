"""How a method of `detco.methods` is run: data, optimiser, checkpoints, metrics. Knows no method by name."""

import time

STARTED = time.perf_counter()
"""When this process first imported the package, which is the first thing that it does."""
