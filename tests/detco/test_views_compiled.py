"""Rendering under torch.compile: one graph without a break, and the very views of rendering without it.

The backends here need no compiler; what they trace is what a GPU's compiler gets.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from detco.views import DetCoRecipe, MoCoRecipe, Photo, SoCoC4Recipe, sample_generator
from detco.views.photometric import PhotometricOptions, apply_photometric, draw_photometric

RECIPES = {
    "moco": MoCoRecipe(global_size=24),
    "detco with RandAugment": DetCoRecipe(global_size=24, local_size=36, patch_size=10, rand_augment=True),
    "soco": SoCoC4Recipe(view_size=32, cutout_prob=0.5, solarise_prob_crop=0.5),
}


def load_oracle():
    path = Path(__file__).parents[1] / "oracles" / "views_pillow.py"
    spec = importlib.util.spec_from_file_location("views_pillow", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = load_oracle()


def collate(recipe, first):
    return default_collate(
        [
            recipe.draw(
                Photo.of(oracle.to_tensor(oracle.photo(index, (40, 50)))),
                sample_generator(seed=0, epoch=0, index=index),
            )
            for index in range(first, first + 4)
        ]
    )


def leaves(views):
    return [views] if torch.is_tensor(views) else [leaf for field in views for leaf in leaves(field)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", RECIPES)
def test_rendering_compiles_to_one_graph_without_a_break_and_gives_the_same_views(monkeypatch, name):
    recipe = RECIPES[name]
    batches = [collate(recipe, first) for first in (0, 4)]
    plain = [leaves(recipe.render(batch)) for batch in batches]
    graphs = []

    def run_as_traced(module, _):
        graphs.append(module)
        return module.forward

    monkeypatch.setattr(
        "detco.views.rows.apply_to_picked_rows",
        lambda *arguments: pytest.fail("rows are picked by index, which a graph cannot"),
    )
    # fullgraph: whatever would look at a value on the device, and so make the host wait for it, is an error.
    compiled = torch.compile(recipe.render, backend=run_as_traced, fullgraph=True, dynamic=False)
    for batch, expected in zip(batches, plain, strict=True):
        assert all(map(torch.equal, leaves(compiled(batch)), expected))
    assert len(graphs) == 1, "another batch needed another graph"


def test_arithmetic_in_place_survives_being_traced_to_primitives():
    """As a compiler sees it: decomposed, and nothing in place."""
    options = PhotometricOptions(
        jitter=(0.4, 0.4, 0.4, 0.1), jitter_prob=0.9, grey_prob=0.2, blur_prob=0.5, blur_sigma=(0.1, 2.0)
    )
    rng = np.random.default_rng(0)
    params = default_collate([draw_photometric(options, rng) for _ in range(6)])
    images = oracle.to_batch([oracle.photo(seed, (16, 20)) for seed in range(6)])
    compiled = torch.compile(apply_photometric, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False)
    difference = compiled(images, params, options) - apply_photometric(images, params, options)
    # Decomposed arithmetic may round otherwise, so a value just below a whole number becomes it.
    assert (difference != 0).float().mean() < 1e-3
    assert difference.abs().max() <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_a_gpu_renders_the_same_views_and_never_makes_the_host_wait(name, is_compiled):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    recipe = RECIPES[name]
    batch = collate(recipe, 0)

    def to_gpu(sample):
        return sample.cuda() if torch.is_tensor(sample) else type(sample)(*map(to_gpu, sample))

    on_gpu = to_gpu(batch)
    render = torch.compile(recipe.render, fullgraph=True, dynamic=False) if is_compiled else recipe.render
    render(on_gpu)  # compiling and first allocations may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        views = render(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(leaves(views), leaves(recipe.render(batch)), strict=True):
        # A step of one grey level is 0.017.
        assert (ours.cpu() - theirs).float().abs().mean() < 0.002
