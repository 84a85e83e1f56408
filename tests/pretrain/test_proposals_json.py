import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from detco.views.photo import decode
from pretrain.images import ImageFiles, list_images
from pretrain.proposals.image_sizes import decoded_size
from pretrain.proposals.official_json import export_json, import_json, unique_stems
from pretrain.proposals.store import STORE_NAME, ProposalsError, ProposalStore

BOXES = {
    "a": [[0, 0, 40, 40], [10, 5, 30, 20], [0, 0, 40, 40], [1, 2, 3, 4], [10, 5, 30, 20], [0, 0, 40, 40]],
    "b": [],
    "turned": [[0, 0, 48, 64]],
    "not_among_the_images": [[0, 0, 1000, 1000]],
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """a (64x48), sub/b (64x48) and turned (48x64 when upright)."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (64, 48), "red").save(folder / "a.jpg")
    Image.new("RGB", (64, 48), "red").save(folder / "sub/b.png")
    Image.new("RGB", (64, 48), "red").save(folder / "turned.jpg", exif=exif)
    return folder


@pytest.fixture
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("generate_proposals")


def official(tmp_path: Path, content: object) -> Path:
    file = tmp_path / "official.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def bring_in(tmp_path: Path, photos: Path, content: object) -> ProposalStore:
    return import_json(official(tmp_path, content), list_images(photos), tmp_path / "out")


def test_imported_boxes_are_unique_with_multiplicity_in_order_of_first_appearance(tmp_path: Path, photos: Path) -> None:
    store = bring_in(tmp_path, photos, BOXES)
    found = store.of(0, 64, 48)
    assert found.boxes_image_px.tolist() == [[0, 0, 40, 40], [10, 5, 40, 25], [1, 2, 4, 6]]
    assert found.multiplicity.tolist() == [3, 2, 1]
    assert store.of(1, 64, 48).boxes_image_px.shape == (0, 4)
    assert store.of(2, 48, 64).boxes_image_px.tolist() == [[0, 0, 48, 64]]
    assert [store.entry(index).stage for index in range(3)] == [0, 3, 0]
    assert store.header["record"]["search"]["backend"] == "official_json"


def test_round_trip_through_the_official_format_is_lossless(tmp_path: Path, photos: Path) -> None:
    images = list_images(photos)
    first = bring_in(tmp_path, photos, BOXES)
    export_json(first, images, tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again == {
        "a": [[0, 0, 40, 40]] * 3 + [[10, 5, 30, 20]] * 2 + [[1, 2, 3, 4]],
        "b": [],
        "turned": [[0, 0, 48, 64]],
    }
    second = import_json(tmp_path / "again.json", images, tmp_path / "second")
    for one, two in zip(first.columns, second.columns, strict=True):
        np.testing.assert_array_equal(one, two)
    export_json(second, images, tmp_path / "third.json")
    assert (tmp_path / "third.json").read_bytes() == (tmp_path / "again.json").read_bytes()


def test_layout_of_the_text_does_not_matter(tmp_path: Path, photos: Path) -> None:
    store = bring_in(tmp_path, photos, "\n " + json.dumps(BOXES, indent=3) + "\n\n")
    assert store.of(0, 64, 48).multiplicity.tolist() == [3, 2, 1]


def test_command_imports_says_when_it_has_and_exports(
    tmp_path: Path, photos: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = official(tmp_path, BOXES), str(tmp_path / "out")
    assert tool.main([str(photos), "-o", out, "--from-json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "3 images, 1.3 boxes per image (2.3 with duplicates)" in text
    assert "without a box: 1 images" in text
    assert tool.main([str(photos), "-o", out, "--from-json", str(file)]) == 0
    assert "finished already" in capsys.readouterr().out
    assert tool.main([str(photos), "-o", out, "--to-json", str(tmp_path / "new.json")]) == 0
    assert json.loads((tmp_path / "new.json").read_text()).keys() == {"a", "b", "turned"}
    file.write_text(json.dumps(BOXES | {"b": [[0, 0, 9, 9]]}))
    assert tool.main([str(photos), "-o", out, "--from-json", str(file)]) == 2
    assert 'search.sha256 "' in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        tool.main([str(photos), "-o", out, "--from-json", str(file), "--min-size", "3"])
    assert "--min-size: without effect beside --from-json" in capsys.readouterr().err


def test_stems_that_occur_twice_are_refused_with_their_number_and_names(tmp_path: Path, photos: Path) -> None:
    shutil.copy(photos / "a.jpg", photos / "sub/a.png")
    shutil.copy(photos / "a.jpg", photos / "sub/turned.webp")
    with pytest.raises(ProposalsError, match=r"2 stems of .* belong to several images: a, turned\. Give these"):
        bring_in(tmp_path, photos, BOXES)


def test_images_without_an_entry_are_refused_with_their_number_and_names(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(ProposalsError, match=r"has no entry for 2 of the 3 images: b, turned\. It must"):
        bring_in(tmp_path, photos, {"a": []})


@pytest.mark.parametrize(
    "box", [[0, 0, 49, 64], [0, 0, 48, 65], [-1, 0, 5, 5], [0, -1, 5, 5], [0, 0, 0, 5], [0, 0, 5, -5], [48, 0, 1, 1]]
)
def test_boxes_outside_the_upright_image_or_empty_are_refused(tmp_path: Path, photos: Path, box: list[int]) -> None:
    with pytest.raises(ProposalsError, match=r"does not fit 1 of the 3 images: turned \(.* 48x64"):
        bring_in(tmp_path, photos, BOXES | {"turned": [[1, 1, 5, 5], box]})
    assert not (tmp_path / "out" / STORE_NAME).exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        '{"a": [[1, 2, 3, 4]]',
        '{"a": [[1, 2, 3, 4]], ',
        '{"a" [[1, 2, 3, 4]]}',
        '{"a": []} {"b": []}',
        '{"a": [], "b": [], "a": [], "turned": []}',
        '{"a": 3}',
        '{"a": {"b": 1}}',
        '{"a": [[1, 2, 3]]}',
        '{"a": [[1, 2, 3, 4], [1]]}',
        '{"a": [1, 2, 3, 4]}',
        '{"a": [[1, 2, 3, "x"]]}',
        '{"a": [[1, 2, 3.5, 4]]}',
        '{"a": [[1, 2, NaN, 4]]}',
        '{"a": [[1, 2, 1e300, 4]]}',
        "{1: [[1, 2, 3, 4]]}",
        '{"a": ' + "[" * 100_000,
        "\udc80",
    ],
)
def test_file_of_another_format_is_refused(tmp_path: Path, photos: Path, content: str) -> None:
    file = tmp_path / "official.json"
    file.write_text(content, errors="surrogateescape")
    with pytest.raises(ProposalsError, match="is not a file of proposals in the official format"):
        import_json(file, list_images(photos), tmp_path / "out")


@pytest.mark.parametrize("wrong", [[1], {"a": []}, BOXES | {"b": [[60, 0, 9, 9]]}])
def test_a_refused_file_can_be_corrected_and_imported_into_the_same_folder(
    tmp_path: Path, photos: Path, wrong: object
) -> None:
    with pytest.raises(ProposalsError):
        bring_in(tmp_path, photos, wrong)
    assert len(bring_in(tmp_path, photos, BOXES)) == 3


def test_a_file_that_is_not_there_is_named(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.json"):
        import_json(tmp_path / "gone.json", list_images(photos), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unreadable_image_has_no_boxes_whatever_the_file_says(tmp_path: Path, photos: Path) -> None:
    (photos / "a.jpg").write_bytes(b"no image")
    store = bring_in(tmp_path, photos, BOXES)
    assert store.columns.sizes[0].tolist() == [0, 0]
    assert store.header["counts"]["unreadable"] == 1


def test_export_of_another_image_list_is_refused(tmp_path: Path, photos: Path) -> None:
    store = bring_in(tmp_path, photos, BOXES)
    (photos / "a.jpg").rename(photos / "c.jpg")
    with pytest.raises(ProposalsError, match="holds the proposals of 3 other images"):
        export_json(store, list_images(photos), tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()


def test_stems_have_neither_folder_nor_the_last_suffix(tmp_path: Path) -> None:
    images = ImageFiles(tmp_path, np.frombuffer(bytearray(b"n01/x.1.JPEG\0y.png\0"), dtype=np.uint8))
    assert unique_stems(images) == ["x.1", "y"]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation", range(10))
def test_size_from_the_header_is_that_of_the_decoded_image(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"image{suffix}"
    Image.new("RGB", (40, 30)).save(file, exif=exif)
    height, width = decode(file.read_bytes()).shape[1:]
    assert decoded_size(file.read_bytes()) == (width, height)
    assert (width, height) == ((30, 40) if 5 <= orientation <= 8 else (40, 30))


def test_size_from_the_header_copes_with_odd_files_as_decode_does(tmp_path: Path) -> None:
    file = tmp_path / "image.jpg"
    Image.new("RGB", (40, 30)).save(file, exif=b"Exif\0\0no such thing")
    assert decode(file.read_bytes()).shape[1:] == (30, 40)
    assert decoded_size(file.read_bytes()) == (40, 30)
    assert decoded_size(b"") == (0, 0)
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="more than"):
        decode((tmp_path / "bomb.png").read_bytes())
    assert decoded_size((tmp_path / "bomb.png").read_bytes()) == (0, 0)
