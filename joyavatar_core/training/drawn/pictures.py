"""Pictures made of pictures: the look of a photograph; and textures, which show no face.

Shape legend: T pixel frames, H W pixel size. Pictures are uint8 [H, W, 3] RGB, sizes are (H, W).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...media.opencv import opencv
from .colours import any_colour
from .layers import Image, Layer, Placement


def photo_like(seed: int, video: Image) -> Image:
    """Soft gradients in place of flat fills, uneven light, a colour cast and grain: [T, H, W, 3] in and out."""
    rng, cv2 = np.random.default_rng(seed), opencv()
    height, width = video.shape[1:3]
    spread, share = rng.uniform(0.015, 0.05) * height, rng.uniform(0.3, 0.6)
    light = cv2.resize(rng.uniform(0.6, 1.25, (3, 3, 1)).astype(np.float32), (width, height), interpolation=2)
    tint = (light[..., None] * rng.uniform(0.85, 1.12, 3)).astype(np.float32)
    gamma, grain, sharp = rng.uniform(0.8, 1.25), rng.uniform(0, 5), rng.uniform(0.3, 0.9)
    out = np.empty_like(video)
    for t, frame in enumerate(video.astype(np.float32)):
        frame = cv2.GaussianBlur(frame, (0, 0), sharp)
        soft = cv2.resize(frame, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
        soft = cv2.resize(cv2.GaussianBlur(soft, (0, 0), spread / 4), (width, height))
        mixed = np.clip((frame * (1 - share) + soft * share) * tint / 255, 0, 1) ** gamma * 255
        out[t] = np.clip(mixed + grain * rng.standard_normal((height, width, 1), np.float32), 0, 255)
    return out


def texture(seed: int, size: tuple[int, int] = (256, 256)) -> Image:
    """A picture of no face, uint8 [H, W, 3]: dead leaves, 1/f noise, stripes, blobs or blurred fields of colour."""
    rng = np.random.default_rng(seed)
    kinds = (_leaves, _cloud, _stripes, _blobs, _fields)
    return kinds[rng.choice(5, p=(0.4, 0.2, 0.12, 0.14, 0.14))](rng, size)


def _leaves(rng: np.random.Generator, size: tuple[int, int]) -> Image:
    """Dead leaves: shapes of all sizes over one another have the statistics of natural pictures."""
    height, width = size
    canvas = _fields(rng, (height * 2, width * 2))
    page = Layer()
    for radius in np.sort(np.exp(rng.uniform(np.log(0.01), np.log(0.35), rng.integers(40, 130))))[::-1]:
        corners = int(rng.choice((3, 4, 5, 6, 24)))
        angle = np.sort(rng.uniform(0, 2 * np.pi, corners)) if corners < 24 else np.linspace(0, 2 * np.pi, 24)
        shape = np.stack([np.cos(angle), np.sin(angle) * rng.uniform(0.3, 1)], 1) * radius
        turn = rng.uniform(0, np.pi)
        spin = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        page.fill(shape @ spin + rng.uniform(0, 1, 2) * (width / height, 1), any_colour(rng, 0, 255))
    page.paint(canvas, Placement(np.eye(2) * height * 2, np.zeros(2), height * 2))
    small = opencv().resize(canvas, (width, height), interpolation=opencv().INTER_AREA).astype(np.float32)
    shading = _spectrum(rng, size, rng.uniform(1.2, 2.0))[..., None] * rng.uniform(0, 30)
    return np.clip(small + shading, 0, 255).astype(np.uint8)


def _spectrum(rng: np.random.Generator, size: tuple[int, int], slope: float) -> NDArray[np.float32]:
    """[H, W] noise of spectrum 1/f^slope and unit deviation."""
    height, width = size
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    f[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal(size)) / f**slope
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(spectrum, size)
    return (noise / max(float(noise.std()), 1e-9)).astype(np.float32)


def _cloud(rng: np.random.Generator, size: tuple[int, int]) -> Image:
    slope = rng.uniform(1.0, 2.0)
    shared = _spectrum(rng, size, slope)
    planes = [0.7 * shared + 0.5 * _spectrum(rng, size, slope) for _ in range(3)]
    base = np.array(any_colour(rng, 60, 200))
    return np.clip(np.stack(planes, 2) * rng.uniform(20, 60) + base, 0, 255).astype(np.uint8)


def _stripes(rng: np.random.Generator, size: tuple[int, int]) -> Image:
    y, x = np.mgrid[: size[0], : size[1]]
    angle, period = rng.uniform(0, np.pi), np.exp(rng.uniform(np.log(6), np.log(60)))
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle) + 6 * _spectrum(rng, size, 2.0)) * 2 * np.pi / period)
    share = (0.5 + 0.5 * np.tanh(wave * rng.uniform(0.5, 6)))[..., None]
    first, second = np.array(any_colour(rng, 0, 255)), np.array(any_colour(rng, 0, 255))
    return (first * share + second * (1 - share)).astype(np.uint8)


def _blobs(rng: np.random.Generator, size: tuple[int, int]) -> Image:
    y, x = np.mgrid[: size[0], : size[1]] / float(size[0])
    out = np.full((*size, 3), any_colour(rng, 20, 220), np.float32)
    for _ in range(rng.integers(5, 16)):
        cx, cy = rng.uniform(0, 1, 2)
        share = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * rng.uniform(0.02, 0.2) ** 2))[..., None]
        out += (np.array(any_colour(rng, 0, 255)) - out) * share * rng.uniform(0.4, 1)
    return out.clip(0, 255).astype(np.uint8)


def _fields(rng: np.random.Generator, size: tuple[int, int]) -> Image:
    cells = rng.integers(2, 7)
    small = rng.uniform(0, 255, (cells, cells, 3)).astype(np.float32)
    return opencv().resize(small, size[::-1], interpolation=1).clip(0, 255).astype(np.uint8)
