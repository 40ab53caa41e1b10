"""Measures that rest on networks of others: layouts as published, on small random weights; nothing is downloaded."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from joyavatar_core.measures import frechet, identity, q_align, syncnet
from joyavatar_core.measures import measure as measure_file
from joyavatar_core.measures.face import Face, assumed_face
from joyavatar_core.measures.measure import Options, measure
from joyavatar_core.measures.mouth_reader import MouthReader
from joyavatar_core.measures.report import TABLE_1, collect
from joyavatar_core.measures.syncnet import SyncNet
from joyavatar_core.measures.truth import measure_truth
from joyavatar_core.measures.video import open_video
from joyavatar_core.measures.weights import I3D, INCEPTION, SYNCNET, Weights

from .test_measures_videos import talking, write_video

CONVOLUTIONS = {  # of syncnet_v2.model, by key: the position of each in its stack, and the shape of its weight
    "netcnnaud": {
        0: (64, 1, 3, 3),
        4: (192, 64, 3, 3),
        8: (384, 192, 3, 3),
        11: (256, 384, 3, 3),
        14: (256, 256, 3, 3),
        18: (512, 256, 5, 4),
    },
    "netcnnlip": {
        0: (96, 3, 5, 7, 7),
        4: (256, 96, 1, 5, 5),
        8: (256, 256, 1, 3, 3),
        11: (256, 256, 1, 3, 3),
        14: (256, 256, 1, 3, 3),
        18: (512, 256, 1, 6, 6),
    },
}

TINY_DINO = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 56,
    "initializer_range": 0.5,
}


def published_shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}

    def norm(name: str, width: int) -> None:
        found.update({f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")})
        found[f"{name}.num_batches_tracked"] = ()

    for stack, layers in CONVOLUTIONS.items():
        for place, shape in layers.items():
            found |= {f"{stack}.{place}.weight": shape, f"{stack}.{place}.bias": shape[:1]}
            norm(f"{stack}.{place + 1}", shape[0])
    for head in ("netfcaud", "netfclip"):
        found |= {f"{head}.0.weight": (512, 512), f"{head}.0.bias": (512,)}
        found |= {f"{head}.3.weight": (1024, 512), f"{head}.3.bias": (1024,)}
        norm(f"{head}.1", 512)
    return found


def test_syncnet_has_the_published_keys_and_shapes() -> None:
    with torch.device("meta"):
        net = SyncNet()
    assert {name: tuple(value.shape) for name, value in net.state_dict().items()} == published_shapes()
    with torch.device("meta"):
        assert net.eval().hear(torch.empty(2, 1, 13, 20)).shape == (2, 1024)
        assert net.look(torch.empty(2, 3, 5, 224, 224)).shape == (2, 1024)


def test_syncnet_is_loaded_from_a_file_and_scores(tmp_path: Path) -> None:
    pytest.importorskip("python_speech_features")
    torch.manual_seed(0)
    torch.save(SyncNet(8).state_dict(), tmp_path / SYNCNET)
    net = Weights(tmp_path).syncnet
    assert net is not None and not net.training
    rng = np.random.default_rng(0)
    crops = rng.integers(0, 255, (7, 224, 224, 3), dtype=np.uint8)
    sound = 0.1 * rng.standard_normal(4480).astype(np.float32)
    found = syncnet.score(net, crops, sound, 16000)
    assert found.distance > 0 and found.confidence >= 0 and abs(found.offset) <= 15
    again = syncnet.score(net, crops[..., ::-1], sound, 16000)
    assert again.distance != found.distance  # the order of the colours counts
    with pytest.raises(ValueError, match="too short for SyncNet"):
        syncnet.score(net, crops[:5], sound, 16000)


def test_other_files_are_not_taken_for_syncnet(tmp_path: Path) -> None:
    path = tmp_path / SYNCNET
    for content in ({"a": torch.zeros(1)}, {"netfclip.3.bias": torch.zeros(4)}, nn.Linear(1, 1)):
        torch.save(content, path)
        with pytest.raises(ValueError, match="not the weights of SyncNet"):
            syncnet.load_syncnet(path)
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="not the weights"):
        syncnet.load_syncnet(path)


@pytest.mark.parametrize("late", [-4, 0, 7])
def test_scores_find_the_offset(late: int) -> None:
    """late: windows by which the picture shows later what the sound has."""
    generator = torch.Generator().manual_seed(0)
    heard = torch.randn(80, 16, generator=generator)
    found = syncnet.score_features(heard.roll(late, 0), heard)
    assert found.offset == late
    assert found.distance < found.confidence  # small where they agree, large elsewhere
    apart = torch.nn.functional.pairwise_distance(heard[1:], heard[:-1]).mean()
    assert found.distance + found.confidence == pytest.approx(float(apart), rel=0.15)


def test_cepstra_are_those_of_the_published_front_end() -> None:
    pytest.importorskip("python_speech_features")
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000).astype(np.float32)
    cepstra = syncnet.cepstra_of(tone)
    assert cepstra.shape[0] == 13 and cepstra.shape[1] in (99, 100)
    louder = syncnet.cepstra_of(2 * tone)[:, 50] - cepstra[:, 50]
    assert louder[0] == pytest.approx(2 * np.log(2), abs=0.02)  # the first is the log energy of 16-bit samples
    assert np.abs(louder[1:]).max() < 0.2


def test_crops_are_at_25_a_second_and_hold_the_face() -> None:
    frames = np.zeros((16, 100, 120, 3), np.uint8)
    frames[:, 40:60, 50:70] = np.arange(16, dtype=np.uint8)[:, None, None, None] * 10 + 5
    face = Face((60.0, 50.0), 20.0, "given", float("nan"))
    crops = syncnet.face_crops([frames[:7], frames[7:]], 16.0, face, 1000)
    assert crops.shape == (25, 224, 224, 3)
    shown = crops[:, 80, 112, 0]  # the face's middle lies at 1 / 2.8 of the height
    expected = np.floor((np.arange(25) + 0.5) * 16 / 25).astype(int) * 10 + 5
    assert shown.tolist() == expected.tolist()
    edge = syncnet.face_crops([frames], 16.0, Face((0.0, 0.0), 20.0, "given", 0.0), 4)
    assert len(edge) == 4 and edge[0, 0, 0].tolist() == [110, 110, 110]


def test_idc_is_the_cosine_to_the_reference(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**TINY_DINO)).save_pretrained(tmp_path / "dinov2-tiny")
    model = Weights(tmp_path).dino
    rng = np.random.default_rng(0)
    own, other = rng.integers(0, 255, (2, 48, 40, 3), dtype=np.uint8)
    assert identity.consistency(model, np.stack([own, own]), own) == pytest.approx(1, abs=1e-5)
    assert identity.consistency(model, np.stack([own, other]), own) < 0.99
    transformers.ViTModel(transformers.ViTConfig(**TINY_DINO)).save_pretrained(tmp_path / "dinov2-not")
    with pytest.raises(ValueError, match="holds a vit model"):
        identity.load_dino(tmp_path / "dinov2-not")
    with pytest.raises(ValueError, match="not a model folder"):
        identity.load_dino(tmp_path)


def test_frechet_distance_of_known_gaussians() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((20_000, 2)) * (1.0, 2.0)
    b = rng.standard_normal((20_000, 2)) * (3.0, 2.0) + (0.0, 4.0)
    assert frechet.distance(a, b) == pytest.approx(16 + (3 - 1) ** 2, rel=0.02)
    assert frechet.distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet.distance(a[:3], a[:3]) == pytest.approx(0, abs=1e-6)  # a singular covariance too
    with pytest.raises(ValueError, match="at least 2"):
        frechet.distance(a[:1], b)


class PictureNetwork(nn.Module):
    """Takes what Inception takes: uint8 pictures."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        assert x.dtype == torch.uint8 and return_features
        return x.float().mean((2, 3))


class ClipNetwork(nn.Module):
    """Takes what I3D takes: clips in [-1, 1], ready-made."""

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        assert x.shape[1:] == (3, 16, 224, 224) and return_features and not (rescale or resize)
        return torch.stack([x.mean((1, 2, 3, 4)), x.amax((1, 2, 3, 4))], 1)


def put_networks(folder: Path) -> None:
    """Small random networks under the names a user's files have."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**TINY_DINO)).save_pretrained(folder / "dinov2-tiny")
    torch.save(SyncNet(8).state_dict(), folder / SYNCNET)
    torch.jit.script(PictureNetwork()).save(str(folder / INCEPTION))
    torch.jit.script(ClipNetwork()).save(str(folder / I3D))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_report_with_all_networks_has_every_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("python_speech_features")
    monkeypatch.setattr(measure_file, "_READ_SECONDS", 0.32)  # SyncNet sees three windows
    put_networks(tmp_path)
    weights = Weights(tmp_path, command(tmp_path, JUDGE))
    videos = [open_video(write_video(tmp_path / f"{i}.mp4", talking(17, seed=i))) for i in (1, 2)]
    reader = MouthReader().requires_grad_(False).eval()  # random: finds no face, so one is assumed
    found = [measure(video, Options(reader, weights)) for video in videos]
    assert {one.face.source for one in found} == {"assumed"}
    truth = measure_truth(videos, videos[0].blocks, None, weights)
    figures = collect(found, truth)
    assert {*TABLE_1, "FID", "FVD"} - {"FPS"} <= set(figures.figures)
    assert not {*TABLE_1, "FID", "FVD"} & set(figures.not_computed)
    assert figures.figures["FID"].mean == pytest.approx(0, abs=1e-6)  # the truth is these videos themselves
    assert figures.figures["Q_face"].mean == 0.25 and figures.figures["IDC"].n == 2
    assert figures.figures["Sync-D"].low < figures.figures["Sync-D"].high


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_networks_for_fid_and_fvd_are_torchscript(tmp_path: Path) -> None:
    torch.jit.script(PictureNetwork()).save(str(tmp_path / INCEPTION))
    torch.jit.script(ClipNetwork()).save(str(tmp_path / I3D))
    weights = Weights(tmp_path)
    frames = np.random.default_rng(0).integers(0, 255, (35, 40, 48, 3), dtype=np.uint8)
    assert frechet.picture_features(weights.inception, frames) == pytest.approx(frames.mean((1, 2)), rel=1e-5)
    clips = frechet.clip_features(weights.i3d, frames)
    assert clips.shape == (2, 2) and clips[0, 0] == pytest.approx(frames[:16].mean() / 127.5 - 1, abs=1e-3)
    (tmp_path / INCEPTION).write_bytes(b"x")
    with pytest.raises(ValueError, match="not a TorchScript file"):
        frechet.load_network(tmp_path / INCEPTION)


def test_a_folder_without_files_has_no_networks(tmp_path: Path) -> None:
    weights = Weights(tmp_path)
    assert weights.dino is None and weights.syncnet is None and weights.inception is None and weights.i3d is None
    with pytest.raises(ValueError, match="no such folder"):
        Weights(tmp_path / "none")


JUDGE = """
import json, sys
from pathlib import Path
names = [Path(line.strip()) for line in sys.stdin]
assert all(name.stat().st_size for name in names)
print(json.dumps([0.5 if name.name.startswith("frame") else 0.25 for name in names]))
"""


def command(tmp_path: Path, text: str) -> str:
    path = tmp_path / "judge.py"
    path.write_text(text)
    return f'"{sys.executable}" "{path}"'


def test_q_align_is_a_command_that_sees_frames_and_faces(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    assert q_align.score(command(tmp_path, JUDGE), frames, assumed_face(32, 32)) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise SystemExit('no weights here')", "no weights here"),
        ("print('hello')", "JSON list"),
        ("print('[0.5]')", "1 numbers for 6 pictures"),
        ("print([4.2] * 6)", "0 .. 1"),
    ],
)
def test_a_command_that_answers_otherwise_is_told_so(tmp_path: Path, text: str, said: str) -> None:
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match=said):
        q_align.score(command(tmp_path, text), frames, assumed_face(32, 32))
    with pytest.raises(OSError):
        q_align.ask("/no/such/program", [])
