import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from rl4med_ddpo.datamodules.annotations import GROUND_TRUTH, read_annotations
from rl4med_ddpo.datamodules.images import INPUT, find_images, read_image
from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY
from rl4med_ddpo.foundation.errors import UserError

RAMP = np.stack(
    [np.arange(16).repeat(16).reshape(16, 16) * 16 + shift for shift in (0, 8, 15)], axis=2
).astype(np.uint8)


def pixels(image):
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


def save(tmp_path, image, name="a.png", **kwargs):
    image.save(tmp_path / name, **kwargs)
    return tmp_path / name


def error(path, size=8):
    with pytest.raises(UserError) as caught:
        read_image(path, size)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_png_is_read_back_exactly(tmp_path):
    image = read_image(save(tmp_path, Image.fromarray(RAMP)), 16)
    assert image.dtype == torch.float32
    assert image.shape == (3, 16, 16)
    assert (pixels(image) == RAMP).all()


def test_jpeg_is_read(tmp_path):
    image = read_image(save(tmp_path, Image.fromarray(RAMP), "a.jpg", quality=95), 16)
    assert np.abs(pixels(image).astype(int) - RAMP).mean() < 4


def test_squash_keeps_the_edges_and_crop_the_centre(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :10], wide[:, 20:40], wide[:, 50:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    for turned in (False, True):
        pattern = wide.transpose(1, 0, 2) if turned else wide
        path = save(tmp_path, Image.fromarray(np.ascontiguousarray(pattern)))
        squashed, cropped = (read_image(path, 10, how) for how in ("squash", "crop"))
        if turned:
            squashed = squashed.transpose(1, 2)
        assert squashed[:, 5, 0].tolist() == [1, 0, 0]
        assert squashed[:, 5, -1].tolist() == [0, 0, 1]
        assert (cropped == torch.tensor([0.0, 1, 0])[:, None, None]).all()


def test_squash_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    image = read_image(save(tmp_path, Image.fromarray(stripes)), 8)
    assert (image - 0.5).abs().max() < 0.05


def test_palette_with_alpha_shows_white_behind(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    path = save(tmp_path, image, transparency=0)
    assert read_image(path, 2)[:, 0].T.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_on_white(tmp_path, mode):
    grey = (100,) * (len(mode) - 1)
    image = Image.new(mode, (3, 1))
    image.putdata([(*grey, 0), (*grey, 255), (*grey, 51)])
    values = pixels(read_image(save(tmp_path, image), 3))[0]
    assert (np.diff(values, axis=1) == 0).all()
    assert values[:, 0].tolist() == [255, 100, 224]


def test_cmyk_jpeg(tmp_path):
    colours = np.zeros((32, 32, 3), np.uint8)
    colours[:, :16], colours[:, 16:] = (200, 40, 60), (30, 90, 220)
    path = save(tmp_path, Image.fromarray(colours).convert("CMYK"), "a.jpg", quality=98)
    assert np.abs(pixels(read_image(path, 32)).astype(int) - colours)[:, [4, 28]].max() < 12


def test_16_bit_grey_is_scaled(tmp_path):
    values = np.array([[0, 257 * 100, 65535, 300]], np.uint16)
    path = save(tmp_path, Image.fromarray(values))
    assert pixels(read_image(path, 4))[0].tolist() == [[0] * 3, [100] * 3, [255] * 3, [1] * 3]


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_and_black_and_white(tmp_path, mode):
    image = Image.new(mode, (2, 1))
    image.putdata([0, 255])
    assert pixels(read_image(save(tmp_path, image), 2))[0].tolist() == [[0] * 3, [255] * 3]


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    path = save(tmp_path, Image.fromarray(RAMP), exif=exif)
    assert (pixels(read_image(path, 16)) == np.rot90(RAMP, -1)).all()


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_every_orientation_is_turned_as_pillow_turns_it(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, Image.fromarray(RAMP), exif=exif)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    assert (pixels(read_image(path, 16)) == upright).all()


def wild_entry(rng):
    """An EXIF entry of any tag and type: 12 bytes, and what it points to."""
    tag, kind = int(rng.integers(1, 0xFFFF)), int(rng.integers(0, 14))
    if rng.random() < 0.3:
        tag = int(rng.choice([0x0112, 0x011A, 0x8769, 0x8825, 0x829A, 0x9286, 0x02BC]))
    count, pointed = int(rng.integers(0, 4)), rng.bytes(24) if rng.random() < 0.5 else bytes(24)
    return struct.pack("<HHI", tag, kind, count), pointed


def wild_exif(rng):
    turned = struct.pack("<HHI", 0x0112, 3, 1), struct.pack("<HH", rng.integers(1, 9), 0) * 6
    entries = [turned, *(wild_entry(rng) for _ in range(rng.integers(1, 6)))]
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    first = len(head) + 12 * len(entries) + 4
    places = [struct.pack("<I", first + 24 * i) for i in range(len(entries))]
    listed = entries[0][0] + turned[1][:4]
    listed += b"".join(
        entry + (place if rng.random() < 0.7 else rng.bytes(4))
        for (entry, _), place in zip(entries[1:], places[1:], strict=True)
    )
    return b"Exif\0\0" + head + listed + bytes(4) + b"".join(pointed for _, pointed in entries)


def test_a_whole_image_is_read_whatever_its_exif_holds(tmp_path):
    rng = np.random.default_rng(0)
    plain = save(tmp_path, Image.fromarray(RAMP), "plain.jpg")
    shown = pixels(read_image(plain, 16))
    stock_fails = 0
    for _ in range(500):
        path = save(tmp_path, Image.fromarray(RAMP), "a.jpg", exif=wild_exif(rng))
        found = pixels(read_image(path, 16))
        assert any((np.rot90(f, k) == shown).all() for f in (found, found[::-1]) for k in range(4))
        try:
            with Image.open(path) as image:
                ImageOps.exif_transpose(image)
        except Exception:
            stock_fails += 1
    assert stock_fails > 0


def test_grey_of_12_bits_in_16_is_refused(tmp_path):
    values = np.linspace(0, 4095, 64, dtype=np.uint16).reshape(8, 8)
    path = save(tmp_path, Image.fromarray(values))
    assert "greatest value is 4,095 of 65,535" in error(path)
    assert (
        pixels(read_image(save(tmp_path, Image.fromarray(values * 16)), 8))[-1, -1] == 255
    ).all()
    assert not pixels(read_image(save(tmp_path, Image.fromarray(values * 0)), 8)).any()


def test_a_jpeg_with_a_hole_is_refused_and_a_black_one_is_not(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    path = save(tmp_path, Image.fromarray(noise), "a.jpg", quality=95)
    assert read_image(path, 8).any()
    data = bytearray(path.read_bytes())
    data[8192 : 8192 + 4096] = bytes(4096)
    path.write_bytes(data)
    assert "nothing but zeros from byte 8,192 on" in error(path)
    black = save(tmp_path, Image.new("RGB", (2000, 2000)), "b.jpg", optimize=True)
    assert bytes(8192) in black.read_bytes()
    assert not read_image(black, 8).any()


def half(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_half_a_file(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = half(save(tmp_path, Image.fromarray(noise), name))
    with Image.open(path) as image:
        image.verify() if name == "a.jpg" else None  # passes: no test of wholeness
    assert "cannot decode" in error(path)


def test_one_changed_byte_in_a_png(tmp_path):
    path = save(tmp_path, Image.fromarray(RAMP))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    assert "cannot decode" in error(path)


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html></html>", b"GIF89a\x01\0\x01\0\0"])
def test_no_image_at_all(tmp_path, content):
    path = tmp_path / "ISIC_1.jpg"
    path.write_bytes(content)
    message = error(path)
    assert "cannot decode" in message
    assert "whole JPEG or PNG" in message


def test_a_whole_gif_is_refused(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(RAMP).save(path, format="GIF")
    assert "JPEG or PNG" in error(path)


def test_missing_file(tmp_path):
    assert "No such file" in error(tmp_path / "a.png")


def declare(path, width, height):
    """Let an image file declare other measures, and end it after its header."""
    data = path.read_bytes()
    if path.suffix == ".png":
        header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
        data = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:60]
    else:
        frame = data.index(b"\xff\xc0")
        data = data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 : -20]
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
@pytest.mark.parametrize("side", [(20_000, 20_000), (10_000, 9_500), (7_072, 7_072)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_giants_are_refused_before_decoding(tmp_path, side, name):
    # were the pixels decoded, the error would be that the file is cut off
    path = declare(save(tmp_path, Image.fromarray(RAMP), name), *side)
    assert f"{side[0] * side[1]:,} pixels; the limit is 50,000,000" in error(path)


def test_below_the_limit_the_file_is_decoded(tmp_path):
    path = declare(save(tmp_path, Image.fromarray(RAMP)), 7_071, 7_071)
    assert "cannot decode" in error(path)


@pytest.mark.filterwarnings("error")
def test_giants_are_refused_when_warnings_are_errors(tmp_path):
    path = declare(save(tmp_path, Image.fromarray(RAMP)), 10_000, 9_500)
    assert "95,000,000 pixels" in error(path)


@pytest.fixture
def frame(folder):
    return read_annotations(folder.root).frame


def test_find_by_stem_with_and_without_suffix(folder, frame):
    (folder.images / "ISIC_0000005_downsampled.jpg").rename(folder.images / "ISIC_0000005.JPEG")
    (folder.images / "ISIC_0000007.jpg").rename(folder.images / "ISIC_0000007_downsampled.png")
    found = [path.name for path in find_images(folder.root, frame)]
    assert found[:2] == ["ISIC_0000000_downsampled.jpg", "ISIC_0000002.jpg"]
    assert found[4] == "ISIC_0000005.JPEG"
    assert found[6] == "ISIC_0000007_downsampled.png"


def test_find_prefers_the_name_in_the_table(folder, frame):
    (folder.images / "ISIC_0000000.jpg").write_bytes(b"")
    assert find_images(folder.root, frame)[0].name == "ISIC_0000000_downsampled.jpg"


def test_find_in_the_doubled_folder(folder, frame):
    inner = folder.images / INPUT
    folder.images.rename(folder.root / "moved")
    folder.images.mkdir()
    (folder.root / "moved").rename(inner)
    found = find_images(folder.root, frame)
    assert len(found) == 39
    assert all(path.parent == inner and path.is_file() for path in found)


def test_find_through_a_linked_folder(folder, frame, tmp_path):
    folder.images.rename(tmp_path / "elsewhere")
    folder.images.symlink_to(tmp_path / "elsewhere")
    assert len(find_images(folder.root, frame)) == 39


def test_find_in_folders_below_and_by_names_with_hyphens_and_dots(folder):
    names = ["site-1/scan.001", "site-1/2019/ISIC-x", "a.b-c_d", "site-1/scan.002"]
    table = folder.root / "labels.csv"
    columns = ",".join(DERMOSCOPY.attributes)
    table.write_text(f"image,group,{columns}\n" + "".join(f"{n},,0,0,0,0,1,0\n" for n in names))
    for name in names:
        path = folder.images / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RAMP).save(path)
    rows = read_annotations(folder.root, table=table).frame
    assert list(rows["id"]) == sorted(names)
    found = find_images(folder.root, rows)
    assert [str(p.relative_to(folder.images)) for p in found] == [f"{n}.png" for n in sorted(names)]
    (folder.images / "site-1").rename(folder.root.parent / "elsewhere")
    (folder.images / "site-1").symlink_to(folder.root.parent / "elsewhere")
    with pytest.raises(UserError, match=r"3 image\(s\) are links that lead out"):
        find_images(folder.root, rows)


def test_a_link_that_leaves_the_folder(folder, frame, tmp_path):
    path = folder.images / "ISIC_0000002.jpg"
    path.rename(tmp_path / "private.jpg")
    path.symlink_to(tmp_path / "private.jpg")
    with pytest.raises(UserError, match=r"1 image\(s\) are links .*ISIC_0000002\.jpg") as caught:
        find_images(folder.root, frame)
    table = folder.root / GROUND_TRUTH
    line = 1 + [row.split(",")[0] for row in table.read_text().splitlines()].index("ISIC_0000002")
    assert f"(id ISIC_0000002, {table}:{line})" in str(caught.value)


def test_missing_images(folder, frame):
    for i in (0, 2, 3, 4, 5):
        next(folder.images.glob(f"ISIC_000000{i}*")).unlink()
    with pytest.raises(UserError) as caught:
        find_images(folder.root, frame)
    assert "5 of 39 images are missing" in str(caught.value)
    assert str(folder.images) in str(caught.value)
    assert "ISIC_0000000, ISIC_0000002, ISIC_0000003 and 2 more" in str(caught.value)


@pytest.mark.parametrize("missing", [True, False])
def test_no_images_folder(folder, frame, missing):
    for path in folder.images.iterdir():
        path.unlink()
    if missing:
        folder.images.rmdir()
    with pytest.raises(UserError) as caught:
        find_images(folder.root, frame)
    assert ("is missing" if missing else "holds no .jpg") in str(caught.value)
    assert str(folder.images) in str(caught.value)
