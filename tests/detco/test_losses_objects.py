"""Similarity of matching objects against a loop over images and boxes."""

import pytest
import torch
from torch.nn import functional as F

from detco.losses import is_same_object, object_similarity

N, K, D = 5, 4, 8


def make_boxes(seed=0, dtype=torch.float64):
    """Embeddings of two views; ids that repeat, some without a level, and a last image without any match."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = [torch.randn(N, K, D, generator=generator, dtype=dtype) * 3 for _ in range(2)]
    ids = [torch.randint(1, 4, (N, K), generator=generator) for _ in range(2)]
    levels = [torch.randint(-1, 4, (N, K), generator=generator) for _ in range(2)]
    ids[0][-1], ids[1][-1] = 1, 2
    return embeddings, ids, levels


def matches_of(ids, levels):
    return is_same_object(ids[0], levels[0], ids[1], levels[1])


def loop(prediction, target, ids, levels):
    per_image = []
    for n in range(len(prediction)):
        cosines = [
            F.cosine_similarity(prediction[n, i], target[n, j], dim=0)
            for i in range(prediction.shape[1])
            for j in range(target.shape[1])
            if ids[0][n, i] == ids[1][n, j] and levels[0][n, i] >= 0 and levels[1][n, j] >= 0
        ]
        per_image.append(sum(cosines) / len(cosines) if cosines else torch.zeros((), dtype=prediction.dtype))
    return -2 * sum(per_image) / len(per_image)


@pytest.mark.parametrize("seed", range(5))
def test_it_equals_a_loop_over_images_and_boxes_in_value_and_gradient(seed):
    (prediction, target), ids, levels = make_boxes(seed)
    prediction.requires_grad_()
    ours = object_similarity(prediction, target, matches_of(ids, levels))
    theirs = loop(prediction, target, ids, levels)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, prediction)[0] for loss in (ours, theirs)))


def test_boxes_match_by_equal_id_if_both_have_a_level():
    ids = torch.tensor([[1, 2, 3, 3]]), torch.tensor([[3, 1, 2, 9]])
    levels = torch.tensor([[0, -1, 3, 1]]), torch.tensor([[2, 0, 0, 0]])
    expected = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]).bool()
    assert torch.equal(matches_of(ids, levels)[0], expected)
    no_level_there = is_same_object(ids[0], levels[0], ids[1], levels[1] - 1)
    assert torch.equal(no_level_there[0], expected & torch.tensor([True, False, False, False]))


def test_views_may_have_different_numbers_of_boxes():
    (prediction, target), ids, levels = make_boxes()
    target, ids[1], levels[1] = target[:, :3], ids[1][:, :3], levels[1][:, :3]
    ours = object_similarity(prediction, target, matches_of(ids, levels))
    torch.testing.assert_close(ours, loop(prediction, target, ids, levels))


def test_an_image_without_a_match_gives_exactly_0_and_no_gradient():
    (prediction, target), _, _ = make_boxes()
    prediction.requires_grad_()
    loss = object_similarity(prediction, target, torch.zeros(N, K, K, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))


def test_an_image_without_a_match_counts_in_the_mean():
    (prediction, _), _, _ = make_boxes()
    is_match = torch.eye(K, dtype=torch.bool).repeat(N, 1, 1)
    is_match[0] = False
    assert object_similarity(prediction, prediction, is_match).item() == pytest.approx(-2 * (N - 1) / N)


def test_equal_directions_give_minus_2_and_opposite_ones_plus_2():
    (prediction, _), _, _ = make_boxes()
    is_match = torch.eye(K, dtype=torch.bool).repeat(N, 1, 1)
    assert object_similarity(prediction, 7 * prediction, is_match).item() == pytest.approx(-2, abs=1e-12)
    assert object_similarity(prediction, -prediction, is_match).item() == pytest.approx(2, abs=1e-12)


def test_permuting_the_boxes_of_a_view_with_their_ids_changes_nothing():
    (prediction, target), ids, levels = make_boxes()
    before = object_similarity(prediction, target, matches_of(ids, levels))
    for view, embeddings in enumerate((prediction, target)):
        order = torch.randperm(K, generator=torch.Generator().manual_seed(view + 1))
        embeddings[:], ids[view], levels[view] = embeddings[:, order], ids[view][:, order], levels[view][:, order]
    torch.testing.assert_close(object_similarity(prediction, target, matches_of(ids, levels)), before)


def test_a_repeated_box_counts_as_often_as_it_is_there():
    one_way, other_way = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    prediction = torch.stack([one_way, one_way, other_way])[None]
    target = torch.stack([one_way, one_way, one_way])[None]
    ids, levels = torch.tensor([[1, 1, 2]]), torch.zeros(1, 3, dtype=torch.int64)
    # Four matches of id 1 with cosine 1 and one of id 2 with cosine 0.
    loss = object_similarity(prediction, target, is_same_object(ids, levels, ids, levels))
    assert loss.item() == pytest.approx(-2 * 4 / 5)


def test_a_vector_of_zeros_has_a_finite_gradient():
    prediction = torch.zeros(1, 2, D, requires_grad=True)
    loss = object_similarity(prediction, torch.ones(1, 2, D), torch.ones(1, 2, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(prediction.grad).all()


def test_it_is_computed_in_float32_under_autocast():
    (prediction, target), ids, levels = make_boxes(dtype=torch.float32)
    outside = object_similarity(prediction, target, matches_of(ids, levels))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = object_similarity(prediction, target, matches_of(ids, levels))
        rounded = object_similarity(prediction.bfloat16(), target.bfloat16(), matches_of(ids, levels))
    assert inside.dtype == rounded.dtype == torch.float32
    assert torch.equal(inside, outside)
    exact = object_similarity(prediction.bfloat16().float(), target.bfloat16().float(), matches_of(ids, levels))
    assert torch.equal(rounded, exact)
