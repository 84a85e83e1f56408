"""What all benchmarks share: the JSON line of a figure, and measuring by turns."""

import datetime
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def common(load_tool):
    return load_tool("benchmarking")


@pytest.fixture(scope="module")
def drawn(load_tool):
    return load_tool("drawn_photos")


class Clock:
    """Time that passes only when somebody works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_figure_is_one_json_line_with_median_range_and_machine(common, capsys):
    figure = common.summarise([4.0, 1.0, 2.0], figure="V2", name="host half", unit="x", device=CPU, bar=">= 1.5")
    figure.print()
    (line,) = capsys.readouterr().out.splitlines()
    content = json.loads(line)
    assert [content[key] for key in ("value", "min", "max", "runs")] == [2.0, 1.0, 4.0, 3]
    assert [content[key] for key in ("figure", "method", "bar")] == ["V2", "all", ">= 1.5"]
    assert content["machine"] == common.machine_name(CPU)
    assert content["torch"] == torch.__version__
    assert datetime.date.fromisoformat(content["date"]) <= datetime.date.today()
    assert common.Figure.from_json(line) == figure


def test_a_figure_without_a_bar_says_nothing_of_one(common):
    figure = common.summarise([1234.5678], figure="V1", name="decode", unit="images/s", device=CPU)
    assert "bar" not in json.loads(figure.to_json())
    assert json.loads(figure.to_json())["value"] == 1234.6
    assert figure.passes is None


@pytest.mark.parametrize(
    ("bar", "value", "passes"),
    [(">= 6", 6.0, True), (">= 6", 5.99, False), ("<= 1.10", 1.1, True), ("<= 1.10", 1.11, False)],
)
def test_a_bar_is_passed_from_the_right_side(common, bar, value, passes):
    figure = common.summarise([value], figure="S1", name="step / bound", unit="x", device=CPU, bar=bar)
    assert figure.passes is passes


def test_what_is_no_figure_is_refused(common):
    with pytest.raises(ValueError, match=r"bar is '> 6'; it must be like"):
        common.summarise([1.0], figure="V2", name="n", unit="x", device=CPU, bar="> 6")
    with pytest.raises(ValueError, match="V2 n is nan after 1 runs"):
        common.summarise([float("nan")], figure="V2", name="n", unit="x", device=CPU)
    for line in ("hello", '{"figure": "V2"}', "[]"):
        with pytest.raises(ValueError, match="not the JSON line of a figure"):
            common.Figure.from_json(line)


def test_contestants_take_turns_and_every_other_round_goes_backwards(common):
    clock, order = Clock(), []

    def work(name, seconds):
        def run():
            order.append(name)
            clock.now += seconds

        return run

    contestants = {"slow": work("slow", 2.0), "fast": work("fast", 0.25)}
    seconds = common.alternate(contestants, rounds=2, min_seconds=1.0, device=CPU, clock=clock)
    assert order == ["slow", "fast", "slow", *["fast"] * 4, *["fast"] * 4, "slow"]
    assert seconds == {"slow": [2.0, 2.0], "fast": [0.25, 0.25]}
    assert common.ratios(seconds["slow"], seconds["fast"]) == [8.0, 8.0]
    assert common.rates(16, seconds["fast"]) == [64.0, 64.0]


def test_the_first_call_of_each_is_not_measured(common):
    clock, costs = Clock(), iter([100.0, 1.0, 3.0])

    def work():
        clock.now += next(costs)

    assert common.alternate({"one": work}, rounds=2, min_seconds=0, device=CPU, clock=clock) == {"one": [1.0, 3.0]}
    with pytest.raises(ValueError, match="rounds is 0"):
        common.alternate({}, rounds=0, min_seconds=0, device=CPU)


def test_drawn_photos_have_the_size_of_those_of_imagenet_and_are_always_the_same(drawn):
    photos = drawn.draw_photos(4)
    assert [Image.open(io.BytesIO(photo)).size for photo in photos] == list(drawn.IMAGENET_SIZES)
    assert 95_000 < np.mean([len(photo) for photo in photos]) < 120_000
    assert drawn.draw_photos(4) == photos
    assert len(set(photos)) == 4
    assert re.fullmatch(r"4 photos of 0.18 megapixels and 1\d\d KB in the mean", drawn.describe(photos))


def test_photos_of_a_folder_are_spread_over_it(drawn, photo_dir):
    paths = sorted(photo_dir.iterdir())
    assert drawn.read_photos(photo_dir, 3) == [paths[index].read_bytes() for index in (0, 12, 23)]
    assert len(drawn.read_photos(photo_dir, 99)) == len(paths)


def test_a_folder_without_usable_photos_is_refused_with_the_reason(drawn, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        drawn.read_photos(tmp_path / "nowhere", 4)
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(ValueError, match=r"no \.jpg or \.jpeg below"):
        drawn.read_photos(tmp_path, 4)
    (tmp_path / "cut.JPG").write_bytes(drawn.draw_photos(1)[0][:5000])
    with pytest.raises(ValueError, match=r"cut\.JPG: .*remove it or give another folder"):
        drawn.read_photos(tmp_path, 4)
