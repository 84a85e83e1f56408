"""The recipes of SoCo: pixels as in the published pipeline, cut-out, replay, batching, settings."""

import importlib.util
import inspect
import pickle
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from detco.artifact import IMAGENET_RGB
from detco.views import (
    BoxSet,
    PairedSample,
    PairedView,
    Photo,
    Proposals,
    SoCoC4Recipe,
    SoCoC4Sample,
    SoCoC4Views,
    SoCoFPNRecipe,
    SoCoFPNSample,
    SoCoFPNViews,
    SoCoStarRecipe,
    SoCoStarSample,
    SoCoStarViews,
    sample_generator,
)
from detco.views.cutout import blank, draw_cutout
from detco.views.photometric import solarise

RECIPES = [SoCoC4Recipe, SoCoFPNRecipe, SoCoStarRecipe]
KINDS = {
    SoCoC4Recipe: (SoCoC4Sample, SoCoC4Views),
    SoCoFPNRecipe: (SoCoFPNSample, SoCoFPNViews),
    SoCoStarRecipe: (SoCoStarSample, SoCoStarViews),
}
PIXELS_ONLY = {"jitter_prob": 0.0, "grey_prob": 0.0, "blur_prob_whole": 0.0, "blur_prob_crop": 0.0}
SMALL = {"view_size": 48, "small_size": 24, "medium_size": 40}
BOXES = Proposals(
    np.array([(5, 5, 60, 80), (40, 10, 140, 90), (30, 50, 90, 115), (70, 60, 145, 118), (0, 0, 50, 50)], np.float32),
    np.array([1, 2, 1, 1, 3]),
)
"""Of images of 120 x 150 pixels."""


def load_oracle(name):
    path = Path(__file__).parents[1] / "oracles" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pillow, oracle = load_oracle("views_pillow"), load_oracle("soco_views_oracle")


def rng_of(index, seed=0, epoch=0):
    return sample_generator(seed=seed, epoch=epoch, index=index)


def photo(index=0, size=(120, 150)):
    return Photo.of(pillow.to_tensor(pillow.photo(index, size)))


def small(recipe, **settings):
    return recipe(**{name: size for name, size in SMALL.items() if name in recipe.__dataclass_fields__} | settings)


def draw(recipe, index=0):
    return recipe.draw_with_proposals(photo(index), BOXES, rng_of(index))


def leaves(sample):
    return [sample] if torch.is_tensor(sample) else [leaf for field in sample for leaf in leaves(field)]


def views_of(sample):
    """Every `ObjectSample` of a sample."""
    return [field.view if isinstance(field, PairedSample) else field for field in sample]


def images_of(views):
    return [field.image if isinstance(field, PairedView) else field for field in views]


def pixels_of(images):
    """Undo the normalisation: whole numbers in [0, 255]."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_RGB.mean_255, IMAGENET_RGB.std_255))
    return (images * std + mean).round()


@pytest.mark.parametrize(
    ("recipe", "sizes"), list(zip(RECIPES, [(224, 224), (224, 224, 112), (224, 224, 112, 192)], strict=True))
)
def test_views_have_the_shapes_and_types_of_the_published_ones(recipe, sizes):
    recipe = recipe(num_boxes=3)
    batch = default_collate([draw(recipe, index) for index in range(2)])
    sample_type, views_type = KINDS[type(recipe)]
    assert isinstance(batch, sample_type)
    views = recipe.render(batch)
    assert isinstance(views, views_type)
    assert views._fields == sample_type._fields
    for image, size in zip(images_of(views), sizes, strict=True):
        assert image.shape == (2, 3, size, size)
        assert image.dtype == torch.float32
    assert all(view.crop.dtype == torch.uint8 for view in views_of(batch))
    for pair in views[1:]:
        for boxes in (pair.boxes, pair.boxes_in_whole):
            assert isinstance(boxes, BoxSet)
            assert (boxes.boxes_view.shape, boxes.boxes_view.dtype) == ((2, 3, 4), torch.float32)
            assert (boxes.ids.shape, boxes.ids.dtype) == ((2, 3), torch.int64)
            assert (boxes.levels.shape, boxes.levels.dtype) == ((2, 3), torch.int64)


@pytest.mark.parametrize("recipe", RECIPES)
def test_boxes_pass_through_rendering_unchanged(recipe):
    recipe = small(recipe)
    batch = default_collate([draw(recipe, index) for index in range(3)])
    for before, after in zip(batch[1:], recipe.render(batch)[1:], strict=True):
        assert all(map(torch.equal, before.boxes, after.boxes))
        assert all(map(torch.equal, before.boxes_in_whole, after.boxes_in_whole))


def test_a_view_equals_the_published_pipeline_on_pillow_images():
    """Flip, jitter, grey, blur, solarise: in this order, with Pillow, from the same parameters."""
    recipe = SoCoStarRecipe(blur_prob_crop=0.5, solarise_prob_crop=0.5, grey_prob=0.3, flip_prob=0.5)
    happened = torch.zeros(4, dtype=torch.bool)
    for index in range(8):
        sample = draw(recipe, index)
        views = recipe.render(default_collate([sample]))
        for view, rendered in zip(views_of(sample), images_of(views), strict=True):
            image = pillow.Image.fromarray(view.crop.permute(1, 2, 0).contiguous().numpy())
            image = pillow.ImageOps.mirror(image) if view.is_flipped else image
            colours = view.photometric
            image = pillow.jitter(image, colours.jitter_order.tolist(), colours.jitter_factors.tolist())
            image = pillow.grey(image) if colours.is_grey else image
            image = pillow.blur(image, colours.blur_sigma.item())
            if view.is_solarised:
                image = pillow.ImageOps.solarize(image, 128)
            difference = (pixels_of(rendered[0]) - pillow.to_tensor(image)).abs()
            assert difference.mean() < 1
            happened |= torch.stack((view.is_flipped, colours.is_grey, colours.blur_sigma > 0, view.is_solarised))
    assert happened.all()


def test_solarise_equals_pillow_exactly():
    images = torch.arange(256).float().view(1, 1, 16, 16).repeat(3, 3, 1, 1)
    expected = pillow.to_batch(
        [
            pillow.ImageOps.solarize(
                pillow.Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB"), 128
            )
        ]
    )
    solarised = solarise(images, torch.tensor([True, False, True]))
    assert torch.equal(solarised[0], expected[0])
    assert torch.equal(solarised[1], images[1])
    assert torch.equal(solarised[2], expected[0])
    assert solarised[0, 0].flatten()[[127, 128, 255]].tolist() == [127, 127, 0]


@pytest.mark.parametrize("settings", [{}, {"cutout_prob": 0.7, "blur_prob_crop": 0.5, "solarise_prob_crop": 0.5}])
@pytest.mark.parametrize("recipe", RECIPES)
def test_rendering_a_batch_equals_rendering_its_samples_one_by_one(recipe, settings):
    recipe = small(recipe, **settings)
    samples = [draw(recipe, index) for index in range(6)]
    together = recipe.render(default_collate(samples))
    for index, sample in enumerate(samples):
        alone = recipe.render(default_collate([sample]))
        for whole, part in zip(leaves(together), leaves(alone), strict=True):
            assert torch.equal(whole[index : index + 1], part)


def test_rendering_as_on_a_gpu_gives_the_same_views(monkeypatch):
    """On a GPU the whole batch is computed at once, and chosen rows are kept by a mask."""
    recipe = small(SoCoStarRecipe, cutout_prob=0.5, solarise_prob_crop=0.5)
    batch = default_collate([draw(recipe, index) for index in range(8)])
    views = recipe.render(batch)
    monkeypatch.setattr("detco.views.rows.is_on_cpu", lambda images: False)
    monkeypatch.setattr(
        "detco.views.rows.apply_to_picked_rows",
        lambda *arguments: pytest.fail("rows are picked by index, which makes the host wait"),
    )
    for ours, theirs in zip(images_of(recipe.render(batch)), images_of(views), strict=True):
        # Sums of many images may round otherwise in the last bit, which whole numbers hide but for rare ties.
        assert (pixels_of(ours) != pixels_of(theirs)).float().mean() < 1e-3


@pytest.mark.gpu
def test_views_are_the_same_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    recipe = SoCoStarRecipe(cutout_prob=0.5)
    batch = default_collate([draw(recipe, index) for index in range(16)])

    def to_gpu(sample):
        return sample.cuda() if torch.is_tensor(sample) else type(sample)(*map(to_gpu, sample))

    for ours, theirs in zip(images_of(recipe.render(to_gpu(batch))), images_of(recipe.render(batch)), strict=True):
        assert (pixels_of(ours.cpu()) - pixels_of(theirs)).abs().mean() < 0.1


def test_rendering_leaves_the_batch_as_it_was():
    recipe = small(SoCoStarRecipe, cutout_prob=0.5, solarise_prob_crop=0.5)
    batch = default_collate([draw(recipe, index) for index in range(3)])
    before = [leaf.clone() for leaf in leaves(batch)]
    first = recipe.render(batch)
    assert all(map(torch.equal, leaves(batch), before))
    assert all(map(torch.equal, leaves(first), leaves(recipe.render(batch))))


def test_a_mirrored_view_is_the_mirror_image_with_its_cutouts():
    settings = PIXELS_ONLY | {"cutout_prob": 1.0}
    for recipe in RECIPES:
        upright, mirrored = (
            small(recipe, **settings, flip_prob=prob).render(
                default_collate([draw(small(recipe, **settings, flip_prob=prob), index) for index in range(6)])
            )
            for prob in (0.0, 1.0)
        )
        for ours, theirs in zip(images_of(upright), images_of(mirrored), strict=True):
            assert torch.equal(ours, theirs.flip(-1))


def test_cutouts_are_in_the_crop_and_the_small_view_only():
    for recipe in RECIPES:
        sample = draw(small(recipe, cutout_prob=1.0))
        for name, view in zip(sample._fields, views_of(sample), strict=True):
            is_cut = (view.cutout_view != 0).any(1)
            assert is_cut.all() if name in ("crop", "small") else not is_cut.any()


def test_cutouts_are_exactly_zero_after_normalisation_and_nothing_else_is():
    recipe = small(SoCoFPNRecipe, **PIXELS_ONLY, solarise_prob_crop=0.0, cutout_prob=0.6)
    image = Photo.of(torch.full((3, 120, 150), 200, dtype=torch.uint8))
    batch = default_collate([recipe.draw_with_proposals(image, BOXES, rng_of(index)) for index in range(6)])
    views = recipe.render(batch)
    for view, rendered in zip(views_of(batch), images_of(views), strict=True):
        for rectangles, pixels in zip(view.cutout_view, rendered, strict=True):
            expected = oracle.covered(pixels.shape[-1], rectangles.tolist())
            assert np.array_equal((pixels == 0).all(0).numpy(), expected)
            assert (pixels[:, torch.from_numpy(~expected)] > 1).all()


def test_blank_covers_the_pixels_whose_centre_lies_in_a_rectangle():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 1, (5, 3, 2, 2)), axis=2)
    rectangles = torch.from_numpy(corners.reshape(5, 3, 4)).float()
    rectangles[1] = 0
    blanked = blank(torch.ones(5, 3, 20, 20), rectangles)
    for image, boxes in zip(blanked, rectangles.tolist(), strict=True):
        assert np.array_equal(image[0].numpy() == 0, oracle.covered(20, boxes))
        assert torch.equal(image[0], image[2])


def test_cutouts_have_the_asked_area_centre_and_frequency():
    boxes_view = np.tile([[0.4, 0.3, 0.6, 0.7]], (4000, 1))
    squares = draw_cutout(boxes_view, prob=0.5, area_share=(0.1, 0.3), rng=np.random.default_rng(0))
    is_cut = squares.any(1)
    assert abs(is_cut.mean() - 0.5) < 5 * 0.5 / np.sqrt(4000)
    sides = squares[is_cut][:, 2:] - squares[is_cut][:, :2]
    assert np.allclose(sides[:, 0], sides[:, 1])
    shares = sides.prod(1) / (0.2 * 0.4)
    assert 0.1 <= shares.min() < 0.105
    assert 0.295 < shares.max() <= 0.3
    assert abs(shares.mean() - 0.2) < 5 * 0.2 / np.sqrt(12 * is_cut.sum())
    centres = ((squares[is_cut][:, 2:] + squares[is_cut][:, :2]) / 2 - (0.4, 0.3)) / (0.2, 0.4)
    assert (centres.min(0) < 0.01).all()
    assert (centres.max(0) > 0.99).all()
    assert np.abs(centres.mean(0) - 0.5).max() < 5 / np.sqrt(12 * is_cut.sum())


def test_cutouts_stay_in_the_view():
    boxes_view = np.tile([[0.0, 0.0, 1.0, 1.0]], (500, 1))
    squares = draw_cutout(boxes_view, prob=1.0, area_share=(0.5, 1.0), rng=np.random.default_rng(0))
    assert squares.min() == 0
    assert squares.max() == 1


def test_a_sample_depends_on_seed_epoch_and_index_alone():
    recipe = small(SoCoStarRecipe, cutout_prob=0.5)
    first = leaves(draw(recipe, 5))
    draw(recipe, 6)  # what was drawn before does not matter
    assert all(map(torch.equal, first, leaves(draw(recipe, 5))))
    assert all(map(torch.equal, first, leaves(draw(pickle.loads(pickle.dumps(recipe)), 5))))
    for other in (rng_of(6), rng_of(5, seed=1), rng_of(5, epoch=1)):
        again = leaves(recipe.draw_with_proposals(photo(5), BOXES, other))
        assert not all(map(torch.equal, first, again))


def test_samples_survive_pickling():
    sample = draw(small(SoCoStarRecipe))
    again = pickle.loads(pickle.dumps(sample))
    assert type(again) is SoCoStarSample
    assert all(map(torch.equal, leaves(sample), leaves(again)))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (37, 211), (300, 30)])
@pytest.mark.parametrize("frame", ["image", "whole"])
def test_tiny_and_long_images_give_finite_views_and_boxes_in_the_view(size, frame):
    recipe = small(SoCoStarRecipe, crop_frame=frame, cutout_prob=1.0)
    image = Photo.of(torch.full((3, *size), 90, dtype=torch.uint8))
    proposals = Proposals(np.array([[0, 0, size[1], size[0]], [0, 0, 1, 1]], np.float32), np.array([1, 1]))
    samples = [recipe.draw_with_proposals(image, proposals, rng_of(index)) for index in range(4)]
    views = recipe.render(default_collate(samples))
    assert all(leaf.isfinite().all() for leaf in leaves(views))
    for pair in views[1:]:
        for boxes in (pair.boxes.boxes_view, pair.boxes_in_whole.boxes_view):
            assert 0 <= boxes.min() <= boxes.max() <= 1
            assert (boxes[..., :2] < boxes[..., 2:]).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_setting_is_a_typed_keyword_with_a_default(recipe):
    """The signature is the schema of the config, which reads it just like this."""
    parameters = inspect.signature(recipe, eval_str=True).parameters.values()
    for parameter in parameters:
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default is not parameter.empty
        assert parameter.annotation in (int, float, bool) or typing.get_origin(parameter.annotation) in (
            tuple,
            typing.Literal,
        )


def test_the_variants_differ_in_the_settings_and_defaults_that_the_code_gave_them():
    c4, fpn, star = ({n: p.default for n, p in inspect.signature(r).parameters.items()} for r in RECIPES)
    assert c4["crop_scale"] == (0.6, 1.0)
    assert fpn["crop_scale"] == (0.5, 1.0)
    assert (c4["box_jitter_prob"], fpn["box_jitter_prob"]) == (0.0, 0.5)
    assert {name for name in c4 if c4[name] != fpn[name]} == {"crop_scale", "box_jitter_prob"}
    assert fpn.keys() - c4.keys() == {"small_size", "small_view", "shared_boxes", "level_max_sizes"}
    assert star.keys() ^ fpn.keys() == {"small_view", "medium_size"}
    assert all(star[name] == fpn[name] for name in star.keys() & fpn.keys())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"view_size": 0}, "view_size is 0; it must be a whole number of at least 1"),
        ({"small_size": 1.5}, "small_size is 1.5"),
        ({"medium_size": -1}, "medium_size is -1"),
        ({"num_boxes": 0}, "num_boxes is 0; it must be a whole number of at least 1"),
        ({"crop_scale": (0.5, 1.5)}, r"crop_scale is \(0.5, 1.5\); it must be \(least, most\)"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio is"),
        ({"crop_frame": "photo"}, "crop_frame is 'photo'; choose one of 'image', 'whole'"),
        ({"jitter": (0.4, 0.4, 0.2)}, "jitter is .* it must be four strengths"),
        ({"jitter_prob": 2}, "jitter_prob is 2"),
        ({"grey_prob": 2}, "grey_prob is 2"),
        ({"blur_sigma": (0.0, 2.0)}, "blur_sigma is"),
        ({"blur_prob_whole": 1.1}, "blur_prob_whole is 1.1; a probability lies between 0 and 1"),
        ({"blur_prob_crop": -1}, "blur_prob_crop is -1"),
        ({"solarise_prob_whole": 2}, "solarise_prob_whole is 2"),
        ({"solarise_prob_crop": 2}, "solarise_prob_crop is 2"),
        ({"flip_prob": 2}, "flip_prob is 2"),
        ({"cutout_prob": 2}, "cutout_prob is 2"),
        ({"cutout_area": (0.0, 0.3)}, r"cutout_area is \(0, 0.3\)"),
        ({"outside_boxes": "keep"}, "outside_boxes is 'keep'; choose one of 'clip', 'drop'"),
        ({"box_jitter_prob": 2}, "box_jitter_prob is 2"),
        ({"box_jitter_ratio": 1.0}, "box_jitter_ratio is 1.0; it must be at least 0 and below 1"),
        ({"box_jitter_rule": "middle"}, "box_jitter_rule is 'middle'; choose one of 'corner', 'centre'"),
        ({"box_jitter_views": "both"}, "box_jitter_views is 'both'; choose one of 'whole', 'all'"),
        ({"level_max_sizes": (48, 96, 192)}, r"level_max_sizes is \(48, 96, 192\); it must be 4 ascending sizes"),
        ({"level_max_sizes": (48, 48, 192, 224)}, "level_max_sizes is"),
        ({"level_max_sizes": (0, 48, 192, 224)}, "level_max_sizes is"),
    ],
)
def test_settings_outside_their_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SoCoStarRecipe(**wrong)


def test_an_unknown_small_view_is_refused():
    with pytest.raises(ValueError, match="small_view is 'half'; choose one of 'crop', 'resize'"):
        SoCoFPNRecipe(small_view="half")


def test_proposals_of_another_image_are_refused():
    with pytest.raises(ValueError, match=r"is no box .* inside an image of 60x60 pixels"):
        SoCoFPNRecipe().draw_with_proposals(photo(0, (60, 60)), BOXES, rng_of(0))
