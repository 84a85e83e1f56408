"""Views: what a method sees of an image, made in two halves. Start reading at `detco.views.base`, then `moco`."""

from detco.views.base import ViewRecipe
from detco.views.detco import DetCoRecipe, DetCoSample, DetCoViews, PatchSample
from detco.views.host import decode, sample_generator
from detco.views.moco import GlobalSample, MoCoRecipe, MoCoSample, MoCoViews

__all__ = [
    "DetCoRecipe",
    "DetCoSample",
    "DetCoViews",
    "GlobalSample",
    "MoCoRecipe",
    "MoCoSample",
    "MoCoViews",
    "PatchSample",
    "ViewRecipe",
    "decode",
    "sample_generator",
]
