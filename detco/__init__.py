"""DetCo, MoCo v2 and their parts: views, networks, losses, methods. Pure torch; no config, no detectors."""

__version__ = "0.1.0"
