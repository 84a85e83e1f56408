import json
import pickle
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from pretrain.proposals.columns import Columns, ImageProposals, ProposalsError, join, no_proposals, stack, write_columns
from pretrain.proposals.folder import ProposalFolder
from pretrain.proposals.store import STORE_KIND, STORE_NAME, ProposalStore


def row(width: int, height: int, *boxes: tuple[int, int, int, int], stage: int = 0) -> ImageProposals:
    """An image whose boxes come once, twice, three times and so on."""
    array = np.array(boxes, dtype=np.uint16).reshape(-1, 4)
    return ImageProposals(width, height, array, np.arange(1, len(boxes) + 1, dtype=np.int32), stage)


ROWS = [
    row(100, 80, (0, 0, 40, 40), (10, 20, 100, 80)),
    no_proposals(0, 0),
    row(65_535, 9, (65_000, 0, 65_535, 9), stage=2),
    no_proposals(300, 200),
    row(7, 9, (0, 0, 7, 9), (1, 1, 2, 2), (3, 3, 5, 9), stage=1),
]


def folder_for(path: Path, num_images: int) -> ProposalFolder:
    folder = ProposalFolder(path, {"images": {"digest": "abc", "count": num_images}})
    folder.claim()
    return folder


@pytest.fixture
def store(tmp_path: Path) -> ProposalStore:
    return folder_for(tmp_path, len(ROWS)).write_store(stack(ROWS))


def test_store_gives_back_what_was_found(store: ProposalStore) -> None:
    assert len(store) == 5
    for index, expected in enumerate(ROWS):
        found = store.of(index, expected.width, expected.height)
        np.testing.assert_array_equal(found.boxes_image_px, expected.boxes_image_px)
        np.testing.assert_array_equal(found.multiplicity, expected.multiplicity)
        assert found.boxes_image_px.shape == (len(found.multiplicity), 4)
        assert (found.boxes_image_px.dtype, found.multiplicity.dtype) == (np.float32, np.int64)
        assert store.entry(index).stage == expected.stage
    assert store.images_digest == "abc"
    for index in (-1, 5):
        with pytest.raises(IndexError):
            store.of(index, 1, 1)


def test_image_of_another_size_is_refused_with_both_sizes_and_the_remedy(store: ProposalStore) -> None:
    with pytest.raises(ProposalsError, match=r"image 0 is 80x100 px, but when .* it was 100x80 px; restore .*again"):
        store.of(0, 80, 100)
    with pytest.raises(ProposalsError, match=r"image 1 is 64x64 px, but when .* it could not be read; restore"):
        store.of(1, 64, 64)


def test_tables_joined_are_the_table_of_all(tmp_path: Path) -> None:
    for pieces in ([ROWS], [ROWS[:2], ROWS[2:]], [ROWS[:1], ROWS[1:2], ROWS[2:4], ROWS[4:]]):
        for found, expected in zip(join([stack(piece) for piece in pieces]), stack(ROWS), strict=True):
            np.testing.assert_array_equal(found, expected)
            assert found.dtype == expected.dtype


def test_bytes_are_a_function_of_the_content_in_every_process(tmp_path: Path, store: ProposalStore) -> None:
    header = {name: {"nested": name} for name in "abcdefgh"}
    for name in ("one", "two", "three", "four"):
        backwards = name in ("two", "four")
        write_columns(tmp_path / name, "kind", dict(sorted(header.items(), reverse=backwards)), stack(ROWS))
    assert len({(tmp_path / name).read_bytes() for name in ("one", "two", "three", "four")}) == 1


def test_store_opens_by_file_and_by_folder_and_says_when_there_is_none(tmp_path: Path, store: ProposalStore) -> None:
    assert ProposalStore.open(tmp_path).digest == ProposalStore.open(tmp_path / STORE_NAME).digest == store.digest
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"does not exist .*generate_proposals\.py"):
        ProposalStore.open(tmp_path / "empty")
    folder_for(tmp_path / "begun", 3)
    with pytest.raises(FileNotFoundError, match="is not finished: run the same command again"):
        ProposalStore.open(tmp_path / "begun")


def test_digest_is_that_of_the_bytes(store: ProposalStore) -> None:
    output = subprocess.run(["sha256sum", str(store.path)], capture_output=True, text=True, check=True).stdout
    assert store.digest == output.split()[0]


def test_store_travels_to_a_worker_as_its_path(store: ProposalStore) -> None:
    data = pickle.dumps(store)
    assert len(data) < 200 + len(str(store.path))
    again = pickle.loads(data)
    np.testing.assert_array_equal(again.of(4, 7, 9).boxes_image_px, ROWS[4].boxes_image_px)


def test_nothing_can_be_written_into_a_store(store: ProposalStore) -> None:
    with pytest.raises(ValueError, match="read-only"):
        store.entry(0).boxes_image_px[0] = 1
    assert store.of(0, 100, 80).boxes_image_px.flags.writeable, "a copy may be changed"


def anonymous_mb() -> float:
    """Memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def test_opening_half_a_million_images_takes_no_memory_of_its_own(tmp_path: Path, store: ProposalStore) -> None:
    num_images, per_image = 500_000, 20
    num_boxes = num_images * per_image
    columns = Columns(
        boxes_image_px=np.tile(np.array([[10, 20, 300, 400]], dtype=np.uint16), (num_boxes, 1)),
        multiplicity=np.ones(num_boxes, dtype=np.int32),
        offsets=np.arange(num_images + 1, dtype=np.int64) * per_image,
        sizes=np.tile(np.array([[500, 400]], dtype=np.int32), (num_images, 1)),
        stages=np.zeros(num_images, dtype=np.uint8),
    )
    large = folder_for(tmp_path / "large", num_images).write_store(columns)
    assert large.path.stat().st_size > 120e6
    before_mb, started_s = anonymous_mb(), time.perf_counter()
    again = ProposalStore.open(large.path)
    seconds = time.perf_counter() - started_s
    for index in range(0, num_images, 1000):
        again.of(index, 500, 400)
    assert len(pickle.dumps(again)) < 1000
    assert anonymous_mb() - before_mb < 10, "the file was read instead of mapped"
    assert seconds < 1


def resaved(**changes: Any) -> bytes:
    """The store of ROWS with other columns (None: without), or another record in its header."""
    columns: dict[str, Any] = stack(ROWS)._asdict()
    header = {"record": {"images": {"digest": "abc", "count": 5}}, "counts": {"images": 5}}
    record = {"format": STORE_KIND, "schema": 1, "header": header} | changes.pop("record", {})
    columns = {name: array for name, array in (columns | changes).items() if array is not None}
    return save(columns, metadata={"detco_proposals": json.dumps(record)})


def test_the_untouched_file_of_the_next_test_is_whole(tmp_path: Path) -> None:
    (tmp_path / STORE_NAME).write_bytes(resaved())
    assert len(ProposalStore.open(tmp_path)) == 5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: b"", "not a complete safetensors file"),
        (lambda whole: whole[:-1], "not a complete safetensors file"),
        (lambda whole: whole[:40], "not a complete safetensors file"),
        (lambda whole: whole + b"more", "not a complete safetensors file"),
        (lambda whole: b"\xff" * 8 + whole[8:], "not a complete safetensors file"),
        (lambda whole: pickle.dumps({"boxes": []}), "not a complete safetensors file"),
        (lambda whole: save({"backbone/conv1": np.zeros(1)}), "of format None, not 'detco-proposals'"),
        (lambda whole: save({"a": np.zeros(1)}, {"detco_proposals": "["}), "its header is not JSON"),
        (lambda whole: save({"a": np.zeros(1)}, {"detco_proposals": "[" * 100_000}), "its header is not JSON"),
        (lambda whole: save({"a": np.zeros(1)}, {"detco_proposals": "[]"}), "of format None"),
        (lambda whole: resaved(record={"format": "detco-proposals-part"}), "of format 'detco-proposals-part'"),
        (lambda whole: resaved(record={"schema": 2}), "has schema 2; only 1 is known"),
        (lambda whole: resaved(record={"header": None}), "no account of where"),
        (lambda whole: resaved(record={"header": {}}), "does not say which images"),
        (lambda whole: resaved(record={"header": {"record": [], "counts": 3}}), "does not say which images"),
        (
            lambda whole: resaved(
                record={"header": {"record": {"images": {"digest": "a", "count": 4}}, "counts": {"images": 4}}}
            ),
            "does not say which images",
        ),
        (lambda whole: resaved(stages=None), "it has the columns"),
        (lambda whole: resaved(extra=np.zeros(1)), "it has the columns"),
        (lambda whole: resaved(stages=np.array(1, np.uint8)), "offsets is"),
        (lambda whole: resaved(stages=np.zeros(4, np.uint8)), "offsets is"),
        (lambda whole: resaved(stages=np.zeros(5, np.int8)), "stages is"),
        (lambda whole: resaved(stages=np.full(5, 4, np.uint8)), "a filter stage is not in"),
        (lambda whole: resaved(sizes=np.full((5, 2), -1, np.int32)), "a negative side"),
        (lambda whole: resaved(sizes=np.ones((2, 5), np.int32)), "sizes is"),
        (lambda whole: resaved(boxes_image_px=np.zeros((5, 4), np.uint16)), "boxes_image_px is"),
        (lambda whole: resaved(offsets=np.array([0, 2, 2, 3, 3, 7])), "offsets do not rise from 0 to the 6 boxes"),
        (lambda whole: resaved(offsets=np.array([1, 2, 2, 3, 3, 6])), "offsets do not rise"),
        (lambda whole: resaved(offsets=np.array([0, 3, 2, 3, 3, 6])), "offsets do not rise"),
        (lambda whole: resaved(offsets=np.array([0, 2**62, -(2**62) - 1, 3, 3, 6])), "offsets do not rise"),
    ],
)
def test_damaged_or_hostile_file_is_refused(
    tmp_path: Path, store: ProposalStore, damage: Callable[[bytes], bytes], message: str
) -> None:
    store.path.write_bytes(damage(store.path.read_bytes()))
    with pytest.raises(ProposalsError, match=message):
        ProposalStore.open(tmp_path)


@pytest.mark.parametrize("box", [(0, 0, 101, 40), (0, 0, 40, 81), (40, 0, 40, 40), (0, 50, 40, 40), None])
def test_box_that_is_empty_or_outside_its_image_is_refused_where_it_is_met(
    tmp_path: Path, box: tuple[int, ...] | None
) -> None:
    columns = stack(ROWS)
    if box:
        columns.boxes_image_px[1] = box
    else:
        columns.multiplicity[1] = 0
    store = folder_for(tmp_path, len(ROWS)).write_store(columns)
    store.of(4, 7, 9)
    with pytest.raises(ProposalsError, match="is damaged: image 0 of 100x80 px has an empty or outlying box"):
        store.of(0, 100, 80)
