"""--train-data with a task whose labels it cannot read."""

import pytest

from transfer import d2

pytestmark = pytest.mark.d2

d2.require()

from transfer.config import load_config  # noqa: E402
from transfer.tasks import config_file, load_tasks  # noqa: E402
from transfer.user_data import use_user_datasets  # noqa: E402


@pytest.mark.parametrize(
    ("protocol", "labels"),
    [("coco_keypoint_fpn_2x", "keypoints"), ("cityscapes_semseg_fcn16s_90k", "a class for every pixel")],
)
def test_own_data_without_the_labels_of_the_task_are_refused_before_they_are_read(protocol: str, labels: str) -> None:
    cfg = load_config(config_file(load_tasks()[protocol], "random"))
    with pytest.raises(ValueError, match=f"trains on {labels}.*--datasets-root"):
        use_user_datasets(cfg, "nowhere.json", "nowhere.json", eval_only=False)
