"""`joyavatar generate` with systems of other projects: their policy, frame rate, hearing and a faster decoder."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from joyavatar_core import checkpoint
from joyavatar_core.autoencoder import AUTOENCODERS, LightAutoencoder
from joyavatar_core.cli.main import build_parser, main
from joyavatar_core.cli.options import policy_of
from joyavatar_core.config import AudioConfig
from joyavatar_core.policy import POLICIES
from joyavatar_core.wan_vae import WanVAE, WanVAEConfig

from .helpers import fill
from .test_cli import write_sound
from .test_families import PACKED, TEXT, saved, weights
from .test_families_reference import wav2vec2

HEARD = replace(PACKED, audio=AudioConfig(kind="added", features=8 * 4, width=2, window=4))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture, a voice of 0.3 s, encoders, and models under their published names."""
    folder = tmp_path_factory.mktemp("families")
    saved(folder / "avatarforcing-1.3b.safetensors", weights(HEARD))
    saved(folder / "livetalk-1.3b-v0.1.safetensors", weights(HEARD))
    saved(folder / "longlive_base.pt", {f"model.{n}": t for n, t in weights(TEXT).items()})
    checkpoint.write(folder / "vae.safetensors", fill(WanVAE(WanVAEConfig(dim=4))).state_dict(), {})
    wav2vec2().save_pretrained(folder / "wav2vec2")
    np.save(folder / "text.npy", np.zeros((3, 6), np.float32))
    write_sound(folder / "voice.wav", 0.3)
    Image.fromarray(np.random.default_rng(2).integers(0, 255, (40, 60, 3), np.uint8)).save(folder / "picture.png")
    return folder


def generate(files: Path, out: Path, model: str, **options: str) -> dict[str, str]:
    """Run the command -> what its report and the file's settings say."""
    av = pytest.importorskip("av")
    given = {
        "image": "picture.png",
        "audio": "voice.wav",
        "vae": "vae.safetensors",
        "text-encoder": "text.npy",
    } | options
    words = [part for name, file in given.items() for part in (f"--{name}", str(files / file))]
    words += ["--model", str(files / model), "--size", "32x32", "--output", str(out), "--device", "cpu"]
    assert main(["generate", *words, "--dtype", "float32"]) == 0
    with av.open(str(out)) as video:
        stream = video.streams.video[0]
        frames = [frame.to_ndarray(format="gray") for frame in video.decode(stream)]
        settings = json.loads(video.metadata["settings"])
        return {
            "rate": str(stream.average_rate),
            "frames": str(len(frames)),
            "policy": settings["policy"],
            "sum": str(int(np.sum(frames))),
        }


@pytest.mark.parametrize(
    ("model", "policy", "rate", "frames"),
    [
        ("avatarforcing-1.3b.safetensors", "avatarforcing", "25", "8"),
        ("livetalk-1.3b-v0.1.safetensors", "livetalk", "16", "5"),
    ],
)
def test_a_model_brings_its_policy_rate_and_hearing(
    model: str, policy: str, rate: str, frames: str, files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        made = generate(files, tmp_path / "a.mp4", model, **{"audio-encoder": "wav2vec2"})
    assert (made["rate"], made["frames"]) == (rate, frames)
    chosen = json.loads(made["policy"])
    assert chosen["block_latents"] == POLICIES[policy].block_latents
    assert chosen["sink_blocks"] == POLICIES[policy].sink_blocks
    assert chosen["given_first"] or chosen["picture_alone"]
    assert "contradicts itself" in caplog.text


def test_text_to_video_is_silent_and_as_long_as_the_sound(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        made = generate(files, tmp_path / "a.mp4", "longlive_base.pt")
    assert (made["rate"], made["frames"]) == ("16", "5")
    assert json.loads(made["policy"])["sink_position"] == "absolute"
    assert "this model does not listen" in caplog.text


def test_a_decoder_beside_the_vae(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    light = fill(LightAutoencoder(AUTOENCODERS["taew2_1"])).half()
    torch.save(light.state_dict(), files / "taew2_1.pth")
    slow = generate(files, tmp_path / "a.mp4", "longlive_base.pt")
    fast = generate(files, tmp_path / "b.mp4", "longlive_base.pt", decoder="taew2_1.pth")
    assert slow["frames"] == fast["frames"] and slow["sum"] != fast["sum"]
    checkpoint.write(files / "taew2_2.safetensors", LightAutoencoder(AUTOENCODERS["taew2_2"]).state_dict(), {})
    words = ["--image", files / "picture.png", "--audio", files / "voice.wav", "--vae", files / "vae.safetensors"]
    words += ["--text-encoder", files / "text.npy", "--model", files / "longlive_base.pt", "--size", "32x32"]
    words += ["--output", tmp_path / "c.mp4", "--device", "cpu", "--decoder", files / "taew2_2.safetensors"]
    assert main(["generate", *map(str, words)]) == 2
    assert "taew2_2.safetensors has 48 latent channels, the model 16" in capsys.readouterr().err


def test_an_encoder_of_another_width(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "livetalk.safetensors", weights(PACKED))
    words = ["--image", files / "picture.png", "--audio", files / "voice.wav", "--vae", files / "vae.safetensors"]
    words += ["--text-encoder", files / "text.npy", "--model", tmp_path / "livetalk.safetensors", "--size", "32x32"]
    words += ["--output", tmp_path / "c.mp4", "--device", "cpu", "--audio-encoder", files / "wav2vec2"]
    assert main(["generate", *map(str, words)]) == 2
    assert "gives tokens of 32 numbers, the model takes 3" in capsys.readouterr().err


def test_an_option_goes_before_the_model() -> None:
    words = ["generate", "--image", "a", "--audio", "b", "--output", "c"]
    args = build_parser().parse_args(words)
    assert args.policy is None and policy_of(args, "longlive") == POLICIES["longlive"]
    args = build_parser().parse_args([*words, "--policy", "self-forcing", "--local-blocks", "2"])
    assert policy_of(args, "longlive") == replace(POLICIES["self-forcing"], local_blocks=2)
