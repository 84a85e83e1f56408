"""Figures V1 to V3: they compare equal recipes, and say so in JSON lines."""

import importlib.util
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from detco.artifact import IMAGENET_RGB
from detco.views import (
    DetCoRecipe,
    MoCoRecipe,
    PairedView,
    Photo,
    SoCoC4Recipe,
    SoCoFPNRecipe,
    SoCoStarRecipe,
    sample_generator,
)

DRAWS = 250
CROP_DRAWS = 500
Z_LIMIT = 4.5
"""A feature of equal pipelines exceeds it once in 150,000 times; some 300 are looked at."""

# Small views for speed, but more than half of the photo's 60 pixels: no JPEG is reduced as it is decoded.
SMALL_DETCO = {"global_size": 32, "local_size": 45, "patch_size": 6}
SMALL_SOCO = {"view_size": 36}
SMALL_RECIPES = [  # the global views of DetCo are those of MoCo v2
    DetCoRecipe(**SMALL_DETCO),
    SoCoStarRecipe(**SMALL_SOCO, small_size=32, medium_size=34),
]


def load_oracle():
    path = Path(__file__).parents[1] / "oracles" / "reference_views.py"
    spec = importlib.util.spec_from_file_location("reference_views", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = load_oracle()


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("benchmark_views")


@pytest.fixture(scope="module")
def photo():
    """A square JPEG that is redder to the right and greener to the bottom, so that a view tells where it was cut."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(60, 200, 60)
    pixels = np.stack([np.tile(ramp, (60, 1)), np.tile(ramp[:, None], (1, 60)), np.full((60, 60), 90.0)], axis=-1)
    buffer = io.BytesIO()
    noisy = (pixels + rng.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def ours(recipe, photo, draws):
    """Our normalised views, one array (draws, ...) each."""
    samples = [recipe.draw(Photo.open(photo), sample_generator(seed=0, epoch=0, index=i)) for i in range(draws)]
    views = recipe.render(default_collate(samples))
    return [(view.image if isinstance(view, PairedView) else view).numpy() for view in views]


def references(recipe, photo, draws):
    torch.manual_seed(0)
    random.seed(0)
    reference = oracle.reference_of(recipe)
    return [view.numpy() for view in default_collate([reference(photo) for _ in range(draws)])]


def grey_levels(views):
    """Views (..., 3, H, W) before normalisation."""
    mean, std = (np.array(values)[:, None, None] for values in (IMAGENET_RGB.mean_255, IMAGENET_RGB.std_255))
    return views * std + mean


def features(views):
    """What tells crops, flips, colours and blur of views (draws, ..., 3, H, W) apart: an array (draws, features)."""
    pixels = grey_levels(views)
    is_grey = np.ptp(pixels, axis=-3).max((-1, -2)) < 0.5
    contrast = np.abs(np.diff(pixels, axis=-1)).mean((-1, -2))
    slope = (pixels * np.linspace(-1, 1, pixels.shape[-1])).mean((-1, -2))
    found = [is_grey[..., None], contrast, slope, pixels.mean((-1, -2)), pixels.std((-1, -2))]
    per_view = np.concatenate(found, axis=-1)
    per_view = per_view.reshape(len(views), -1, per_view.shape[-1])
    # Of a set of patches: their mean, and the first of them, which tells whether they are shuffled.
    return np.concatenate([per_view.mean(1), per_view[:, 0]], axis=1)


def z_scores(one, other):
    """How many standard errors the means of two samples (draws, features) are apart, for each feature."""
    error = np.sqrt(one.var(0) / len(one) + other.var(0) / len(other))
    return np.abs(one.mean(0) - other.mean(0)) / np.maximum(error, 1e-9)


@pytest.mark.parametrize("recipe", SMALL_RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_the_reference_draws_views_of_the_same_distribution_as_ours(photo, recipe):
    pairs = list(zip(ours(recipe, photo, DRAWS), references(recipe, photo, DRAWS), strict=True))
    for our_views, reference_views in pairs:
        assert our_views.shape == reference_views.shape
        one, other = features(our_views), features(reference_views)
        assert z_scores(one, other).max() < Z_LIMIT
        assert z_scores((one - one.mean(0)) ** 2, (other - other.mean(0)) ** 2).max() < Z_LIMIT


PLAIN = {"jitter_prob": 0.0, "grey_prob": 0.0, "flip_prob": 0.0}
PLAIN_SOCO = {**PLAIN, "blur_prob_whole": 0.0, "blur_prob_crop": 0.0, "solarise_prob_crop": 0.0}


@pytest.mark.parametrize(
    "recipe",
    [
        DetCoRecipe(**SMALL_DETCO, **PLAIN, blur_prob=0.0, patch_order="grid"),
        SoCoC4Recipe(**SMALL_SOCO, **PLAIN_SOCO),
    ],
    ids=["DetCo", "SoCo-C4"],
)
def test_the_reference_draws_crops_of_the_same_distribution_as_ours(photo, recipe):
    def extent(views):
        """Red rises to the right and green to the bottom: their means and ranges are where a view was cut."""
        pixels = grey_levels(views).reshape(-1, *views.shape[-3:])[:, :2]
        columns, rows = pixels[:, 0].mean(1), pixels[:, 1].mean(2)
        edges = [columns.mean(1), rows.mean(1), *(np.ptp(line[:, 1:-1], axis=1) for line in (columns, rows))]
        return np.stack(edges, axis=1).reshape(len(views), -1)

    pairs = list(zip(ours(recipe, photo, CROP_DRAWS), references(recipe, photo, CROP_DRAWS), strict=True))
    # SoCo's whole view is no crop: without colours it is the same in every draw.
    for our_views, reference_views in pairs[1:] if isinstance(recipe, SoCoC4Recipe) else pairs:
        one, other = extent(our_views), extent(reference_views)
        assert z_scores(one, other).max() < Z_LIMIT
        assert z_scores((one - one.mean(0)) ** 2, (other - other.mean(0)) ** 2).max() < Z_LIMIT


FIXED_COLOURS = {"jitter_prob": 0.0, "grey_prob": 0.0, "flip_prob": 1.0, "blur_sigma": (1.0, 1.0)}
FIXED_CROPS = {"crop_ratio": (1.0, 1.0)}
FIXED_MOCO = {**FIXED_COLOURS, **FIXED_CROPS, "global_scale": (1.0, 1.0), "blur_prob": 1.0, "global_size": 36}
FIXED_DETCO = {**FIXED_MOCO, "local_scale": (1.0, 1.0), "local_size": 45, "patch_size": 15, "patch_order": "grid"}
FIXED_SOCO = {**FIXED_COLOURS, **FIXED_CROPS, "crop_scale": (1.0, 1.0), "view_size": 36}
FIXED_SOCO |= {"blur_prob_whole": 1.0, "blur_prob_crop": 0.0}


@pytest.mark.parametrize(
    "recipe",
    [
        MoCoRecipe(**FIXED_MOCO),
        MoCoRecipe(**FIXED_MOCO | {"grey_prob": 1.0, "blur_prob": 0.0}),
        DetCoRecipe(**FIXED_DETCO),
        SoCoC4Recipe(**FIXED_SOCO, solarise_prob_whole=0.0, solarise_prob_crop=0.0),
        SoCoFPNRecipe(**FIXED_SOCO, small_size=32, solarise_prob_whole=0.0, solarise_prob_crop=0.0),
        SoCoStarRecipe(**FIXED_SOCO, small_size=32, medium_size=34, solarise_prob_whole=0.0, solarise_prob_crop=1.0),
    ],
    ids=["MoCo", "MoCo grey", "DetCo", "SoCo-C4", "SoCo-FPN", "SoCo-FPN*"],
)
def test_where_nothing_is_random_the_reference_makes_the_same_pixels_as_ours(photo, recipe):
    for our_view, reference_view in zip(ours(recipe, photo, 1), references(recipe, photo, 1), strict=True):
        difference = np.abs(grey_levels(our_view) - grey_levels(reference_view))
        # Either resizes with its own rounding; a value at the threshold of solarisation goes to either side.
        assert np.median(difference) < 0.51
        assert np.quantile(difference, 0.98) < 2.5


def test_what_the_reference_does_not_have_is_refused():
    for recipe, message in [
        (MoCoRecipe(rand_augment=True), "no RandAugment"),
        (DetCoRecipe(patch_color="patch"), "patch_color is 'patch'"),
        (SoCoC4Recipe(crop_frame="whole"), 'from the "image"'),
        (SoCoFPNRecipe(cutout_prob=0.5), "blanks nothing"),
        (SoCoFPNRecipe(small_view="resize"), "small_view is 'resize'"),
        (object(), "no reference for object"),
    ]:
        with pytest.raises(ValueError, match=message):
            oracle.reference_of(recipe)


def test_every_method_has_a_reference(tool):
    for method in tool.METHODS.values():
        assert callable(oracle.reference_of(method.recipe_for()()))


def run(tool, capsys, *arguments):
    """The figures that the tool prints, by figure, method and name."""
    assert tool.main([*arguments, "--rounds", "2", "--min-seconds", "0", "--device", "cpu"]) == 0
    lines = map(json.loads, capsys.readouterr().out.splitlines())
    return {(line["figure"], line["method"], line["name"]): line for line in lines}


def test_every_figure_is_a_json_line_and_the_ratios_carry_the_bars(tool, photo_dir, capsys):
    arguments = ["--images", str(photo_dir), "--num-photos", "2", "--batch-size", "2"]
    found = run(tool, capsys, *arguments, "--methods", "detco", "soco_c4")
    assert [key[0] for key in found] == ["V1"] * 3 + ["V2", "V2", "V2", "V3", "V3", "V3"] * 2
    bars = {key: line["bar"] for key, line in found.items() if "bar" in line}
    assert bars == {
        ("V2", "detco", "host half / reference, given photos"): ">= 6",
        ("V3", "detco", "host and device half / reference, given photos"): ">= 1.5",
        ("V3", "soco_c4", "host and device half / reference, given photos"): ">= 1.5",
    }
    assert all(line["unit"] == "x" for key, line in found.items() if " / " in key[2])
    assert all(line["runs"] == 2 and 0 < line["min"] <= line["value"] <= line["max"] for line in found.values())


def test_a_ratio_is_that_of_the_two_rates(tool, photo_dir, capsys):
    found = run(tool, capsys, "--images", str(photo_dir), "--num-photos", "2", "--methods", "moco_v2")
    host = [found["V2", "moco_v2", f"{name}, given photos"] for name in ("host half", "reference")]
    ratio = found["V2", "moco_v2", "host half / reference, given photos"]
    assert host[0]["min"] / host[1]["max"] * 0.99 <= ratio["value"] <= host[0]["max"] / host[1]["min"] * 1.01
    assert ratio["value"] > 1


def test_large_photos_have_figures_but_no_bars(tool, capsys, monkeypatch):
    monkeypatch.setattr(tool, "LARGE_SIZES", ((640, 480),))
    found = run(tool, capsys, "--num-photos", "1", "--large-photos", "1", "--methods", "moco_v2", "--batch-size", "1")
    large = {key: line for key, line in found.items() if "12-megapixel" in key[2]}
    assert {key[0] for key in large} == {"V1", "V2"}
    assert not any("bar" in line for line in large.values())


def test_the_device_half_is_measured_compiled_too_or_it_is_said_why_not(tool, photo_dir, capsys, monkeypatch):
    arguments = ["--images", str(photo_dir), "--num-photos", "1", "--methods", "moco_v2", "--batch-size", "1"]
    monkeypatch.setattr(tool, "compiled", lambda render: render)
    for trouble, expected in [(None, 1), ("no compiler", 0)]:
        monkeypatch.setattr(tool, "compiler_trouble", lambda device, trouble=trouble: trouble)
        assert tool.main([*arguments, "--compile", "--rounds", "1", "--min-seconds", "0", "--device", "cpu"]) == 0
        printed = capsys.readouterr()
        assert printed.out.count("device half, cpu, batch 1, compiled") == expected
        assert ("torch.compile does not work here (no compiler)" in printed.err) is (trouble is not None)


def test_our_pipeline_draws_new_views_in_every_call_and_boxes_for_a_recipe_with_proposals(tool, photo_dir):
    photos = [path.read_bytes() for path in sorted(photo_dir.iterdir())[:2]]
    pipeline = tool.OurPipeline("soco_fpn", photos, torch.device("cpu"))
    first, second = pipeline.host(), pipeline.host(3)
    assert len(first.whole.crop) == 2
    assert len(second.whole.crop) == 3
    assert not torch.equal(first.crop.view.crop, second.crop.view.crop[:2])
    assert len(first.crop.boxes.ids.unique()) > 1  # without proposals the whole image would be the only object


def test_a_folder_that_cannot_be_used_is_refused(tool, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tool.main(["--images", str(tmp_path)])
    assert "no .jpg or .jpeg below" in capsys.readouterr().err
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    with pytest.raises(SystemExit):
        tool.main(["--images", str(tmp_path)])
    assert "broken.jpg" in capsys.readouterr().err


def test_options_that_measure_nothing_are_refused(tool, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in [
        (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["--large-photos", "-1"], "--large-photos is -1; it must be at least 0"),
        (["--device", "cuda"], "--device is cuda, but torch finds no GPU here"),
    ]:
        with pytest.raises(SystemExit):
            tool.main(arguments)
        assert message in capsys.readouterr().err


def test_help_says_what_the_figures_are_and_what_they_compare_with(tool, capsys):
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    text = capsys.readouterr().out
    for word in ("V1", "V2", "V3", "Pillow and torchvision v1", "python tools/benchmark_views.py", "median"):
        assert word in text
