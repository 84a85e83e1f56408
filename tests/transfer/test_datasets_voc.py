"""Reading VOC folders: hostile ones made up here, and a real one."""

import os
from pathlib import Path

import pytest
from PIL import Image

from transfer.repairs import DatasetError
from transfer.voc_source import check_classes, read_voc

REAL = Path(os.environ.get("DETCO_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "voc_blood_cells"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} does not exist; set $DETCO_TEST_DATA")


def xml_object(box: tuple[float, ...], name: str = "cat", extra: str = "") -> str:
    corners = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


class VocFolder:
    """Writes a VOC folder, image by image."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lines: list[str] = []
        for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (root / name).mkdir(parents=True)

    def add(self, stem: str, *objects: str, suffix: str = ".jpg", size=(100, 80), line: str | None = None) -> None:
        Image.new("RGB", (100, 80)).save(self.root / "JPEGImages" / f"{stem}{suffix}", format="PNG")
        width, height = size
        header = f"<size><width>{width}</width><height>{height}</height></size>"
        text = f"<annotation>{header}{''.join(objects)}</annotation>"
        (self.root / "Annotations" / f"{stem}.xml").write_text(text)
        self.lines.append(stem if line is None else line)

    def read(self):
        (self.root / "ImageSets/Main/train.txt").write_text("\n".join(self.lines) + "\n")
        return read_voc(self.root, "train")


@pytest.fixture
def voc(tmp_path: Path) -> VocFolder:
    return VocFolder(tmp_path / "voc")


def test_a_box_of_the_whole_image_in_the_file_is_the_whole_image(voc: VocFolder) -> None:
    voc.add("a", xml_object((1, 1, 100, 80)))
    (image,) = voc.read().images
    assert image.objects[0].box == (0, 0, 100, 80)
    assert (image.width, image.height) == (100, 80)


def test_classes_are_sorted_whatever_the_order_of_the_files(voc: VocFolder) -> None:
    voc.add("a", xml_object((1, 1, 9, 9), "zebra"), xml_object((1, 1, 9, 9), "ant"))
    voc.add("b", xml_object((1, 1, 9, 9), "moth"))
    assert voc.read().classes == ("ant", "moth", "zebra")


@pytest.mark.parametrize("box", [(5, 5, 5, 5), (5, 5, 5, 20), (20, 5, 10, 20), (0, 0, 0, 0), ("nan", 1, 9, 9)])
def test_boxes_without_area_are_dropped_and_counted(voc: VocFolder, box) -> None:
    voc.add("a", xml_object(box), xml_object((1, 1, 9, 9)))
    found = voc.read()
    assert len(found.images[0].objects) == 1
    assert found.notes == ("1 boxes without area dropped (a.xml)",)


def test_boxes_outside_are_dropped_and_those_across_the_border_clipped(voc: VocFolder) -> None:
    voc.add("a", xml_object((101, 5, 120, 20)), xml_object((-10, 41, 50, 200)))
    found = voc.read()
    assert [item.box for item in found.images[0].objects] == [(0, 40, 50, 80)]
    assert found.notes == (
        "1 boxes outside their image dropped (a.xml)",
        "1 boxes reaching outside their image clipped (a.xml)",
    )


def test_a_tool_that_counts_from_zero_is_worth_no_word(voc: VocFolder) -> None:
    voc.add("a", xml_object((0, 0, 100, 80)))
    found = voc.read()
    assert found.images[0].objects[0].box == (0, 0, 100, 80)
    assert found.notes == ()


@pytest.mark.parametrize("stem", ["IMG (1)", "two words", "b#2", "{x}", "dotted.name.v2", "\u00dcn\u00efcode"])
@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".png"])
def test_odd_names_and_suffixes_are_found(voc: VocFolder, stem: str, suffix: str) -> None:
    voc.add(stem, xml_object((1, 1, 9, 9)), suffix=suffix)
    (image,) = voc.read().images
    assert image.stem == stem
    assert image.path.name == stem + suffix


def test_split_files_with_class_columns_suffixes_and_blank_lines_are_understood(voc: VocFolder) -> None:
    voc.add("a", xml_object((1, 1, 9, 9)), line="a  1")
    voc.add("b", xml_object((1, 1, 9, 9)), line="b -1\n\n")
    voc.add("c", xml_object((1, 1, 9, 9)), line="c.jpg")
    voc.add("d 1", xml_object((1, 1, 9, 9)))
    assert [image.stem for image in voc.read().images] == ["a", "b", "c", "d 1"]


def test_difficult_is_read_and_absent_means_no(voc: VocFolder) -> None:
    voc.add("a", xml_object((1, 1, 9, 9), extra="<difficult>1</difficult>"), xml_object((1, 1, 9, 9)))
    assert [item.is_difficult for item in voc.read().images[0].objects] == [True, False]


def test_a_size_of_zero_is_read_from_the_image(voc: VocFolder) -> None:
    voc.add("a", xml_object((1, 1, 200, 9)), size=(0, 0))
    found = voc.read()
    assert (found.images[0].width, found.images[0].height) == (100, 80)
    assert found.images[0].objects[0].box.x2 == 100
    assert "1 sizes missing in the XML, read from the images (a.xml)" in found.notes


def test_images_without_a_box_are_kept_and_counted(voc: VocFolder) -> None:
    voc.add("a", xml_object((1, 1, 9, 9)))
    for number in range(7):
        voc.add(f"bare{number}")
    found = voc.read()
    assert len(found.images) == 8
    assert found.notes == ("7 images without a box (bare0.jpg, bare1.jpg, bare2.jpg, bare3.jpg, bare4.jpg and 2 more)",)


def test_listed_images_that_are_missing_are_refused_by_name(voc: VocFolder) -> None:
    voc.add("a", xml_object((1, 1, 9, 9)))
    voc.add("b", xml_object((1, 1, 9, 9)))
    (voc.root / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(DatasetError, match=r"1 of the 2 images listed in .* are not in .*: b. Add them"):
        voc.read()


def test_listed_images_without_xml_are_refused_by_name(voc: VocFolder) -> None:
    voc.add("a", xml_object((1, 1, 9, 9)))
    voc.lines.append("ghost")
    with pytest.raises(DatasetError, match=r"1 of the 2 images .* have no XML in .*: ghost"):
        voc.read()


def test_an_image_listed_twice_is_refused(voc: VocFolder) -> None:
    voc.add("a", xml_object((1, 1, 9, 9)))
    voc.lines.append("a")
    with pytest.raises(DatasetError, match=r"lists images twice: a$"):
        voc.read()


def test_nonsense_in_an_xml_is_refused_with_the_file(voc: VocFolder) -> None:
    voc.add("a", xml_object((1, 1, "wide", 9)))
    with pytest.raises(DatasetError, match=r"a.xml: <bndbox/xmax> is 'wide', not a number"):
        voc.read()
    (voc.root / "Annotations/a.xml").write_text("<annotation>")
    with pytest.raises(DatasetError, match=r"a.xml is not XML"):
        voc.read()
    (voc.root / "Annotations/a.xml").write_text("<a><size><width>9</width><height>9</height></size><object/></a>")
    with pytest.raises(DatasetError, match=r"a.xml has an object without a name"):
        voc.read()


def test_a_folder_of_another_layout_or_split_says_what_is_expected(voc: VocFolder, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"has no folder Annotations; a VOC dataset is laid out as Annotations/"):
        read_voc(tmp_path, "train")
    voc.add("a", xml_object((1, 1, 9, 9)))
    voc.read()
    with pytest.raises(DatasetError, match=r"test.txt does not exist; splits there: train"):
        read_voc(voc.root, "test")
    (voc.root / "ImageSets/Main/train.txt").write_text("\n")
    with pytest.raises(DatasetError, match="lists no image"):
        read_voc(voc.root, "train")


def test_a_set_without_any_usable_box_is_refused(voc: VocFolder) -> None:
    voc.add("a", xml_object((3, 3, 3, 3)))
    with pytest.raises(DatasetError, match=r"no image of the split 'train' of .* has a usable box"):
        voc.read()


def test_classes_that_the_training_set_lacks_are_refused_by_name(voc: VocFolder) -> None:
    voc.add("a", xml_object((1, 1, 9, 9), "yak"), xml_object((1, 1, 9, 9), "cat"))
    check_classes(voc.read(), ["cat", "dog", "yak"])
    with pytest.raises(
        DatasetError, match=r"classes that the training set lacks: 'yak' \(say, in a\); .* are: cat, dog"
    ):
        check_classes(voc.read(), ["cat", "dog"])


@needs_real
@pytest.mark.realdata
def test_the_real_blood_cells_are_read_with_their_two_boxes_without_area() -> None:
    found = read_voc(REAL, "trainval")
    assert len(found.images) == 292
    assert found.classes == ("Platelets", "RBC", "WBC")
    assert found.notes == ("2 boxes without area dropped (BloodImage_00338.xml, BloodImage_00343.xml)",)
    assert all(item.box.has_area() and item.box.x2 <= image.width for image in found.images for item in image.objects)
