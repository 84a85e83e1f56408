"""DetCo on two real gloo processes: shuffling, queues, loss and gradient, DistributedDataParallel."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from detco.methods.detco import DetCo
from detco.models.batch_shuffle import draw_permutation, shuffle_rows, unshuffle_rows
from detco.views.detco import DetCoViews
from detco.views.moco import MoCoViews

pytestmark = pytest.mark.dist

SMALL = {"dim": 16, "head_hidden": 8, "queue_size": 16}
PER_PROCESS = 4


def make_views(count, local=True, seed=0, patch_px=16):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(count, 3, 32, 32)] * 2 + [(count, 9, 3, patch_px, patch_px)] * 2 * local
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return DetCoViews(*tensors) if local else MoCoViews(*tensors)


def share_of(views, rank):
    return type(views)(*(view[rank * PER_PROCESS : (rank + 1) * PER_PROCESS] for view in views))


def make_method(**options):
    torch.manual_seed(0)
    return DetCo(**(SMALL | options))


def queues_of(method):
    return [*method.queues_global.values(), *method.queues_local.values()]


def everything(rank, world_size):
    """All that the tests below look at, in one start of the processes, which takes longer than the work."""
    with pytest.raises(ValueError, match="queue size 16 is not a multiple of the 6 keys"):
        make_method(multi_level=False, local=False).check_batch(3)
    works = (shuffle_and_unshuffle, three_steps, step_on_a_share, modes, traffic)
    return {work.__name__: work(rank, world_size) for work in works}


@pytest.fixture(scope="module")
def results(run_distributed):
    return run_distributed(everything, 2)


def of(results, work):
    return [result[work.__name__] for result in results]


def shuffle_and_unshuffle(rank, world_size):
    torch.manual_seed(100)  # alike on both, as the trainer seeds them
    images = torch.arange(rank * 8, rank * 8 + 8).view(8, 1, 1)
    permutation = draw_permutation(16)
    shuffled = shuffle_rows(images, permutation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_bfloat16 = shuffle_rows(images.float(), permutation)
    assert in_bfloat16.dtype == torch.bfloat16
    assert torch.equal(in_bfloat16.long(), shuffled)
    return {
        "permutation": permutation,
        "shuffled": shuffled.flatten(),
        "back": unshuffle_rows(shuffled * torch.arange(1, 9).view(1, 8, 1), permutation),
    }


def test_shuffled_images_meet_others_and_come_back_in_order(results):
    first, second = of(results, shuffle_and_unshuffle)
    assert torch.equal(first["permutation"], second["permutation"])
    seen = torch.cat([first["shuffled"], second["shuffled"]])
    assert sorted(seen.tolist()) == list(range(16))
    assert set(first["shuffled"].tolist()) != set(range(8))
    assert torch.equal(seen, first["permutation"])  # place by place, as in one process with all images
    # Key tensor t of image g carries g * (t + 1).
    expected = (torch.arange(16).view(16, 1) * torch.arange(1, 9)).unsqueeze(2)
    assert torch.equal(first["back"], expected)
    assert torch.equal(second["back"], expected)


def three_steps(rank, world_size):
    method = make_method(queue_size=16).eval()  # without batch statistics, a key is a function of its image alone
    torch.manual_seed(100)
    history = []
    for step in range(3):
        views = make_views(world_size * PER_PROCESS, seed=step)
        method(share_of(views, rank))
        method.commit()
        with torch.no_grad():
            history.append(method.key(views.global_key, views.local_key))
    return {
        "queues": [queue.keys for queue in queues_of(method)],
        "cursors": [queue.cursor.item() for queue in queues_of(method)],
        "keys": history,
    }


def test_all_eight_queues_hold_every_image_s_key_in_order_on_both_processes(results):
    first, second = of(results, three_steps)
    assert first["cursors"] == second["cursors"] == [3 * 8 % 16] * 8
    for t, (ours, theirs) in enumerate(zip(first["queues"], second["queues"], strict=True)):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours.norm(dim=0), torch.ones(16))
        # 16 columns, 8 keys per step: step 2 overwrote step 0, step 1 is still there.
        newest = torch.cat([first["keys"][2][:, t], first["keys"][1][:, t]])
        torch.testing.assert_close(ours, newest.T, rtol=1e-4, atol=1e-5)
    assert len({queue.sum().item() for queue in first["queues"]}) == 8


def loss_and_gradients(method, module, views):
    torch.manual_seed(7)  # the same permutation on one and on two processes
    method.before_step(0.0)
    output = module(views)
    output.loss.backward()
    method.commit()
    # The head of every gradient and its norm: enough to tell, and small enough to hand over.
    gradients = {
        name: torch.cat([p.grad.flatten()[:64], p.grad.norm().view(1)]) for name, p in method.query.named_parameters()
    }
    return {"loss": output.loss.detach(), "gradients": gradients, "queues": [q.keys for q in queues_of(method)]}


def step_on_a_share(rank, world_size):
    method = make_method(bn_group=PER_PROCESS).double()
    module = DistributedDataParallel(method, broadcast_buffers=False)
    views = share_of(make_views(world_size * PER_PROCESS), rank)
    return loss_and_gradients(method, module, DetCoViews(*(view.double() for view in views)))


def test_two_processes_equal_one_with_the_whole_batch_in_loss_gradient_and_queues(results):
    shares = of(results, step_on_a_share)
    method = make_method(bn_group=PER_PROCESS).double()
    views = DetCoViews(*(view.double() for view in make_views(2 * PER_PROCESS)))
    whole = loss_and_gradients(method, method, views)

    torch.testing.assert_close((shares[0]["loss"] + shares[1]["loss"]) / 2, whole["loss"], rtol=1e-9, atol=0)
    assert shares[0]["loss"] != shares[1]["loss"]
    for share in shares:
        for name, gradient in whole["gradients"].items():
            torch.testing.assert_close(share["gradients"][name], gradient, rtol=1e-6, atol=1e-9)
        for ours, theirs in zip(share["queues"], whole["queues"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def modes(rank, world_size):
    losses = {}
    for multi_level in (False, True):
        for local in (False, True):
            torch.manual_seed(0)
            method = DetCo(**SMALL, multi_level=multi_level, local=local).to(memory_format=torch.channels_last)
            module = DistributedDataParallel(method, broadcast_buffers=False, find_unused_parameters=False)
            optimiser = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01)
            for step in range(2):
                # oneDNN's bfloat16 channels_last gradient of a strided 3x3 convolution is wrong on 1x1 maps, which
                # patches of 16 px would have in res5.
                views = share_of(make_views(world_size * PER_PROCESS, local, seed=step, patch_px=32), rank)
                method.before_step(step / 2)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    output = module(views)
                output.loss.backward()
                optimiser.step()
                optimiser.zero_grad()
                method.commit()
            parts = [*method.parameters(), *(queue.keys for queue in queues_of(method))]
            sums = torch.stack([part.detach().sum() for part in parts])
            losses[multi_level, local] = (output.loss.detach(), sums)
    return losses


def test_every_mode_trains_under_ddp_in_bfloat16_without_unused_parameters(results):
    first, second = of(results, modes)
    for mode, (loss, sums) in first.items():
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss)
        assert torch.equal(sums, second[mode][1])


def traffic(rank, world_size):
    """Bytes that this process receives in one step, by collective."""
    received = {}

    def counted(name, original):
        def call(output, *arguments, **options):
            received.setdefault(name, []).append(output.numel() * output.element_size())
            return original(output, *arguments, **options)

        return call

    names = (
        "all_to_all_single",
        "all_gather_into_tensor",
        "all_gather",
        "broadcast",
        "all_reduce",
        "all_gather_object",
    )
    method = make_method()
    torch.manual_seed(7)
    with mock.patch.multiple(dist, **{name: counted(name, getattr(dist, name)) for name in names}):
        method.before_step(0.0)
        method(share_of(make_views(world_size * PER_PROCESS), rank)).loss.backward()
        method.commit()
    return received


def test_a_process_receives_its_own_share_of_the_images_and_the_keys_of_all_and_nothing_else(results):
    bytes_per_float, embeddings, dim = 4, 8, SMALL["dim"]
    images, patches = (PER_PROCESS * count * 3 * side**2 * bytes_per_float for count, side in ((1, 32), (9, 16)))
    keys_of_all = 2 * PER_PROCESS * embeddings * dim * bytes_per_float
    for received in of(results, traffic):
        assert received == {"all_to_all_single": [images, patches], "all_gather_into_tensor": [keys_of_all]}
