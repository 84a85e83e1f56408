"""On real photos, proposals and views together put objects on the levels measured of the official pipeline."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from detco.views import Photo, SoCoStarRecipe, sample_generator
from detco.views.base import Proposals
from pretrain.proposals.backends import SearchParams, propose
from pretrain.proposals.filters import FilterParams, filter_boxes

DATA = Path(os.environ.get("DETCO_TEST_DATA", Path(__file__).parents[3] / "shared/data"))
PHOTOS = sorted((DATA / "unlabelled_photos").rglob("*.jpg"))[::84]
NUM_DRAWS = 20
# Shares of P2..P5: 100 ImageNet images with the official boxes. Other photos differ by some hundredths.
PUBLISHED = {
    "whole": (0.0, 0.36, 0.64, 0.0),
    "crop": (0.02, 0.27, 0.69, 0.03),
    "small": (0.28, 0.69, 0.03, 0.0),
    "medium": (0.03, 0.41, 0.56, 0.0),
}
TOLERANCE = 0.08


@pytest.mark.realdata
@pytest.mark.skipif(not PHOTOS, reason=f"needs unlabelled_photos below {DATA}; set DETCO_TEST_DATA")
def test_objects_lie_on_the_levels_of_the_official_pipeline() -> None:
    recipe = SoCoStarRecipe()
    levels: dict[str, Counter[int]] = {view: Counter() for view in PUBLISHED}
    for photo in PHOTOS:
        image = Photo.open(photo.read_bytes())
        raw = propose(np.ascontiguousarray(image.pixels().permute(1, 2, 0).numpy()), SearchParams("skimage"))
        kept = filter_boxes(raw, image.width, image.height, FilterParams())
        proposals = Proposals(kept.boxes.astype(np.float32), kept.multiplicity)
        for index in range(NUM_DRAWS):
            rng = sample_generator(seed=0, epoch=0, index=index)
            sample = recipe.draw_with_proposals(image, proposals, rng)
            levels["whole"].update(sample.crop.boxes_in_whole.levels.tolist())
            for view in ("crop", "small", "medium"):
                levels[view].update(getattr(sample, view).boxes.levels.tolist())
    for view, expected in PUBLISHED.items():
        shares = [levels[view][level] / levels[view].total() for level in range(4)]
        assert shares == pytest.approx(expected, abs=TOLERANCE), view
