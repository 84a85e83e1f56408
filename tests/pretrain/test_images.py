import os
import pickle
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest

from pretrain import images as images_module
from pretrain.images import ImageFiles, ImageList, list_images


def make_files(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def names_of(images: ImageList) -> list[str]:
    return [images.path(i).relative_to(images.root).as_posix() for i in range(len(images))]


def age(root: Path) -> None:
    """Set back the times of all folders by an hour, as if nothing had been added lately."""
    then = time.time() - 3600
    for path in [root, *root.rglob("*")]:
        os.utime(path, (then, then))


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder in which lists of any length are kept."""
    monkeypatch.setattr(images_module, "MIN_FILES_TO_CACHE", 1)
    return tmp_path / "cache"


def test_tree_is_listed_in_the_order_of_its_bytes(tmp_path: Path) -> None:
    make_files(
        tmp_path, "b/2.jpg", "b/10.png", "B/x.JPEG", "a b (1).JPG", "\u00e9.webp", "z.Png", "deep/er/still/c.jpg"
    )
    names = names_of(list_images(tmp_path))
    assert names == sorted(names, key=os.fsencode)
    assert set(names) == {
        "b/2.jpg", "b/10.png", "B/x.JPEG", "a b (1).JPG", "\u00e9.webp", "z.Png", "deep/er/still/c.jpg",
    }  # fmt: skip


def test_hidden_files_and_other_files_are_passed_over(tmp_path: Path) -> None:
    make_files(tmp_path, "a.jpg", "._a.jpg", ".hidden/b.jpg", "labels.txt", "c.gif", "jpg", "d.jpg.part", "e.tar")
    assert names_of(list_images(tmp_path)) == ["a.jpg"]


def test_folder_named_like_an_image_is_searched_and_not_listed(tmp_path: Path) -> None:
    make_files(tmp_path, "album.jpg/a.jpg")
    assert names_of(list_images(tmp_path)) == ["album.jpg/a.jpg"]


def test_names_that_are_no_utf8_survive(tmp_path: Path) -> None:
    os.close(os.open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", os.O_CREAT | os.O_WRONLY))
    images = list_images(tmp_path)
    assert images.path(0).exists()


def test_links_to_folders_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    make_files(tmp_path, "root/sub/a.jpg", "elsewhere/b.jpg")
    (tmp_path / "root/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/sub/up").symlink_to(tmp_path / "root")
    assert names_of(list_images(tmp_path / "root")) == ["linked/b.jpg", "sub/a.jpg"]


def test_path_outside_the_list_is_refused(tmp_path: Path) -> None:
    images = list_images(make_files(tmp_path, "a.jpg"))
    for index in (-1, 1):
        with pytest.raises(IndexError):
            images.path(index)


def test_digest_is_that_of_the_names_and_not_of_the_place(tmp_path: Path) -> None:
    here = list_images(make_files(tmp_path / "here", "x/a.jpg", "b.jpg"))
    there = list_images(make_files(tmp_path / "there", "x/a.jpg", "b.jpg"))
    other = list_images(make_files(tmp_path / "other", "x/a.jpg", "c.jpg"))
    assert here.digest == there.digest != other.digest


def test_empty_folder_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    make_files(tmp_path, "notes.txt", "sub/table.csv")
    with pytest.raises(ValueError, match=r"no images in .*looked for \.jpg.* in 2 folder\(s\), found 0 and 2 other"):
        list_images(tmp_path)


def test_folder_of_archives_is_refused_with_the_advice_to_unpack(tmp_path: Path) -> None:
    make_files(tmp_path, "train.zip", "val.tar.gz")
    with pytest.raises(
        ValueError, match=r"archives \(1 \.gz, 1 \.zip\): unpack them first \(plain \.tar files can stay"
    ):
        list_images(tmp_path)


def test_tars_beside_images_are_passed_over_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_files(tmp_path, "a.jpg", "n01440764.tar")
    assert names_of(list_images(tmp_path)) == ["a.jpg"]
    assert "1 .tar file(s) beside the images are passed over" in caplog.text


def test_a_shard_or_its_index_in_place_of_their_folder_is_told_so(tmp_path: Path) -> None:
    for name in ("shard-000000.tar", "image_index.npz"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"name the folder that it lies in, {tmp_path}$"):
            list_images(tmp_path / name)


def test_an_address_that_is_not_of_the_web_is_refused() -> None:
    with pytest.raises(ValueError, match=r"s3://bucket/images is an address, of which only http:// and https://"):
        list_images("s3://bucket/images")


def test_missing_empty_and_odd_roots_are_refused(tmp_path: Path) -> None:
    make_files(tmp_path, "a.jpg")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"set DATA\.ROOT"):
        list_images("")
    with pytest.raises(ValueError, match=r"neither a folder \(of images or of \.tar files\) nor a \.txt listing"):
        list_images(tmp_path / "a.jpg")


def test_listing_takes_relative_and_absolute_paths(tmp_path: Path) -> None:
    make_files(tmp_path, "lists/near.jpg", "far/away (1).JPG")
    listing = tmp_path / "lists/train.txt"
    listing.write_text(f"near.jpg\r\n\n{tmp_path}/far/away (1).JPG\n../far/away (1).JPG", encoding="utf-8")
    images = list_images(listing)
    assert images.root == tmp_path / "lists"
    assert len(images) == 3
    assert {images.path(i).resolve() for i in range(3)} == {tmp_path / "lists/near.jpg", tmp_path / "far/away (1).JPG"}


def test_listing_with_missing_files_is_refused_with_their_number_and_the_first(tmp_path: Path) -> None:
    make_files(tmp_path, "a.jpg")
    (tmp_path / "train.txt").write_text("a.jpg\n" + "".join(f"gone_{i}.jpg\n" for i in range(7)))
    with pytest.raises(FileNotFoundError, match=r"7 of the 8 files .*'gone_0.jpg', .*'gone_4.jpg', \.\.\."):
        list_images(tmp_path / "train.txt")


def test_listing_without_a_line_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="found 0 lines"):
        list_images(tmp_path / "train.txt")


def test_cached_list_equals_the_listed_one_and_is_not_read_from_the_folders(
    tmp_path: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_files(tmp_path / "data", "b/2.jpg", "a.jpg", "c/d/\u00e9 (1).png")
    age(root)
    listed = list_images(root, cached)

    def fail(root: Path) -> None:
        raise AssertionError("the folders were read again")

    monkeypatch.setattr(images_module, "_scan_folder", fail)
    again = list_images(root, cached)
    assert names_of(again) == names_of(listed)
    assert again.digest == listed.digest
    assert again.root == listed.root


@pytest.mark.parametrize("change", ["add", "remove", "rename", "add_folder", "remove_folder"])
def test_cached_list_is_dropped_when_a_folder_changes(tmp_path: Path, cached: Path, change: str) -> None:
    root = make_files(tmp_path / "data", "a/1.jpg", "a/2.jpg", "b/deep/3.jpg")
    age(root)
    list_images(root, cached)
    if change == "add":
        make_files(root, "b/deep/4.jpg")
    elif change == "remove":
        (root / "a/2.jpg").unlink()
    elif change == "rename":
        (root / "a/2.jpg").rename(root / "a/9.jpg")
    elif change == "add_folder":
        make_files(root, "b/new/5.jpg")
    else:
        (root / "b/deep/3.jpg").unlink()
        (root / "b/deep").rmdir()
    expected = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.jpg"))
    assert names_of(list_images(root, cached)) == expected


def test_cached_listing_is_dropped_when_the_listing_changes(tmp_path: Path, cached: Path) -> None:
    make_files(tmp_path, "a.jpg", "b.jpg")
    listing = tmp_path / "train.txt"
    listing.write_text("a.jpg\n")
    age(tmp_path)
    assert len(list_images(listing, cached)) == 1
    (tmp_path / "a.jpg").unlink()
    assert len(list_images(listing, cached)) == 1, "a cached listing is not checked again"
    listing.write_text("b.jpg\nb.jpg\n")
    assert names_of(list_images(listing, cached)) == ["b.jpg", "b.jpg"]


def test_folder_that_has_just_changed_is_not_cached(tmp_path: Path, cached: Path) -> None:
    list_images(make_files(tmp_path / "data", "a.jpg"), cached)
    assert not cached.exists()


@pytest.mark.parametrize("damage", [b"", b"not a zip file", b"PK\x03\x04"])
def test_damaged_cache_is_replaced(tmp_path: Path, cached: Path, damage: bytes) -> None:
    root = make_files(tmp_path / "data", "a.jpg")
    age(root)
    list_images(root, cached)
    (file,) = cached.iterdir()
    whole = file.read_bytes()
    for content in (damage, whole[: len(whole) // 2]):
        file.write_bytes(content)
        assert names_of(list_images(root, cached)) == ["a.jpg"]
        assert file.read_bytes() == whole


def test_cache_follows_the_environment_and_spares_the_data_folder(
    tmp_path: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_files(tmp_path / "data", "a.jpg")
    age(root)
    monkeypatch.setenv("DETCO_CACHE", str(cached))
    list_images(root)
    assert len(list(cached.iterdir())) == 1
    assert list(root.iterdir()) == [root / "a.jpg"]


def test_unwritable_cache_is_a_warning_only(tmp_path: Path, cached: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_files(tmp_path / "data", "a.jpg")
    age(root)
    cached.write_text("a file where the folder should be")
    assert len(list_images(root, cached)) == 1
    assert "DETCO_CACHE" in caplog.text


def test_short_lists_leave_nothing_behind(tmp_path: Path) -> None:
    root = make_files(tmp_path / "data", "a.jpg")
    age(root)
    list_images(root, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_long_list_holds_no_object_per_path(tmp_path: Path) -> None:
    names = [b"n%08d/n%08d_%d.JPEG" % (i // 1300, i // 1300, i) for i in range(100_000)]
    block = np.frombuffer(bytearray(b"\0".join(names) + b"\0"), dtype=np.uint8)
    images = ImageFiles(tmp_path, block)
    assert images.path(99_999) == tmp_path / os.fsdecode(names[-1])
    assert len(images) == 100_000
    # Bytes of the names, one end per name, a few hundred bytes around them: nothing else to copy into a worker.
    assert len(pickle.dumps(images)) < block.nbytes + 8 * len(names) + 2000


def test_a_list_reaches_a_worker_through_shared_memory(tmp_path: Path) -> None:
    images = ImageFiles(tmp_path, np.frombuffer(bytearray(b"some/name.jpg\0" * 100_000), dtype=np.uint8))
    assert len(ForkingPickler.dumps(images)) < 2000


def test_files_are_named_and_read_by_their_paths(tmp_path: Path) -> None:
    make_files(tmp_path, "a.jpg", "sub/b.jpg")
    (tmp_path / "sub/b.jpg").write_bytes(b"content")
    images = list_images(tmp_path)
    assert images.name(1) == f"{tmp_path}/sub/b.jpg"
    assert images.read(1) == b"content"
    (tmp_path / "sub/b.jpg").unlink()
    with pytest.raises(FileNotFoundError):
        images.read(1)
