"""Packing: complete or not there, the same bytes however often it was interrupted."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from pretrain import shard_packing
from pretrain.images import list_images
from pretrain.shard_packing import PackError, pack
from pretrain.shards import INDEX_NAME

TOOL = Path(__file__).parents[2] / "tools/make_shards.py"


@pytest.fixture
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("make_shards")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def expected(photo_dir: Path, tmp_path: Path) -> dict[str, bytes]:
    """The shards of the photos, made without an interruption."""
    pack(list_images(photo_dir), tmp_path / "expected", 5)
    return bytes_of(tmp_path / "expected")


def test_shards_are_plain_tars_that_any_program_reads(
    photo_dir: Path, tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert tool.main([str(photo_dir), "-o", str(out), "--shard-size", "10"]) == 0
    assert f"24 images, 0.000 GB, finished in 0 s; use it as DATA.ROOT {out}" in capsys.readouterr().out
    assert sorted(bytes_of(out)) == [INDEX_NAME, *(f"shard-00000{i}.tar" for i in range(3)), "shards.json"]
    for number, count in enumerate([10, 10, 4]):
        with tarfile.open(out / f"shard-00000{number}.tar", "r:") as tar:
            members = tar.getmembers()
            assert [member.name for member in members] == [f"photo_{10 * number + i:03d}.jpg" for i in range(count)]
            for member in members:
                content = tar.extractfile(member)
                assert content
                assert content.read() == (photo_dir / member.name).read_bytes()
        subprocess.run(["tar", "-tf", out / f"shard-00000{number}.tar"], check=True, capture_output=True)


def test_bytes_depend_on_names_and_images_alone(
    photo_dir: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in sorted(photo_dir.iterdir(), reverse=True):
        copy = tmp_path / "copy" / path.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
        copy.chmod(0o600)
        os.utime(copy, (5, 5))
    monkeypatch.setattr(shard_packing, "IMAGES_AT_ONCE", 2)
    pack(list_images(tmp_path / "copy"), tmp_path / "out", 5)
    assert bytes_of(tmp_path / "out") == expected


def test_index_is_not_needed_to_read_them(tmp_path: Path, photo_dir: Path) -> None:
    with_index = pack(list_images(photo_dir), tmp_path / "out", 5)
    (tmp_path / "out" / INDEX_NAME).unlink()
    scanned = list_images(tmp_path / "out")
    assert scanned.digest == with_index.digest
    assert [scanned.read(i) for i in range(24)] == [with_index.read(i) for i in range(24)]


def test_killed_and_started_again_it_ends_with_the_same_bytes(
    photo_dir: Path, tmp_path: Path, expected: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for path in photo_dir.iterdir():
        (photos / path.name).write_bytes(path.read_bytes())
    (photos / "photo_013.jpg").unlink()
    os.mkfifo(photos / "photo_013.jpg")  # reading it waits for ever, in the third shard
    command = [sys.executable, str(TOOL), str(photos), "-o", str(out), "--shard-size", "5"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list(out.glob(".shard-000002.tar.*.partial")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert sorted(path.name for path in out.glob("[!.]*")) == ["shard-000000.tar", "shard-000001.tar", "shards.json"]
    (photos / "photo_013.jpg").unlink()
    (photos / "photo_013.jpg").write_bytes((photo_dir / "photo_013.jpg").read_bytes())
    caplog.set_level(logging.INFO)
    for done in ("photo_000.jpg", "photo_009.jpg"):
        (photos / done).write_bytes(b"is not read again")
    pack(list_images(photos), out, 5)
    assert bytes_of(out) == expected, "other bytes, or something was left behind"
    assert "2 of 5 shards are complete" in caplog.text


def test_damaged_and_missing_shards_are_made_again(
    photo_dir: Path, tmp_path: Path, expected: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    pack(list_images(photo_dir), out, 5)
    (out / "shard-000000.tar").write_bytes(expected["shard-000000.tar"][:3000])
    (out / "shard-000001.tar").write_bytes(expected["shard-000002.tar"])
    (out / "shard-000003.tar").unlink()
    pack(list_images(photo_dir), out, 5)
    assert bytes_of(out) == expected
    assert "shard-000000.tar is no whole tar" in caplog.text
    assert "shard-000001.tar has other members than it should: it is made again" in caplog.text


def test_folder_of_other_shards_is_refused(photo_dir: Path, tmp_path: Path, tool: ModuleType) -> None:
    out = tmp_path / "out"
    pack(list_images(photo_dir), out, 5)
    with pytest.raises(ValueError, match=r"of another size: 24 images .* in shards of 5, .* in shards of 6,"):
        pack(list_images(photo_dir), out, 6)
    for content in ("{", "[]", "{}", "\xff"):
        (out / "shards.json").write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match=r"shards\.json is damaged .*remove .* and start again"):
            pack(list_images(photo_dir), out, 5)
    (out / "shards.json").unlink()
    with pytest.raises(ValueError, match=r"image_index\.npz, which was not made here; choose another folder"):
        pack(list_images(photo_dir), out, 5)
    assert tool.main([str(photo_dir), "-o", str(out)]) == 2


def test_folder_with_images_is_refused_and_left_alone(photo_dir: Path, tmp_path: Path, tool: ModuleType) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(photo_dir, photos)
    before = bytes_of(photos)
    with pytest.raises(ValueError, match=r"photo_000\.jpg, which was not made here; choose another folder"):
        pack(list_images(photo_dir), photos, 5)
    assert tool.main([str(photos), "-o", str(photos)]) == 2, "its images would hide those that come later"
    assert bytes_of(photos) == before


def test_image_that_cannot_be_read_is_named_and_what_is_complete_is_kept(
    photo_dir: Path, tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    listing = tmp_path / "some.txt"
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(b"x")
    listing.write_text("0.jpg\n1.jpg\n2.jpg\n3.jpg\n")
    images = list_images(listing)
    (tmp_path / "2.jpg").unlink()
    with pytest.raises(PackError, match=r"cannot read .*2\.jpg: .*No such file.*Repair or remove it"):
        pack(images, tmp_path / "out", 2)
    assert sorted(bytes_of(tmp_path / "out")) == ["shard-000000.tar", "shards.json"]
    (tmp_path / "2.jpg").mkdir()
    assert tool.main([str(listing), "-o", str(tmp_path / "out"), "--shard-size", "2"]) == 1
    assert "2.jpg" in capsys.readouterr().err


def test_names_that_a_tar_cannot_keep_are_refused(photo_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    listing = tmp_path / "lists/some.txt"
    listing.write_text(f"{photo_dir}/photo_000.jpg\n")
    with pytest.raises(ValueError, match=r"1 of the 1 names .* absolute or have '\.\.': '/.*photo_000\.jpg'"):
        pack(list_images(listing), tmp_path / "out", 5)
    assert not (tmp_path / "out").exists()


def test_listing_with_odd_names_and_a_name_twice_is_packed_as_it_stands(tmp_path: Path) -> None:
    for name in ("a.gif", ".hidden.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "some.txt").write_text("./b.jpg\nb.jpg\nb.jpg\n.hidden.jpg\na.gif\n")
    listed = list_images(tmp_path / "some.txt")
    for _ in range(2):  # the second time complete shards are recognised
        packed = pack(listed, tmp_path / "out", 2)
        assert packed.digest == listed.digest
        assert [packed.read(i) for i in range(5)] == [listed.read(i) for i in range(5)]


def test_shards_can_be_packed_anew(photo_dir: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    pack(list_images(photo_dir), tmp_path / "first", 7)
    pack(list_images(tmp_path / "first"), tmp_path / "second", 5)
    assert bytes_of(tmp_path / "second") == expected


def test_wrong_numbers_and_folders_are_refused(photo_dir: Path, tmp_path: Path, tool: ModuleType) -> None:
    with pytest.raises(ValueError, match="--shard-size is 0; a shard must have at least 1 image"):
        pack(list_images(photo_dir), tmp_path / "out", 0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write to .*choose another folder"):
        pack(list_images(photo_dir), tmp_path / "file/out", 5)
    assert tool.main([str(tmp_path / "nowhere"), "-o", str(tmp_path / "out")]) == 2
