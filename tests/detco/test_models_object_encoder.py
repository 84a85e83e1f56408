"""From an image and boxes to one projection per box: pooling on painted maps, levels, gradients, precision."""

import pytest
import torch
from torch import nn

from detco.models.fpn import Pyramid
from detco.models.norm import SyncBatchNorm
from detco.models.object_encoder import C4Encoder, FPNEncoder, own_level, pool_boxes

ROUTINGS = ["all", "own"]
SIDES = (28, 14, 7, 4)
N, K, DIM = 3, 4, 16


def settled(encoder, *sample):
    """With the running statistics of a sample, so that what evaluation gives differs clearly from box to box."""
    norms = [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for momentum in (1.0, 0.1):
        for norm in norms:
            norm.momentum = momentum
        if momentum == 1:
            encoder.project(*sample)
    return encoder


def make_fpn_encoder(level_routing):
    """With a box head of next to no work in the place of the real one, which has a test file of its own."""
    torch.manual_seed(0)
    encoder = FPNEncoder(dim=DIM, hidden=8, level_routing=level_routing)
    torch.manual_seed(1)
    encoder.box_head = nn.Sequential(
        nn.Conv2d(256, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 1024)
    )
    return settled(encoder, make_pyramid(), *make_boxes())


@pytest.fixture(scope="module")
def built():
    """Built once, because that takes a second each."""
    encoders = {routing: make_fpn_encoder(routing) for routing in ROUTINGS}
    torch.manual_seed(0)
    return encoders | {"c4": settled(C4Encoder(dim=DIM, hidden=8), torch.randn(N, 1024, 14, 14), *make_boxes())}


@pytest.fixture
def encoders(built):
    """One per routing, with the same weights, in training mode."""
    return {routing: built[routing].train() for routing in ROUTINGS}


@pytest.fixture
def c4_encoder(built):
    return built["c4"].train()


def make_pyramid(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Pyramid(*(torch.randn(N, 256, side, side, generator=generator).requires_grad_() for side in SIDES))


def make_boxes(seed=0):
    """Boxes (N, K, 4) with sides of at least a fifth of the view, and levels (N, K) that include every one."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(N, K, 2, generator=generator) * 0.5
    sides = 0.2 + torch.rand(N, K, 2, generator=generator) * 0.3
    levels = torch.arange(N * K).roll(seed).view(N, K) % 4
    return torch.cat([corners, corners + sides], dim=2), levels


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):  # shapes without values
        c4, fpn = C4Encoder(), FPNEncoder()
    parts = {name: num_parameters(part) for name, part in fpn.named_children()}
    assert parts == {"backbone": 23_508_032, "fpn": 3_346_432, "box_head": 15_207_424, "projector": 5_255_424}
    assert num_parameters(fpn) == 47_317_312
    assert num_parameters(c4.projector) == 9_449_728
    assert num_parameters(c4) == 32_957_760


def test_batch_norm_is_plain_until_converted_and_blocks_start_as_the_identity(encoders, c4_encoder):
    for encoder in (*encoders.values(), c4_encoder):
        assert not any(isinstance(module, SyncBatchNorm) for module in encoder.modules())
        assert not any(block.bn3.weight.any() for block in encoder.backbone.layer3)


# Pooling.


def test_the_whole_map_at_its_own_size_is_the_identity():
    feature_map = torch.randn(2, 5, 7, 7)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(2, 1, 4)
    torch.testing.assert_close(pool_boxes(feature_map, whole, 7), feature_map)


def test_a_box_over_a_constant_area_gives_that_constant():
    feature_map = torch.full((1, 1, 20, 30), -100.0)
    feature_map[:, :, 5:15, 10:24] = 3.0  # rows 5..14, columns 10..23
    # Half a pixel inside the area: there no sample looks over its edge.
    inside = torch.tensor([[[10.5 / 30, 5.5 / 20, 23.5 / 30, 14.5 / 20]]])
    torch.testing.assert_close(pool_boxes(feature_map, inside, 7), torch.full((1, 1, 7, 7), 3.0))
    further = inside + torch.tensor([-1 / 30, 0, 0, 0])
    assert pool_boxes(feature_map, further, 7).min() < 3


@pytest.mark.parametrize("size", [(28, 28), (14, 14), (7, 7), (4, 4), (6, 11)], ids=str)
@pytest.mark.parametrize("cells", [7, 14])
def test_a_cell_shows_its_place_as_a_fraction_of_the_view_whatever_the_size_of_the_map(size, cells):
    """Maps painted with their pixels' places; so a map of 4 stands for the whole view, 112 / 32 = 3.5 or not."""
    height, width = size
    rows, columns = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    places = torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)])[None]
    x1, y1, x2, y2 = box = (0.2, 0.3, 0.7, 0.8)

    pooled = pool_boxes(places, torch.tensor([[box]]), cells)
    centres = (torch.arange(cells) + 0.5) / cells
    torch.testing.assert_close(pooled[0, 0], (x1 + (x2 - x1) * centres).expand(cells, cells))
    torch.testing.assert_close(pooled[0, 1], (y1 + (y2 - y1) * centres)[:, None].expand(cells, cells))


def test_cells_average_as_many_samples_as_they_have_pixels():
    feature_map = torch.randn(1, 1, 14, 14)
    whole = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])
    expected = nn.functional.avg_pool2d(feature_map, 2)
    torch.testing.assert_close(pool_boxes(feature_map, whole, 7), expected)


def test_boxes_come_out_image_by_image_and_one_without_a_width_is_zero():
    feature_map, (boxes, _) = torch.randn(N, 2, 7, 9), make_boxes()
    pooled = pool_boxes(feature_map, boxes, 3)
    assert pooled.shape == (N * K, 2, 3, 3)
    for n in range(N):
        for k in range(K):
            alone = pool_boxes(feature_map[n : n + 1], boxes[n : n + 1, k : k + 1], 3)
            assert torch.equal(pooled[n * K + k], alone[0])
    is_empty = torch.rand(N, K, generator=torch.Generator().manual_seed(0)) < 0.5
    assert 0 < is_empty.sum() < N * K
    with_empty = pool_boxes(feature_map, boxes * ~is_empty[:, :, None], 3)
    assert torch.equal(with_empty, torch.where(is_empty.flatten()[:, None, None, None], 0, pooled))


def test_pooling_is_in_float32_under_autocast_and_of_bfloat16_maps():
    feature_map, (boxes, _) = torch.randn(2, 3, 14, 14), make_boxes()
    outside = pool_boxes(feature_map, boxes[:2], 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = pool_boxes(feature_map, boxes[:2], 7)
        of_rounded = pool_boxes(feature_map.bfloat16(), boxes[:2], 7)
    assert inside.dtype == of_rounded.dtype == torch.float32
    assert torch.equal(inside, outside)
    exact = pool_boxes(feature_map.bfloat16().float(), boxes[:2], 7)
    assert torch.equal(of_rounded, exact)


# Levels.


def touched_levels(encoder, boxes, levels, n, k):
    """The levels that the projection of box k of image n depends on, and whether on that image alone."""
    pyramid = make_pyramid()
    encoder.project(pyramid, boxes, levels)[n, k].square().sum().backward()
    touched = []
    for index, level in enumerate(pyramid):
        if level.grad is not None and level.grad.any():
            touched.append(index)
            assert not level.grad[[i for i in range(N) if i != n]].any()
    return touched


@pytest.mark.parametrize("routing", ROUTINGS)
def test_without_batch_statistics_a_projection_depends_on_its_box_s_own_level_and_image_alone(encoders, routing):
    boxes, levels = make_boxes(seed=1)
    encoder = encoders[routing].eval()
    assert sorted(levels[0].tolist()) == [0, 1, 2, 3]
    for n, k in ((0, 0), (0, 1), (0, 2), (0, 3), (2, 1)):
        assert touched_levels(encoder, boxes, levels, n, k) == [levels[n, k]]


def test_without_batch_statistics_both_routings_are_one_function(encoders):
    encoders["own"].load_state_dict(encoders["all"].state_dict())  # the running statistics, too
    pyramid, (boxes, levels) = make_pyramid(), make_boxes()
    levels[1, 2] = -1
    both = [encoder.eval().project(pyramid, boxes, levels) for encoder in encoders.values()]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)
    assert both[0].shape == (N, K, DIM)
    assert both[0].flatten(0, 1).std(dim=0).mean() > 0.01  # far above what is taken for equal


def test_all_keeps_of_a_call_per_level_with_every_box_the_entry_of_the_box_s_own(encoders):
    encoder, pyramid, (boxes, levels) = encoders["all"], make_pyramid(), make_boxes()
    each = encoder.project_each(pyramid, boxes, levels)
    kept = encoder.project(pyramid, boxes, levels)

    calls = [encoder.projector(encoder.box_head(pool_boxes(level, boxes, 7))) for level in pyramid]
    for index, call in enumerate(calls):
        torch.testing.assert_close(each[index], call.view(N, K, DIM), rtol=1e-4, atol=1e-5)
    for n in range(N):
        for k in range(K):
            torch.testing.assert_close(kept[n, k], calls[levels[n, k]][n * K + k], rtol=1e-4, atol=1e-5)


def test_own_normalises_every_box_once_all_levels_together(encoders):
    encoder, pyramid, (boxes, levels) = encoders["own"], make_pyramid(), make_boxes()
    each = encoder.project_each(pyramid, boxes, levels)
    assert each.shape == (1, N, K, DIM)

    pooled = [
        pool_boxes(pyramid[levels[n, k]][n : n + 1], boxes[n : n + 1, k : k + 1], 7) for n in range(N) for k in range(K)
    ]
    expected = encoder.projector(encoder.box_head(torch.cat(pooled))).view(N, K, DIM)
    torch.testing.assert_close(each[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.project(pyramid, boxes, levels), expected, rtol=1e-4, atol=1e-5)


def test_the_box_head_runs_four_times_for_all_and_once_for_own(encoders):
    runs = {}
    for routing, encoder in encoders.items():
        before = encoder.box_head[1].num_batches_tracked.item()
        encoder.project(make_pyramid(), *make_boxes())
        runs[routing] = encoder.box_head[1].num_batches_tracked.item() - before
    assert runs == {"all": 4, "own": 1}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_boxes_are_described_once_and_on_their_own_level_whatever_the_routing(encoders, routing):
    """The projector, which is not transferred, sees nothing."""
    encoder, pyramid, (boxes, levels) = encoders[routing], make_pyramid(), make_boxes()
    levels[2, 1] = -1
    own = encoders["own"]
    before = [encoder.box_head[1].num_batches_tracked.item(), encoder.projector[1].num_batches_tracked.item()]
    described = encoder.describe(pyramid, boxes, levels)
    after = [encoder.box_head[1].num_batches_tracked.item(), encoder.projector[1].num_batches_tracked.item()]
    assert after == [before[0] + 1, before[1]]
    assert described.shape == (N * K, 1024)
    torch.testing.assert_close(own.projector(described).view(N, K, DIM), own.project(pyramid, boxes, levels))


def test_c4_describes_boxes_by_the_mean_of_res5(c4_encoder):
    boxes, levels = make_boxes()
    features = torch.randn(N, 1024, 14, 14, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        described = c4_encoder.describe(features, boxes, levels)
        expected = c4_encoder.backbone.layer4(pool_boxes(features, boxes, 14)).mean(dim=(2, 3))
    assert described.shape == (N * K, 2048)
    torch.testing.assert_close(described, expected)


def test_own_level_takes_the_coarsest_for_a_box_without_a_level_and_leaves_single_entries_alone():
    entries = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 5, 2)
    levels = torch.tensor([[2, 0, -1, 3, 1]])
    assert torch.equal(own_level(entries, levels)[..., 0], torch.tensor([[2.0, 0.0, 3.0, 3.0, 1.0]]))
    assert torch.equal(own_level(entries[2:3], levels), entries[2])


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("levels", [torch.full((N, K), -1), torch.tensor([[0, -1, 2, 3]] * N)], ids=["none", "some"])
def test_boxes_without_a_level_and_boxes_without_an_area_are_finite_with_finite_gradients(encoders, routing, levels):
    pyramid, (boxes, _) = make_pyramid(), make_boxes()
    boxes[0, 0] = torch.tensor([0.5, 0.5, 0.5, 0.5])
    projected = encoders[routing].project(pyramid, boxes, levels)
    projected.square().sum().backward()
    assert torch.isfinite(projected).all()
    assert all(torch.isfinite(level.grad).all() for level in pyramid)


@pytest.mark.parametrize(("routing", "level"), [("own", 0), ("own", 3), ("own", -1), ("all", 1)])
def test_every_parameter_gets_a_gradient_even_if_all_boxes_lie_on_one_level(encoders, routing, level):
    encoder, (boxes, _) = encoders[routing], make_boxes()
    encoder.zero_grad(set_to_none=True)
    features = encoder.features(torch.randn(N, 3, 32, 32))
    encoder.project(features, boxes, torch.full((N, K), level)).square().sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []
    assert encoder.fpn.fpn_convs[level].conv.weight.grad.any()
    encoder.zero_grad(set_to_none=True)


def test_an_unknown_routing_is_refused():
    with pytest.raises(ValueError, match='level_routing must be "all" or "own", but is \'routed\''):
        FPNEncoder(level_routing="routed")


# From images.


def test_a_view_of_112_px_is_pooled_from_maps_28_14_7_and_4_wide(encoders):
    with torch.no_grad():
        features = encoders["own"].features(torch.randn(2, 3, 112, 112))
    assert isinstance(features, Pyramid)
    assert tuple(level.shape[-1] for level in features) == SIDES


def test_c4_on_the_whole_image_is_the_trunk_and_the_projector(c4_encoder):
    """At 224 px res4 is 14 wide, so the whole image's box is pooled as it is."""
    c4_encoder.eval()
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    whole = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])
    with torch.no_grad():
        projected = c4_encoder.project(c4_encoder.features(images), whole, torch.zeros(1, 1, dtype=torch.int64))
        expected = c4_encoder.projector(c4_encoder.backbone(images).res5.mean(dim=(2, 3)))
    torch.testing.assert_close(projected[0], expected, rtol=1e-4, atol=1e-5)


def test_c4_projects_every_box_by_res5_from_its_own_image_and_reads_no_levels(c4_encoder):
    c4_encoder.eval()
    boxes, levels = make_boxes()
    features = torch.randn(N, 1024, 14, 14, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        projected = c4_encoder.project(features, boxes, levels)
        assert torch.equal(projected, c4_encoder.project(features, boxes, -torch.ones_like(levels)))
        for n, k in ((0, 1), (2, 3)):
            pooled = pool_boxes(features[n : n + 1], boxes[n : n + 1, k : k + 1], 14)
            expected = c4_encoder.projector(c4_encoder.backbone.layer4(pooled).mean(dim=(2, 3)))
            torch.testing.assert_close(projected[n, k], expected[0], rtol=1e-4, atol=1e-5)
    assert projected.shape == (N, K, DIM)


def test_every_parameter_of_c4_gets_a_gradient_also_under_autocast(c4_encoder):
    boxes, levels = make_boxes()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projected = c4_encoder.project(c4_encoder.features(torch.randn(N, 3, 64, 64)), boxes, levels)
    projected.float().square().sum().backward()
    assert [name for name, parameter in c4_encoder.named_parameters() if parameter.grad is None] == []
    assert all(torch.isfinite(parameter.grad).all() for parameter in c4_encoder.parameters())
    c4_encoder.zero_grad(set_to_none=True)


def test_boxes_may_be_in_float64(encoders):
    boxes, levels = make_boxes()
    pyramid = make_pyramid()
    encoder = encoders["own"].eval()
    torch.testing.assert_close(
        encoder.project(pyramid, boxes.double(), levels), encoder.project(pyramid, boxes, levels)
    )
