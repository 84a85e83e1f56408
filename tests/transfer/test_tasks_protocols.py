"""The protocols of tasks.yaml, and how departures from them are found. Needs no Detectron2."""

import re
from collections import defaultdict
from itertools import combinations

import pytest

from transfer.results.reference import load_reference
from transfer.tasks import CONFIGS, Task, config_file, departures, load_init_values, load_tasks, published_values

TASKS = load_tasks()
ITERATIONS = {"12k": 12_000, "24k": 24_000, "90k": 90_000, "1x": 90_000, "2x": 180_000, "3x": 270_000, "4x": 360_000}


@pytest.fixture
def task() -> Task:
    return Task(
        "demo_1x/heavy",
        title="Demo",
        recipe="heavy",
        config="demo/heavy_1x",
        values={"SOLVER.MAX_ITER": 90, "SOLVER.WEIGHT_DECAY": 1e-4, "MODEL.RESNETS.NORM": "SyncBN"},
        accepts={"SOLVER.WEIGHT_DECAY": [2.5e-5]},
        inits={"supervised": {"MODEL.WEIGHTS": "other.pkl", "MODEL.RESNETS.NORM": "FrozenBN"}},
    )


def nested(max_iter: int = 90, weight_decay: float = 1e-4) -> dict[str, dict[str, float]]:
    return {"SOLVER": {"MAX_ITER": max_iter, "WEIGHT_DECAY": weight_decay}}


def test_id_is_the_name_without_the_recipe(task: Task) -> None:
    assert task.id == "demo_1x"
    assert {name for name, task in TASKS.items() if task.id != name} == {
        f"coco_maskrcnn_fpn_{schedule}/4conv1fc" for schedule in ("12k", "1x", "2x", "4x")
    }
    assert all(task.name == name and name in (task.id, f"{task.id}/{task.recipe}") for name, task in TASKS.items())


def test_an_accepted_value_is_no_departure_but_any_other_is(task: Task) -> None:
    published = {key: task.values[key] for key in ("SOLVER.MAX_ITER", "SOLVER.WEIGHT_DECAY")}
    assert departures(published, nested(), task.accepts) == []
    assert departures(published, nested(weight_decay=2.5e-5), task.accepts) == []
    assert departures(published, nested(weight_decay=2.5e-5)) == [
        "SOLVER.WEIGHT_DECAY is 2.5e-05, the task's is 0.0001"
    ]
    assert len(departures(published, nested(weight_decay=5e-5), task.accepts)) == 1
    assert len(departures(published, nested(max_iter=30, weight_decay=5e-5), task.accepts)) == 2


def test_a_key_that_the_config_lacks_is_a_departure() -> None:
    published = {"SOLVER.MAX_ITER": 90, "MODEL.DENSEPOSE_ON": True}
    assert departures(published, nested()) == ["MODEL.DENSEPOSE_ON is not set, the task's is True"]


def test_published_values_join_task_weights_and_what_is_special_to_both(task: Task) -> None:
    general = load_init_values()["supervised"]
    values = published_values(task, "supervised")
    assert values == {**task.values, **general, "MODEL.WEIGHTS": "other.pkl", "MODEL.RESNETS.NORM": "FrozenBN"}
    assert published_values(task, "converted") == {**task.values, **load_init_values()["converted"]}


def test_published_values_without_input_keep_what_is_not_input(task: Task) -> None:
    assert published_values(task, "converted", with_input=False) == task.values
    assert published_values(task, "supervised", with_input=False) == {**task.values, "MODEL.RESNETS.NORM": "FrozenBN"}


def test_changing_returned_values_does_not_change_the_protocols() -> None:
    name = "coco_maskrcnn_fpn_1x"
    published_values(TASKS[name], "converted")["SOLVER.MAX_ITER"] = 1
    load_init_values()["converted"]["INPUT.FORMAT"] = "BGR"
    assert published_values(load_tasks()[name], "converted")["SOLVER.MAX_ITER"] == 90_000
    assert published_values(load_tasks()[name], "converted")["INPUT.FORMAT"] == "RGB"


def test_config_file_names_what_there_is_where_one_is_missing(task: Task) -> None:
    c4 = TASKS["coco_maskrcnn_c4_1x"]
    assert config_file(c4, "soco") == CONFIGS / "coco/mask_rcnn_r50_c4_1x_soco.yaml"
    with pytest.raises(FileNotFoundError, match=r"voc0712_fasterrcnn_c4_24k has random, converted, supervised$"):
        config_file(TASKS["voc0712_fasterrcnn_c4_24k"], "soco")
    with pytest.raises(FileNotFoundError, match=r"heavy_1x_\*\.yaml; the configs come with a checkout"):
        config_file(task, "converted")


def test_no_two_protocols_ask_for_the_same() -> None:
    for left, right in combinations(TASKS.values(), 2):
        assert left.values != right.values, (left.name, right.name)
        assert left.config != right.config
        assert left.title != right.title


def test_iterations_are_those_of_the_name_and_steps_are_within() -> None:
    for task in TASKS.values():
        word = task.id.rsplit("_", 1)[1]
        iterations, steps = task.values["SOLVER.MAX_ITER"], task.values["SOLVER.STEPS"]
        assert iterations == ITERATIONS.get(word, iterations)
        assert steps == sorted(steps)
        assert 0.5 < steps[0] / iterations <= steps[-1] / iterations < 1


def test_percentage_in_a_name_is_the_share_of_the_images() -> None:
    for task in TASKS.values():
        stated = re.search(r"(\d+)pct|coco(\d+)_", task.id)
        share = next(filter(None, stated.groups())) if stated else None
        data = task.values["DATASETS.TRAIN"]
        assert data == [f"coco_2017_train_{share}pct"] if share else not any("pct" in name for name in data)


def test_msra_and_ssl_columns_differ_in_all_four_input_settings() -> None:
    inits = load_init_values()
    keys = set(inits["supervised"]) - {"MODEL.WEIGHTS"}
    assert keys == {"INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1"}
    assert all(inits["supervised"][key] != inits["converted"][key] for key in keys)


def test_input_settings_belong_to_the_weights_and_not_to_a_task() -> None:
    keys = {key for values in load_init_values().values() for key in values}
    assert all(keys.isdisjoint(task.values) for task in TASKS.values())


def test_sparse_rcnn_row_of_supervised_weights_is_frozen_as_in_its_paper() -> None:
    values = published_values(TASKS["coco_sparsercnn_300pro_3x"], "supervised")
    assert (values["MODEL.RESNETS.NORM"], values["MODEL.BACKBONE.FREEZE_AT"]) == ("FrozenBN", 2)
    assert (values["INPUT.FORMAT"], values["MODEL.RESNETS.STRIDE_IN_1X1"]) == ("RGB", False)
    assert values["MODEL.WEIGHTS"].endswith("torchvision/R-50.pkl")


def test_a_task_says_that_it_is_unpublished_exactly_where_no_number_carries_its_id_and_recipe() -> None:
    recipes: dict[str, set[str | None]] = defaultdict(set)
    for row in load_reference().results:
        recipes[row.task].add(row.recipe)
    for task in TASKS.values():
        assert bool(task.unpublished) == recipes[task.id].isdisjoint({task.recipe, None}), task.name
