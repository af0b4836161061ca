"""Image files of every mode: the right pixels, or refused with the reason."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pfedmoe_mpi.data import Dataset
from support.data_files import all_rows, data_error, open_data, random_images

INK = random_images(1, 8, 10)[0]
COLOURS = random_images(1, 8, 10, 3, seed=1)[0]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder of two classes: `a` is empty, and `b` holds a grey image."""
    for name in "ab":
        (tmp_path / name).mkdir()
    Image.fromarray(random_images(1, 8, 10, seed=2)[0]).save(tmp_path / "b" / "grey.png")
    return tmp_path


def save(root: Path, image: Image.Image, name: str, **options: Any) -> Path:
    path = root / "a" / name
    image.save(path, **options)
    return path


def read_saved(root: Path, image: Image.Image, name: str, **options: Any) -> Dataset:
    save(root, image, name, **options)
    return open_data("folder", root)


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return pixels (H, W, 3) on white, as (3, H, W)."""
    share = alpha[..., None] / 255
    return np.rint(pixels * share + 255 * (1 - share)).astype(np.uint8).transpose(2, 0, 1)


# transparency


@pytest.mark.parametrize("name", ["ink.png", "ink.tif", "ink.webp"])
def test_ink_in_the_alpha_channel_is_kept(root: Path, name: str) -> None:
    image = Image.fromarray(np.dstack([np.zeros_like(COLOURS), INK]))
    options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
    data = read_saved(root, image, name, **options)
    assert np.array_equal(all_rows(data)[0], np.stack([255 - INK] * 3))
    assert data.warnings == (f"transparent images are put on white: 1 of 2, for example {root / 'a' / name}",)


def test_colours_with_alpha_are_put_on_white(root: Path) -> None:
    image = Image.fromarray(np.dstack([COLOURS, INK]))
    data = read_saved(root, image, "x.png")
    assert np.array_equal(all_rows(data)[0], on_white(COLOURS, INK))


def test_grey_with_alpha_stays_grey(root: Path) -> None:
    image = Image.merge("LA", [Image.new("L", (10, 8), 0), Image.fromarray(INK)])
    data = read_saved(root, image, "x.png")
    assert data.shape == (1, 8, 10) and np.array_equal(all_rows(data)[0, 0], 255 - INK)
    assert len(data.warnings) == 1


def test_a_transparent_palette_is_put_on_white(root: Path) -> None:
    alpha = np.arange(256, dtype=np.uint8)[::-1].copy()
    palette = random_images(256, 3, seed=3)
    image = Image.fromarray(INK).convert("P")
    image.putpalette(palette.tobytes())
    data = read_saved(root, image, "x.png", transparency=alpha.tobytes())
    with Image.open(root / "a" / "x.png") as file:
        assert file.mode == "P" and "transparency" in file.info
    assert np.array_equal(all_rows(data)[0], on_white(palette[INK], alpha[INK]))
    assert len(data.warnings) == 1


@pytest.mark.parametrize("name", ["x.png", "x.gif"])
def test_a_transparent_colour_is_white(root: Path, name: str) -> None:
    two = np.where(INK > 99, 80, 10).astype(np.uint8)
    data = read_saved(root, Image.fromarray(two), name, transparency=10)
    assert (all_rows(data)[0] == np.where(INK > 99, 80, 255)).all() and len(data.warnings) == 1


def test_a_transparent_colour_of_rgb_is_white(root: Path) -> None:
    pixels = np.where(INK[..., None] > 99, COLOURS, (1, 2, 3)).astype(np.uint8)
    data = read_saved(root, Image.fromarray(pixels), "x.png", transparency=(1, 2, 3))
    expected = np.where(INK[..., None] > 99, COLOURS, 255).transpose(2, 0, 1)
    assert np.array_equal(all_rows(data)[0], expected) and len(data.warnings) == 1


def test_opaque_images_with_an_alpha_channel_are_unchanged(root: Path) -> None:
    opaque = np.full((8, 10), 255, np.uint8)
    data = read_saved(root, Image.fromarray(np.dstack([COLOURS, opaque])), "x.png")
    assert np.array_equal(all_rows(data)[0], COLOURS.transpose(2, 0, 1)) and not data.warnings
    grey = Image.merge("LA", [Image.fromarray(INK), Image.fromarray(opaque)])
    data = read_saved(root, grey, "x.png")
    assert np.array_equal(all_rows(data)[0, 0], INK) and not data.warnings


def test_transparency_is_removed_before_resizing(root: Path) -> None:
    alpha = np.zeros((8, 10), np.uint8)
    alpha[:, 5:] = 255
    save(root, Image.fromarray(np.dstack([np.zeros_like(COLOURS), alpha])), "x.png")
    x = all_rows(open_data("folder", root, size=4))[0]
    expected = Image.fromarray(255 - alpha).resize((4, 4), Image.Resampling.BILINEAR)
    assert np.array_equal(x, np.stack([np.asarray(expected)] * 3))


def test_white_on_a_transparent_background_is_refused(root: Path) -> None:
    path = save(root, Image.fromarray(np.dstack([np.full_like(COLOURS, 255), INK])), "x.png")
    assert "-background black" in data_error("x.png is white on a transparent background", "folder", root)
    Image.new("RGBA", (10, 8), (255, 255, 255, 0)).save(path)
    assert (all_rows(open_data("folder", root))[0] == 255).all()


# CMYK


@pytest.mark.parametrize("name", ["x.tif", "x.jpg"])
def test_cmyk_is_converted_and_announced(root: Path, name: str) -> None:
    image = Image.new("CMYK", (10, 8), (0, 200, 100, 30))
    data = read_saved(root, image, name)
    expected = [round((255 - ink) * (255 - 30) / 255) for ink in (0, 200, 100)]
    assert np.abs(all_rows(data)[0].astype(int) - np.reshape(expected, (3, 1, 1))).max() <= 1
    assert len(data.warnings) == 1 and "without their colour profile: 1 of 2" in data.warnings[0]


# more than 8 bits


@pytest.mark.parametrize("orientation", range(1, 10))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_images_are_upright(root: Path, name: str, orientation: int) -> None:
    """A camera's EXIF orientation is applied, as every viewer does; 9 is no orientation."""
    upright = np.kron(np.array([[0, 255], [80, 160]], np.uint8), np.ones((8, 8), np.uint8))
    stored = {2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T}
    stored |= {6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(random_images(1, 16, 16, seed=2)[0]).save(root / "b" / "grey.png")
    image = Image.fromarray(np.dstack([stored.get(orientation, upright)] * 3))
    data = read_saved(
        root, image, name, exif=exif, **({"quality": 100} if name[-3:] in {"jpg", "ebp"} else {})
    )
    assert abs(all_rows(data)[0, 0].astype(int) - upright).max() < 30
    said = "images are turned upright as their EXIF orientation says: 1 of 2, for example"
    if not name.endswith("tif"):  # Pillow turns it
        assert [text.startswith(said) for text in data.warnings] == [True] * (2 <= orientation <= 8)


def test_damaged_exif_is_ignored(root: Path) -> None:
    data = read_saved(root, Image.fromarray(COLOURS), "a.png", exif=b"Exif\0\0no header")
    assert np.array_equal(all_rows(data)[0], COLOURS.transpose(2, 0, 1)) and not data.warnings


def deep_png(kind: int, channels: int) -> bytes:
    """Return a PNG file of 10 × 8 pixels with 16 bits per channel."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    lines = random_images(8, 10 * channels * 2)
    raw = b"".join(b"\0" + line.tobytes() for line in lines)
    header = struct.pack(">IIBBBBB", 10, 8, 16, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


def deep_tiff() -> bytes:
    """Return an RGB TIFF file of 10 × 8 pixels with 16 bits per channel."""
    start = 8 + 2 + 9 * 12 + 4  # of the bits per channel, which do not fit into their entry
    entries = [
        *((256, 3, 1, 10), (257, 3, 1, 8), (258, 3, 3, start), (259, 3, 1, 1), (262, 3, 1, 2)),
        *((273, 4, 1, start + 6), (277, 3, 1, 3), (278, 3, 1, 8), (279, 4, 1, 10 * 8 * 6)),
    ]
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    header = b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4)
    return header + struct.pack("<3H", 16, 16, 16) + random_images(10 * 8 * 6).tobytes()


PIXELS = random_images(10 * 8 * 3 * 2).tobytes()
DEEP = {
    "grey.png": deep_png(0, 1),
    "rgb.png": deep_png(2, 3),
    "la.png": deep_png(4, 2),
    "rgba.png": deep_png(6, 4),
    "rgb.tif": deep_tiff(),
    "rgb.ppm": b"P6 10 8 65535\n" + PIXELS,
    "text.ppm": b"P3 10 8 1023\n" + b" ".join(b"%d" % number for number in range(240)),
    "grey.pgm": b"P5 10 8 65535\n" + PIXELS[:160],
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_are_refused(root: Path, name: str) -> None:
    (root / "a" / name).write_bytes(DEEP[name])
    with Image.open(root / "a" / name) as image:
        image.load()
        assert image.size == (10, 8), "the test's file is an image"
    message = data_error(f"{name} has more than 8 bits per channel", "folder", root)
    assert "float32 in an HDF5 file" in message


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_grey_tiff_is_refused(root: Path, mode: str) -> None:
    save(root, Image.new(mode, (10, 8), 1000), "x.tif", compression="tiff_lzw")
    data_error("x.tif has more than 8 bits", "folder", root)


def test_fewer_than_8_bits_are_scaled(root: Path) -> None:
    (root / "a" / "x.pgm").write_bytes(b"P5 10 8 15\n" + (INK // 16).tobytes())
    assert np.array_equal(all_rows(open_data("folder", root))[0, 0], INK // 16 * 17)
    bits = Image.fromarray(INK > 99)
    digits = b" ".join(b"%d" % bit for bit in (INK <= 99).ravel())  # in this format 1 is black
    (root / "a" / "x.pgm").write_bytes(b"P1 10 8\n" + digits)
    assert np.array_equal(all_rows(open_data("folder", root))[0, 0], np.where(INK > 99, 255, 0))
    (root / "a" / "x.pgm").unlink()
    assert bits.mode == "1"
    data = read_saved(root, bits, "x.png")
    assert np.array_equal(all_rows(data)[0, 0], np.where(INK > 99, 255, 0))


# damage


def test_damage_that_pillow_does_not_expect_is_refused(root: Path) -> None:
    (root / "a" / "x.ppm").write_bytes(b"PyP 10 8 255\n" + INK.tobytes())
    data_error("x.ppm cannot be read as an image: AssertionError", "folder", root)


# frames


@pytest.mark.parametrize("name", ["x.gif", "x.tif", "x.png", "x.webp"])
def test_several_frames_are_refused(root: Path, name: str) -> None:
    first, *others = [Image.fromarray(pixels) for pixels in random_images(3, 8, 10, 3)]
    path = save(root, first, name, save_all=True, append_images=others)
    assert f"magick '{path}[0]'" in data_error(f"{name} has 3 frames", "folder", root)
    first.save(path, save_all=True)
    assert open_data("folder", root).shape == (3, 8, 10)


def test_a_camera_image_with_previews_is_its_first_frame(root: Path) -> None:
    first, preview = Image.new("RGB", (10, 8), (200, 100, 50)), Image.new("RGB", (5, 4))
    path = save(root, first, "x.jpg", format="MPO", save_all=True, append_images=[preview])
    with Image.open(path) as image:
        assert image.format == "MPO" and image.n_frames == 2
    data = open_data("folder", root)
    assert np.abs(all_rows(data)[0].mean(axis=(1, 2)) - (200, 100, 50)).max() < 3 and not data.warnings
