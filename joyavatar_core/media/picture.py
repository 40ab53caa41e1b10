"""A reference picture from a file, and its fitting to the size of the stream.

Shape legend: H W height and width of the file's picture, 3 = RGB. All pictures are uint8, 0 to 255, sRGB.

Pillow decodes, since it reports truncated files and turns pictures as EXIF asks; OpenCV resizes.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from . import MediaError
from .opencv import opencv

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 100_000_000
"""Largest picture that is decoded whole (300 MB as RGB). A larger JPEG is decoded at a half, a quarter or an eighth."""

REDUCED_SIDE = 4096
"""A JPEG with a longer side than twice this is decoded reduced: no stream is that large."""

BACKGROUND = 128
"""Transparent parts are laid on mid grey: zero in the model's range, and no bright or dark rim round cut-out hair."""

HEADROOM = 1 / 3
"""Share of the surplus height that a crop takes from above: less than a half, since heads are at the top."""

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
"""Formats that are tried. Pillow's others include ones that start foreign programs (EPS) or read other files."""

_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


def read_picture(path: str | Path) -> np.ndarray:
    """The first picture of a file, upright, as uint8 [H, W, 3] RGB.

    Alpha (and a palette's or a colour key's transparency) is composited on mid grey, 16-bit is scaled to 8, grey,
    1-bit, palette and CMYK become RGB, EXIF rotation is applied, an animation gives its first frame. Up to
    `MAX_PIXELS`; a JPEG with a side beyond 2 * `REDUCED_SIDE` is decoded reduced and so may have far more.

    Raises MediaError when the file is missing, empty, a directory, not a picture, truncated or too large.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            return _decode(path, stream)
    except IsADirectoryError:
        raise MediaError(f"{path}: is a folder; name a picture file in it") from None
    except FileNotFoundError:
        raise MediaError(f"{path}: no such file; check the path of the picture") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise MediaError(f"{path}: cannot be read ({reason}); check the file and its permissions") from None


def fit_picture(rgb: np.ndarray, width: int, height: int, mode: Literal["crop", "pad"] = "crop") -> np.ndarray:
    """`rgb` uint8 [H, W, 3] brought to uint8 [height, width, 3] without distortion.

    crop: filled, the surplus cut off at both sides alike, of the height a third above and two thirds below.
    pad: shown whole, centred; the bars continue the picture's edges, blurred.
    Raises ValueError for another mode, a size below 1 or an array of another kind.
    """
    _check_rgb(rgb)
    if width < 1 or height < 1:
        raise ValueError(f"size {width}x{height}: width and height must be at least 1")
    if mode == "crop":
        return resize(_cropped(rgb, width, height), width, height)
    if mode == "pad":
        return _padded(rgb, width, height)
    raise ValueError(f"mode {mode!r} is unknown; use 'crop' or 'pad'")


def _check_rgb(rgb: np.ndarray) -> None:
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or 0 in rgb.shape:
        raise ValueError(f"picture of shape {rgb.shape} and type {rgb.dtype}: must be uint8 [H, W, 3], not empty")


def _decode(path: Path, stream: BinaryIO) -> np.ndarray:
    image = _open(path, stream)
    longer = max(image.size)
    if longer > 2 * REDUCED_SIDE:
        width, height = (max(1, side * REDUCED_SIDE // longer) for side in image.size)
        image.draft("RGB", (width, height))
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{path}: {width}x{height} is {width * height / 1e6:.0f} megapixels, the limit is "
            f"{MAX_PIXELS / 1e6:.0f} megapixels; scale the picture down"
        )
    try:
        image.load()
        return _to_rgb(_upright(image))
    except _DECODE_ERRORS as error:
        raise MediaError(
            f"{path}: the picture is truncated or damaged ({_one_line(error)}); export or download it again"
        ) from None


def _open(path: Path, stream: BinaryIO) -> Image.Image:
    pil = _pillow()
    if not stream.read(1):
        raise MediaError(f"{path}: the file is empty; export or download it again")
    stream.seek(0)
    pil.init()
    known = [name for name in FORMATS if name in pil.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning: this file has a limit of its own
            return pil.open(stream, formats=known)
    except pil.DecompressionBombError:
        return _open_huge(path, stream)
    except _DECODE_ERRORS:
        raise MediaError(f"{path}: not a picture that can be read; use PNG, JPEG or WebP") from None


def _open_huge(path: Path, stream: BinaryIO) -> Image.Image:
    """A JPEG past the size at which Pillow refuses: opened by its own class, as it can be decoded reduced."""
    from PIL import JpegImagePlugin

    stream.seek(0)
    try:
        return JpegImagePlugin.JpegImageFile(stream)
    except _DECODE_ERRORS:
        raise MediaError(
            f"{path}: has too many pixels, the limit is {MAX_PIXELS / 1e6:.0f} megapixels; scale the picture down"
        ) from None


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except _DECODE_ERRORS:
        return image  # damaged EXIF is no reason to refuse a sound picture


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        grey = _deep_grey(np.asarray(image))
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        return _on_background(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def _deep_grey(values: np.ndarray) -> np.ndarray:
    """16-bit, 32-bit or float grey [H, W] as uint8. Floats up to 1 are taken as 0 to 1, integers as 16-bit."""
    if values.dtype.kind == "f":
        values = np.nan_to_num(values)
        top = 1.0 if values.max() <= 1.0 else 255.0 if values.max() <= 255.0 else 65535.0
    else:
        top = 65535.0
    return np.clip(np.rint(values.astype(np.float32) * (255.0 / top)), 0, 255).astype(np.uint8)


def _on_background(rgba: np.ndarray) -> np.ndarray:
    """[H, W, 4] -> [H, W, 3]; row by row, since a whole picture in wider integers would take eight times its memory."""
    out = np.empty((*rgba.shape[:2], 3), np.uint8)
    for row in range(len(rgba)):
        alpha = rgba[row, :, 3:].astype(np.uint32)
        out[row] = (rgba[row, :, :3] * alpha + BACKGROUND * (255 - alpha) + 127) // 255
    return out


def crop_box(columns: int, rows: int, width: int, height: int) -> tuple[int, int, int, int]:
    """(x, y, width, height) of what "crop" keeps of a picture of columns x rows for a size of this aspect."""
    keep_columns = min(columns, max(1, round(rows * width / height)))
    keep_rows = min(rows, max(1, round(columns * height / width)))
    return (columns - keep_columns) // 2, round((rows - keep_rows) * HEADROOM), keep_columns, keep_rows


def _cropped(rgb: np.ndarray, width: int, height: int) -> np.ndarray:
    x, y, keep_columns, keep_rows = crop_box(rgb.shape[1], rgb.shape[0], width, height)
    return rgb[y : y + keep_rows, x : x + keep_columns]


def _padded(rgb: np.ndarray, width: int, height: int) -> np.ndarray:
    cv2 = opencv()
    rows, columns = rgb.shape[:2]
    scale = min(width / columns, height / rows)
    inner_w = min(width, max(1, round(columns * scale)))
    inner_h = min(height, max(1, round(rows * scale)))
    inner = resize(rgb, inner_w, inner_h)
    top, left = (height - inner_h) // 2, (width - inner_w) // 2
    borders = (top, height - inner_h - top, left, width - inner_w - left)
    filled = cv2.copyMakeBorder(inner, *borders, cv2.BORDER_REPLICATE)
    filled = cv2.GaussianBlur(filled, (0, 0), max(1.0, min(width, height) / 24))
    filled[top : top + inner_h, left : left + inner_w] = inner
    return filled


def resize(rgb: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 [H, W, 3] -> [height, width, 3]: areas averaged where it shrinks, cubic where it grows."""
    cv2 = opencv()
    rows, columns = rgb.shape[:2]
    if (rows, columns) == (height, width):
        return rgb.copy()
    shrinking = width * height < rows * columns
    return cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading pictures needs Pillow: pip install pillow") from error
    return Image
