"""The published numbers as data, and the naming rules that tie ours to them."""

import copy
import functools
import math

import pytest
import yaml

from transfer.results.cells import difference
from transfer.results.identity import identify, load_names
from transfer.results.published import published_rows
from transfer.results.reference import REFERENCE_FILE, Noise, ReferenceDataError, load_reference, parse_reference
from transfer.results.runs import Run
from transfer.results.table import Legend
from transfer.tasks import load_tasks

# The brackets of DetCo (arXiv:2102.04803 v2), Tables 2 and 3, as printed: box AP, AP50, AP75, mask AP, AP50, AP75.
PRINTED = {
    "coco_maskrcnn_c4_12k": {
        "InsDis": "(-1.3) (-3.6) (-0.6) (-1.0) (-3.2) (-0.8)",
        "PIRL": "(-1.6) (-4.2) (-0.8) (-1.5) (-3.7) (-1.4)",
        "SwAV": "(-10.6) (-11.6) (-14.1) (-8.6) (-11.6) (-10.7)",
        "MoCo v1": "(-0.2) (-2.3) (+0.6) (-0.1) (-1.8) (+0.3)",
        "MoCo v2": "(+0.5) (-1.5) (+1.3) (+0.4) (-1.0) (+1.0)",
        "DetCo+AA": "(+2.7) (+2.3) (+3.8) (+2.2) (+2.4) (+2.6)",
    },
    "coco_maskrcnn_fpn_12k": {
        "InsDis": "(-4.2) (-6.8) (-4.4) (-3.6) (-6.3) (-2.0)",
        "PIRL": "(-4.7) (-7.9) (-5.1) (-4.3) (-7.3) (-3.0)",
        "SwAV": "(-2.9) (-2.1) (-4.1) (-1.6) (-1.7) (-0.4)",
        "MoCo v1": "(-2.8) (-4.9) (-2.9) (-2.5) (-4.4) (-0.9)",
        "MoCo v2": "(-1.8) (-3.4) (-1.8) (-1.6) (-3.1) (0.0)",
        "DetCo+AA": "(+1.2) (+1.1) (+1.5) (+1.2) (+1.4) (+3.0)",
    },
    "coco_maskrcnn_c4_1x": {"DetCo+AA": "(+1.6) (+1.5) (+1.8) (+1.4) (+1.6) (+1.5)"},
    "coco_maskrcnn_fpn_1x": {"DetCo+AA": "(+1.2) (+1.4) (+1.2) (+1.0) (+1.5) (+0.8)"},
}
MASK_METRICS = ("box_AP", "box_AP50", "box_AP75", "mask_AP", "mask_AP50", "mask_AP75")


@functools.cache
def _data():
    return yaml.safe_load(REFERENCE_FILE.read_text(encoding="utf-8"))


def _run(
    path="w.pkl", *, label="ours", task="voc0712_fasterrcnn_c4_24k", recipe="c4_extra_norm", decay=None, **provenance
):
    return Run(
        path="run",
        task=task,
        recipe=recipe,
        label=label,
        schedule={} if decay is None else {"weight_decay": decay},
        weights_path=path,
        weights_sha256="00",
        provenance=provenance,
        metrics={"box_AP": 50.0},
        departures=(),
        config_digest="d",
        seed=0,
    )


def test_all_published_numbers_are_there_and_valid():
    reference = load_reference()
    assert len(reference.results) == 471
    numbers = [number for row in reference.results for number in row.metrics.values()]
    # Count and sum of the transcription that two people made and compared.
    assert len(numbers) == 1618
    assert sum(numbers) == pytest.approx(69328.79, abs=1e-6)
    assert {row.confidence for row in reference.results} == {"high", "medium", "low"}
    assert all(reference.sources[row.source] and reference.papers[row.paper].citation for row in reference.results)


def test_a_task_has_a_published_row_or_is_ours_alone():
    reference = load_reference()
    published = {(row.task, row.recipe) for row in reference.results}
    ours = load_tasks().values()
    assert {task.id for task in ours} <= set(reference.tasks)
    assert {task.recipe for task in ours} <= set(reference.recipes)
    for task in ours:
        assert ((task.id, task.recipe) in published) != bool(task.unpublished), task.name
    unpublished = set(reference.tasks) - {task for task, _ in published}
    assert unpublished <= {task.id for task in ours if task.unpublished}


@pytest.mark.parametrize(
    ("task", "recipe", "method", "epochs", "number"),
    [
        ("cityscapes_maskrcnn_fpn_24k", "moco", "DetCo", 200, ("mask_AP50", 63.2)),
        ("cityscapes_semseg_fcn16s_90k", "moco", "supervised_in1k", 90, ("mIoU", 74.6)),
        ("coco_sparsercnn_300pro_3x", "sparsercnn", "DetCo", 200, ("box_APl", 59.7)),
        ("coco_densepose_fpn_s1x", "densepose_legacy", "DetCo", 200, ("dp_AP50", 87.7)),
        ("coco_keypoint_fpn_2x", "moco", "DetCo", 200, ("keypoint_AP75", 73.4)),
        ("coco50_maskrcnn_fpn_1x", "4conv1fc", "SoCo*", 400, ("box_AP", 40.1)),
        ("lvis1_maskrcnn_fpn_2x", "4conv1fc", "SoCo*", 400, ("mask_AP", 26.9)),
        ("minicoco_maskrcnn_fpn_5pct", "4conv1fc", "SoCo", 100, ("box_AP", 24.6)),
    ],
)
def test_the_recipe_of_our_task_finds_the_published_rows(task, recipe, method, epochs, number):
    rows = load_reference().rows(task, recipe)
    (row, *others) = [row for row in rows if (row.pretrain_method, row.pretrain_epochs) == (method, epochs)]
    assert row.metrics[number[0]] == number[1]
    assert all(other.metrics == row.metrics for other in others)


def test_the_supervised_row_on_all_of_coco_is_no_row_of_the_half():
    assert [row.pretrain_method for row in load_reference().rows("coco50_maskrcnn_fpn_1x", "4conv1fc")] == ["SoCo*"]


def test_a_row_that_two_tables_print_is_found_in_both():
    rows = [row for row in load_reference().results if row.also_in]
    assert len(rows) == 135
    for row in rows:
        again = row.printed_in("DetCo-v1", row.also_in["table"])
        assert again.metrics == row.metrics
        assert again.source == "detco_readme"
        assert row.printed_in(row.paper, row.table) is row
        assert row.printed_in("DetCo-v1", "Table 99") is None


@pytest.mark.parametrize("task", PRINTED)
def test_differences_to_supervised_equal_the_brackets_that_the_paper_prints(task):
    reference = load_reference()
    recipe = "moco" if "_fpn_" in task else "c4_extra_norm"
    rows = published_rows(reference.rows(task, recipe), reference, Legend())
    for name, printed in PRINTED[task].items():
        row = next(row for row in rows if row.name == name and row.epochs == 200)
        assert " ".join(difference(row.cells[metric]) for metric in MASK_METRICS) == printed


def test_the_supervised_row_is_the_one_of_the_recipe():
    reference = load_reference()
    for recipe, expected in (("moco", 38.9), ("4conv1fc", 39.7)):
        rows = reference.rows("coco_maskrcnn_fpn_1x", recipe)
        methods = [row for row in rows if not row.is_supervised]
        assert methods
        assert {reference.baseline(row).metrics["box_AP"] for row in methods} == {expected}


def test_a_paper_with_its_own_supervised_row_is_measured_against_that():
    reference = load_reference()
    rows = reference.rows("voc0712_fasterrcnn_c4_24k", "c4_extra_norm")
    npid = next(row for row in rows if row.pretrain_method == "NPID")
    pixpro = next(row for row in rows if row.pretrain_method == "PixPro" and row.paper == "PixPro")
    assert reference.baseline(npid).metrics["box_AP"] == 54.19  # OpenSelfSup's own
    assert reference.baseline(pixpro).metrics["box_AP"] == 53.5  # none in that README: the first of the recipe


def test_equal_rows_of_several_papers_become_one_that_cites_them_all():
    reference = load_reference()
    entries = reference.rows("voc0712_fasterrcnn_c4_24k", "c4_extra_norm")
    rows = published_rows(entries, reference, Legend())
    mocov2 = next(row for row in rows if (row.name, row.epochs) == ("MoCo v2", 200))
    assert [entry.paper for entry in mocov2.entries] == ["DetCo", "MoCo README", "DenseCL README"]
    assert sum(len(row.entries) for row in rows) == len(entries)  # nothing is lost
    different = [row.cells["box_AP"].value for row in rows if (row.name, row.epochs) == ("MoCo v2", 800)]
    assert different == [57.4, 57.6]  # two sources that disagree stay two rows


def test_random_init_and_supervised_come_first():
    reference = load_reference()
    rows = published_rows(reference.rows("coco_retinanet_1x", "moco"), reference, Legend())
    assert [row.name for row in rows[:2]] == ["random init", "supervised"]


def test_rows_without_numbers_say_why():
    empty = [row for row in load_reference().results if not row.metrics]
    assert len(empty) == 2
    assert all("diverged" in row.status for row in empty)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("task", "coco", "task 'coco'"),
        ("paper", "nobody", "paper 'nobody'"),
        ("source", "hearsay", "source 'hearsay'"),
        ("metrics", {"box_ap": 1.0}, "unknown metric 'box_ap'"),
        ("metrics", {"box_AP": 101.0}, "101.0, not a number in per cent"),
        ("metrics", {}, "neither metrics nor a status"),
        ("confidence", "certain", "confidence 'certain'"),
        ("recipe", "mocco", "recipe 'mocco'"),
        ("pretrain_epochs", 0, "pretrain_epochs 0"),
        ("colour", "red", "unknown keys ['colour']"),
        ("also_in", {"paper": "DetCo-v1", "table": "Table 3"}, "also_in ['paper', 'table']"),
        ("also_in", {"paper": "nobody", "table": "Table 3", "source": "detco_readme"}, "also_in.paper 'nobody'"),
    ],
)
def test_a_wrong_entry_is_named(key, value, message):
    data = {**_data(), "results": [{**_data()["results"][0], key: value}]}
    with pytest.raises(ReferenceDataError) as error:
        parse_reference(data)
    assert message in str(error.value)


def test_a_note_on_a_task_that_does_not_exist_is_refused():
    data = copy.deepcopy(_data())
    data["noise"][0]["tasks"].append("voc_typo")
    with pytest.raises(ReferenceDataError, match="voc_typo"):
        parse_reference(data)


def test_noise_of_a_standard_deviation_is_two_sigma_of_a_difference_of_means():
    noise = Noise(std={"box_AP": 0.2}, difference={}, source="")
    assert noise.allowed_difference("box_AP", num_ours=1, num_published=1) == pytest.approx(0.4 * math.sqrt(2))
    assert noise.allowed_difference("box_AP", num_ours=5, num_published=5) == pytest.approx(0.4 * math.sqrt(0.4))
    assert noise.allowed_difference("mask_AP", num_ours=1, num_published=1) is None


IMAGENET = {"images": 1281167}


@pytest.mark.parametrize(
    ("provenance", "method", "variant"),
    [
        ({"method": "moco_v2"}, "MoCo v2", None),
        ({"method": "detco"}, "DetCo", "plain"),
        ({"method": "detco", "rand_augment": True}, "DetCo", "AA"),
        ({"method": "detco", "rand_augment": None, "view_options": {"RAND_AUGMENT": True}}, "DetCo", "AA"),
        ({"method": "detco", "method_options": {"multi_level": False, "local": False}}, "MoCo v2", None),
        ({"method": "detco", "method_options": {"local": False}}, "DetCo ablation: MLS only (b)", None),
        ({"method": "detco", "method_options": {"multi_level": False}}, "DetCo ablation: GLC only (c)", None),
    ],
)
def test_provenance_names_the_published_row(provenance, method, variant):
    identity = identify(_run(**{"rand_augment": False, "epochs": 200.0, "dataset": IMAGENET, **provenance}))
    assert (identity.pretrain_method, identity.variant, identity.epochs) == (method, variant, 200)
    assert identity.obstacle is None


def test_every_name_that_the_rules_give_exists_in_the_published_rows():
    names = load_names()
    published = {(row.pretrain_method, row.variant) for row in load_reference().results}
    for rule in (*names["rules"], *names["released"], *names["weights"]):
        assert (rule["published"]["pretrain_method"], rule["published"].get("variant")) in published


@pytest.mark.parametrize(
    ("provenance", "reason"),
    [
        ({"rand_augment": None}, "does not say how it was pretrained"),
        ({"method": "detco", "dataset": IMAGENET}, "how many epochs"),
        ({"method": "detco", "epochs": 200}, "how many images"),
        ({"method": "detco", "epochs": 200, "dataset": IMAGENET, "rand_augment": None}, "does not say rand_augment"),
        ({"method": "detco", "epochs": 200, "dataset": {"images": 600}}, "pretrained on 600 images"),
        ({"method": "detco", "epochs": 200, "dataset": IMAGENET, "queue_size": 4096}, "queue_size 4096"),
        ({"method": "soco", "epochs": 100, "dataset": IMAGENET}, "no published row is known for method 'soco'"),
        ({"method": "moco_v2", "rand_augment": True, "epochs": 200, "dataset": IMAGENET}, "with these settings"),
    ],
)
def test_weights_that_are_not_the_published_ones_say_why(provenance, reason):
    assert reason in identify(_run(**{"rand_augment": False, **provenance})).obstacle


VOUCHED = "somebody's weights, imagenet-1K"


@pytest.mark.parametrize(
    ("method", "published"),
    [
        ("moco_v1", "MoCo v1"),
        ("moco_v2", "MoCo v2"),
        ("swav", "SwAV"),
        ("densecl", "DenseCL"),
        ("pixpro", "PixPro"),
        ("insloc", "InsLoc"),
    ],
)
def test_a_released_checkpoint_is_compared_if_its_user_vouches_for_the_images(method, published):
    identity = identify(_run(label=VOUCHED, method=method, epochs=800, source={"kind": "checkpoint"}))
    assert (identity.pretrain_method, identity.epochs, identity.obstacle) == (published, 800, None)
    doubted = identify(_run(method=method, epochs=800, source={"kind": "checkpoint"}))
    assert doubted.pretrain_method == published
    assert "on which images" in doubted.obstacle


def test_a_released_checkpoint_without_epochs_or_of_an_unknown_method_is_compared_with_nothing():
    assert "how many epochs" in identify(_run(label=VOUCHED, method="byol")).obstacle
    assert "method 'dino'" in identify(_run(label=VOUCHED, method="dino", epochs=800)).obstacle
    # DetCo's own files do not tell which of the two checkpoints they are.
    assert identify(_run(label=VOUCHED, method="detco", epochs=200)).pretrain_method is None


def test_weights_of_this_suite_need_their_own_record_whatever_the_label_says():
    identity = identify(_run(label=VOUCHED, method="moco_v2", epochs=200, dataset=IMAGENET))
    assert "does not say rand_augment" in identity.obstacle


@pytest.mark.parametrize(
    ("variant", "task", "recipe", "decay", "published"),
    [
        ("SoCo_FPN", "coco_maskrcnn_fpn_1x", "4conv1fc", 2.5e-5, "SoCo"),
        ("SoCo_FPN_Star", "coco_maskrcnn_fpn_1x", "4conv1fc", 2.5e-5, "SoCo*"),
        ("SoCo_FPN", "coco_maskrcnn_fpn_1x", "4conv1fc", 1e-4, None),
        ("SoCo_FPN", "coco_maskrcnn_fpn_1x", "moco", 2.5e-5, None),
        ("SoCo_C4", "coco_maskrcnn_fpn_1x", "4conv1fc", 2.5e-5, None),
        ("SoCo_C4", "coco_maskrcnn_c4_1x", "c4_extra_norm", 2.5e-5, "SoCo"),
        ("SoCo_C4", "voc0712_fasterrcnn_c4_24k", "c4_extra_norm", 1e-4, "SoCo"),
        ("SoCo_FPN", "voc0712_fasterrcnn_c4_24k", "c4_extra_norm", 1e-4, None),
    ],
)
def test_a_soco_checkpoint_is_its_published_row_only_under_the_published_settings(
    variant, task, recipe, decay, published
):
    run = _run(label=VOUCHED, task=task, recipe=recipe, decay=decay, method="soco", epochs=400, variant=variant)
    assert identify(run).pretrain_method == published


def test_torchvisions_weights_are_the_published_ones_of_sparse_rcnn_alone():
    path = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
    assert identify(_run(path=path, recipe="sparsercnn")).pretrain_method == "supervised_in1k"
    assert identify(_run(path=path, recipe="moco")).pretrain_method == "supervised_in1k (torchvision)"


def test_weights_known_by_their_address_need_no_provenance():
    assert identify(_run(path="")).pretrain_method == "random_init"
    msra = identify(_run(path="detectron2://ImageNetPretrained/MSRA/R-50.pkl"))
    assert msra.is_supervised
    assert msra.obstacle is None
