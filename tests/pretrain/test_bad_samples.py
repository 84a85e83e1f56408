import json
import logging
from pathlib import Path

import pytest

from pretrain.bad_samples import BadSample, BadSampleLog, TooManyBadSamples


def bad(number: int) -> BadSample:
    return BadSample(f"/data/{number}.jpg", "ValueError: broken", f"/data/{number + 1}.jpg")


def test_each_file_is_written_once_over_batches_and_resumed_runs(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    log = BadSampleLog(path, 1000)
    log.add([bad(1), bad(1)], 100)
    log.add([bad(2), bad(1)], 200)
    BadSampleLog(path, 1000).add([bad(2), bad(3)], 100)
    assert [json.loads(line)["path"] for line in path.read_text().splitlines()] == [f"/data/{i}.jpg" for i in (1, 2, 3)]
    assert json.loads(path.read_text().splitlines()[0]) == bad(1)._asdict()
    assert log.num_bad == 4


def test_no_file_is_made_without_a_bad_sample(tmp_path: Path) -> None:
    BadSampleLog(tmp_path / "bad_samples.jsonl", 1000).add([], 100)
    assert list(tmp_path.iterdir()) == []


def test_line_cut_short_by_a_kill_is_dropped_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    BadSampleLog(path, 1000).add([bad(1), bad(2)], 100)
    path.write_text(path.read_text()[:-20])
    BadSampleLog(path, 1000).add([bad(2)], 100)
    assert [json.loads(line)["path"] for line in path.read_text().splitlines()] == ["/data/1.jpg", "/data/2.jpg"]


def test_one_warning_above_one_in_a_thousand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = BadSampleLog(tmp_path / "bad_samples.jsonl", 5000)
    log.add([bad(1)], 1000)
    assert caplog.records == []
    log.add([bad(2)], 1999)
    log.add([bad(3)], 2000)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "2 of 1,999 samples could not be read (2 files of 5,000), more than 0.1 %" in caplog.text


def test_run_stops_above_five_per_cent_with_counts_names_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    log = BadSampleLog(path, 900)
    log.add([bad(i) for i in range(30)], 600)  # 5 % exactly
    with pytest.raises(
        TooManyBadSamples, match=r"31 of 601 .*31 files of 900.*/data/0\.jpg .*\.\.\.\. Repair or remove"
    ):
        log.add([bad(30)], 601)
    assert len(path.read_text().splitlines()) == 31, "everything is on record when the run stops"


def test_a_handful_of_bad_files_at_the_start_does_not_stop_the_run(tmp_path: Path) -> None:
    log = BadSampleLog(tmp_path / "bad_samples.jsonl", 900)
    log.add([bad(i) for i in range(19)], 32)
    with pytest.raises(TooManyBadSamples):
        log.add([bad(20)], 64)
