"""Where weights come from: every project whose released ResNet-50 is known, and how its files are read."""

from transfer.sources.layouts import Layout, load_layouts
from transfer.sources.read import Source, read_source
from transfer.sources.recognise import SourceError
from transfer.sources.resnet50 import resnet50_shapes

__all__ = ["Layout", "Source", "SourceError", "load_layouts", "read_source", "resnet50_shapes"]
