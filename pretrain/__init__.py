"""How a method of `detco.methods` is run: data, optimiser, checkpoints, metrics. Knows no method by name."""
