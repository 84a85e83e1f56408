"""What is compared before the first iteration: config, weights, data, published protocol.

transfer/settings_check.py calls them in order. A check returns notes for the log (those that begin with "WARNING: " are
logged as such) and raises ValueError or FileNotFoundError for what would stop the run or quietly spoil its result. A
setting that is merely not the published one is neither: it is a departure, which results.json lists.
"""
