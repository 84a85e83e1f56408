"""Image files: decoding anything, the same pixels by either decoder, and crops of reduced photos."""

import importlib.util
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from detco.views import photo
from detco.views.host import CropBox, crop_and_resize, draw_crop_box
from detco.views.photo import Photo, UnreadableImage, decode

DATA = Path(os.environ.get("DETCO_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
PHOTOS = sorted((DATA / "coco_animals" / "train").glob("*.jpg"))[:24]

needs_simplejpeg = pytest.mark.skipif(photo.simplejpeg is None, reason="needs simplejpeg")


def load_oracle():
    path = Path(__file__).parents[1] / "oracles" / "views_pillow.py"
    spec = importlib.util.spec_from_file_location("views_pillow", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = load_oracle()


def encode(image, suffix="PNG", **options):
    file = io.BytesIO()
    image.save(file, format=suffix, **options)
    return file.getvalue()


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def by_pillow(monkeypatch, load):
    """What `load` returns where simplejpeg is not installed."""
    with monkeypatch.context() as patch:
        patch.setattr(photo, "simplejpeg", None)
        return load()


class Witness(Photo):
    """Notes at which reductions it was decoded."""

    def __init__(self, whole):
        self.seen = []
        super().__init__(
            whole.height, whole.width, lambda r: self.seen.append(r) or whole.pixels(r), reductions=(8, 4, 2)
        )


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_every_png_mode_becomes_rgb_with_the_same_pixels(mode):
    image = oracle.photo(0).convert(mode)
    expected = oracle.to_tensor(image.convert("RGB"))
    decoded = decode(encode(image))
    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded, expected)


def test_palette_with_transparency_keeps_its_colours():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    decoded = decode(encode(image, transparency=bytes([0, 128])))
    assert decoded[:, 0, 0].tolist() == [255, 0, 0]
    assert decoded[:, 0, 1].tolist() == [0, 0, 255]


def test_sixteen_bit_grey_keeps_its_upper_eight_bits():
    values = np.array([[0, 255, 256, 0x8000, 0xFFFF]], dtype=np.uint16)
    decoded = decode(encode(Image.fromarray(values)))
    assert decoded[0, 0].tolist() == [0, 0, 1, 0x80, 0xFF]
    assert torch.equal(decoded[0], decoded[2])


def test_cmyk_jpeg_looks_as_it_did():
    image = oracle.photo(1)
    decoded = decode(encode(image.convert("CMYK"), "JPEG", quality=95))
    assert (decoded.float() - oracle.to_tensor(image).float()).abs().mean() < 6


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP"])
def test_formats_are_recognised_by_content(suffix):
    image = oracle.photo(2)
    decoded = decode(encode(image, suffix))
    assert decoded.shape == (3, *reversed(image.size))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["PNG", "TIFF"])
def test_exif_orientation_is_applied(orientation, suffix):
    image = oracle.photo(3, (40, 60))
    exif = exif_of(orientation)
    turned = {
        1: image,
        2: image.transpose(Image.FLIP_LEFT_RIGHT),
        3: image.transpose(Image.ROTATE_180),
        4: image.transpose(Image.FLIP_TOP_BOTTOM),
        5: image.transpose(Image.TRANSPOSE),
        6: image.transpose(Image.ROTATE_270),
        7: image.transpose(Image.TRANSVERSE),
        8: image.transpose(Image.ROTATE_90),
    }[orientation]
    assert torch.equal(decode(encode(image, suffix, exif=exif)), oracle.to_tensor(turned))


def test_a_damaged_exif_block_does_not_cost_the_image():
    data = encode(oracle.photo(3), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff garbage")
    assert decode(data).shape == (3, 120, 150)


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP"])
def test_truncated_files_are_refused_with_the_reason(suffix):
    data = encode(oracle.photo(4), suffix)
    with pytest.raises(UnreadableImage, match=rf"cannot decode image of {len(data) // 2} bytes: .+"):
        decode(data[: len(data) // 2])


def test_a_jpeg_is_not_decoded_before_its_crops_are_cut():
    data = encode(oracle.photo(4), "JPEG")
    damaged = Photo.open(data[: len(data) // 2])
    assert (damaged.height, damaged.width) == (120, 150)
    with pytest.raises(UnreadableImage, match=rf"cannot decode image of {len(data) // 2} bytes: .+"):
        damaged.crops([(CropBox(0, 0, 10, 10), 10)])


@pytest.mark.parametrize("data", [b"", b"not an image", b"\xff\xd8\xff\xe0" + bytes(100), b"<html></html>"])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(UnreadableImage, match="cannot decode image"):
        decode(data)


def test_decompression_bombs_are_refused_before_they_are_unpacked(monkeypatch):
    monkeypatch.setattr(photo, "MAX_PIXELS", 120 * 150 - 1)
    with pytest.raises(UnreadableImage, match=r"150x120 pixels are more than the 17999 allowed"):
        decode(encode(oracle.photo(5)))


def test_a_real_bomb_far_beyond_pillows_own_limit_is_refused():
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    with pytest.raises(UnreadableImage, match=r"cannot decode image.*(decompression bomb|100000x100000)"):
        decode(data + struct.pack(">I", 4) + b"IDAT" + bytes(8))


JPEGS = {
    "4:4:4": {"subsampling": 0, "quality": 95},
    "4:2:2": {"subsampling": 1, "quality": 75},
    "4:2:0": {"subsampling": 2, "quality": 50},
    "progressive": {"progressive": True},
    "stored as RGB": {"keep_rgb": True},
    "grey": {},
}


@needs_simplejpeg
@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("size", [(120, 152), (117, 151), (9, 300), (8, 8)])
def test_a_jpeg_has_the_same_pixels_with_and_without_simplejpeg(monkeypatch, kind, size):
    image = oracle.photo(6, size).convert("L" if kind == "grey" else "RGB")
    file = Photo.open(encode(image, "JPEG", **JPEGS[kind]))
    for reduction in (1, *photo.REDUCTIONS):
        ours, pillows = file.pixels(reduction), by_pillow(monkeypatch, lambda r=reduction: file.pixels(r))
        assert ours.shape == (3, -(-size[0] // reduction), -(-size[1] // reduction))
        assert torch.equal(ours, pillows)


@needs_simplejpeg
def test_damaged_jpegs_are_read_or_refused_alike_with_and_without_simplejpeg(monkeypatch):
    """Or a run would replace other samples on another machine."""
    rng = np.random.default_rng(0)
    data = np.frombuffer(encode(oracle.photo(7), "JPEG"), dtype=np.uint8)

    def verdict(file):
        try:
            return decode(file)
        except UnreadableImage as error:
            return str(error)

    num_read = 0
    for _ in range(150):
        damaged = data.copy()
        damaged[rng.integers(len(damaged), size=rng.integers(4))] = rng.integers(256)
        file = damaged.tobytes()[: rng.integers(len(data) // 2, 2 * len(data))]
        ours, pillows = verdict(file), by_pillow(monkeypatch, lambda file=file: verdict(file))
        assert type(ours) is type(pillows)
        assert ours == pillows if isinstance(ours, str) else torch.equal(ours, pillows)
        num_read += torch.is_tensor(ours)
    assert 5 < num_read < 145


def test_what_is_no_decoded_image_is_refused():
    for image in (torch.zeros(3, 8, 8), torch.zeros(1, 8, 8).byte(), torch.zeros(3, 0, 8).byte()):
        with pytest.raises(ValueError, match=r"expected an RGB image, uint8 of shape \(3, H, W\)"):
            Photo.of(image)


def test_crops_of_a_decoded_image_are_cut_from_it():
    image = oracle.to_tensor(oracle.photo(8))
    wanted = [(CropBox(0, 0, 120, 150), 7), (CropBox(20, 30, 64, 80), 64), (CropBox(119, 149, 1, 1), 5)]
    for crop, (box, size) in zip(Photo.of(image).crops(wanted), wanted, strict=True):
        assert torch.equal(crop, crop_and_resize(image, box, size))


def test_a_photo_is_decoded_once_as_small_as_its_crops_allow():
    rng = np.random.default_rng(1)
    data = encode(oracle.photo(9, (301, 403)), "JPEG")
    seen = set()
    for _ in range(60):
        file = Witness(Photo.open(data))
        boxes = [draw_crop_box(301, 403, (0.05, 1.0), (0.5, 2.0), rng) for _ in range(int(rng.integers(1, 4)))]
        sizes = [int(rng.integers(1, min(box.height, box.width) * 1.2)) for box in boxes]
        crops = file.crops(list(zip(boxes, sizes, strict=True)))
        assert [crop.shape for crop in crops] == [(3, size, size) for size in sizes]
        (reduction,) = file.seen
        seen.add(reduction)
        # The edges of a reduced box lie within half a pixel of where they should.
        margins = [min(box.height, box.width) / size for box, size in zip(boxes, sizes, strict=True)]
        slack = max(1 / size for size in sizes)
        assert reduction == 1 or min(margins) >= reduction * (1 - slack)
        assert reduction == 8 or min(margins) <= 2 * reduction * (1 + slack)
    assert seen == {1, 2, 4, 8}


@pytest.mark.parametrize(("side", "reduction"), [(78, 1), (80, 2), (156, 2), (160, 4), (312, 4), (320, 8), (400, 8)])
def test_no_crop_is_enlarged_because_its_photo_was_reduced(side, reduction):
    file = Witness(Photo.open(encode(oracle.photo(9, (400, 400)), "JPEG")))
    file.crops([(CropBox(0, 0, side, 400), 40), (CropBox(0, 0, 400, 400), 40)])
    assert file.seen == [reduction]


def test_only_plain_jpegs_are_reduced():
    image = oracle.photo(9, (400, 400))
    files = {
        "PNG": encode(image),
        "WebP": encode(image, "WEBP"),
        "CMYK": encode(image.convert("CMYK"), "JPEG"),
        "two images": encode(image, "MPO", save_all=True, append_images=[image]),
        "tiny": encode(image.resize((400, 7)), "JPEG"),
    }
    for kind, data in files.items():
        file = Photo.open(data)
        box = CropBox(0, 5, file.height, 380)
        (crop,) = file.crops([(box, 2)])
        assert torch.equal(crop, crop_and_resize(decode(data), box, 2)), kind
    (crop,) = Photo.open(encode(image, "JPEG")).crops([(CropBox(0, 5, 400, 380), 2)])
    assert not torch.equal(crop, crop_and_resize(decode(encode(image, "JPEG")), CropBox(0, 5, 400, 380), 2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_photo_shows_what_the_whole_one_does_whichever_way_it_lies(orientation):
    painting = np.zeros((157, 203, 3), dtype=np.uint8)
    painting[:, :, 0] = np.linspace(0, 255, 203)
    painting[:, :, 1] = np.linspace(0, 255, 157)[:, None]
    data = encode(Image.fromarray(painting), "JPEG", exif=exif_of(orientation), quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    file, whole = Photo.open(data), Photo.of(decode(data))
    assert (file.width, file.height) == (whole.width, whole.height) == upright.size
    for box in (CropBox(0, 0, file.height, file.width), CropBox(9, 21, 130, 120)):
        for size in (12, 29, 60):
            (ours,), (theirs,) = file.crops([(box, size)]), whole.crops([(box, size)])
            # A pixel of the crop is a step of 255 / size; edges move by half a pixel, and by one where it is mirrored.
            assert (ours.float() - theirs.float()).abs().mean(dim=(1, 2)).max() < 255 / size


@pytest.mark.realdata
@pytest.mark.skipif(not PHOTOS, reason=f"needs coco_animals below {DATA}; set DETCO_TEST_DATA")
@pytest.mark.parametrize("size", [64, 112])
def test_crops_of_reduced_real_photos_look_like_those_of_whole_ones(size):
    rng = np.random.default_rng(size)
    moved, resampled = [], []
    for path in PHOTOS:
        file = Witness(Photo.open(path.read_bytes()))
        whole = file.pixels()
        box = draw_crop_box(file.height, file.width, (0.2, 1.0), (3 / 4, 4 / 3), rng)
        (crop,) = file.crops([(box, size)])
        reduction = file.seen[-1]
        if reduction == 1:
            continue
        moved.append((crop.float() - crop_and_resize(whole, box, size).float()).abs().mean())
        # The same window, so that nothing but the way of averaging differs.
        edges = [round(edge / reduction) * reduction for edge in (box.top, box.left)]
        sides = [
            round((edge + side) / reduction) * reduction - start
            for edge, side, start in zip((box.top, box.left), (box.height, box.width), edges, strict=True)
        ]
        resampled.append((crop.float() - crop_and_resize(whole, CropBox(*edges, *sides), size).float()).abs().mean())
    assert len(moved) > len(PHOTOS) * 0.8
    assert torch.stack(resampled).mean() < 1.5
    assert torch.stack(moved).mean() < 3.5
