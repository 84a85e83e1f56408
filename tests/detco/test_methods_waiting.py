"""A step is queued on the GPU without the host ever waiting for it."""

import pytest
import torch

from detco.methods.detco import DetCo
from detco.views.detco import DetCoViews
from detco.views.moco import MoCoViews


@pytest.mark.gpu
@pytest.mark.parametrize(("multi_level", "local"), [(False, False), (True, True)], ids=["moco_v2", "detco"])
def test_no_step_makes_the_host_wait_for_the_gpu(multi_level, local):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    method = DetCo(multi_level=multi_level, local=local, dim=16, head_hidden=8, queue_size=12, bn_group=2).cuda()
    images, patches = [(4, 3, 32, 32)] * 2, [(4, 9, 3, 16, 16)] * 2
    for step in range(3):
        tensors = [torch.randn(shape, device="cuda") for shape in images + patches * local]
        views = DetCoViews(*tensors) if local else MoCoViews(*tensors)
        # The first step may wait: what is made once, like pinned memory, is made there.
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            method.before_step(step / 3)
            method(views).loss.backward()
            method.commit()
        finally:
            torch.cuda.set_sync_debug_mode("default")
