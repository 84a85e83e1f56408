"""What a run reports, and that an interruption does not show in it."""

import json
import re
from pathlib import Path

import pytest
import torch

from pretrain.launch import World
from pretrain.manifest import git_commit, hardware, versions, write_manifest
from pretrain.metrics import Pace, Reporter, Timing, Window, console_line

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
TIMING = Timing(images_per_second=812.04, data_wait_share=0.021, eta_seconds=3725.4)


def test_averages_are_means_over_the_interval_which_then_begins_anew() -> None:
    window = Window()
    for loss in (1.0, 2.0, 6.0):
        window.add({"loss": loss})
    assert window.averages(ALONE) == {"loss": 3.0}
    window.add({"loss": 8.0})
    assert window.averages(ALONE) == {"loss": 8.0}


def test_half_an_interval_survives_a_checkpoint() -> None:
    before, after = Window(), Window()
    before.add({"loss": 0.1})
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    before.add({"loss": 0.2})
    after.add({"loss": 0.2})
    assert after.averages(ALONE) == before.averages(ALONE)


def test_the_console_line_has_one_column_per_loss_family() -> None:
    averages = {"loss": 21.3373, "loss_gg/res2": 6.312, "loss_gg/res5": 6.4, "loss_gl/res5": 7.0, "top1_gg/res2": 0.5}
    line = console_line(120, 1000, 3, 0.0299, averages, TIMING, {"gpu_memory_gib": 12.34})
    assert line == (
        "epoch 3  step 120/1000  loss 21.3373  gg 6.31 6.40  gl 7.00  lr 0.0299  812.0 img/s  wait 2%  "
        "ETA 1:02:05  12.3 GiB"
    )


def test_a_resumed_reporter_removes_what_lies_beyond_its_step_and_half_a_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"step": 8, "lo')
    reporter = Reporter(tmp_path, start_step=4, total_steps=10)
    reporter.report(step=6, epoch=1, lr=0.1, averages={"loss": 1.5}, timing=TIMING)
    reporter.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[-1]["loss"] == 1.5
    assert lines[-1]["time"]["images_per_second"] == pytest.approx(812.04)
    assert list((tmp_path / "tensorboard").iterdir())


def test_pace_measures_images_waiting_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("pretrain.metrics.time.perf_counter", lambda: now[0])
    pace = Pace(32, torch.device("cpu"))
    for seconds in (100.0, 4.0):  # the first lap holds the start-up
        for _ in range(2):
            with pace.waiting():
                now[0] += 0.5
            pace.stepped()
        now[0] += seconds - 1.0
        timing = pace.lap(steps_left=10)
    assert timing == Timing(images_per_second=16.0, data_wait_share=0.25, eta_seconds=20.0)


def test_the_manifest_keeps_every_start(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    write_manifest(file, {"seed": 0}, step=0)
    write_manifest(file, {"seed": 0}, step=7)
    manifest = json.loads(file.read_text())
    assert [start["step"] for start in manifest["starts"]] == [0, 7]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT.*\+00:00", start["time"]) for start in manifest["starts"])


def test_the_manifest_holds_plain_text_only() -> None:
    described = {**versions(), **hardware(torch.device("cpu"))}
    assert {"torch", "torchvision", "detco", "cpu", "cpu_cores"} <= described.keys()
    assert all(type(value) in (str, int) for value in described.values()), "weights_only loading refuses subclasses"
    assert git_commit() is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", git_commit() or "")
