"""Finding proposals over cores, shards and interruptions; the FIFO among the images makes a search wait for ever."""

import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import PIL
import pytest
from PIL import Image

from detco.views.photo import decode
from pretrain.images import list_images
from pretrain.launch import StopRequest
from pretrain.proposals import folder as folder_module
from pretrain.proposals import generate as generate_module
from pretrain.proposals.backends import SearchParams, propose
from pretrain.proposals.filters import FilterParams, filter_boxes
from pretrain.proposals.folder import ProposalFolder
from pretrain.proposals.generate import Shard, generate
from pretrain.proposals.search import SearchError, Stopped, find_all
from pretrain.proposals.store import STORE_NAME, ProposalStore
from pretrain.proposals.summary import summary

REPOSITORY = Path(__file__).parents[2]
NUM_IMAGES = 9
STUCK = "photo_007.jpg"  # in the last but one of five parts of two

# As the command, with smaller parts.
SCRIPT = """
import importlib.util, sys
from pretrain.proposals import folder
folder.IMAGES_PER_PART = 2
spec = importlib.util.spec_from_file_location("tool", sys.argv[1])
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
sys.exit(tool.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def few_photos(photo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few photos, small ones, so that a search takes a second. Read only."""
    target = tmp_path_factory.mktemp("few")
    for photo in sorted(photo_dir.iterdir())[:NUM_IMAGES]:
        Image.open(photo).resize((72, 64)).save(target / photo.name, quality=90)
    return target


@pytest.fixture(scope="module")
def expected(few_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The store of them, made by one worker without interruption in one part."""
    return run(few_photos, tmp_path_factory.mktemp("expected"), num_workers=1)


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("generate_proposals")


@pytest.fixture
def stuck(few_photos: Path, tmp_path: Path) -> Path:
    """The same folder, but reading one image waits for ever."""
    target = tmp_path / "stuck"
    shutil.copytree(few_photos, target)
    (target / STUCK).unlink()
    os.mkfifo(target / STUCK)
    return target


@pytest.fixture
def parts_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "IMAGES_PER_PART", 2)


def make(photos: Path, out: Path, *, shard: str = "0/1", num_workers: int = 2) -> ProposalStore | None:
    return generate(
        list_images(photos), out, SearchParams(), FilterParams(), shard=Shard.parse(shard), num_workers=num_workers
    )


def run(photos: Path, out: Path, **options: int) -> bytes:
    """Make a store; its bytes."""
    assert make(photos, out, **options)
    assert [path.name for path in out.iterdir()] == [STORE_NAME], "something was left behind"
    return (out / STORE_NAME).read_bytes()


def wait_until(is_so: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def part_files(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("parts/part-*"))


def when_waiting(out: Path, act: Callable[[], None]) -> threading.Thread:
    """Act as soon as all parts before the stuck image are there."""

    def watch() -> None:
        wait_until(lambda: len(part_files(out)) == 3)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_store_holds_what_search_and_filters_give_for_the_decoded_image(few_photos: Path, tmp_path: Path) -> None:
    store = make(few_photos, tmp_path / "out")
    assert store
    num_duplicates = 0
    for index, photo in enumerate(sorted(few_photos.iterdir())):
        pixels = decode(photo.read_bytes()).permute(1, 2, 0).numpy()
        kept = filter_boxes(propose(np.ascontiguousarray(pixels), SearchParams()), 72, 64, FilterParams())
        found = store.of(index, 72, 64)
        np.testing.assert_array_equal(found.boxes_image_px, kept.boxes)
        np.testing.assert_array_equal(found.multiplicity, kept.multiplicity)
        assert store.entry(index).stage == kept.stage
        num_duplicates += int((kept.multiplicity > 1).sum())
    assert num_duplicates, "the photos are too plain to try this with"


def test_bytes_are_the_same_for_one_and_more_workers(few_photos: Path, expected: bytes, tmp_path: Path) -> None:
    assert run(few_photos, tmp_path / "out", num_workers=3) == expected


@pytest.mark.usefixtures("parts_of_two")
def test_bytes_are_the_same_for_any_shards_and_the_last_to_end_joins_them(
    few_photos: Path, expected: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert make(few_photos, tmp_path, shard="2/3") is None
    assert part_files(tmp_path) == ["part-00002.safetensors"]
    assert "4 of 5 parts of other shards are not" in caplog.text
    assert make(few_photos, tmp_path, shard="2/3") is None
    assert make(few_photos, tmp_path, shard="0/3") is None
    assert make(few_photos, tmp_path, shard="1/3")
    assert (tmp_path / STORE_NAME).read_bytes() == expected
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("text", ["", "3", "1/1", "4/4", "-1/2", "1/2/3", "a/b", "0/0", "1.0/2"])
def test_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not i/n with 0 <= i < n"):
        Shard.parse(text)


def descendants(pid: int) -> list[int]:
    """All processes that `pid` has started, and those they have."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    found = [pid]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found[1:]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.usefixtures("parts_of_two")
def test_two_at_once_then_one_killed_and_one_interrupted_and_the_same_command_goes_on(
    few_photos: Path, stuck: Path, expected: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    out = tmp_path / "out"
    command = [
        *(sys.executable, "-c", SCRIPT, str(REPOSITORY / "tools/generate_proposals.py")),
        *(str(stuck), "-o", str(out), "--workers", "2"),
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    pair = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        for _ in range(2)
    ]
    families = [[], []]
    try:
        # Both have fork servers and workers, and one of the workers reads the FIFO.
        wait_until(lambda: len(part_files(out)) == 3)
        wait_until(lambda: all(len(descendants(process.pid)) >= 4 for process in pair))
        families = [descendants(process.pid) for process in pair]
        pair[0].kill()  # as for want of memory
        os.killpg(pair[1].pid, signal.SIGINT)  # as Ctrl-C does
        assert pair[0].wait(20) == -signal.SIGKILL
        _, complaint = pair[1].communicate(timeout=20)
        assert pair[1].returncode == 130
        assert "stopped by signal 2; what is finished is kept: the same command goes on\n" in complaint
        wait_until(lambda: not any(is_alive(pid) for family in families for pid in family), seconds=10)
    finally:
        for process in pair:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert part_files(out) == [f"part-0000{part}.safetensors" for part in range(3)]
    assert not (out / STORE_NAME).exists()
    (stuck / STUCK).unlink()
    shutil.copy(few_photos / STUCK, stuck)
    assert run(stuck, out) == expected
    assert "proposals: 3 images to search" in caplog.text, "finished parts were made again"


@pytest.mark.usefixtures("parts_of_two")
def test_sigterm_ends_it_soon_even_if_a_disk_does_not_answer(stuck: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = set(multiprocessing.active_children())
    sent_s = []

    def send() -> None:
        sent_s.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    watch = when_waiting(out, send)
    with pytest.raises(Stopped, match="stopped by signal 15; what is finished is kept") as stopped:
        make(stuck, out)
    assert time.monotonic() - sent_s[0] < 10
    assert stopped.value.signal_number == 15
    wait_until(lambda: set(multiprocessing.active_children()) <= before, seconds=10)  # or the program could not end
    assert len(part_files(out)) == 3
    watch.join()


@pytest.mark.usefixtures("parts_of_two")
def test_killed_worker_is_reported_with_the_remedy(stuck: Path, tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())

    def kill_workers() -> None:
        for worker in set(multiprocessing.active_children()) - before:
            worker.kill()

    watch = when_waiting(tmp_path / "out", kill_workers)
    with pytest.raises(SearchError, match=r"a worker process was killed .* fewer --workers, now 2.*goes on"):
        make(stuck, tmp_path / "out")
    watch.join()


def test_failure_of_the_search_names_the_image(few_photos: Path) -> None:
    broken = SearchParams()
    object.__setattr__(broken, "scale", "three")  # past its own checks
    with (
        StopRequest() as stop,
        pytest.raises(SearchError, match=r"the search fails on .*photo_000\.jpg: \w+Error: "),
    ):
        next(find_all(list_images(few_photos), [0], broken, FilterParams(), num_workers=1, stop=stop))


def test_unreadable_rotated_and_overlong_images_are_kept_as_they_are_and_told(few_photos: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a_cut.jpg").write_bytes((few_photos / "photo_000.jpg").read_bytes()[:500])
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.open(few_photos / "photo_001.jpg").save(photos / "b_turned.jpg", exif=exif)
    Image.new("RGB", (65_536, 32)).save(photos / "c_long.png")
    Image.new("RGB", (65_535, 32)).save(photos / "d_just.png")
    images = list_images(photos)
    store = make(photos, tmp_path / "out")
    assert store
    assert store.columns.sizes.tolist() == [[0, 0], [64, 72], [65_536, 32], [65_535, 32]]
    assert np.diff(store.columns.offsets).tolist()[0::2] == [0, 0]
    assert len(store.of(1, 64, 72).boxes_image_px)
    assert store.of(3, 65_535, 32).boxes_image_px.tolist() == [[0, 0, 65_535, 32]]
    counts = store.header["counts"]
    assert (counts["unreadable"], counts["too_long"], sum(counts["stages"])) == (1, 1, 2)
    text = summary(store, images)
    assert f"unreadable: 1 images (training replaces them): {photos}/a_cut.jpg" in text
    assert f"a side is above 65,535 px: 1 images: {photos}/c_long.png" in text


def test_summary_counts_boxes_and_stages(few_photos: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(few_photos, photos)
    Image.new("RGB", (64, 64), "red").save(photos / "z_plain.png")  # its one region is the whole image: relaxed
    Image.new("RGB", (200, 40), "red").save(photos / "z_strip.png")  # likewise, but too oblong for all but the last
    Image.new("RGB", (20, 20), "red").save(photos / "z_tiny.png")
    store = make(photos, tmp_path / "out")
    assert store
    entries = [store.entry(index) for index in range(len(store))]
    assert [entry.stage for entry in entries[-3:]] == [1, 2, 3]
    stages = [sum(entry.stage == stage for entry in entries) for stage in range(4)]
    num_boxes = sum(len(entry.multiplicity) for entry in entries)
    num_all = sum(int(entry.multiplicity.sum()) for entry in entries)
    text = summary(store, list_images(photos))
    assert f"12 images, {num_boxes / 12:.1f} boxes per image ({num_all / 12:.1f} with duplicates)" in text
    assert f"filters: {stages[0]} images with boxes that pass; of those without, {stages[1]} take boxes of any" in text
    assert f"{stages[2]} of any shape, {stages[3]} none" in text


def test_lost_disk_is_not_taken_for_unreadable_images(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(20):
        (photos / f"{index:02}.jpg").touch()
    with pytest.raises(SearchError, match=r"20 images in a row cannot be read, the first is .*00\.jpg; check that"):
        make(photos, tmp_path / "out")
    assert part_files(tmp_path / "out") == []


@pytest.mark.usefixtures("parts_of_two")
def test_damaged_part_is_made_again(few_photos: Path, expected: bytes, tmp_path: Path) -> None:
    make(few_photos, tmp_path, shard="0/2")
    part = tmp_path / "parts/part-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    assert run(few_photos, tmp_path) == expected


@pytest.mark.usefixtures("parts_of_two")
def test_damaged_part_of_another_shard_is_named_and_made_again_by_that_shard(
    few_photos: Path, expected: bytes, tmp_path: Path
) -> None:
    make(few_photos, tmp_path, shard="0/2")
    part = tmp_path / "parts/part-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(SearchError, match=r"part-00002\.safetensors is not .*The shard that made it makes it again"):
        make(few_photos, tmp_path, shard="1/2")
    assert make(few_photos, tmp_path, shard="0/2")
    assert (tmp_path / STORE_NAME).read_bytes() == expected


@pytest.mark.usefixtures("parts_of_two")
@pytest.mark.parametrize("late", ["part", "part, and the folder stays", "merge"])
def test_one_that_another_overtakes_takes_its_store(
    few_photos: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    def overtake() -> None:
        (tmp_path / STORE_NAME).write_bytes(expected)
        if late == "part, and the folder stays":  # the other could not remove the folder while this wrote into it
            for name in part_files(tmp_path):
                (tmp_path / "parts" / name).unlink()
        else:
            shutil.rmtree(tmp_path / "parts")

    name = "merge" if late == "merge" else "write_part"
    original = getattr(ProposalFolder, name)

    def overtaken(*args: object) -> object:
        if late == "merge" or args[1] == 3:
            overtake()
        return original(*args)

    monkeypatch.setattr(ProposalFolder, name, overtaken)
    assert run(few_photos, tmp_path) == expected


@pytest.fixture
def finished(few_photos: Path, expected: bytes, tmp_path: Path) -> Iterator[Path]:
    """A finished folder, which nothing may change."""
    (tmp_path / STORE_NAME).write_bytes(expected)
    yield tmp_path
    assert (tmp_path / STORE_NAME).read_bytes() == expected


def test_finished_folder_says_so(
    few_photos: Path, finished: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / "parts").mkdir()  # left by one that was killed after the merge
    assert tool.main([str(few_photos), "-o", str(finished)]) == 0
    assert "finished already\n" in capsys.readouterr().out
    assert not (finished / "parts").exists()


def refusal(tool: ModuleType, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert tool.main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def test_finished_folder_of_other_parameters_versions_or_images_is_refused_with_what_differs(
    few_photos: Path,
    photo_dir: Path,
    finished: Path,
    tool: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = refusal(tool, capsys, few_photos, "-o", finished, "--scale", "500", "--max-side", "256")
    assert "search.max_side null there, 256 here; search.scale 300.0 there, 500.0 here" in text
    assert f"images.count {NUM_IMAGES} there, 24 here; images.digest" in refusal(
        tool, capsys, photo_dir, "-o", finished
    )
    monkeypatch.setattr(PIL, "__version__", "1.1.7")
    assert '"1.1.7" here. Ask for the same' in refusal(tool, capsys, few_photos, "-o", finished)


@pytest.mark.usefixtures("parts_of_two")
def test_unfinished_folder_of_other_parameters_is_refused_too(
    few_photos: Path, tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    make(few_photos, tmp_path, shard="0/5")
    text = refusal(tool, capsys, few_photos, "-o", tmp_path, "--min-size", "10", "--shard", "1/5")
    assert "search.min_size 100 there, 10 here" in text
    (tmp_path / "parts/record.json").write_text("{")
    assert "record.json is damaged" in refusal(tool, capsys, few_photos, "-o", tmp_path)


def test_wrong_words_are_refused_before_any_work(
    few_photos: Path,
    tmp_path: Path,
    tool: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    assert "no backend 'magic'" in refusal(tool, capsys, few_photos, "-o", out, "--backend", "magic")
    assert "--workers is 0" in refusal(tool, capsys, few_photos, "-o", out, "--workers", "0")
    assert "shard '2/2' is not i/n" in refusal(tool, capsys, few_photos, "-o", out, "--shard", "2/2")
    assert "does not exist" in refusal(tool, capsys, tmp_path / "nowhere", "-o", out)
    file = few_photos / "photo_000.jpg"
    assert f"cannot write to {file}/parts" in refusal(tool, capsys, few_photos, "-o", file)
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)  # as if it were not installed
    assert "pip install" in refusal(tool, capsys, few_photos, "-o", out)
    assert not out.exists()


def test_disk_that_is_too_full_is_refused_before_any_work(
    few_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "BYTES_PER_IMAGE", 2**60)
    with pytest.raises(ValueError, match=r"MB left, and the proposals of 9 images take about .* MB"):
        make(few_photos, tmp_path)


@pytest.mark.usefixtures("parts_of_two")
def test_part_that_cannot_be_written_fails_with_1_and_keeps_the_others(
    few_photos: Path, tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "parts/part-00002.safetensors").mkdir(parents=True)
    assert tool.main([str(few_photos), "-o", str(tmp_path)]) == 1
    complaint = capsys.readouterr().err
    assert f"error: cannot write to {tmp_path}: [Errno 21]" in complaint
    assert "the same command goes on" in complaint
    assert len(part_files(tmp_path)) == 3


def test_progress_has_a_pace_and_an_eta(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = generate_module.Progress("proposals, shard 0/4", 3000)
    clock[0] += 60  # the start-up
    for _ in range(1000):
        progress.count()
        clock[0] += 0.02
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3, "one every five seconds"
    assert lines[1] == "proposals, shard 0/4: 503/3,000 images, 50.0 images/s, ETA 0:00:50"
