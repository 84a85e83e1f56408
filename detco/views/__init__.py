"""Views: what a method sees of an image, made in two halves. Start reading at `detco.views.base`, then `moco`."""

from detco.views.base import ProposalRecipe, Proposals, ViewRecipe
from detco.views.detco import DetCoRecipe, DetCoSample, DetCoViews, PatchSample
from detco.views.host import sample_generator
from detco.views.moco import GlobalSample, MoCoRecipe, MoCoSample, MoCoViews
from detco.views.object_views import BoxSet, ObjectSample, PairedSample, PairedView
from detco.views.photo import Photo, UnreadableImage, decode
from detco.views.soco import (
    SoCoC4Recipe,
    SoCoC4Sample,
    SoCoC4Views,
    SoCoFPNRecipe,
    SoCoFPNSample,
    SoCoFPNViews,
    SoCoStarRecipe,
    SoCoStarSample,
    SoCoStarViews,
)

__all__ = [
    "BoxSet",
    "DetCoRecipe",
    "DetCoSample",
    "DetCoViews",
    "GlobalSample",
    "MoCoRecipe",
    "MoCoSample",
    "MoCoViews",
    "ObjectSample",
    "PairedSample",
    "PairedView",
    "PatchSample",
    "Photo",
    "ProposalRecipe",
    "Proposals",
    "SoCoC4Recipe",
    "SoCoC4Sample",
    "SoCoC4Views",
    "SoCoFPNRecipe",
    "SoCoFPNSample",
    "SoCoFPNViews",
    "SoCoStarRecipe",
    "SoCoStarSample",
    "SoCoStarViews",
    "UnreadableImage",
    "ViewRecipe",
    "decode",
    "sample_generator",
]
