"""Reference pictures of every kind, good and bad. All files are made here."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from joyavatar_core.media import MediaError
from joyavatar_core.media.picture import BACKGROUND, MAX_PIXELS, fit_picture, read_picture


def scene(height: int = 40, width: int = 60) -> np.ndarray:
    """Red left half, blue right half, a green bar at the top."""
    rgb = np.zeros((height, width, 3), np.uint8)
    rgb[:, : width // 2, 0] = 220
    rgb[:, width // 2 :, 2] = 220
    rgb[: height // 4] = (0, 200, 0)
    return rgb


def close(a: np.ndarray, b: np.ndarray, within: int = 4) -> bool:
    return a.shape == b.shape and np.abs(a.astype(int) - b).mean() <= within


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.gif", "a.tiff", "фото и 音.png"])
def test_formats(tmp_path, name):
    Image.fromarray(scene()).save(tmp_path / name)
    rgb = read_picture(tmp_path / name)
    assert rgb.dtype == np.uint8 and rgb.flags.writeable and close(rgb, scene(), 8)


def test_modes(tmp_path):
    grey = scene().mean(axis=2).astype(np.uint8)
    three = np.repeat(grey[:, :, None], 3, axis=2)
    image = Image.fromarray(scene())
    cases = {
        "grey.png": (Image.fromarray(grey), three),
        "deep.png": (Image.fromarray((grey.astype(np.uint16) << 8) | grey), three),
        "float.tiff": (Image.fromarray(grey.astype(np.float32) / 255), three),
        "bits.png": (Image.fromarray(grey > 70), np.where(three > 70, 255, 0)),
        "palette.png": (image.quantize(8), scene()),
        "cmyk.jpg": (image.convert("CMYK"), scene()),
        "cmyk.tiff": (image.convert("CMYK"), scene()),
        "one.png": (Image.fromarray(scene()[:1, :1]), scene()[:1, :1]),
    }
    for name, (made, expected) in cases.items():
        made.save(tmp_path / name)
        assert close(read_picture(tmp_path / name), expected, 8), name


def test_deep_colour_png(tmp_path):
    """16 bits a channel, written by hand, since Pillow cannot."""
    rgb = scene(8, 8)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb.astype(np.uint16) * 257)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    (tmp_path / "a.png").write_bytes(data)
    assert close(read_picture(tmp_path / "a.png"), rgb, 1)


def test_transparent_is_laid_on_grey(tmp_path):
    alpha = np.full((40, 60), 255, np.uint8)
    alpha[:, :20], alpha[:, 20:25] = 0, 128
    rgba = Image.fromarray(np.dstack([scene(), alpha]))
    rgba.save(tmp_path / "rgba.png")
    rgba.quantize(16).save(tmp_path / "palette.png")
    rgba.convert("LA").save(tmp_path / "la.png")
    Image.fromarray(scene()).save(tmp_path / "key.png", transparency=(220, 0, 0))
    for name in ("rgba.png", "palette.png", "la.png"):
        rgb = read_picture(tmp_path / name)
        assert (rgb[:, :20] == BACKGROUND).all(), name
        assert not (rgb[:, 30:] == BACKGROUND).all(axis=2).any(), name
    half = read_picture(tmp_path / "rgba.png")[30, 22]
    assert np.abs(half.astype(int) - [(220 + BACKGROUND) // 2, BACKGROUND // 2, BACKGROUND // 2]).max() <= 1
    assert (read_picture(tmp_path / "key.png")[20:, :30] == BACKGROUND).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    upright = scene()
    turns = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 3),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(turns[orientation](upright))
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    assert close(read_picture(tmp_path / "a.jpg"), upright)


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.fromarray(scene()), Image.fromarray(255 - scene())]
    for name in ("a.gif", "a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100)
        assert close(read_picture(tmp_path / name), scene(), 8), name


def test_20000_pixels(tmp_path):
    """A long strip is read whole, a huge JPEG reduced, another huge picture refused before it is decoded."""
    Image.new("L", (20000, 300), 90).save(tmp_path / "strip.png")
    assert read_picture(tmp_path / "strip.png").shape == (300, 20000, 3)
    Image.new("L", (20000, 9600), 90).save(tmp_path / "huge.jpg", quality=20)
    rgb = read_picture(tmp_path / "huge.jpg")
    assert rgb.shape == (2400, 5000, 3) and abs(rgb.mean() - 90) < 4
    Image.new("1", (20000, 20000)).save(tmp_path / "huge.png")
    Image.new("1", (11000, 11000)).save(tmp_path / "large.png")
    for name in ("huge.png", "large.png"):
        with pytest.raises(MediaError, match=f"limit is {MAX_PIXELS // 10**6} megapixels") as caught:
            read_picture(tmp_path / name)
        assert "\n" not in str(caught.value) and "scale the picture down" in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated(tmp_path, kind):
    """Cut anywhere: an error of one line, never another exception, and never a picture with a missing half."""
    noise = np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    data = buffer.getvalue()
    whole = np.array(Image.open(buffer).convert("RGB"))
    path = tmp_path / "cut"
    for length in np.linspace(1, len(data) * 0.95, 40).astype(int):
        path.write_bytes(data[:length])
        try:
            assert close(read_picture(path), whole, 0)  # only what comes after the pixels is missing
        except MediaError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match=r"truncated or damaged|not a picture"):
        read_picture(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(st.data())
def test_damaged_files_raise_media_error_only(data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"]))
    buffer = io.BytesIO()
    Image.fromarray(scene(16, 16)).save(buffer, kind)
    raw = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"damaged-{os.getpid()}"
    path.write_bytes(raw)
    try:
        assert read_picture(path).shape[2] == 3
    except MediaError as error:
        assert "\n" not in str(error)
    finally:
        path.unlink()


def test_bad_files_end_in_one_clear_line(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    cases = {
        "empty.png": "is empty",
        "text.png": "not a picture",
        "drawing.eps": "not a picture",
        "missing.png": "no such file",
        "": "is a folder",
    }
    for name, words in cases.items():
        with pytest.raises(MediaError, match=words) as caught:
            read_picture(tmp_path / name)
        message = str(caught.value)
        assert message.startswith(str(tmp_path / name)) and "\n" not in message and ";" in message


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 70), st.integers(1, 70), st.sampled_from(["crop", "pad"]))
def test_fit_gives_the_size_and_keeps_a_plain_colour(rows, columns, width, height, mode):
    plain = np.full((rows, columns, 3), (10, 130, 250), np.uint8)
    fitted = fit_picture(plain, width, height, mode)
    assert fitted.shape == (height, width, 3) and fitted.dtype == np.uint8
    assert (np.abs(fitted.astype(int) - (10, 130, 250)) <= 1).all()


def test_crop_takes_more_from_below_and_equally_from_the_sides():
    tall = np.repeat(np.arange(90, dtype=np.uint8)[:, None, None], 30, axis=1).repeat(3, axis=2)
    rows = fit_picture(tall, 30, 30)[:, 0, 0]
    assert (rows[0], rows[-1]) == (20, 49)
    wide = tall.transpose(1, 0, 2)
    assert fit_picture(wide, 30, 30)[0, [0, -1], 0].tolist() == [30, 59]


def test_pad_shows_the_whole_picture_between_bars_of_its_edges():
    picture = scene(40, 80)
    fitted = fit_picture(picture, 80, 80, "pad")
    assert np.array_equal(fitted[20:60], picture)
    assert (fitted[10, :, 1] > 120).all() and (fitted[75, 5] == (220, 0, 0)).all()
    circle = np.zeros((100, 50, 3), np.uint8)
    circle[40:60, 15:35] = 255
    small = fit_picture(circle, 64, 64, "pad")[:, :, 0] > 127
    assert abs(int(small.any(axis=0).sum()) - int(small.any(axis=1).sum())) <= 1, "no distortion"


def test_fit_refuses_what_it_cannot_fit():
    for bad in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="must be uint8"):
            fit_picture(bad, 8, 8)
    with pytest.raises(ValueError, match="at least 1"):
        fit_picture(scene(), 0, 8)
    with pytest.raises(ValueError, match="'stretch' is unknown"):
        fit_picture(scene(), 8, 8, "stretch")  # pyright: ignore[reportArgumentType]
