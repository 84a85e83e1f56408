"""SoCo: against a loop over images and boxes, against BYOL, its schedule, what is trained and what is handed on."""

import collections
import copy
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detco.methods import METHODS
from detco.methods.soco import SoCoC4, SoCoFPN, SoCoFPNStar, spread
from detco.models import object_encoder
from detco.models.norm import SyncBatchNorm
from detco.views.object_views import BoxSet, PairedView
from detco.views.soco import SoCoC4Recipe, SoCoC4Views, SoCoFPNRecipe, SoCoFPNViews, SoCoStarRecipe, SoCoStarViews
from transfer.naming import COUNTER, account_for

pytestmark = pytest.mark.usefixtures("narrow")
SMALL = {"dim": 8, "hidden": 16}
VIEWS = {
    SoCoC4: (SoCoC4Views, {"crop": 32}),
    SoCoFPN: (SoCoFPNViews, {"crop": 32, "small": 16}),
    SoCoFPNStar: (SoCoStarViews, {"crop": 32, "small": 16, "medium": 48}),
}
VARIANTS = [(SoCoC4, {}), (SoCoFPN, {"level_routing": "all"}), (SoCoFPN, {"level_routing": "own"})]


def load_oracle():
    path = Path(__file__).parents[1] / "oracles" / "soco_oracle.py"
    spec = importlib.util.spec_from_file_location("soco_oracle", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.C4_CELLS = object_encoder.C4_CELLS
    return module


def make_boxes(count, num_boxes, ids, generator):
    corners = torch.rand(count, num_boxes, 2, generator=generator) * 0.5
    sizes = 0.2 + torch.rand(count, num_boxes, 2, generator=generator) * 0.3
    levels = torch.randint(0, 4, (count, num_boxes), generator=generator)
    return BoxSet(torch.cat([corners, corners + sizes], dim=2), ids, levels)


def make_views(variant, count=3, num_boxes=2, seed=0):
    """Random images and boxes; within an image every id occurs once, in another order in the whole view."""
    generator = torch.Generator().manual_seed(seed)
    views, sizes = VIEWS[variant]
    pairs = {}
    for name, size in sizes.items():
        ids = torch.arange(num_boxes).expand(count, num_boxes)
        pairs[name] = PairedView(
            torch.randn(count, 3, size, size, generator=generator),
            make_boxes(count, num_boxes, ids, generator),
            make_boxes(count, num_boxes, ids.flip(1), generator),
        )
    return views(torch.randn(count, 3, 32, 32, generator=generator), **pairs)


def make_method(variant, **options):
    """A method whose residual branches count: they start with weight 0, and so would hide the layers in them."""
    torch.manual_seed(0)
    method = variant(**(SMALL | options))
    with torch.no_grad():
        for network in (method.online, method.target):
            for name, value in network.named_parameters():
                if name.endswith("bn3.weight"):
                    value.fill_(0.5)
    return method


def settle(method, views):
    """Evaluation mode with the statistics of these views; with those at the start, all boxes would look alike."""
    for module in method.modules():
        if isinstance(module, SyncBatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        method(views)
    return method.eval()


def trained(method):
    return {name: parameter for name, parameter in method.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("variant", "options", "lowest"),
    [(SoCoC4, {}, -4.0), (SoCoFPN, {"level_routing": "own"}, -8.0), (SoCoFPNStar, {"level_routing": "own"}, -12.0)],
)
def test_equal_views_and_networks_without_a_predictor_give_the_lowest_loss(variant, options, lowest):
    method = make_method(variant, **options)
    method.predictor = nn.Identity()
    views = make_views(variant, count=2, num_boxes=1)
    same = views.crop.boxes_in_whole
    pairs = {name: PairedView(views.whole, same, same) for name in VIEWS[variant][1]}
    output = method(views._replace(**pairs))
    assert output.loss.item() == pytest.approx(lowest, abs=1e-4)
    assert set(output.metrics) == {f"{family}/{name}" for family in ("loss_pair", "embedding_std") for name in pairs}
    assert not any(value.requires_grad or value.dim() for value in output.metrics.values())
    assert all(output.metrics[f"loss_pair/{name}"].item() == pytest.approx(-4.0, abs=1e-4) for name in pairs)


@pytest.mark.parametrize(("variant", "options"), VARIANTS)
def test_forward_is_the_loop_over_images_and_boxes_in_loss_and_gradient(variant, options):
    method = make_method(variant, **options)
    with torch.no_grad():  # a target of its own, or an exchange of the two networks would not be seen
        for value in method.target.parameters():
            value.add_(0.05 * torch.randn_like(value))
    # An id twice in one view (padding), an object that only one view has, an image whose boxes have no level.
    views = make_views(variant)
    levels = views.crop.boxes.levels.clone()
    levels[2] = -1
    boxes = views.crop.boxes._replace(ids=torch.tensor([[0, 0], [0, 5], [0, 1]]), levels=levels)
    views = views._replace(crop=views.crop._replace(boxes=boxes))

    oracle, routing = load_oracle(), options.get("level_routing")
    predictor = {f"predictor.{name}": value for name, value in method.predictor.state_dict().items()}
    online = oracle.Network(method.online.state_dict() | predictor, routing)
    target = oracle.Network(method.target.state_dict(), routing)
    theirs = online.watch()
    expected = oracle.soco_loss(online, target, views.whole, views[1:])
    expected.backward()

    output = method(views)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected.detach(), rtol=1e-4, atol=1e-5)
    ours = {name.removeprefix("online."): parameter for name, parameter in trained(method).items()}
    assert set(ours) == set(theirs)
    for name, parameter in ours.items():
        difference = (parameter.grad - theirs[name].grad).norm()
        assert difference <= 1e-3 * theirs[name].grad.norm() + 1e-5, name  # biases before BatchNorm have none


def test_one_box_around_the_whole_image_makes_soco_c4_byol(monkeypatch):
    monkeypatch.setattr(object_encoder, "C4_CELLS", 2)  # res4's side at 32 px: pooling changes nothing
    method = make_method(SoCoC4, ema_decay=0.9).double()  # BatchNorm of three images makes much of rounding
    oracle = load_oracle()
    f, f_xi = (oracle.resnet50(copy.deepcopy(net.backbone.state_dict())) for net in (method.online, method.target))
    g, g_xi, q = copy.deepcopy((method.online.projector, method.target.projector, method.predictor))
    byol = oracle.BYOLOracle(f, g, q, f_xi, g_xi, lr=0.01)
    optimiser = torch.optim.SGD(trained(method).values(), lr=0.01, momentum=0.9)
    everything = BoxSet(torch.tensor([0.0, 0, 1, 1]).expand(3, 1, 4), torch.ones(3, 1), torch.zeros(3, 1))

    for step in range(2):  # in the first, both networks are still equal
        images = torch.randn(2, 3, 3, 32, 32).double()
        tau = 1 - (1 - 0.9) * (math.cos(math.pi * step / 2) + 1) / 2
        expected = byol.step(*images, tau)
        method.before_step(step / 2)
        loss = method(SoCoC4Views(images[0], PairedView(images[1], everything, everything))).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        method.commit()
        assert loss.item() + 4 == pytest.approx(expected, rel=1e-7)  # |a - b|^2 = 2 - 2 cos, in either direction

    for ours, theirs in ((method.online, (f, g)), (method.target, (f_xi, g_xi)), (method.predictor, (q,))):
        for mine, other in zip(ours.parameters(), [p for part in theirs for p in part.parameters()], strict=True):
            assert (mine - other).norm() <= 1e-5 * other.norm() + 1e-9


def test_decay_of_the_target_takes_the_published_values():
    with torch.device("meta"):
        method = SoCoC4()
    steps = 62_556  # 100 epochs of ImageNet at batch 2048
    decays = [method.ema_decay_at(step / steps) for step in (0, 15_639, 31_278, 46_917)]
    assert decays == pytest.approx([0.99, 0.991464, 0.995, 0.998536], abs=5e-7)
    assert method.ema_decay_at(1.0) == 1.0


def test_decay_depends_on_progress_and_not_on_the_steps_this_process_has_made():
    method = make_method(SoCoFPN, ema_decay=0.8)
    online, target = method.online.projector[0].weight, method.target.projector[0].weight
    for progress in (0.25, 0.75, 0.25):
        with torch.no_grad():
            target.zero_()
        method.before_step(progress)
        torch.testing.assert_close(target, 0.2 * (math.cos(math.pi * progress) + 1) / 2 * online.detach())


def test_first_update_of_the_target_changes_nothing_and_no_update_touches_its_buffers():
    method = make_method(SoCoFPN, level_routing="own")
    with torch.no_grad():
        method(make_views(SoCoFPN, count=2, num_boxes=1))
    before = {name: value.clone() for name, value in method.target.state_dict().items()}
    method.before_step(0.0)
    parameters = dict(method.target.named_parameters())
    for name, value in method.target.state_dict().items():
        if name in parameters:
            torch.testing.assert_close(value, method.online.get_parameter(name), rtol=1e-6, atol=0)
            torch.testing.assert_close(value, before[name], rtol=1e-6, atol=0)
        else:
            assert torch.equal(value, before[name]), name
    # Three views went through the target's trunk, and four box sets through what follows.
    assert method.target.backbone.bn1.num_batches_tracked == 3
    assert method.target.projector[1].num_batches_tracked == 4
    assert method.predictor[1].num_batches_tracked == 4


def test_every_trained_parameter_takes_a_gradient_and_no_other_even_if_all_boxes_are_on_one_level():
    method = make_method(SoCoFPN, level_routing="own")  # "all": by the comparison with the loop above
    views = make_views(SoCoFPN, num_boxes=1)
    boxes = views.crop.boxes._replace(levels=torch.full((3, 1), 2))
    before = [value.clone() for value in method.target.parameters()]
    times_run = collections.Counter()
    for name in ("online", "target"):
        conv = getattr(method, name).backbone.conv1
        conv.register_forward_hook(lambda *_, name=name: times_run.update([name]))

    method(SoCoFPNViews(views.whole, *(PairedView(pair.image, boxes, boxes) for pair in views[1:]))).loss.backward()
    method.commit()
    assert [name for name, value in trained(method).items() if value.grad is None] == []
    assert set(trained(method)) == {name for name, _ in method.named_parameters() if not name.startswith("target.")}
    assert all(value.grad is None for value in method.target.parameters())
    assert all(torch.equal(value, old) for value, old in zip(method.target.parameters(), before, strict=True))
    assert times_run == {"online": 3, "target": 3}  # every view once per network, whatever the number of box sets


def test_order_of_boxes_and_boxes_without_a_level_do_not_change_the_loss():
    views = make_views(SoCoFPN)
    method = settle(make_method(SoCoFPN, level_routing="own"), views)

    def loss_with(in_crop, in_whole):
        crop = views.crop._replace(boxes=in_crop(views.crop.boxes), boxes_in_whole=in_whole(views.crop.boxes_in_whole))
        with torch.no_grad():
            return method(views._replace(crop=crop)).metrics["loss_pair/crop"].item()

    def kept(boxes):
        return boxes

    def flipped(boxes):
        return BoxSet(*(part.flip(1) for part in boxes))

    def with_copies(boxes, **changed):
        return BoxSet(*(torch.cat(parts, 1) for parts in zip(boxes, boxes._replace(**changed), strict=True)))

    def with_copies_without_level(boxes):
        return with_copies(boxes, levels=torch.full_like(boxes.levels, -1))

    def all_one_object(boxes):
        return boxes._replace(ids=torch.zeros_like(boxes.ids))

    loss = loss_with(kept, kept)
    for changes in ((flipped, kept), (kept, flipped), (with_copies,) * 2, (with_copies_without_level,) * 2):
        assert loss_with(*changes) == pytest.approx(loss, abs=1e-4)
    assert abs(loss_with(all_one_object, all_one_object) - loss) > 1e-2


def test_image_without_a_match_counts_as_zero():
    views = make_views(SoCoFPN)
    method = settle(make_method(SoCoFPN, level_routing="own"), views)
    ids = views.crop.boxes.ids + torch.tensor([[0], [0], [10]])
    views = SoCoFPNViews(views.whole, *(pair._replace(boxes=pair.boxes._replace(ids=ids)) for pair in views[1:]))
    first_two = SoCoFPNViews(
        views.whole[:2],
        *(
            PairedView(p.image[:2], BoxSet(*(x[:2] for x in p.boxes)), BoxSet(*(x[:2] for x in p[2])))
            for p in views[1:]
        ),
    )
    with torch.no_grad():
        assert 3 * method(views).loss.item() == pytest.approx(2 * method(first_two).loss.item(), rel=1e-4)


def test_loss_falls_on_a_few_images_and_embeddings_stay_apart():
    method = make_method(SoCoFPN, dim=16, hidden=64, level_routing="own")
    scenes = F.interpolate(2 * torch.randn(4, 3, 4, 4), size=(64, 64), mode="bilinear")
    edges, levels = torch.tensor([[0, 0, 0.6, 0.6], [0.4, 0.4, 1, 1]]), torch.tensor([1, 2])
    boxes = BoxSet(edges.expand(4, 2, 4), torch.arange(2).expand(4, 2), levels.expand(4, 2))
    whole, small = scenes[..., ::2, ::2], scenes[..., ::4, ::4]
    in_small = boxes._replace(levels=boxes.levels - 1)
    views = SoCoFPNViews(whole, PairedView(0.8 * whole, boxes, boxes), PairedView(small, in_small, boxes))
    optimiser = torch.optim.SGD(trained(method).values(), lr=0.02)
    losses = []
    for step in range(5):
        method.before_step(step / 5)
        output = method(views)
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
        losses.append(output.loss.item())
    assert losses[-1] < min(losses[0] - 2, -4)
    for name in ("crop", "small"):
        assert output.metrics[f"embedding_std/{name}"] > 0.3 / math.sqrt(16)


def test_spread_is_zero_for_one_direction_and_largest_for_all():
    one = torch.tensor([1.0, 2, 3, 4])
    assert spread(torch.stack([one, 2 * one, 3 * one]).unsqueeze(0)).item() == pytest.approx(0, abs=1e-6)
    assert spread(torch.stack([torch.eye(4), -torch.eye(4)])).item() == pytest.approx(1 / math.sqrt(4))
    assert spread(one.view(1, 1, 4)).item() == 0  # one box has no spread, and is not NaN


@pytest.mark.parametrize("variant", [SoCoC4, SoCoFPN, SoCoFPNStar])
def test_all_norms_are_synchronised_or_none(variant):
    with torch.device("meta"):
        for sync_bn in (True, False):
            norms = [m for m in variant(sync_bn=sync_bn).modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            per_network = 53 + 1 if variant is SoCoC4 else 53 + 8 + 4 + 1
            assert len(norms) == 2 * per_network + 1
            assert {isinstance(norm, SyncBatchNorm) for norm in norms} == {sync_bn}


@pytest.mark.parametrize(
    ("variant", "online", "target", "transferred"),
    [
        (SoCoC4, 35_067_456, 32_957_760, 318),
        (SoCoFPN, 49_427_008, 47_317_312, 392),
        (SoCoFPNStar, 49_427_008, 47_317_312, 392),
    ],
)
def test_sizes_are_the_official_ones_and_every_transferred_tensor_has_a_name_in_the_detector(
    variant, online, target, transferred, monkeypatch
):
    monkeypatch.undo()  # the widths are the published ones
    with torch.device("meta"):
        method = variant()
    assert sum(parameter.numel() for parameter in trained(method).values()) == online
    assert sum(parameter.numel() for parameter in method.target.parameters()) == target

    parts = {role: method.get_submodule(path) for role, path in variant.transfer_parts.items()}
    account = account_for(f"{role}/{name}" for role, part in parts.items() for name in part.state_dict())
    assert len(account.converted) + len(account.dropped) == transferred
    assert account.unexplained == ()
    assert account.colliding == {}
    assert set(account.dropped.values()) == {COUNTER}
    assert all(path.startswith("online.") for path in variant.transfer_parts.values())


@pytest.mark.parametrize(("variant", "options"), VARIANTS)
def test_forward_transfer_runs_each_transferred_norm_once_and_nothing_else(variant, options):
    method = make_method(variant, **options)
    views = make_views(variant, count=2, num_boxes=1)
    with torch.no_grad():
        method.forward_transfer(views)
    transferred = {
        f"{path}.{name}"
        for path in variant.transfer_parts.values()
        for name, _ in method.get_submodule(path).named_buffers()
    }
    for name, buffer in method.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer == (1 if name in transferred else 0), name


def test_forward_transfer_shows_the_box_head_each_box_on_its_own_level():
    method = make_method(SoCoFPN)
    views = make_views(SoCoFPN, count=2)
    seen = []
    method.online.box_head.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        method.forward_transfer(views)
        method.online.level_routing = "own"
        boxes = views.crop.boxes_in_whole
        method.online.project(method.online.features(views.whole), boxes.boxes_view, boxes.levels)
    torch.testing.assert_close(*seen)


def test_loss_is_float32_under_autocast_and_close_to_full_precision():
    method = make_method(SoCoFPN, level_routing="own").eval()  # batch statistics of 3 images amplify rounding
    views = make_views(SoCoFPN, count=2, num_boxes=1)
    with torch.no_grad():
        full = method(views)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = method(views)
    assert {value.dtype for value in (half.loss, *half.metrics.values())} == {torch.float32}
    assert half.loss.item() == pytest.approx(full.loss.item(), abs=0.1)


def test_variants_are_found_by_name_and_have_their_views():
    variants = [SoCoC4, SoCoFPN, SoCoFPNStar]
    assert [METHODS[name] for name in ("soco_c4", "soco_fpn", "soco_fpn_star")] == variants
    assert [v.recipe_for(dim=8) for v in variants] == [SoCoC4Recipe, SoCoFPNRecipe, SoCoStarRecipe]


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        (SoCoC4, {"dim": 0}, "dim must be above 0, but is 0"),
        (SoCoFPN, {"hidden": -1}, "hidden must be above 0, but is -1"),
        (SoCoFPNStar, {"ema_decay": 1.01}, r"ema_decay must be in \[0, 1\], but is 1.01"),
        (SoCoFPN, {"level_routing": "any"}, 'level_routing must be "all" or "own", but is \'any\''),
    ],
)
def test_arguments_out_of_range_are_refused_with_their_value(variant, options, message):
    with pytest.raises(ValueError, match=message):
        variant(**options)


@pytest.mark.parametrize("sync_bn", [True, False])
def test_one_image_per_norm_is_refused(sync_bn):
    with torch.device("meta"):
        method = SoCoC4(sync_bn=sync_bn)
    method.check_batch(2)
    with pytest.raises(ValueError, match=rf"would see 1 image .*1 per process.*1 process\(es\), sync_bn {sync_bn}"):
        method.check_batch(1)
