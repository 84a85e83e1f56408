"""DetCo: Eq. 1 from hand-made embeddings, gradient routes, ablation modes, the step protocol."""

import copy
import inspect
import math

import pytest
import torch
from torch.nn import functional as F

from detco.methods.detco import DetCo
from detco.views.detco import DetCoRecipe, DetCoViews
from detco.views.moco import MoCoRecipe, MoCoViews

STAGES = ("res2", "res3", "res4", "res5")
WEIGHTS = (0.1, 0.4, 0.7, 1.0)
SMALL = {"dim": 16, "head_hidden": 8, "queue_size": 12}
MODES = [
    pytest.param(False, False, id="none"),
    pytest.param(True, False, id="multi_level_only"),
    pytest.param(False, True, id="local_only"),
    pytest.param(True, True, id="detco"),
]


def make_views(count, local=True, seed=0, image_px=32, patch_px=16):
    generator = torch.Generator().manual_seed(seed)

    def images(*shape):
        return torch.randn(*shape, generator=generator)

    globals_ = images(count, 3, image_px, image_px), images(count, 3, image_px, image_px)
    if not local:
        return MoCoViews(*globals_)
    patches = images(count, 9, 3, patch_px, patch_px), images(count, 9, 3, patch_px, patch_px)
    return DetCoViews(*globals_, *patches)


def make_method(**options):
    torch.manual_seed(0)
    return DetCo(**(SMALL | options))


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


class GivenEmbeddings(torch.nn.Module):
    """Stands where an encoder would: returns the embeddings of the images it is given, by their index."""

    def __init__(self, embeddings):
        super().__init__()
        self.embeddings = torch.nn.Parameter(embeddings)

    def forward(self, images, patches):
        return self.embeddings[images[:, 0, 0, 0].long()]


def cross_entropy_term(query, positive, negatives):
    logits = torch.cat([(query * positive).sum(1, keepdim=True), query @ negatives], dim=1) / 0.2
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64))


def test_loss_is_eq_1_of_the_paper():
    method = make_method()
    queries, keys = unit(3, 8, 16), unit(3, 8, 16)
    method.query, method.key = GivenEmbeddings(queries), GivenEmbeddings(keys)
    indices = torch.arange(3.0).view(3, 1, 1, 1)
    output = method(DetCoViews(indices, indices, indices, indices))

    expected = 0.0
    for i, (stage, weight) in enumerate(zip(STAGES, WEIGHTS, strict=True)):
        q_g, q_l, k_g, k_l = queries[:, i], queries[:, 4 + i], keys[:, i], keys[:, 4 + i]
        queue_g, queue_l = method.queues_global[stage].keys, method.queues_local[stage].keys
        eq_2 = cross_entropy_term(q_g, k_g, queue_g)
        eq_5 = cross_entropy_term(q_l, k_l, queue_l)
        eq_4 = cross_entropy_term(q_l, k_g, queue_g)
        expected += weight * (eq_2 + eq_5 + eq_4)
        for pair, term in {"gg": eq_2, "ll": eq_5, "gl": eq_4}.items():
            torch.testing.assert_close(output.metrics[f"loss_{pair}/{stage}"], term)
    torch.testing.assert_close(output.loss.detach(), torch.as_tensor(expected))


def test_metrics_are_twelve_detached_losses_and_accuracies():
    output = make_method()(make_views(2))
    names = {
        f"{family}_{pair}/{stage}" for family in ("loss", "top1") for pair in ("gg", "ll", "gl") for stage in STAGES
    }
    assert set(output.metrics) == names
    assert not any(value.requires_grad or value.dim() for value in output.metrics.values())
    assert all(0 <= value <= 1 for name, value in output.metrics.items() if name.startswith("top1"))


def test_swapping_the_queues_of_a_stage_changes_exactly_what_reads_them():
    method = make_method()
    queries, keys = unit(3, 8, 16), unit(3, 8, 16)
    before = method.contrast(queries, keys)
    method.queues_global["res3"].keys, kept = unit(12, 16).T, method.queues_global["res3"].keys
    global_replaced = method.contrast(queries, keys)
    method.queues_global["res3"].keys = kept
    method.queues_local["res3"].keys = unit(12, 16).T
    local_replaced = method.contrast(queries, keys)

    def changed(after):
        return {name for name in before if before[name].loss != after[name].loss}

    assert changed(global_replaced) == {("gg", "res3"), ("gl", "res3")}
    assert changed(local_replaced) == {("ll", "res3")}


@pytest.mark.parametrize("stage", ["res2", "res5"])
@pytest.mark.parametrize(("pair", "head"), [("gg", "global_heads"), ("ll", "local_heads"), ("gl", "local_heads")])
def test_gradient_of_a_term_reaches_its_query_head_of_its_stage_and_no_other(pair, head, stage):
    method = make_method()
    views = make_views(2)
    queries = method.query(views.global_query, views.local_query)
    with torch.no_grad():
        keys = method.key(views.global_key, views.local_key)
    method.contrast(queries, keys)[pair, stage].loss.backward()

    reached = {
        name.rsplit(".", 2)[0]
        for name, parameter in method.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 0 and "heads" in name
    }
    assert reached == {f"query.{head}.{stage}"}
    assert method.query.trunk.conv1.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("multi_level", "local"), MODES)
def test_mode_builds_and_trains_only_what_it_uses(multi_level, local):
    method = make_method(multi_level=multi_level, local=local)
    output = method(make_views(2, local))
    output.loss.backward()

    stages = STAGES if multi_level else ("res5",)
    pairs = ("gg", "ll", "gl") if local else ("gg",)
    assert [name for name in output.metrics if name.startswith("loss_")] == [
        f"loss_{pair}/{stage}" for stage in stages for pair in pairs
    ]
    assert tuple(method.queues_global) == tuple(method.query.global_heads) == stages
    assert tuple(method.queues_local) == tuple(method.query.local_heads) == (stages if local else ())
    assert tuple(method.weights.values()) == (WEIGHTS if multi_level else (1.0,))
    assert all(parameter.grad is not None for parameter in method.query.parameters())
    assert DetCo.recipe_for(multi_level=multi_level, local=local) is (DetCoRecipe if local else MoCoRecipe)


def test_recipe_of_an_unset_switch_is_that_of_the_constructor_s_default():
    default = inspect.signature(DetCo.__init__).parameters["local"].default
    assert DetCo.recipe_for(queue_size=4) is DetCo.recipe_for(local=default) is DetCoRecipe


def test_terms_are_summed_and_not_averaged():
    # Eq. 1 sums: with all twelve terms at chance, the weighted total is 2.2 * 3 * ln(K + 1).
    method = make_method()
    orthogonal = torch.zeros(1, 8, 16)
    orthogonal[..., 0] = 1.0
    away = torch.zeros(1, 8, 16)
    away[..., 1] = 1.0
    method.query, method.key = GivenEmbeddings(orthogonal), GivenEmbeddings(away)
    for queue in (*method.queues_global.values(), *method.queues_local.values()):
        queue.keys.copy_(away[0, 0].view(16, 1).expand(16, 12))
    index = torch.zeros(1, 1, 1, 1)
    assert method(DetCoViews(index, index, index, index)).loss.item() == pytest.approx(2.2 * 3 * math.log(13), rel=1e-6)


def test_key_network_starts_as_a_copy_and_follows_the_average_of_the_weights_alone():
    method = make_method(ema_decay=0.9)
    for query, key in zip(method.query.state_dict().values(), method.key.state_dict().values(), strict=True):
        assert torch.equal(query, key)

    expected = {name: value.detach().clone() for name, value in method.key.named_parameters()}
    optimiser = torch.optim.SGD(method.query.parameters(), lr=0.03)
    for step in range(3):
        for name, value in method.query.named_parameters():
            expected[name] = 0.9 * expected[name] + (1 - 0.9) * value.detach()
        method.before_step(step / 3)
        method(make_views(4, seed=step)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        method.commit()

    for name, value in method.key.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
        assert value.grad is None
        assert not value.requires_grad
    assert not torch.equal(method.query.trunk.bn1.weight, method.key.trunk.bn1.weight)
    # Buffers: the key network counted its own forwards (2 per step) and saw its own images.
    assert method.key.trunk.bn1.num_batches_tracked.item() == 6
    assert not torch.allclose(method.key.trunk.bn1.running_mean, method.query.trunk.bn1.running_mean)


def test_keys_of_a_step_are_not_its_negatives_and_are_the_next_step_s():
    method = make_method().eval()  # without batch statistics, a key is a function of its image alone
    views = make_views(4)
    method(views)
    keys = method.key(views.global_key, views.local_key)
    queues = [*method.queues_global.values(), *method.queues_local.values()]

    def contains_keys():
        return [
            torch.isclose(queue.keys[:, :4], keys[:, t].T, atol=1e-5).all().item() for t, queue in enumerate(queues)
        ]

    assert contains_keys() == [False] * 8
    method.commit()
    assert contains_keys() == [True] * 8
    assert [queue.cursor.item() for queue in queues] == [4] * 8


def test_loss_reads_the_queue_before_this_step_s_keys_are_in_it():
    method = make_method().eval()
    views = make_views(4)
    first = method(views).loss.item()
    again = method(views).loss.item()
    method.commit()
    with_own_keys = method(views).loss.item()
    assert again == pytest.approx(first, rel=1e-5)  # forward writes nothing
    assert with_own_keys != pytest.approx(first, rel=1e-3)


def test_queue_is_never_written_between_forward_and_backward():
    # The queue is written after backward, so autograd never meets a negative that was overwritten.
    method = make_method()
    for seed in range(3):
        method(make_views(4, seed=seed)).loss.backward()
        method.commit()


def test_commit_pushes_the_keys_of_all_forwards_since_the_last_one_in_their_order():
    method = make_method().eval()
    micro_batches = [make_views(2, seed=seed) for seed in range(4)]
    keys = [method.key(views.global_key, views.local_key) for views in micro_batches]
    queues = [*method.queues_global.values(), *method.queues_local.values()]
    before = [queue.keys.clone() for queue in queues]

    for views in micro_batches[:3]:
        method(views)
    assert all(torch.equal(queue.keys, old) for queue, old in zip(queues, before, strict=True))
    method.commit()
    for t, queue in enumerate(queues):
        torch.testing.assert_close(queue.keys[:, :6], torch.cat(keys[:3])[:, t].T, atol=1e-5, rtol=0)
        assert torch.equal(queue.keys[:, 6:], before[t][:, 6:])

    method(micro_batches[3])
    method.commit()  # the first three are not pushed again
    for t, queue in enumerate(queues):
        assert queue.cursor.item() == 8
        torch.testing.assert_close(queue.keys[:, 6:8], keys[3][:, t].T, atol=1e-5, rtol=0)


def test_gradient_of_micro_batches_is_that_of_the_whole_batch_where_batchnorm_does_not_join_images():
    gradients, queues = [], []
    for num_micro_batches in (1, 2):
        method = make_method(multi_level=False, local=False).double().eval()
        views = MoCoViews(*(view.double() for view in make_views(4, local=False)))
        for start in range(0, 4, 4 // num_micro_batches):
            part = MoCoViews(*(view[start : start + 4 // num_micro_batches] for view in views))
            (method(part).loss / num_micro_batches).backward()
        method.commit()
        gradients.append({name: parameter.grad for name, parameter in method.query.named_parameters()})
        queues.append(method.queues_global["res5"].keys)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(*queues, rtol=1e-9, atol=1e-12)


def test_commit_without_forward_is_refused():
    method = make_method(multi_level=False, local=False)
    with pytest.raises(RuntimeError, match=r"commit\(\) without a forward\(\)"):
        method.commit()
    method(make_views(2, local=False))
    method.commit()
    with pytest.raises(RuntimeError, match=r"commit\(\) without a forward\(\)"):
        method.commit()


def test_positive_of_a_query_is_its_own_image():
    method = make_method().eval()
    views = make_views(4)
    same = views._replace(global_key=views.global_query, local_key=views.local_query)
    metrics = method(same).metrics  # the key network is a copy, so query and positive coincide
    for name in ("loss_gg/res2", "loss_gg/res5", "loss_ll/res2", "loss_ll/res5"):
        pair, stage = name.removeprefix("loss_").split("/")
        queries = method.query(views.global_query, views.local_query)
        i = STAGES.index(stage) + 4 * (pair == "ll")
        negatives = (method.queues_global if pair == "gg" else method.queues_local)[stage].keys
        torch.testing.assert_close(
            metrics[name], cross_entropy_term(queries[:, i], queries[:, i], negatives).detach(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.usefixtures("narrow")
def test_groups_of_bn_group_images_are_normalised_apart_and_keys_in_other_groups_than_queries():
    method = make_method(multi_level=False, local=False, bn_group=2)
    in_turn = {"query": copy.deepcopy(method.query), "key": copy.deepcopy(method.key)}
    passes = {}

    def remember(name, images, embeddings):
        passes[name] = images, embeddings

    for name in in_turn:
        getattr(method, name).register_forward_hook(
            lambda _, inputs, output, name=name: remember(name, inputs[0], output)
        )
    views = make_views(6, local=False)
    method(views)
    for name, encoder in in_turn.items():
        images, embeddings = passes[name]
        expected = torch.cat([encoder(group) for group in images.split(2)])
        torch.testing.assert_close(embeddings, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(passes["query"][0], views.global_query)
    images_of_keys = [views.global_key.eq(image).flatten(1).all(dim=1).nonzero().item() for image in passes["key"][0]]
    assert sorted(images_of_keys) == list(range(6))
    assert [set(images_of_keys[i : i + 2]) for i in (0, 2, 4)] != [{0, 1}, {2, 3}, {4, 5}]


def test_losses_are_float32_under_autocast_and_close_to_full_precision():
    method = make_method().to(memory_format=torch.channels_last).eval()  # batch statistics of 4 images amplify rounding
    views = make_views(4, patch_px=32)
    full = method(views)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method(views._replace(global_query=views.global_query.to(memory_format=torch.channels_last)))
    assert {value.dtype for value in (half.loss, *half.metrics.values())} == {torch.float32}
    assert half.loss.item() == pytest.approx(full.loss.item(), rel=0.05)
    half.loss.backward()
    assert {p.grad.dtype for p in method.query.parameters()} == {torch.float32}


def test_first_step_losses_are_in_the_expected_ranges():
    torch.manual_seed(0)
    method = DetCo()  # the published sizes: K 65536, full heads
    with torch.no_grad():
        output = method(make_views(4, image_px=128, patch_px=64))
    ranges = {"gg": (6.1, 6.8), "ll": (6.2, 7.8), "gl": (9.5, 12.5)}
    for pair, (low, high) in ranges.items():
        for stage in STAGES:
            assert low < output.metrics[f"loss_{pair}/{stage}"].item() < high, (pair, stage)
    assert 50 < output.loss.item() < 58


def test_every_term_is_near_chance_once_real_keys_fill_the_queues():
    method = make_method(dim=128, head_hidden=64, queue_size=16)
    views = make_views(8, patch_px=32)
    with torch.no_grad():
        for seed in (1, 2):
            method(make_views(8, seed=seed, patch_px=32))
            method.commit()
        losses = [value.item() for name, value in method(views).metrics.items() if name.startswith("loss_")]
    assert losses == pytest.approx([math.log(17)] * 12, abs=0.4)  # against noise, g-g and l-l are below 1


def test_forward_transfer_refreshes_the_statistics_of_the_query_trunk_from_whole_images():
    method = make_method()
    views = make_views(2)
    before = method.key.trunk.bn1.running_mean.clone()
    method.forward_transfer(views)
    of_images = method.query.trunk.conv1(views.global_query).mean(dim=(0, 2, 3))
    torch.testing.assert_close(method.query.trunk.bn1.running_mean, 0.1 * of_images, rtol=1e-4, atol=1e-6)
    assert torch.equal(method.key.trunk.bn1.running_mean, before)


def test_transferred_backbone_has_torchvision_s_names():
    method = make_method(multi_level=False, local=False)
    backbone = method.get_submodule(DetCo.transfer_parts["backbone"])
    names = set(backbone.state_dict())
    assert {"conv1.weight", "bn1.num_batches_tracked", "layer4.2.bn3.running_var"} <= names
    assert not any(name.startswith("fc.") for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage_weights": (0.4, 0.7, 1.0)}, r"stage_weights must be 4 numbers .* \(0.4, 0.7, 1.0\)"),
        ({"stage_weights": (0.1, 0.4, -0.7, 1.0)}, "stage_weights must be 4 numbers of at least 0"),
        ({"queue_size": 0}, "queue_size must be above 0, but is 0"),
        ({"dim": -1}, "dim must be above 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"bn_group": 0}, "bn_group must be above 0"),
        ({"head_hidden": 0}, "head_hidden must be above 0"),
        ({"ema_decay": 1.5}, r"ema_decay must be in \[0, 1\], but is 1.5"),
    ],
)
def test_arguments_out_of_range_are_refused_with_their_value(options, message):
    with pytest.raises(ValueError, match=message):
        DetCo(**options)


@pytest.mark.parametrize(
    ("count", "message"), [(5, "queue size 12 is not a multiple of the 5"), (6, "6 images per process do not split")]
)
def test_batch_that_does_not_fit_is_refused_before_any_work(count, message):
    method = make_method(multi_level=False, local=False, bn_group=4)
    with pytest.raises(ValueError, match=message):
        method(make_views(count, local=False))
    assert method.query.trunk.bn1.num_batches_tracked.item() == 0
