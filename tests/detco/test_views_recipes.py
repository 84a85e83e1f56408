"""The recipes of MoCo v2 and DetCo: order of operations, patch geometry, replay, batching, settings."""

import functools
import importlib.util
import inspect
import math
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from detco.artifact import IMAGENET_RGB
from detco.views import DetCoRecipe, DetCoSample, DetCoViews, MoCoRecipe, MoCoSample, MoCoViews, Photo, sample_generator
from detco.views.detco import NUM_PATCHES, cut_patches
from detco.views.rand_augment import OPERATIONS, SKIPPED

STILL = {"jitter_prob": 0.0, "grey_prob": 0.0, "blur_prob": 0.0, "flip_prob": 0.0}
"""Settings under which nothing happens to colours."""

SMALL = {"global_size": 32, "local_size": 48, "patch_size": 12}


def load_oracle():
    path = Path(__file__).parents[1] / "oracles" / "views_pillow.py"
    spec = importlib.util.spec_from_file_location("views_pillow", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = load_oracle()


def rng_of(index, seed=0, epoch=0):
    return sample_generator(seed=seed, epoch=epoch, index=index)


def photo(index=0, size=(120, 150)):
    return Photo.of(oracle.to_tensor(oracle.photo(index, size)))


def leaves(sample):
    return [sample] if torch.is_tensor(sample) else [leaf for field in sample for leaf in leaves(field)]


def pixels_of(views):
    """Undo the normalisation: whole numbers in [0, 255]."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_RGB.mean_255, IMAGENET_RGB.std_255))
    return (views * std + mean).round()


def painted(cell_size=85):
    """An image whose 3x3 cells of the local crop hold their own index in every channel."""
    cells = torch.arange(NUM_PATCHES, dtype=torch.uint8).view(3, 3)
    return Photo.of(cells.repeat_interleave(cell_size, 0).repeat_interleave(cell_size, 1).expand(3, -1, -1))


def whole_image(**settings):
    """A recipe whose local crop is the whole (square) image."""
    return DetCoRecipe(**STILL | {"local_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)} | settings)


def test_views_have_the_shapes_and_types_of_the_paper():
    recipe = DetCoRecipe()
    batch = default_collate([recipe.draw(photo(index), rng_of(index)) for index in range(2)])
    assert isinstance(batch, DetCoSample)
    views = recipe.render(batch)
    assert isinstance(views, DetCoViews)
    assert views.global_query.shape == views.global_key.shape == (2, 3, 224, 224)
    assert views.local_query.shape == views.local_key.shape == (2, 9, 3, 64, 64)
    assert {view.dtype for view in views} == {torch.float32}
    assert all(crop.dtype == torch.uint8 for crop in (batch.global_query.crop, batch.local_key.crop))


def test_moco_views_have_the_shapes_and_types_of_the_paper():
    recipe = MoCoRecipe()
    batch = default_collate([recipe.draw(photo(), rng_of(0))])
    assert isinstance(batch, MoCoSample)
    views = recipe.render(batch)
    assert isinstance(views, MoCoViews)
    assert views.global_query.shape == views.global_key.shape == (1, 3, 224, 224)
    assert not torch.equal(views.global_query, views.global_key)


@pytest.mark.parametrize("with_rand_augment", [False, True])
def test_a_global_view_equals_the_published_pipeline_on_pillow_images(with_rand_augment):
    """Jitter, [blur, RandAugment, grey] or [grey, blur], flip: in this order, with Pillow, from the same parameters."""
    recipe = MoCoRecipe(rand_augment=with_rand_augment)
    for index in range(12):
        sample = recipe.draw(photo(index), rng_of(index)).query
        image = oracle.Image.fromarray(sample.crop.permute(1, 2, 0).contiguous().numpy())
        if sample.is_flipped:
            image = oracle.ImageOps.mirror(image)
        colours = sample.photometric
        image = oracle.jitter(image, colours.jitter_order.tolist(), colours.jitter_factors.tolist())
        if not with_rand_augment:
            image = oracle.grey(image) if colours.is_grey else image
        image = oracle.blur(image, colours.blur_sigma.item())
        for operation, argument in zip(*(values.tolist() for values in sample.rand_augment), strict=True):
            if operation != SKIPPED:
                image = oracle.RAND_AUGMENT[OPERATIONS[operation]](image, argument)
        if with_rand_augment:
            image = oracle.grey(image) if colours.is_grey else image
        batch = default_collate([MoCoSample(sample, sample)])
        assert (pixels_of(recipe.render(batch).global_query[0]) - oracle.to_tensor(image)).abs().mean() < 1


@pytest.mark.parametrize("settings", [{}, {"rand_augment": True}, {"patch_color": "patch"}, {"patch_order": "grid"}])
def test_rendering_a_batch_equals_rendering_its_samples_one_by_one(settings):
    recipe = DetCoRecipe(**SMALL, **settings)
    samples = [recipe.draw(photo(index), rng_of(index)) for index in range(12)]
    together = recipe.render(default_collate(samples))
    for index, sample in enumerate(samples):
        alone = recipe.render(default_collate([sample]))
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(whole[index : index + 1], part)


@pytest.mark.parametrize("settings", [{"rand_augment": True}, {"patch_color": "patch"}])
def test_rendering_as_on_a_gpu_gives_the_same_views(monkeypatch, settings):
    """On a GPU the whole batch is computed at once, and chosen rows are kept by a mask."""
    recipe = DetCoRecipe(**SMALL, **settings)
    batch = default_collate([recipe.draw(photo(index), rng_of(index)) for index in range(12)])
    views = recipe.render(batch)
    monkeypatch.setattr("detco.views.rows.is_on_cpu", lambda images: False)
    monkeypatch.setattr(
        "detco.views.rows.apply_to_picked_rows",
        lambda *arguments: pytest.fail("rows are picked by index, which makes the host wait"),
    )
    for ours, theirs in zip(recipe.render(batch), views, strict=True):
        # Sums of many images may round otherwise in the last bit, which whole numbers hide but for rare ties.
        assert (pixels_of(ours) != pixels_of(theirs)).float().mean() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{"rand_augment": True}, {"patch_color": "patch"}])
def test_views_are_the_same_on_a_gpu(settings):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    recipe = DetCoRecipe(**settings)
    batch = default_collate([recipe.draw(photo(index), rng_of(index)) for index in range(16)])

    def to_gpu(sample):
        return sample.cuda() if torch.is_tensor(sample) else type(sample)(*map(to_gpu, sample))

    for ours, theirs in zip(recipe.render(to_gpu(batch)), recipe.render(batch), strict=True):
        assert (pixels_of(ours.cpu()) - pixels_of(theirs)).abs().mean() < 0.1


def test_rendering_leaves_the_batch_as_it_was():
    recipe = DetCoRecipe(**SMALL, rand_augment=True)
    batch = default_collate([recipe.draw(photo(index), rng_of(index)) for index in range(3)])
    before = [leaf.clone() for leaf in leaves(batch)]
    first = recipe.render(batch)
    assert all(torch.equal(leaf, copy) for leaf, copy in zip(leaves(batch), before, strict=True))
    assert all(torch.equal(*pair) for pair in zip(first, recipe.render(batch), strict=True))


def test_a_sample_depends_on_seed_epoch_and_index_alone():
    recipe, again = (DetCoRecipe(**SMALL, rand_augment=True) for _ in range(2))
    first = leaves(recipe.draw(photo(), rng_of(5)))
    recipe.draw(photo(1), rng_of(6))  # what was drawn before does not matter
    assert all(torch.equal(*pair) for pair in zip(first, leaves(recipe.draw(photo(), rng_of(5))), strict=True))
    assert all(torch.equal(*pair) for pair in zip(first, leaves(again.draw(photo(), rng_of(5))), strict=True))
    for other in (rng_of(6), rng_of(5, seed=1), rng_of(5, epoch=1)):
        assert not all(torch.equal(*pair) for pair in zip(first, leaves(recipe.draw(photo(), other)), strict=True))


def test_recipes_survive_pickling():
    recipe = pickle.loads(pickle.dumps(DetCoRecipe(**SMALL, rand_augment=True)))
    assert recipe.draw(photo(), rng_of(0)).local_key.crop.shape == (3, 48, 48)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (37, 211)])
@pytest.mark.parametrize("recipe", [MoCoRecipe(global_size=32, rand_augment=True), DetCoRecipe(**SMALL)])
def test_tiny_and_long_images_give_finite_views(recipe, size):
    image = Photo.of(torch.full((3, *size), 90, dtype=torch.uint8))
    views = recipe.render(default_collate([recipe.draw(image, rng_of(index)) for index in range(4)]))
    assert all(view.isfinite().all() for view in views)


def test_every_patch_lies_within_the_cell_it_is_said_to_come_from():
    recipe = whole_image()
    samples = [recipe.draw(painted(), rng_of(index)) for index in range(64)]
    batch = default_collate(samples)
    views = recipe.render(batch)
    for patches, sample in ((views.local_query, batch.local_query), (views.local_key, batch.local_key)):
        colours = pixels_of(patches).flatten(2)
        assert torch.equal(colours.amin(2), colours.amax(2))
        assert torch.equal(colours[..., 0].long(), sample.cell)
        assert torch.equal(sample.cell.sort(1).values, torch.arange(9).expand(64, 9))


def test_patches_are_cut_at_their_offsets():
    crops = torch.arange(2 * 3 * 30 * 30).view(2, 3, 30, 30)
    cell = torch.stack([torch.arange(9), torch.arange(9).flip(0)])
    offset = torch.stack([torch.arange(18).view(9, 2) % 4, torch.arange(18).view(9, 2) % 3])
    patches = cut_patches(crops, cell, offset, cell_size=10, patch_size=7)
    for image in range(2):
        for slot in range(9):
            top = cell[image, slot] // 3 * 10 + offset[image, slot, 0]
            left = cell[image, slot] % 3 * 10 + offset[image, slot, 1]
            assert torch.equal(patches[image, slot], crops[image, :, top : top + 7, left : left + 7])


@pytest.fixture(scope="module")
def patch_samples():
    """Thousands of drawn patch sets, without their pixels, which are not what is tested."""
    recipe = whole_image(global_size=1)
    pixel = torch.zeros(3, 1, 1, dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Photo, "crops", lambda photo, wanted: [pixel for _ in wanted])
        return [recipe.draw(Photo.of(pixel), rng_of(index)) for index in range(3000)]


def test_permutations_are_uniform(patch_samples):
    cells = torch.stack([sample.local_query.cell for sample in patch_samples])
    draws = len(cells)
    bound = 5 * math.sqrt(1 / 9 * 8 / 9 / draws)
    for slot in range(9):
        shares = cells[:, slot].bincount(minlength=9) / draws
        assert (shares - 1 / 9).abs().max() < bound
    # Nine factorial is more than can be covered, but all orders of the first three cells occur equally often.
    orders = Counter(tuple(row.argsort()[:3].argsort().tolist()) for row in cells)
    assert len(orders) == 6
    assert max(abs(count / draws - 1 / 6) for count in orders.values()) < 5 * math.sqrt(5 / 36 / draws)
    assert len({tuple(row.tolist()) for row in cells}) > 0.98 * draws


def test_permutations_and_offsets_of_query_and_key_are_independent(patch_samples):
    query, key = (torch.stack([getattr(s, name).cell for s in patch_samples]) for name in ("local_query", "local_key"))
    draws = len(query)
    agreement = (query == key).float().mean().item()
    assert agreement == pytest.approx(1 / 9, abs=5 * math.sqrt(1 / 9 * 8 / 9 / draws / 9) * 2)
    offsets = [torch.stack([getattr(s, name).offset for s in patch_samples]) for name in ("local_query", "local_key")]
    together = torch.cat([offset.flatten(1) for offset in offsets], 1).double()
    correlation = together.T.corrcoef() - torch.eye(36)
    assert correlation.abs().max() < 5 / math.sqrt(draws)


def test_offsets_cover_0_to_21_uniformly(patch_samples):
    offsets = torch.stack([sample.local_key.offset for sample in patch_samples]).flatten()
    shares = offsets.bincount() / len(offsets)
    assert len(shares) == 22
    assert (shares - 1 / 22).abs().max() < 5 * math.sqrt(1 / 22 * 21 / 22 / len(offsets))


def test_grid_order_keeps_the_cells_in_place():
    recipe = whole_image(patch_order="grid")
    sample = recipe.draw(painted(), rng_of(0))
    assert sample.local_query.cell.tolist() == sample.local_key.cell.tolist() == list(range(9))


def test_the_crop_is_flipped_as_a_whole_before_it_is_cut():
    recipe = whole_image(patch_order="grid", flip_prob=1.0)
    views = recipe.render(default_collate([recipe.draw(painted(), rng_of(0))]))
    assert pixels_of(views.local_query)[0, :, 0, 0, 0].tolist() == [2, 1, 0, 5, 4, 3, 8, 7, 6]


NUM_FLAT = 120


@functools.cache
def flat_colours(patch_color):
    """Mean colour of each of nine patches (images, 9, 3) of an image of one colour."""
    recipe = whole_image(
        patch_color=patch_color,
        jitter_prob=1.0,
        grey_prob=0.2,
        blur_prob=0.5,
        global_size=8,
        local_size=48,
        patch_size=12,
    )
    image = Photo.of(torch.tensor([180, 90, 40], dtype=torch.uint8).view(3, 1, 1).expand(3, 50, 50))
    views = recipe.render(default_collate([recipe.draw(image, rng_of(index)) for index in range(NUM_FLAT)]))
    return pixels_of(views.local_query).mean((3, 4))


def test_colours_are_the_same_over_the_nine_patches_of_an_image():
    colours = flat_colours("image")
    assert torch.equal(colours.amin(1), colours.amax(1))
    assert len(colours[:, 0].unique(dim=0)) > 0.75 * NUM_FLAT, "images share their colours"


def test_colours_differ_between_patches_when_drawn_per_patch():
    colours = flat_colours("patch")
    assert all(len(patches.unique(dim=0)) >= 7 for patches in colours)
    # Each of the nine slots has the distribution that whole images have.
    whole = flat_colours("image")[:, 0]
    error = whole.std(0) * math.sqrt(2 / NUM_FLAT)
    assert ((colours.mean(0) - whole.mean(0)).abs() < 5 * error).all()


def test_the_local_branch_gets_no_rand_augment():
    with_it, without = (DetCoRecipe(**SMALL, rand_augment=flag).draw(photo(), rng_of(0)) for flag in (True, False))
    assert with_it.global_query.rand_augment.operation.shape == (2,)
    assert without.global_query.rand_augment.operation.shape == (0,)
    assert "rand_augment" not in with_it.local_query._fields


def test_crops_cover_the_shares_of_the_paper(monkeypatch):
    seen = []
    monkeypatch.setattr(Photo, "crops", lambda photo, wanted: seen.extend(wanted) or [None for _ in wanted])
    recipe = DetCoRecipe()
    for index in range(300):
        recipe.draw(Photo.of(torch.zeros(3, 400, 400, dtype=torch.uint8)), rng_of(index))
    for size, least in ((224, 0.2), (255, 0.6)):
        areas = np.array([box.height * box.width / 400**2 for box, crop_size in seen if crop_size == size])
        assert len(areas) == 600
        assert least - 0.01 < areas.min() < least + 0.02


def test_detco_knows_every_setting_of_moco_with_the_same_default():
    moco, detco = (inspect.signature(recipe).parameters for recipe in (MoCoRecipe, DetCoRecipe))
    assert {name: detco[name].default for name in moco} == {name: moco[name].default for name in moco}
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in detco.values())


def test_every_setting_of_detco_reaches_its_global_views():
    changed = {
        "global_size": 96,
        "global_scale": (0.3, 0.9),
        "crop_ratio": (0.5, 2.0),
        "jitter": (0.1, 0.2, 0.3, 0.4),
        "jitter_prob": 0.11,
        "grey_prob": 0.12,
        "blur_prob": 0.13,
        "blur_sigma": (0.2, 1.0),
        "flip_prob": 0.14,
        "rand_augment": True,
        "rand_augment_num_ops": 3,
        "rand_augment_magnitude": 5.0,
        "rand_augment_magnitude_std": 0.25,
        "rand_augment_prob": 0.15,
    }
    assert set(changed) == set(inspect.signature(MoCoRecipe).parameters)
    assert vars(DetCoRecipe(**changed).global_views) == vars(MoCoRecipe(**changed))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"global_size": 0}, "global_size is 0; it must be a whole number of at least 1"),
        ({"global_scale": (0.0, 1.0)}, r"global_scale is \(0, 1\); it must be \(least, most\) with both in \(0, 1\]"),
        ({"global_scale": (0.5, 1.5)}, "global_scale is"),
        ({"global_scale": (0.5,)}, "global_scale is"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio is"),
        ({"flip_prob": 2}, "flip_prob is 2; a probability lies between 0 and 1"),
        ({"rand_augment_prob": 2}, "rand_augment_prob is 2"),
        ({"local_size": 256}, "local_size is 256; it must be a multiple of 3"),
        ({"local_scale": (0.6, 1.1)}, "local_scale is"),
        ({"patch_size": 86}, "patch_size is 86; it must be at most 85, a third of local_size 255"),
        ({"patch_order": "random"}, "patch_order is 'random'; choose one of 'shuffled', 'grid'"),
        ({"patch_color": "cell"}, "patch_color is 'cell'; choose one of 'image', 'patch'"),
    ],
)
def test_settings_outside_their_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DetCoRecipe(**wrong)
