"""The two ways of working on rows, picked ones on a CPU and all of them elsewhere, agree and touch nothing else."""

from typing import NamedTuple

import pytest
import torch

from detco.views.rows import apply_by_choice, known_maximum, render_alike, render_rows

OPERATIONS = {
    0: lambda images, amount: images + amount[:, None, None, None],
    1: lambda images, amount: images * amount[:, None, None, None],
    4: lambda images, _: images.flip(-1),
}


class Sample(NamedTuple):
    images: torch.Tensor
    amount: torch.Tensor


def sample(seed, count=6):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 4, 5), generator=generator).float()
    return Sample(images, torch.rand(count, generator=generator))


def brighten(batch):
    return batch.images * batch.amount[:, None, None, None]


@pytest.fixture(params=["picked", "all"])
def way(request, monkeypatch):
    """Both ways, on this CPU."""
    if request.param == "all":
        monkeypatch.setattr("detco.views.rows.is_on_cpu", lambda values: False)
    return request.param


@pytest.mark.parametrize("choice", [[0, 1, 4, -1, 2, 1], [4] * 6, [-1] * 6])
def test_every_row_gets_the_operation_of_its_choice_and_no_other(way, choice):
    images, amount = sample(0)
    before = images.clone()
    result = apply_by_choice(torch.tensor(choice), OPERATIONS, images, amount)
    for row, number in enumerate(choice):
        one = slice(row, row + 1)
        expected = OPERATIONS[number](images[one], amount[one]) if number in OPERATIONS else images[one]
        assert torch.equal(result[one], expected)
    assert torch.equal(images, before)


def test_operations_nobody_chose_are_not_computed_on_a_cpu():
    images, amount = sample(0)
    operations = OPERATIONS | {7: lambda images, amount: pytest.fail("computed in vain")}
    apply_by_choice(torch.tensor([0, 1, 4, -1, 2, 1]), operations, images, amount)


@pytest.mark.parametrize("count", [1, 5])
def test_rows_are_rendered_in_their_places(way, count):
    batch = sample(1, count)
    assert torch.equal(render_rows(brighten, batch), brighten(batch))


def test_batches_rendered_together_are_those_rendered_alone(way):
    batches = [sample(seed) for seed in range(3)]
    together = render_alike(brighten, *batches)
    assert len(together) == 3
    assert all(torch.equal(ours, brighten(batch)) for ours, batch in zip(together, batches, strict=True))


def test_batches_are_one_call_where_rows_are_not_picked(monkeypatch):
    monkeypatch.setattr("detco.views.rows.is_on_cpu", lambda values: False)
    calls = []
    render_alike(lambda batch: calls.append(len(batch.images)) or batch.images, sample(0), sample(1))
    assert calls == [12]


def test_the_largest_parameter_is_read_only_where_nobody_waits(monkeypatch):
    values = torch.tensor([0.5, 1.25, 0.75])
    assert known_maximum(values, bound=2.0) == 1.25
    monkeypatch.setattr("detco.views.rows.is_on_cpu", lambda values: False)
    assert known_maximum(values, bound=2.0) == 2.0
