"""Lists of images in tars: the same images, runs and proposals as the folder that was packed."""

import json
import os
import pickle
import shutil
import tarfile
import time
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain import images as images_module
from pretrain import shards as shards_module
from pretrain.image_list import as_block
from pretrain.images import ImageList, ImagesLost, list_images
from pretrain.shard_packing import pack
from pretrain.shards import INDEX_NAME, LocalFolder, ShardIndex, ShardList

NAMES = ["a b (1).JPG", "n01/x.jpg", "n01/x.y.jpeg", "n02/" + "long/" * 40 + "z.png", "z\u00e9.webp"]


def make_tree(root: Path) -> Path:
    """Files of different bytes and lengths, also 0 and multiples of a block."""
    for number, name in enumerate(NAMES):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number + 1]) * (512 * number + (number % 2)))
    os.close(os.open(os.fsencode(root) + b"/caf\xe9.jpg", os.O_CREAT | os.O_WRONLY))
    return root


def make_tar(file: Path, folder: Path, names: list[str], **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", **options) as tar:
        for name in names:
            tar.add(folder / name, name)
    return file


def contents(images: ImageList) -> list[tuple[bytes, bytes]]:
    return [(images.relative_name(index), images.read(index)) for index in range(len(images))]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree")


@pytest.fixture
def packed(tree: Path, tmp_path: Path) -> Path:
    pack(list_images(tree), tmp_path / "packed", 2)
    return tmp_path / "packed"


def test_packed_images_are_the_list_that_was_packed(tree: Path, packed: Path) -> None:
    files, shards = list_images(tree), list_images(packed)
    assert contents(shards) == contents(files)
    assert shards.digest == files.digest
    assert shards.root == packed
    last = len(shards) - 1
    assert shards.name(last) == f"{packed}/shard-000002.tar/z\u00e9.webp"


@pytest.mark.parametrize("dialect", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_plain_tars_of_any_maker_are_listed_in_the_order_of_the_bytes(tree: Path, tmp_path: Path, dialect: int) -> None:
    names = [os.fsdecode(name) for name, _ in contents(list_images(tree))]
    make_tar(tmp_path / "tars/2/b.tar", tree, names[::-2], format=dialect)
    make_tar(tmp_path / "tars/1.tar", tree, names[-2::-2], format=dialect)
    shards = list_images(tmp_path / "tars")
    assert contents(shards) == contents(list_images(tree))
    assert shards.digest == list_images(tree).digest


def test_names_may_begin_at_the_current_folder_as_tar_writes_them(tree: Path, tmp_path: Path) -> None:
    make_tar(tmp_path / "tars/all.tar", tree, ["."])
    with tarfile.open(tmp_path / "tars/all.tar", "a") as tar:
        tar.add(tree / NAMES[0], "./././extra.jpg")
    expected = sorted([*contents(list_images(tree)), (b"extra.jpg", (tree / NAMES[0]).read_bytes())])
    assert contents(list_images(tmp_path / "tars")) == expected


def test_links_odd_names_and_other_members_are_passed_over(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = make_tar(tmp_path / "tars/a.tar", tree, ["n01/x.jpg"])
    with tarfile.open(file, "a") as tar:
        for name in ("n01/x.cls", "n01/x.json", "._x.jpg", ".hidden/x.jpg", "/etc/x.jpg", "../x.jpg", "a/../../x.jpg"):
            info = tarfile.TarInfo(name)
            tar.addfile(info)
        for name, kind in (("soft.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE), ("dir.jpg", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert contents(list_images(file.parent)) == [(b"n01/x.jpg", (tree / "n01/x.jpg").read_bytes())]
    assert "6 images are passed over: links, or names that are absolute or have .." in caplog.text


def test_a_name_in_two_tars_counts_twice_in_the_order_of_the_tars(tree: Path, tmp_path: Path) -> None:
    for number, tar in enumerate(["a.tar", "b.tar"]):
        (tmp_path / "same.jpg").write_bytes(bytes([number]))
        make_tar(tmp_path / "tars" / tar, tmp_path, ["same.jpg"])
    assert contents(list_images(tmp_path / "tars")) == [(b"same.jpg", b"\0"), (b"same.jpg", b"\1")]


def test_truncated_tar_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"x" * 512)
    (tmp_path / "y.jpg").write_bytes(b"y" * 400)
    file = make_tar(tmp_path / "tars/a.tar", tmp_path, ["x.jpg", "y.jpg"], format=tarfile.USTAR_FORMAT)
    whole = file.read_bytes()
    for length in (300, 700, 1000, 1024, 1100, 1536, 1700, 2048, 2300):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.tar is no whole tar .*damaged or was cut short"):
            list_images(file.parent)
    file.write_bytes(whole[: 2048 + 512])
    assert len(list_images(file.parent)) == 2, "one block of zeros is an end mark"


def test_rubbish_in_the_place_of_a_header_is_refused(tree: Path, tmp_path: Path) -> None:
    file = make_tar(tmp_path / "tars/a.tar", tree, ["n01/x.jpg", "n01/x.y.jpeg"], format=tarfile.USTAR_FORMAT)
    content = bytearray(file.read_bytes())
    second = content.index(b"n01/x.y.jpeg")
    content[second + 20] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"no header and no end mark at byte {second:,}"):
        list_images(file.parent)


@pytest.mark.parametrize(("mode", "kind"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_compressed_tars_are_refused_by_their_content_and_by_their_name(
    tree: Path, tmp_path: Path, mode: Any, kind: str
) -> None:
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/a.tar", mode) as tar:
        tar.add(tree / "n01/x.jpg", "x.jpg")
    with pytest.raises(ValueError, match=rf"a\.tar is compressed \({kind}\).*plain \.tar"):
        list_images(tmp_path / "tars")
    shutil.copy(tmp_path / "tars/a.tar", tmp_path / "tars/b.tar.gz")
    with pytest.raises(ValueError, match=r"archives \(1 \.gz\) beside 1 \.tar: uncompress these"):
        list_images(tmp_path / "tars")


def test_tars_that_are_empty_or_without_images_are_refused(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/a.tar").touch()
    with pytest.raises(ValueError, match="is no whole tar"):
        list_images(tmp_path / "tars")
    (tmp_path / "tars/a.tar").write_bytes(bytes(10240))  # as `tar -cf a.tar -T /dev/null` writes it
    (tree / "x.cls").write_bytes(b"7")
    make_tar(tmp_path / "tars/b.tar", tree, ["x.cls"])
    with pytest.raises(ValueError, match=r"no images in the 2 tar\(s\) .* looked for \.jpg.*found 0 and 1 other"):
        list_images(tmp_path / "tars")


def test_missing_or_shortened_shard_is_refused_at_the_start(packed: Path) -> None:
    shard = packed / "shard-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    with pytest.raises(ValueError, match=rf"shard-000001\.tar has changed .* {len(whole) - 512:,} bytes and had"):
        list_images(packed)
    shard.unlink()
    with pytest.raises(ValueError, match=r"the shard .*shard-000001\.tar is missing or not readable .*restore it"):
        list_images(packed)


def test_shard_of_the_same_length_with_other_images_is_noticed(packed: Path, tree: Path) -> None:
    shard = packed / "shard-000000.tar"
    size = shard.stat().st_size
    make_tar(shard, tree, ["n01/x.jpg", "a b (1).JPG"])
    os.truncate(shard, size)
    with pytest.raises(ValueError, match=r"shard-000000\.tar has changed since its index was made: 'a b \(1\).JPG'"):
        list_images(packed)


def test_shard_that_goes_or_changes_during_a_run_ends_it(packed: Path) -> None:
    images = list_images(packed)
    shard = packed / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[content.rindex(b"caf")] ^= 1  # in the second header only, at which the start does not look
    shard.write_bytes(content)
    assert images.read(0) == b""
    with pytest.raises(ImagesLost, match=r"has changed since its index was made: 'caf.*make the index again"):
        images.read(1)
    (packed / "shard-000002.tar").unlink()
    assert pickle.loads(pickle.dumps(images)).read(2)
    with pytest.raises(ImagesLost, match="missing or not readable"):
        pickle.loads(pickle.dumps(images)).read(len(images) - 1)


def test_index_that_is_damaged_or_of_another_kind_is_refused(packed: Path) -> None:
    index = packed / INDEX_NAME
    whole = index.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"n01/x.jpg")] ^= 1
    for damage in (b"", b"no", whole[: len(whole) // 2], bytes(flipped)):
        index.write_bytes(damage)
        with pytest.raises(ValueError, match=r"image_index\.npz is no index of .* damaged .*run make_shards.py again"):
            list_images(packed)
    for change in ({"shards": np.full(6, 3, np.int32)}, {"shard_names": as_block([b"a", b"../b", b"c"])}):
        columns = ShardIndex.parse(whole, "it").as_columns() | change
        with pytest.raises(ValueError, match="does not fit itself"):
            ShardIndex.from_columns(columns)
    np.savez(index, x=np.array(["pickle"], dtype=object))
    with pytest.raises(ValueError, match="no index"):
        list_images(packed)


def test_scanned_tars_are_kept_like_other_lists_and_scanned_again_when_they_change(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "MIN_FILES_TO_CACHE", 1)
    file = make_tar(tmp_path / "tars/sub/a.tar", tree, NAMES)
    then = time.time() - 3600
    for path in (file, file.parent, file.parents[1]):
        os.utime(path, (then, then))
    scanned = list_images(tmp_path / "tars", tmp_path / "cache")
    with monkeypatch.context() as no_scan:
        no_scan.setattr(images_module, "scan_shards", None)
        kept = list_images(tmp_path / "tars", tmp_path / "cache")
    assert contents(kept) == contents(scanned)
    assert kept.digest == scanned.digest
    make_tar(file, tree, NAMES[:2])  # in place: the time of no folder changes
    assert len(list_images(tmp_path / "tars", tmp_path / "cache")) == 2


def test_few_files_are_open_at_a_time(packed: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "MAX_OPEN_SHARDS", 2)
    images = list_images(packed)
    before = len(list(Path("/proc/self/fd").iterdir()))
    expected = list_images(tree)
    for index in np.random.default_rng(0).integers(len(images), size=50).tolist():
        assert images.read(index) == expected.read(index)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


def test_a_long_list_holds_no_object_per_image_and_goes_to_workers_through_shared_memory(tmp_path: Path) -> None:
    num_images, num_shards = 100_000, 100
    names = [b"n%08d/n%08d_%d.JPEG" % (i // 1300, i // 1300, i) for i in range(num_images)]
    number = np.arange(num_images)
    index = ShardIndex(
        block=as_block(names),
        shards=(number % num_shards).astype(np.int32),
        offsets=number // num_shards * 1024 + 512,
        sizes=np.full(num_images, 400),
        headers=number,
        shard_names=[f"shard-{shard:06d}.tar" for shard in range(num_shards)],
        shard_bytes=np.full(num_shards, 2**30),
    )
    images = ShardList(index, LocalFolder(tmp_path))
    # The names, 8 bytes where each ends, 28 bytes of where the image lies; a little per shard.
    assert len(pickle.dumps(images)) < len(index.block) + (8 + 28) * num_images + 40 * num_shards + 3000
    assert len(ForkingPickler.dumps(images)) < 40 * num_shards + 4000


def test_index_outside_the_list_is_refused(packed: Path) -> None:
    images = list_images(packed)
    for index in (-1, len(images)):
        with pytest.raises(IndexError):
            images.read(index)


def state(run_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Everything that a run has learned, and what it reported."""
    saved = torch.load(max((run_dir / "checkpoints").glob("step_*.pth")), weights_only=True)
    reports = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return saved["model"], [{key: value for key, value in line.items() if key != "time"} for line in reports]


def assert_same_run(run_dir: Path, reference: Path) -> None:
    (model, reports), (expected, expected_reports) = state(run_dir), state(reference)
    assert model.keys() == expected.keys()
    assert all(torch.equal(model[name], expected[name]) for name in expected)
    assert reports == expected_reports


def test_a_run_on_shards_is_that_on_the_folder_and_either_resumes_the_other(
    run_here: Callable[..., Any], photo_dir: Path, tmp_path: Path
) -> None:
    shards = str(pack(list_images(photo_dir), tmp_path / "shards", 5).root)
    assert run_here(tmp_path / "folder").code == 0
    assert run_here(tmp_path / "packed", **{"DATA.ROOT": shards}).code == 0
    assert_same_run(tmp_path / "packed", tmp_path / "folder")

    for first, then in ((str(photo_dir), shards), (shards, str(photo_dir))):
        cut = tmp_path / f"cut_{Path(first).name}"
        assert run_here(cut, trouble="15@0.375", **{"DATA.ROOT": first}).code == 128 + 15
        assert run_here(cut, "--resume", **{"DATA.ROOT": then}).code == 0
        assert_same_run(cut, tmp_path / "folder")


def test_proposals_of_the_folder_fit_its_shards(
    run_here: Callable[..., Any], make_proposals: Callable[..., Path], photo_dir: Path, tmp_path: Path
) -> None:
    shards = str(pack(list_images(photo_dir), tmp_path / "shards", 5).root)
    boxes = {"METHOD.BOXES": "True", "DATA.PROPOSALS": str(make_proposals(photo_dir))}
    assert run_here(tmp_path / "folder", **boxes).code == 0
    assert run_here(tmp_path / "packed", **boxes, **{"DATA.ROOT": shards}).code == 0
    assert_same_run(tmp_path / "packed", tmp_path / "folder")


def test_run_whose_shard_goes_away_ends_with_the_reason(
    run_here: Callable[..., Any], photo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(list_images(photo_dir), tmp_path / "shards", 12)

    def check_and_lose(self: ShardList, source: object) -> None:
        (tmp_path / "shards/shard-000001.tar").unlink()

    monkeypatch.setattr(ShardList, "check", check_and_lose)
    ended = run_here(tmp_path / "run", **{"DATA.ROOT": str(tmp_path / "shards")})
    assert ended.code == 1
    assert "shard-000001.tar is missing or not readable" in ended.stderr
    assert "Traceback" not in ended.stderr
