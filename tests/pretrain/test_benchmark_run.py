"""`tools/benchmark_run.py`: it measures the real trainer and loader, and counts what it says it counts."""

import itertools
import json
import re
import time
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"
TOY_CONFIG = """METHOD: {NAME: toy, QUEUE_SIZE: 12}
SOLVER: {BASE_LR: 0.1}
"""
SMALL = ["--cpu", "--methods", "toy", "--batch-size", "6", "--workers", "0", "--rounds", "2", "--seconds", "0"]


@pytest.fixture
def load(load_tool, monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return load_tool


@pytest.fixture
def toy(load, monkeypatch, tmp_path, _toy_registered, one_thread_and_quiet_logs):
    """benchmark_run for the toy method, whose published config is a folder of one."""
    tool = load("benchmark_run")
    import measured_run

    (tmp_path / "configs/pretrain").mkdir(parents=True)
    (tmp_path / "configs/pretrain/toy_r50_1ep.yaml").write_text(TOY_CONFIG)
    monkeypatch.setattr(measured_run, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "DISTINCT_PHOTOS", 5)
    return tool


def figures(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_rate_counts_the_batches_between_the_first_request_after_the_warm_ones_and_the_last(load, monkeypatch):
    rates = load("benchmark_rates")
    clock = iter([0, 10, 30, 31, 33, 34, 36, 40])
    monkeypatch.setattr(rates.time, "perf_counter", lambda: next(clock))
    timed = rates.Timed(itertools.count(), warm=2, seconds=5)
    assert list(timed) == [0, 1, 2, 3, 4, 5]
    assert timed.num_handed_on == 6
    assert timed.rate(12) == pytest.approx(12 * 4 / 6)  # 4 batches from 30 to 36


def test_three_batches_are_counted_at_least(load):
    timed = load("benchmark_rates").Timed(itertools.count(), warm=1, seconds=0)
    assert list(timed) == [0, 1, 2, 3]


def test_a_run_has_figures_of_files_device_and_loader_and_their_ratio(toy, capsys):
    assert toy.main([*SMALL, "--parts", "train"]) == 0
    found = {(figure["figure"], figure["name"].split(";")[0]): figure for figure in figures(capsys)}
    ratio = found.pop(("E1", "E1 / min(E2, E3)"))
    assert list(found) == [("E1", "from JPEG files"), ("E2", "from the device"), ("E3", "loader alone")]
    for figure in found.values():
        assert figure["unit"] == "images/s"
        assert figure["runs"] == 2
        assert figure["name"].endswith("; batch 6, fp32, 0 workers")
        assert "bar" not in figure
    assert 0 < ratio["value"] < 5


def test_end_to_end_is_slower_than_the_loader_where_the_loader_is_slow(toy, capsys, monkeypatch):
    import pretrain.data

    read = pretrain.data.PretrainDataset.__getitem__

    def slow(dataset, pair):
        time.sleep(0.01)
        return read(dataset, pair)

    monkeypatch.setattr(pretrain.data.PretrainDataset, "__getitem__", slow)
    assert toy.main([*SMALL, "--parts", "train"]) == 0
    e1, e2, e3, _ = (figure["value"] for figure in figures(capsys))
    assert e1 < 100
    assert e3 < 100
    assert e2 > 100


def test_what_is_changed_in_the_config_is_in_the_name_and_takes_the_bars_away(toy, load, capsys, monkeypatch):
    import benchmark_rates

    monkeypatch.setitem(benchmark_rates.CONFIGS_WITH_BARS, "toy", [])
    words = [*SMALL, "--parts", "train", "--rounds", "1"]
    assert toy.main(words) == 0
    assert [figure.get("bar") for figure in figures(capsys)] == [None, None, None, ">= 0.95"]
    assert toy.main(["METHOD.WIDTH", "4", *words]) == 0
    for figure in figures(capsys):
        assert figure["name"].endswith("METHOD.WIDTH 4")
        assert "bar" not in figure


def test_told_to_end_it_tells_what_it_knows(toy, capsys, monkeypatch):
    import benchmark_rates

    rate, calls = benchmark_rates.Timed.rate, itertools.count(1)

    def ending(timed, batch_size):
        if next(calls) == 6:  # after the first step, and the three rates of the first round
            raise SystemExit(143)
        return rate(timed, batch_size)

    monkeypatch.setattr(benchmark_rates.Timed, "rate", ending)
    with pytest.raises(SystemExit):
        toy.main([*SMALL, "--parts", "train"])
    assert [figure["runs"] for figure in figures(capsys)] == [1, 1, 1, 1]


def test_a_profile_names_what_the_steps_do(toy, tmp_path, capsys):
    assert toy.main([*SMALL, "--parts", "train", "--rounds", "1", "--profile", str(tmp_path / "profile.txt")]) == 0
    assert re.search(r"aten::convolution", (tmp_path / "profile.txt").read_text())


@pytest.mark.parametrize("method", ["moco_v2", "soco_fpn"])
def test_the_reference_pipeline_makes_views_of_the_sizes_of_ours(load, tmp_path, method, monkeypatch):
    measured_run = load("measured_run")
    monkeypatch.setattr(measured_run, "REFERENCE_BATCH", 2)
    args = load("benchmark_run").parse(["--cpu", "--methods", method, "--workers", "0"])
    measured_run.write_files(tmp_path / "photos", two_photos(load), 5)
    images = measured_run.photos_of(tmp_path)
    assert len(images) == 5
    cfg = measured_run.config_of(method, args)
    views = next(iter(measured_run.make_reference_loader(cfg, images, pin_memory=False)))
    sizes = {"moco_v2": [224, 224], "soco_fpn": [224, 224, 112]}[method]
    assert [tuple(view.shape) for view in views] == [(measured_run.REFERENCE_BATCH, 3, side, side) for side in sizes]
    assert all(view.dtype == torch.float32 for view in views)


def two_photos(load):
    return load("drawn_photos").draw_photos(2, sizes=((96, 64),))


def test_made_proposals_fit_the_images(load, tmp_path):
    measured_run = load("measured_run")
    measured_run.write_files(tmp_path / "photos", two_photos(load), 4)
    images = measured_run.photos_of(tmp_path)
    store = measured_run.make_proposals(images, tmp_path / "proposals")
    assert store.images_digest == images.digest
    for index in range(4):
        assert len(store.of(index, 96, 64).boxes_image_px) == measured_run.BOXES_PER_IMAGE


def test_a_listing_has_as_many_readable_paths_as_wanted_and_is_old_enough_to_be_cached(load, tmp_path):
    start = load("benchmark_start")
    listing = start.write_listing(tmp_path, 100, two_photos(load)[0])
    images = start.list_images(listing, tmp_path / "cache")
    assert len(images) == 100
    assert len(images.read(99)) > 1000
    assert time.time() - listing.stat().st_mtime > 60


@pytest.fixture
def started(load, tmp_path, monkeypatch):
    """`started(code, *words)`: `start_once` with a stand-in for the package pretrain that runs `code`."""
    start, run = load("benchmark_start"), load("benchmark_run")
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain/__init__.py").touch()  # without, a real package anywhere on PYTHONPATH would come first
    (tmp_path / "images.txt").touch()
    monkeypatch.setattr(start, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    args = run.parse(["--cpu", "--methods", "moco_v2", "--batch-size", "2", "VIEWS.GLOBAL_SIZE", "32"])

    def started(code, *words):
        (tmp_path / "pretrain/__main__.py").write_text(f"import sys, time\n{code}\n")
        return start.start_once(tmp_path / "images.txt", args, *words)

    return started


def test_a_start_is_timed_to_what_it_says_and_then_ended(started):
    code = "print('3 begin'); time.sleep(0.3); print('step 1/9'); time.sleep(60)"
    started_at = time.monotonic()
    begun, done = started(code, "begin", "step 1/")
    assert begun > 0
    assert 0.25 < done - begun < 10
    assert time.monotonic() - started_at < 30


def test_a_start_is_given_the_sizes_and_the_list_and_says_what_went_wrong(started, tmp_path):
    with pytest.raises(RuntimeError, match=r"did not say 'begin', but:\n.*refused: ") as error:
        started("print('refused:', *sys.argv)", "begin")
    assert f"DATA.ROOT {tmp_path}/images.txt LOG.EVERY_STEPS 1" in str(error.value)
    config = (tmp_path / "config.yaml").read_text()
    assert "BATCH_SIZE_TOTAL: 2" in config
    assert "GLOBAL_SIZE: 32" in config


def test_a_run_says_what_its_start_is_timed_by(load, run_here, tmp_path):
    start = load("benchmark_start")
    said = run_here(tmp_path / "run", **{"LOG.EVERY_STEPS": "1"}).stdout
    assert 0 < said.index(start.FIRST_STEP_BEGINS) < said.index(start.FIRST_STEP_DONE)


def test_a_worker_has_memory_of_its_own_that_hardly_grows(load, tmp_path):
    start = load("benchmark_start")
    listing = start.write_listing(tmp_path, 5000, load("drawn_photos").draw_photos(1, sizes=((32, 32),))[0])
    early, late = start.worker_memory(start.list_images(listing, tmp_path / "cache"), 2048)
    assert 1 < early < 500
    assert abs(late - early) < start.FLAT_MB


def test_a_method_without_a_published_config_is_refused(load, capsys, monkeypatch):
    tool = load("benchmark_run")
    monkeypatch.setattr(tool, "DISTINCT_PHOTOS", 1)
    assert tool.main(["--cpu", "--methods", "glc_v9", "--parts", "train"]) == 2
    assert "there is no configs/pretrain/glc_v9_r50_*ep.yaml" in capsys.readouterr().err
