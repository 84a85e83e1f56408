"""DetCo, MoCo v2 and their parts: views, networks, losses, methods. Pure torch; knows no files, configs or detectors."""

__version__ = "0.1.0"
