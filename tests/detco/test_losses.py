"""InfoNCE against the cross-entropy of explicit logits."""

import math

import pytest
import torch
from torch.nn import functional as F

from detco.losses import info_nce

TEMPERATURE = 0.2


def unit(*shape, dim=1, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=dim)


def explicit_logits(query, positive, negatives):
    return torch.cat([(query * positive).sum(1, keepdim=True), query @ negatives], dim=1) / TEMPERATURE


@pytest.mark.parametrize("temperature", [TEMPERATURE, 0.001])
@pytest.mark.parametrize("num_images", [1, 5])
def test_info_nce_equals_the_cross_entropy_of_explicit_logits_in_value_and_gradient(num_images, temperature):
    torch.manual_seed(0)
    query, positive, negatives = unit(num_images, 8).requires_grad_(), unit(num_images, 8), unit(8, 31, dim=0)

    ours = info_nce(query, positive, negatives, temperature).loss
    logits = explicit_logits(query, positive, negatives) * (TEMPERATURE / temperature)
    theirs = F.cross_entropy(logits, torch.zeros(num_images, dtype=torch.int64))

    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, query)[0] for loss in (ours, theirs)))


def test_gradient_of_info_nce_equals_its_finite_differences_in_query_and_positive():
    torch.manual_seed(1)
    inputs = unit(3, 4).requires_grad_(), unit(3, 4).requires_grad_(), unit(4, 6, dim=0)
    assert torch.autograd.gradcheck(lambda *x: info_nce(*x, TEMPERATURE).loss, inputs)


def test_info_nce_keeps_no_matrix_over_the_negatives_for_the_backward_pass():
    kept = []
    query, positive, negatives = unit(5, 8).requires_grad_(), unit(5, 8), unit(8, 1000, dim=0)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor.numel()), tensor)[1], lambda x: x):
        info_nce(query, positive, negatives, TEMPERATURE)
    assert 0 < max(kept) <= query.numel()


def test_negatives_may_change_before_the_backward_pass():
    torch.manual_seed(4)
    query, positive, negatives = unit(5, 8).requires_grad_(), unit(5, 8), unit(8, 31, dim=0)
    (expected,) = torch.autograd.grad(info_nce(query, positive, negatives, TEMPERATURE).loss, query)
    loss = info_nce(query, positive, negatives, TEMPERATURE).loss
    negatives.zero_()
    assert torch.equal(torch.autograd.grad(loss, query)[0], expected)


def test_gradients_that_it_does_not_have_are_refused_and_not_left_out():
    query, positive, negatives = unit(5, 8).requires_grad_(), unit(5, 8), unit(8, 31, dim=0)
    with pytest.raises(ValueError, match="no gradient for its negatives"):
        info_nce(query, positive, negatives.clone().requires_grad_(), TEMPERATURE)
    loss = info_nce(query, positive, negatives, TEMPERATURE).loss
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(loss, query, create_graph=True)


def test_one_loss_may_be_used_and_differentiated_twice():
    torch.manual_seed(5)
    query, positive, negatives = unit(5, 8).requires_grad_(), unit(5, 8), unit(8, 31, dim=0)
    loss = info_nce(query, positive, negatives, TEMPERATURE).loss
    (once,) = torch.autograd.grad(loss, query, retain_graph=True)
    (twice,) = torch.autograd.grad(loss * 2 + loss.square(), query)
    torch.testing.assert_close(twice, once * (2 + 2 * loss))


def test_top1_counts_the_images_whose_positive_beats_every_negative():
    negatives = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    query = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.8, 0.6], [-1.0, 0.0]])
    positive = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.8, 0.6], [-1.0, 0.0]])  # the second loses to a negative
    assert info_nce(query, positive, negatives, TEMPERATURE).top1.item() == pytest.approx(3 / 4)


def test_info_nce_of_orthogonal_embeddings_is_the_logarithm_of_the_number_of_classes():
    query = torch.tensor([[1.0, 0.0]])
    orthogonal = torch.tensor([[0.0, 1.0]])
    loss = info_nce(query, orthogonal, orthogonal.T.expand(2, 65536), TEMPERATURE).loss
    assert loss.item() == pytest.approx(math.log(65537), abs=1e-5)


def test_info_nce_is_computed_in_float32_under_autocast():
    torch.manual_seed(2)
    tensors = unit(4, 128, dtype=torch.float32), unit(4, 128, dtype=torch.float32), unit(128, 512, dim=0).float()
    outside = info_nce(*tensors, TEMPERATURE).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce(*tensors, TEMPERATURE).loss
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_bfloat16_embeddings_give_a_float32_loss():
    torch.manual_seed(3)
    rounded = [x.to(torch.bfloat16) for x in (unit(4, 16), unit(4, 16), unit(16, 32, dim=0))]
    loss = info_nce(*rounded, TEMPERATURE).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, info_nce(*(x.float() for x in rounded), TEMPERATURE).loss)


def test_info_nce_stays_finite_when_the_positive_is_hopeless():
    query = torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss = info_nce(query, -query.detach(), query.detach().T, temperature=0.001).loss
    loss.backward()
    assert loss.item() == pytest.approx(2000)
    assert torch.isfinite(query.grad).all()
