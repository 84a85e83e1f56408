"""suite.yaml -> jobs: what is combined, which config and weights a job gets, what is refused."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from transfer.suite.forecast import forecast
from transfer.suite.inputs import config_files
from transfer.suite.plan import Suite, SuiteError, job_ids, load_suite, make_jobs, train_words, with_weights

ROOT = Path(__file__).parents[2]
READY = sorted((ROOT / "configs/suites").glob("*.yaml"))
FILES = {
    "detco_paper": ("moco_v2", "detco"),
    "soco_paper": ("soco_c4", "soco_fpn"),
    "ranking_12k": ("mine",),
    "quick": ("detco",),
}
# weights x seeds summed over tasks, counted by hand from the tables that the files name
NUM_JOBS = {
    "detco_paper": 4 * (2 + 5 + 4 + 2 + 4 * 3 + 4 * 3 + 2 + 2 + 1) + 3,
    "soco_paper": 3 * (5 + 3 + 3 + 2 + 2 + 2 + 3 + 1),
    "ranking_12k": 4,
    "quick": 12,
}


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pkl"
    path.write_bytes(b"weights")
    return path


def write(folder: Path, text: str) -> Path:
    path = folder / "suite.yaml"
    path.write_text(text)
    return path


def suite_of(folder: Path, tasks: str, weights: str = "{random: {init: random}}", more: str = "") -> Suite:
    return load_suite(write(folder, f"output: {folder}/out\nweights: {weights}\ntasks: {tasks}\n{more}"))


def value_of(words: tuple[str, ...], key: str) -> str:
    return words[len(words) - 1 - words[::-1].index(key) + 1]


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_a_ready_suite_resolves_to_existing_configs_and_the_expected_number_of_jobs(
    path: Path, weights_file: Path
) -> None:
    suite = with_weights(load_suite(path), [f"{name}={weights_file}" for name in FILES[path.stem]])
    jobs = make_jobs(suite, only=(), num_gpus=8, auto_scale=False)
    assert len(jobs) == NUM_JOBS[path.stem]
    assert len({job.id for job in jobs}) == len(jobs)
    for job in jobs:
        assert Path(value_of(train_words(job), "--config-file")).is_file()


def test_every_suite_that_is_shipped_is_counted_here() -> None:
    assert {path.stem for path in READY} == set(NUM_JOBS)


def test_the_ranking_takes_about_seven_hours_on_eight_gpus_for_each_checkpoint(weights_file: Path) -> None:
    suite = with_weights(load_suite(ROOT / "configs/suites/ranking_12k.yaml"), [f"mine={weights_file}"])
    jobs = make_jobs(suite, only=(), num_gpus=8, auto_scale=False)
    # 24k x 0.537 + 12k x (0.584 + 0.261 + 0.205) seconds
    hours = [forecast(job, []).hours for job in jobs]
    assert sum(hour for hour in hours if hour is not None) == pytest.approx(25488 / 3600)


def test_jobs_are_weights_times_tasks_times_seeds_with_each_task_s_own_seeds_and_overrides(tmp_path: Path) -> None:
    suite = suite_of(
        tmp_path,
        "[coco_retinanet_12k, {task: voc0712_fasterrcnn_c4_24k, seeds: [3, 4], overrides: [TEST.EVAL_PERIOD, 7]}]",
        "{random: {init: random}, supervised: {init: supervised, label: theirs}}",
        "overrides: [SOLVER.GAMMA, 0.2]",
    )
    jobs = make_jobs(suite, only=(), num_gpus=8, auto_scale=True)
    assert [job.id for job in jobs] == [
        "coco_retinanet_12k__random__seed0",
        "coco_retinanet_12k__supervised__seed0",
        "voc0712_fasterrcnn_c4_24k__random__seed3",
        "voc0712_fasterrcnn_c4_24k__random__seed4",
        "voc0712_fasterrcnn_c4_24k__supervised__seed3",
        "voc0712_fasterrcnn_c4_24k__supervised__seed4",
    ]
    words = train_words(jobs[5])
    assert words[:2] == ("--config-file", str(ROOT / "configs/transfer/voc/faster_rcnn_r50_c4_24k_supervised.yaml"))
    assert {"--resume", "--auto-scale"} <= set(words)
    assert (value_of(words, "--num-gpus"), value_of(words, "SEED")) == ("8", "4")
    assert (value_of(words, "SOLVER.GAMMA"), value_of(words, "TEST.EVAL_PERIOD")) == ("0.2", "7")
    assert value_of(words, "TRANSFER.LABEL") == "theirs"
    assert value_of(words, "--output-dir") == str(tmp_path / "out/voc0712_fasterrcnn_c4_24k__supervised__seed4/run")
    assert "TEST.EVAL_PERIOD" not in train_words(jobs[0])


def test_only_chooses_jobs_without_changing_their_places(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, "[coco_retinanet_12k, coco_maskrcnn_fpn_1x/4conv1fc]", more="seeds: [0, 1]")
    jobs = make_jobs(suite, only=["*fpn_1x/4conv1fc__*seed1", "nothing"], num_gpus=8, auto_scale=False)
    assert [(job.id, job.index) for job in jobs] == [("coco_maskrcnn_fpn_1x-4conv1fc__random__seed1", 3)]


def test_a_file_of_the_command_line_fills_the_suite_s_weights_and_another_name_adds_a_row_to_every_task(
    tmp_path: Path, weights_file: Path
) -> None:
    suite = suite_of(
        tmp_path, "[{task: coco_retinanet_12k, weights: [detco]}]", "{random: {init: random}, detco: {label: DetCo}}"
    )
    suite = with_weights(suite, [f"detco={weights_file}", f"mine={weights_file}"])
    jobs = make_jobs(suite, only=(), num_gpus=8, auto_scale=False)
    assert [job.weights for job in jobs] == ["detco", "mine"]
    for job in jobs:
        assert value_of(train_words(job), "MODEL.WEIGHTS") == str(weights_file)
        assert job.inputs[str(weights_file)] == hashlib.sha256(b"weights").hexdigest()
    assert value_of(train_words(jobs[0]), "TRANSFER.LABEL") == "DetCo"
    assert "TRANSFER.LABEL" not in train_words(jobs[1])


def test_soco_weights_take_the_soco_config_where_the_task_has_one(tmp_path: Path, weights_file: Path) -> None:
    suite = suite_of(tmp_path, "[coco_maskrcnn_c4_1x, voc0712_fasterrcnn_c4_24k]", "{theirs: {init: soco}}")
    jobs = make_jobs(with_weights(suite, [f"theirs={weights_file}"]), only=(), num_gpus=8, auto_scale=False)
    configs = [Path(value_of(train_words(job), "--config-file")).name for job in jobs]
    assert configs == ["mask_rcnn_r50_c4_1x_soco.yaml", "faster_rcnn_r50_c4_24k_converted.yaml"]


def test_a_config_of_one_s_own_is_found_beside_the_suite_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my {x}").mkdir()
    (tmp_path / "my {x}/task_random.yaml").touch()
    suite = suite_of(tmp_path, "[{config: 'my {x}/task_{init}.yaml'}]")
    monkeypatch.chdir("/")
    (job,) = make_jobs(suite, only=(), num_gpus=0, auto_scale=False)
    assert job.id == "task__random__seed0"
    assert value_of(train_words(job), "--config-file") == str(tmp_path / "my {x}/task_random.yaml")


def test_the_iterations_of_a_job_are_the_published_ones_overridden_and_scaled(tmp_path: Path) -> None:
    tasks = "[coco_retinanet_12k, {task: coco_retinanet_1x, overrides: [SOLVER.MAX_ITER, 80]}]"
    suite = suite_of(tmp_path, tasks)
    as_published = make_jobs(suite, only=(), num_gpus=4, auto_scale=False)
    scaled = make_jobs(suite, only=(), num_gpus=4, auto_scale=True)
    assert [job.iterations for job in as_published] == [12000, 80]
    assert [job.iterations for job in scaled] == [24000, 160]


@pytest.mark.parametrize(
    ("tasks", "weights", "more", "message"),
    [
        ("[coco_retinanet_12kk]", "{a: {init: random}}", "", "did you mean coco_retinanet_12k"),
        ("[{task: coco_retinanet_12k, seed: [1]}]", "{a: {init: random}}", "", "did you mean seeds"),
        ("[{config: 'x.yaml'}]", "{a: {init: random}}", "", "must hold {init}"),
        ("[coco_retinanet_12k, coco_retinanet_12k]", "{a: {init: random}}", "", "is there twice"),
        ("[{task: coco_retinanet_12k, weights: [b]}]", "{a: {init: random}}", "", "'b' is not known"),
        ("[coco_retinanet_12k]", "{a: {init: xyz}}", "", "valid: random, supervised"),
        ("[coco_retinanet_12k]", "{a: {init: random, file: x.pkl}}", "", "takes no file"),
        ("[coco_retinanet_12k]", "{a__b: {init: random}}", "", "single _"),
        ("[coco_retinanet_12k]", "{a: {init: random}}", "seeds: [1, 1]", "different numbers"),
        ("[coco_retinanet_12k]", "{a: {init: random}}", "overrides: [SEED]", "KEY, VALUE"),
        ("[coco_retinanet_12k]", "{a: {init: random}}", "weigths: {}", "did you mean weights"),
        ("[]", "{}", "", "has no 'tasks'"),
        ("abc", "{a: {init: random}}", "", "tasks: expected a list, got 'abc'"),
        ("{a: 1}", "{a: {init: random}}", "", "tasks: expected a list"),
        ("[coco_retinanet_12k]", "[a]", "", "weights is ['a'], expected NAME: {init, file, label}"),
        ("[{task: coco_retinanet_12k, weights: 3}]", "{a: {init: random}}", "", "expected a list, got 3"),
        ("[coco_retinanet_12k]", "{a: {init: random}}", "output: [1]", "output: expected a path, got [1]"),
        ("[coco_retinanet_12k]", "{a: {init: random}}", "datasets_root: 3", "datasets_root: expected a path, got 3"),
    ],
)
def test_a_wrong_suite_file_is_refused_with_what_to_do(
    tmp_path: Path, tasks: str, weights: str, more: str, message: str
) -> None:
    with pytest.raises(SuiteError, match=re.escape(message)):
        suite_of(tmp_path, tasks, weights, more)


def test_iterations_that_are_no_number_are_refused_by_name(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, "[{task: coco_retinanet_12k, overrides: [SOLVER.MAX_ITER, abc]}]")
    with pytest.raises(SuiteError, match=r"task coco_retinanet_12k: SOLVER\.MAX_ITER is 'abc'"):
        make_jobs(suite, only=(), num_gpus=8, auto_scale=False)


def test_the_ids_of_a_suite_are_those_of_its_jobs_even_where_files_are_missing(tmp_path: Path) -> None:
    tasks, weights = "[coco_retinanet_12k, coco_retinanet_1x]", "{a: {init: random}, b: {init: supervised}}"
    suite = suite_of(tmp_path, tasks, weights, "seeds: [0, 1]")
    assert job_ids(suite) == [job.id for job in make_jobs(suite, only=(), num_gpus=8, auto_scale=False)]
    assert len(job_ids(with_weights(suite, ["c=lost.pkl"]))) == 12


def test_a_job_knows_the_content_of_its_config_and_of_all_its_bases(tmp_path: Path) -> None:
    for name, text in {
        "my_random": "_BASE_: [one.yaml, sub/two.yaml, lost.yaml]",
        "one": "A: !!python/tuple [1]",
        "sub/two": "_BASE_: ../three.yaml",
        "three": "_BASE_: my_random.yaml",  # in a circle
        "unrelated": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(text)
    suite = suite_of(tmp_path, "[{config: 'my_{init}.yaml'}]")

    def inputs() -> Mapping[str, str]:
        return make_jobs(suite, only=(), num_gpus=0, auto_scale=False)[0].inputs

    before = inputs()
    names = ("my_random", "one", "sub/two", "three")
    assert set(before) == {str(tmp_path / f"{name}.yaml") for name in names}
    for name in names:
        path = tmp_path / f"{name}.yaml"
        path.write_text(path.read_text() + "\n# other")
        after = inputs()
        assert {key for key in after if after[key] != before[key]} == {str(path)}
        before = after


@pytest.mark.d2
def test_the_files_of_a_config_are_those_that_detectron2_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    config = pytest.importorskip("detectron2.config").CfgNode
    opened: list[str] = []
    really_open = config._open_cfg
    monkeypatch.setattr(config, "_open_cfg", lambda name: opened.append(name) or really_open(name))
    for path in sorted((ROOT / "configs/transfer").rglob("*_random.yaml"))[::5]:
        opened.clear()
        config.load_yaml_with_base(str(path), allow_unsafe=False)
        assert {Path(name).resolve() for name in opened} == set(config_files(path))
        assert len(opened) > 1


def test_weights_without_a_file_are_all_named_at_once(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, "[coco_retinanet_12k]", "{a: {}, b: {init: soco}, random: {init: random}}")
    with pytest.raises(SuiteError, match="a, b; add --weights a=FILE --weights b=FILE"):
        make_jobs(suite, only=(), num_gpus=8, auto_scale=False)
    assert len(make_jobs(suite, only=["*__random__*"], num_gpus=8, auto_scale=False)) == 1


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("random=x.pkl", "takes no file"),
        ("x.pkl", "not NAME=FILE"),
        ("a__b=x.pkl", "not NAME=FILE"),
        ("a=", "not NAME"),
    ],
)
def test_a_wrong_weights_option_is_refused(tmp_path: Path, word: str, message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        with_weights(suite_of(tmp_path, "[coco_retinanet_12k]"), [word])


def test_a_missing_file_or_config_is_refused_by_name(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, "[coco_retinanet_12k, {config: 'x_{init}.yaml'}]")
    with pytest.raises(SuiteError, match=r"no file .*x_random.yaml"):
        make_jobs(suite, only=(), num_gpus=8, auto_scale=False)
    with pytest.raises(SuiteError, match=r"no file lost.pkl; make it with: convert-to-d2"):
        make_jobs(with_weights(suite, ["a=lost.pkl"]), only=["*12k__a__*"], num_gpus=8, auto_scale=False)
