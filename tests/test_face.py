"""Faces: five points, the place in the picture and 512 numbers, with networks made here byte by byte.

The detector made here finds cells of pure green, the recogniser gives averages of colours: what they say of a picture
is known beforehand, and OpenCV really runs them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from joyavatar_core import checkpoint
from joyavatar_core.media import face

pytest.importorskip("cv2")

OFFSETS = np.array([[-1, -1], [1, -1], [0, 0.25], [-0.75, 1.5], [0.75, 1.5]], np.float32)
"""Where the detector made here says the points are, in cells from the corner of the green one."""


# ONNX in bytes: a message is its fields, a field its number and what stands in it


def varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def attribute(name: str, value: int | list[int]) -> bytes:
    if isinstance(value, int):
        return field(5, field(1, name) + field(3, value) + field(20, 2))
    return field(5, field(1, name) + b"".join(field(8, v) for v in value) + field(20, 7))


def node(kind: str, inputs: Iterable[str], output: str, **attributes: Any) -> bytes:
    fields = [*(field(1, i) for i in inputs), field(2, output), field(3, f"{kind}_{output}"), field(4, kind)]
    return field(1, b"".join([*fields, *(attribute(k, v) for k, v in attributes.items())]))


def tensor(name: str, values: np.ndarray) -> bytes:
    kind = 7 if values.dtype == np.int64 else 1
    dims = b"".join(field(1, n) for n in values.shape)
    return field(5, dims + field(2, kind) + field(8, name) + field(9, values.tobytes()))


def value(number: int, name: str, shape: Iterable[int | str]) -> bytes:
    dims = b"".join(field(1, field(1, n) if isinstance(n, int) else field(2, n)) for n in shape)
    return field(number, field(1, name) + field(2, field(1, field(1, 1) + field(2, dims))))


def model(*graph: bytes) -> bytes:
    return field(1, 8) + field(7, b"".join([*graph, field(2, "made")])) + field(8, field(1, "") + field(2, 13))


def recogniser_bytes(numbers: int = 512, before: bytes = b"", first: str = "input") -> bytes:
    """Averages of 7 x 7 pixels, then `numbers` sums of 2 x 2 of them in colour."""
    return model(
        before,
        node("AveragePool", [first], "small", kernel_shape=[7, 7], strides=[7, 7]),
        node("Conv", ["small", "weight"], "sums", kernel_shape=[2, 2], strides=[2, 2]),
        node("Flatten", ["sums"], "output", axis=1),
        tensor("weight", kernel(numbers)),
        value(11, "input", (1, 3, 112, 112)),
        value(12, "output", (1, numbers)),
    )


def kernel(numbers: int = 512) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(numbers // 64, 3, 2, 2)).astype(np.float32)


def answer(aligned: np.ndarray, scaled: bool = True) -> np.ndarray:
    """What the recogniser must say of an aligned face [112, 112, 3], without OpenCV."""
    x = aligned.astype(np.float64)
    x = (x - 127.5) / 127.5 if scaled else x
    small = x.reshape(16, 7, 16, 7, 3).mean((1, 3)).reshape(8, 2, 8, 2, 3)
    return np.einsum("icjdk,nkcd->nij", small, kernel().astype(np.float64)).reshape(-1)


def detector_bytes() -> bytes:
    """YuNet's outputs: the finest level finds green cells of 8 x 8 pixels, the others nothing."""
    graph = []
    for stride in (8, 16, 32):
        graph.append(node("AveragePool", ["input"], f"p{stride}", kernel_shape=[stride] * 2, strides=[stride] * 2))
        heads = {
            "cls": ([[-1, 1, -1]], [0.0]),  # of BGR: one in a green cell
            "obj": ([[0, 0, 0]], [1.0]),
            "bbox": ([[0, 0, 0]] * 4, [0.0, 0.0, 1.0, 1.0]),
            "kps": ([[0, 0, 0]] * 10, OFFSETS.reshape(-1)),
        }
        for name, (weight, bias) in heads.items():
            weight = np.array(weight, np.float32)[:, :, None, None] / 255
            weight = weight if stride == 8 else 0 * weight
            key = f"{name}_{stride}"
            graph += [
                tensor(f"w{key}", weight),
                tensor(f"b{key}", np.array(bias, np.float32)),
                tensor(f"s{key}", np.array([1, -1, len(weight)], np.int64)),
                node("Conv", [f"p{stride}", f"w{key}", f"b{key}"], f"c{key}", kernel_shape=[1, 1]),
                node("Transpose", [f"c{key}"], f"t{key}", perm=[0, 2, 3, 1]),
                node("Reshape", [f"t{key}", f"s{key}"], key),
                value(12, key, (1, f"n{stride}", len(weight))),
            ]
    return model(*graph, value(11, "input", (1, 3, "height", "width")))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces")
    (folder / "recogniser.onnx").write_bytes(recogniser_bytes())
    (folder / "detector.onnx").write_bytes(detector_bytes())
    return folder


def picture(*cells: tuple[int, int], width: int = 160, height: int = 128, cell: int = 8) -> np.ndarray:
    """Dark grey noise with green cells at (x, y)."""
    out = np.random.default_rng(1).integers(20, 60, (height, width, 3), np.uint8)
    for x, y in cells:
        out[y : y + cell, x : x + cell] = (0, 255, 0)
    return out


# where the face is


def test_points_of_the_detector(files: Path) -> None:
    found = face.points(picture((64, 48)), files / "detector.onnx")
    assert found.shape == (5, 2) and np.allclose(found, 8 * OFFSETS + [64, 48], atol=0.01)


def test_large_pictures_are_looked_at_small(files: Path) -> None:
    detector = face.load_detector(files / "detector.onnx")
    found = face.points(picture((640, 480), width=1280, height=960, cell=16), detector)
    assert np.allclose(found, 16 * OFFSETS + [640, 480], atol=0.1)


def test_a_close_up_is_looked_at_smaller_still() -> None:
    """A detector that, as YuNet, does not see what is too large."""

    class OnlySmall:
        sizes: list[tuple[int, int]] = []  # noqa: RUF012

        def setInputSize(self, size: tuple[int, int]) -> None:  # noqa: N802
            self.sizes.append(size)

        def detect(self, bgr: np.ndarray) -> tuple[int, np.ndarray | None]:
            row = np.concatenate([[10, 10, 60, 80], (face.TEMPLATE * 0.5).reshape(-1), [0.9]])
            return 1, row[None] if bgr.shape[1] <= 320 else None

    found = face.points(picture(width=1280, height=960), OnlySmall())
    assert OnlySmall.sizes == [(640, 480), (320, 240)] and np.allclose(found, face.TEMPLATE * 2, atol=1e-3)


@pytest.mark.parametrize(
    ("cells", "said"),
    [((), "no face found in the picture of 160x128"), (((32, 32), (96, 64)), r"2 faces found \(at .*crop to one")],
)
def test_none_or_two_faces(files: Path, cells: tuple[tuple[int, int], ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        face.points(picture(*cells), files / "detector.onnx")


def test_points_by_hand() -> None:
    text = "10,20 30.5,20 20,30 12,40 28,40"
    assert face.given_points(text).tolist() == [[10, 20], [30.5, 20], [20, 30], [12, 40], [28, 40]]
    for wrong in ("", "1,2 3,4", "a,b c,d e,f g,h i,j", text + " 1,2"):
        with pytest.raises(ValueError, match="write five of them"):
            face.given_points(wrong)


# the place of ArcFace


def moved(angle: float, scale: float, shift: tuple[float, float], points: np.ndarray = face.TEMPLATE) -> np.ndarray:
    turn = scale * np.exp(1j * np.deg2rad(angle))
    z = (points @ np.array([1, 1j])) * turn + complex(*shift)
    return np.stack([z.real, z.imag], 1).astype(np.float32)


@pytest.mark.parametrize(("angle", "scale", "shift"), [(0, 1, (0, 0)), (30, 2.5, (40, -7)), (-170, 0.4, (300, 200))])
def test_similarity_undoes_turn_scale_and_shift(angle: float, scale: float, shift: tuple[float, float]) -> None:
    points = moved(angle, scale, shift)
    matrix = face.similarity(points)
    assert np.allclose(points @ matrix[:, :2].T + matrix[:, 2], face.TEMPLATE, atol=1e-3)
    assert np.linalg.det(matrix[:, :2]) == pytest.approx(scale**-2, rel=1e-4)


def test_similarity_is_the_least_squares_one() -> None:
    """Against a solver of the four unknowns, on points that no similarity brings to the template."""
    points = moved(20, 1.7, (50, 60)) + np.random.default_rng(2).normal(size=(5, 2)).astype(np.float32) * 4
    x, y, one, zero = points[:, 0], points[:, 1], np.ones(5), np.zeros(5)
    rows = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
    a, b, u, v = np.linalg.lstsq(rows, face.TEMPLATE.T.reshape(-1), rcond=None)[0]
    assert np.allclose(face.similarity(points), [[a, -b, u], [b, a, v]], atol=1e-6)


def test_aligned_brings_the_face_to_its_place() -> None:
    """A picture of the template's points, turned and enlarged: after alignment the dots lie in the template."""
    points = moved(25, 2.0, (150, 40))
    canvas = np.zeros((480, 480, 3), np.uint8)
    for x, y in points.round().astype(int):
        canvas[y - 3 : y + 4, x - 3 : x + 4] = 255
    out = face.aligned(canvas, points)
    assert out.shape == (112, 112, 3) and out.dtype == np.uint8
    for x, y in face.TEMPLATE.round().astype(int):
        assert out[y, x].min() > 200
    assert out.mean() < 12


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (face.TEMPLATE[:4], r"shape \[4, 2\]"),
        (face.TEMPLATE * np.nan, "give five finite ones"),
        (face.TEMPLATE + 500, "outside the picture of 160x128"),
        (face.TEMPLATE[[1, 0, 2, 4, 3]], "not in the order right eye, left eye"),
        (np.full((5, 2), 50, np.float32), "not in the order"),
    ],
)
def test_points_that_are_no_face(points: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        face.aligned(picture(), points)


def test_small_faces_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    face.aligned(picture(), moved(0, 0.2, (60, 60)))
    assert "eyes are 7 pixels apart" in caplog.text


# who it is


def test_embedding_of_a_picture(files: Path) -> None:
    image, points = picture((64, 48)), moved(10, 0.8, (30, 20))
    found = face.embed(image, points, files / "recogniser.onnx")
    wanted = answer(face.aligned(image, points))
    assert found.shape == (512,) and found.dtype == np.float32
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
    assert np.allclose(found, wanted / np.linalg.norm(wanted), atol=1e-6)


def test_networks_that_normalise_get_plain_pixels(tmp_path: Path) -> None:
    """As InsightFace tells them: a subtraction and a multiplication among the first nodes."""
    before = node("Sub", ["input", "m"], "moved") + node("Mul", ["moved", "d"], "scaled")
    before += tensor("m", np.array([127.5], np.float32)) + tensor("d", np.array([1 / 127.5], np.float32))
    (tmp_path / "own.onnx").write_bytes(recogniser_bytes(before=before, first="scaled"))
    (tmp_path / "plain.onnx").write_bytes(recogniser_bytes())
    own, plain = (face.load_recogniser(tmp_path / f"{name}.onnx") for name in ("own", "plain"))
    assert (own.mean, own.deviation) == (0, 1) and (plain.mean, plain.deviation) == (127.5, 127.5)
    image = picture((64, 48))
    assert np.allclose(face.embed(image, face.TEMPLATE, own), face.embed(image, face.TEMPLATE, plain), atol=1e-6)


def test_bgr_networks_get_bgr(files: Path) -> None:
    model = face.load_recogniser(files / "recogniser.onnx")
    swapped = face.Recogniser(model.name, model.network, bgr=True)
    image = picture((64, 48))
    there = face.embed(image[..., ::-1].copy(), face.TEMPLATE, model)
    assert np.allclose(face.embed(image, face.TEMPLATE, swapped), there, atol=1e-6)


def test_a_truncated_or_foreign_file(files: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.onnx").write_bytes((files / "recogniser.onnx").read_bytes()[:200])
    (tmp_path / "text.onnx").write_text("hello")
    (tmp_path / "small.onnx").write_bytes(recogniser_bytes(128))
    for name, said in (("cut", "cannot use it"), ("text", "cannot use it"), ("small", "gives 128 numbers, not 512")):
        with pytest.raises(ValueError, match=said) as caught:
            face.load_recogniser(tmp_path / f"{name}.onnx")
        assert "non-commercial research only" in str(caught.value) and "\n" not in str(caught.value)
    for wrong in ("cut", "text"):
        with pytest.raises(ValueError, match=r"YuNet from the OpenCV Zoo \(MIT licence\)"):
            face.load_detector(tmp_path / f"{wrong}.onnx")
    with pytest.raises(ValueError, match="YuNet"):
        face.load_detector(files / "recogniser.onnx")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file at .* for the face detector: .*by hand"):
        face.points(picture(), tmp_path / "none.onnx")
    with pytest.raises(ValueError, match=r"no file at .* for the face recogniser: .*non-commercial"):
        face.embed(picture(), face.TEMPLATE, tmp_path / "none.onnx")


# numbers from anywhere


def numbers() -> np.ndarray:
    return np.random.default_rng(3).normal(size=512) * 20


@pytest.mark.parametrize("kind", ["npy", "safetensors", "json"])
def test_embedding_from_a_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"face.{kind}"
    if kind == "npy":
        np.save(path, numbers()[None])
    elif kind == "json":
        path.write_text(json.dumps(numbers().tolist()))
    else:
        checkpoint.write(path, {"embedding": torch.from_numpy(numbers())}, {})
    found = face.read_embedding(path)
    assert found.dtype == np.float32 and np.allclose(found, numbers() / np.linalg.norm(numbers()), atol=1e-6)
    assert np.array_equal(face.face_of_file(path), found)


def test_wrong_embeddings(tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text('{"a": "b"}')
    (tmp_path / "cut.json").write_text("[1, 2")
    (tmp_path / "text.npy").write_bytes(b"hello")
    (tmp_path / "text.safetensors").write_bytes(struct.pack("<Q", 99) + b"{}")
    np.save(tmp_path / "few.npy", np.ones(128))
    np.save(tmp_path / "zero.npy", np.zeros(512))
    np.save(tmp_path / "nan.npy", np.full(512, np.nan))
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}], object), allow_pickle=True)
    checkpoint.write(tmp_path / "two.safetensors", {"a": torch.ones(512), "b": torch.ones(512)}, {})
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=f"{path.name}.* holds no face embedding") as caught:
            face.read_embedding(path)
        assert "\n" not in str(caught.value)


def test_a_picture_asks_for_what_it_needs(files: Path, tmp_path: Path) -> None:
    Image.fromarray(picture((64, 48))).save(tmp_path / "me.png")
    found = face.face_of_file(tmp_path / "me.png", files / "recogniser.onnx", files / "detector.onnx")
    hand = " ".join(f"{x},{y}" for x, y in 8 * OFFSETS + [64, 48])
    by_hand = face.face_of_file(tmp_path / "me.png", files / "recogniser.onnx", hand=hand)
    assert np.allclose(found, by_hand, atol=1e-3) and found.shape == (512,)
    with pytest.raises(ValueError, match=r"a face recogniser is needed: .*non-commercial research only"):
        face.face_of_file(tmp_path / "me.png")
    with pytest.raises(ValueError, match=r"the face must be found: .*five points by hand"):
        face.face_of_file(tmp_path / "me.png", files / "recogniser.onnx")
