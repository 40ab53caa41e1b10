"""Full-size systems from files: random weights of tiny widths, written as they are published, through the command line.

Shape legend: L tokens, C channels of a token, H W pixels.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from joyavatar_core import checkpoint
from joyavatar_core.autoencoder import AUTOENCODERS, AutoencoderConfig, LightAutoencoder
from joyavatar_core.avatar import build_model, detect_config, detect_vae_config, load_autoencoder
from joyavatar_core.cli import full_size
from joyavatar_core.cli.main import build_parser, main
from joyavatar_core.config import MODELS, AudioConfig, FaceConfig, ModelConfig
from joyavatar_core.model import JoyAvatarDiT
from joyavatar_core.policy import POLICIES
from joyavatar_core.wan_vae import WanVAE, WanVAEConfig
from joyavatar_core.wav2vec import Wav2Vec2Windows

from .test_cli import write_sound

transformers = pytest.importorskip("transformers")
torch.set_num_threads(2)

CPU = torch.device("cpu")
TEXT, CLIP, WAV2VEC2, FACE = 12, 20, 64, 512
MODEL = ModelConfig(
    dim=24,
    ffn_dim=32,
    layers=2,
    heads=2,
    freq_dim=16,
    text_dim=TEXT,
    text_len=8,
    image_dim=CLIP,
    audio=AudioConfig(features=WAV2VEC2, width=16),
    face=FaceConfig(features=FACE, dim=16, depth=1, heads=2, queries=3, width=16),
)
SMALL_VAE = WanVAEConfig(dim=4)
SMALL_LIGHT = AutoencoderConfig(
    encoder_widths=(4, 4, 4), decoder_widths=(4, 4, 4, 4), encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1)
)


def save(path: Path, module: nn.Module, **metadata: str) -> Path:
    checkpoint.write(path, module.state_dict(), metadata)
    return path


def save_transformer(path: Path, config: ModelConfig) -> Path:
    torch.manual_seed(0)
    return save(path, JoyAvatarDiT(config), model_config=checkpoint.config_to_json(config))


def save_wav2vec2(folder: Path) -> None:
    config = transformers.Wav2Vec2Config(
        hidden_size=WAV2VEC2,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=32,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
    )
    transformers.Wav2Vec2Model(config).save_pretrained(folder)


def save_umt5(folder: Path) -> Any:
    """A tiny umT5 and a tokenizer that knows three words and, as T5's do, ends every text with </s>."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "calm": 4, "speaker": 5}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])  # pyright: ignore
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = transformers.UMT5Config(vocab_size=8, d_model=TEXT, d_kv=6, d_ff=16, num_layers=2, num_heads=2)
    model = transformers.UMT5EncoderModel(config).eval()
    model.save_pretrained(folder)
    return model


def save_clip(folder: Path) -> Any:
    config = transformers.CLIPVisionConfig(
        hidden_size=CLIP,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=8,
    )
    model = transformers.CLIPVisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of everything."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(1)
    save_transformer(folder / "model.safetensors", MODEL)
    save(folder / "vae.safetensors", WanVAE(SMALL_VAE))
    save(
        folder / "light.safetensors",
        LightAutoencoder(SMALL_LIGHT),
        autoencoder_config=checkpoint.config_to_json(SMALL_LIGHT),
    )
    save_wav2vec2(folder / "wav2vec2")
    save_umt5(folder / "umt5")
    save_clip(folder / "clip")
    np.save(folder / "text.npy", np.random.default_rng(0).normal(size=(3, TEXT)))
    checkpoint.write(folder / "clip.safetensors", {"tokens": torch.randn(1, 5, CLIP)}, {})
    np.save(folder / "face.npy", np.random.default_rng(1).normal(size=FACE).astype(np.float32))
    write_sound(folder / "voice.wav", 1.0)
    Image.fromarray(np.random.default_rng(2).integers(0, 255, (40, 60, 3), np.uint8)).save(folder / "picture.png")
    return folder


def words(files: Path, out: Path, **changes: str | Path | None) -> list[str]:
    """`joyavatar generate` with every option of a full-size model; changes replace options, None leaves one out."""
    options: dict[str, str | Path | None] = {
        "model": files / "model.safetensors",
        "vae": files / "vae.safetensors",
        "audio-encoder": files / "wav2vec2",
        "text-encoder": files / "umt5",
        "clip-vision": files / "clip",
        "face": files / "face.npy",
        "prompt": "a calm speaker",
        "image": files / "picture.png",
        "audio": files / "voice.wav",
        "output": out,
        "size": "32x32",
        "dtype": "float32",
        "device": "cpu",
    }
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    return ["generate", *(word for n, v in options.items() if v is not None for word in (f"--{n}", str(v)))]


def load(files: Path, **changes: str | Path | None) -> Any:
    args = build_parser().parse_args(words(files, files / "none.mp4", **changes))
    picture = np.asarray(Image.open(files / "picture.png"))
    return full_size.load_full_size(args, picture, "cpu", torch.float32)


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


# the whole way


@pytest.mark.parametrize("vae", ["vae.safetensors", "light.safetensors"])
def test_generate_makes_a_playable_file(files: Path, tmp_path: Path, vae: str, capsys: Any) -> None:
    out = tmp_path / "avatar.mp4"
    assert main(words(files, out, vae=files / vae)) == 0, capsys.readouterr().err
    assert frames_of(out).shape == (16, 32, 32, 3)


def test_generate_with_ready_embeddings(files: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "avatar.mp4"
    ready = {"text_encoder": files / "text.npy", "clip_vision": files / "clip.safetensors", "prompt": None}
    status = main(words(files, out, **ready, vae=files / "light.safetensors", dtype="bfloat16"))
    assert status == 0, capsys.readouterr().err
    assert len(frames_of(out)) == 16


def test_generate_hearing_the_whole_sound(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "avatar.mp4"
    assert main([*words(files, out, vae=files / "light.safetensors"), "--whole-audio"]) == 0
    assert len(frames_of(out)) == 16


def test_generate_without_audio_branch(files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A plain Wan2.1: the sound sets the length, and a warning says so."""
    silent = ModelConfig(dim=24, ffn_dim=32, layers=1, heads=2, in_channels=16, text_dim=TEXT, text_len=8, image_dim=0)
    model = save_transformer(tmp_path / "wan.safetensors", silent)
    out = tmp_path / "avatar.mp4"
    assert main(words(files, out, model=model, vae=files / "light.safetensors")) == 0
    assert len(frames_of(out)) == 16
    assert "--audio-encoder, --clip-vision, --face" in caplog.text and "only sets the length" in caplog.text


def test_embedded_kind_from_files(files: Path, tmp_path: Path) -> None:
    """A model of the embedded kind needs an autoencoder and no encoders."""
    config = ModelConfig(
        dim=24, ffn_dim=32, layers=1, heads=2, text_dim=0, text_len=0, image_dim=64,
        audio=AudioConfig(
            kind="window", features=256, width=8, window=16, tokens=2, channels=4, dilations=(2, 4, 4), readings=2
        ),
    )  # fmt: skip
    model = save_transformer(tmp_path / "own.safetensors", config)
    names = ("audio_encoder", "text_encoder", "clip_vision", "face", "prompt")
    out = tmp_path / "avatar.mp4"
    assert main(words(files, out, model=model, vae=files / "light.safetensors", **dict.fromkeys(names))) == 0
    assert len(frames_of(out)) == 16


def test_model_in_two_files(files: Path, tmp_path: Path) -> None:
    """FantasyTalking's layout: the audio weights lie in a file of their own, under its prefix."""
    tensors, metadata = checkpoint.read(files / "model.safetensors")
    audio = {n: t for n, t in tensors.items() if n.startswith("proj_model.") or ".processor." in n}
    base = {n: t for n, t in tensors.items() if n not in audio}
    base = {f"model.diffusion_model.{n}": t for n, t in base.items()}
    checkpoint.write(tmp_path / "base.safetensors", base, metadata)
    named = {n if n.startswith("proj_model.") else f"audio_processor.{n}": t for n, t in audio.items()}
    checkpoint.write(tmp_path / "audio.safetensors", named, {})
    both = f"{tmp_path / 'base.safetensors'},{tmp_path / 'audio.safetensors'}"
    avatar, _ = load(files, model=both)
    loaded = avatar.model.state_dict()
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[n], tensors[n]) for n in tensors)
    with pytest.raises(checkpoint.CheckpointError, match=r"audio\.safetensors repeats .* 7 twice"):
        load(files, model=f"{both},{tmp_path / 'audio.safetensors'}")


# parts


def test_system(files: Path) -> None:
    avatar, encoded = load(files)
    assert isinstance(avatar.autoencoder, WanVAE) and avatar.autoencoder.config == SMALL_VAE
    assert isinstance(avatar.front_end(avatar.geometry(None, POLICIES["joyavatar-flash"])), Wav2Vec2Windows)
    assert avatar.fps == 16 and avatar.size == (512, 512)
    shapes = [None if t is None else tuple(t.shape) for t in (encoded.text, encoded.image, encoded.face)]
    assert shapes == [(1, 4, TEXT), (1, 5, CLIP), (1, FACE)]
    assert not any(p.requires_grad for p in avatar.model.parameters())


def test_face_is_optional(files: Path) -> None:
    avatar, encoded = load(files, face=None)
    assert encoded.face is None
    assert avatar.condition(torch.zeros(1, 3, 32, 32), encoded).kv.face is None


def test_weights_take_the_asked_dtype(files: Path) -> None:
    args = build_parser().parse_args(words(files, files / "none.mp4"))
    picture = np.zeros((32, 32, 3), np.uint8)
    avatar, _ = full_size.load_full_size(args, picture, "cpu", torch.bfloat16)
    assert {p.dtype for p in avatar.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in avatar.autoencoder.parameters()} == {torch.bfloat16}  # pyright: ignore


@torch.no_grad()
def test_text_is_umt5_of_the_cleaned_prompt(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = save_umt5(tmp_path)
    wanted = model(input_ids=torch.tensor([[3, 4, 5, 1]])).last_hidden_state
    got = full_size.load_text_encoder(tmp_path, 8, CPU, torch.float32)("  a &amp;lt;")
    assert got.shape == (1, 3, TEXT)  # "a", one unknown word, the end
    got = full_size.load_text_encoder(tmp_path, 8, CPU, torch.float32)(" a\n calm  speaker")
    assert torch.allclose(got, wanted, atol=1e-6)
    assert full_size.load_text_encoder(tmp_path, 8, CPU, torch.float32)("a " * 50).shape == (1, 8, TEXT)
    assert full_size.load_text_encoder(tmp_path, 8, CPU, torch.float32)("").shape == (1, 1, TEXT)


def test_tokenizer_beside_the_encoder(tmp_path: Path) -> None:
    """As in the published repositories: text_encoder/ and tokenizer/ side by side."""
    save_umt5(tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "text_encoder" / name).rename(tmp_path / "tokenizer" / name)
    got = full_size.load_text_encoder(tmp_path / "text_encoder", 8, CPU, torch.float32)("a")
    assert got.shape == (1, 2, TEXT)
    (tmp_path / "tokenizer" / "tokenizer.json").rename(tmp_path / "gone")
    (tmp_path / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="no tokenizer"):
        full_size.load_text_encoder(tmp_path / "text_encoder", 8, CPU, torch.float32)("a")


@torch.no_grad()
def test_picture_tokens_leave_the_last_block_but_one(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = save_clip(tmp_path)
    seen: list[Tensor] = []

    def note(_: nn.Module, __: object, out: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(out if isinstance(out, Tensor) else out[0])

    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    blocks[1].register_forward_hook(note)
    picture = np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)
    model(pixel_values=full_size.clip_pixels(picture, 28))
    got = full_size.load_clip_vision(tmp_path, CPU, torch.float32)(picture)
    assert got.shape == (1, 5, CLIP) and torch.allclose(got, seen[0], atol=1e-6)


def test_pictures_side_by_side_are_seen_apart(files: Path) -> None:
    """One model and one text for both; each picture as by itself."""
    args = build_parser().parse_args(words(files, files / "out.mp4"))
    grey, black = np.full((90, 70, 3), 128, np.uint8), np.zeros((80, 80, 3), np.uint8)
    _, both = full_size.load_for_pictures(args, [grey, black], "cpu", torch.float32)
    _, second = full_size.load_full_size(args, black, "cpu", torch.float32)
    assert both[1].image is not None and second.image is not None and both[0].image is not None
    assert torch.equal(both[1].image, second.image) and not torch.allclose(both[0].image, second.image)
    assert both[0].text is both[1].text is not None


def test_clip_pixels_are_normalised() -> None:
    grey = np.full((50, 30, 3), 128, np.uint8)
    pixels = full_size.clip_pixels(grey, 224)
    wanted = [(128 / 255 - m) / s for m, s in zip((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758), strict=True)]
    assert pixels.shape == (1, 3, 224, 224)
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.tensor(wanted), atol=1e-3) and pixels[0, 0].std() < 1e-4


# widths from shapes


@pytest.mark.parametrize(
    "config",
    [
        WanVAEConfig(),
        SMALL_VAE,
        WanVAEConfig(dim=6, multipliers=(1, 2, 2), blocks=1, halve_time=(True, False)),
    ],
)
def test_vae_widths_are_detected(config: WanVAEConfig) -> None:
    with torch.device("meta"):
        tensors = WanVAE(config).state_dict()
    assert detect_vae_config(tensors) == config


@pytest.mark.parametrize("name", [n for n in MODELS if n != "tiny"])
def test_model_sizes_are_detected(name: str) -> None:
    with torch.device("meta"):
        tensors = build_model(MODELS[name]).state_dict()
    found = detect_config(tensors)
    assert found == MODELS[name]


def test_published_light_autoencoder_is_told_apart(tmp_path: Path) -> None:
    light = LightAutoencoder(AUTOENCODERS["taew2_1"])
    torch.save(light.state_dict(), tmp_path / "taew2_1.pth")
    loaded = load_autoencoder(tmp_path / "taew2_1.pth")
    assert isinstance(loaded, LightAutoencoder) and loaded.config == AUTOENCODERS["taew2_1"]


def test_published_vae_is_a_pickle(tmp_path: Path) -> None:
    torch.save(WanVAE(SMALL_VAE).state_dict(), tmp_path / "vae.pth")
    assert isinstance(load_autoencoder(tmp_path / "vae.pth"), WanVAE)


# what is missing or wrong: status 2 and one line

Spoil = Callable[[Path, Path], dict[str, str | Path | None]]
"""From the folder of good files and an empty folder to changed options."""


def _file(name: str, content: bytes | np.ndarray | dict[str, Tensor]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, dict):
            checkpoint.write(path, content, {})
        else:
            np.save(path, content)
        return path

    return make


def _without(name: str, folder: Path, source: Path) -> Path:
    """A copy of a safetensors file without one tensor."""
    tensors, metadata = checkpoint.read(source)
    del tensors[name]
    checkpoint.write(folder / source.name, tensors, metadata)
    return folder / source.name


BAD: dict[str, tuple[Spoil, str]] = {
    "no vae": (lambda g, t: {"vae": None}, "--vae"),
    "no audio encoder": (lambda g, t: {"audio_encoder": None}, "--audio-encoder"),
    "no text encoder": (lambda g, t: {"text_encoder": None}, "--text-encoder"),
    "no clip": (lambda g, t: {"clip_vision": None}, "--clip-vision"),
    "nothing": (lambda g, t: {"vae": None, "clip_vision": None}, "--vae (.*), --clip-vision"),
    "model path": (lambda g, t: {"model": t / "none.safetensors"}, "no checkpoint at"),
    "model folder": (lambda g, t: {"model": t}, "no checkpoint at"),
    "model empty": (lambda g, t: {"model": _file("m.safetensors", b"")(t)}, "not a readable safetensors"),
    "model foreign": (lambda g, t: {"model": g / "clip.safetensors"}, "not a Wan2.1-shaped transformer"),
    "model lacks": (
        lambda g, t: {"model": _without("head.head.bias", t, g / "model.safetensors")},
        "1 missing: head.head.bias",
    ),
    "vae is a model": (lambda g, t: {"vae": g / "model.safetensors"}, "does not fit"),
    "vae lacks": (lambda g, t: {"vae": _without("conv1.bias", t, g / "vae.safetensors")}, "1 missing: conv1.bias"),
    "vae channels": (
        lambda g, t: {
            "vae": save(
                t / "v.safetensors",
                LightAutoencoder(AutoencoderConfig(latent_channels=4)),
                autoencoder_config=checkpoint.config_to_json(AutoencoderConfig(latent_channels=4)),
            )
        },
        "4 latent channels, the model 16",
    ),
    "wav2vec2 path": (lambda g, t: {"audio_encoder": t / "none"}, "none"),
    "wav2vec2 is clip": (lambda g, t: {"audio_encoder": g / "clip"}, "wav2vec2"),
    "text path": (lambda g, t: {"text_encoder": t / "none"}, "no checkpoint at"),
    "text folder empty": (lambda g, t: {"text_encoder": t}, "no config.json"),
    "text is clip": (lambda g, t: {"text_encoder": g / "clip"}, "not a UMT5EncoderModel"),
    "text width": (lambda g, t: {"text_encoder": _file("t.npy", np.zeros((3, 7)))(t)}, "takes .tokens, 12"),
    "text too long": (lambda g, t: {"text_encoder": _file("t.npy", np.zeros((9, TEXT)))(t)}, "at most 8"),
    "text npy empty": (lambda g, t: {"text_encoder": _file("t.npy", b"")(t)}, "not a readable .npy"),
    "text npy foreign": (lambda g, t: {"text_encoder": _file("t.npy", b"hello" * 9)(t)}, "not a readable .npy"),
    "text npy words": (lambda g, t: {"text_encoder": _file("t.npy", np.array(["a"]))(t)}, "not an array of numbers"),
    "text not finite": (lambda g, t: {"text_encoder": _file("t.npy", np.full((1, TEXT), np.nan))(t)}, "not finite"),
    "clip is text": (lambda g, t: {"clip_vision": g / "umt5"}, "not a CLIPVisionModel"),
    "clip two tensors": (
        lambda g, t: {"clip_vision": _file("c.safetensors", {"a": torch.ones(1), "b": torch.ones(1)})(t)},
        "holds 2 tensors",
    ),
    "face count": (lambda g, t: {"face": _file("f.npy", np.ones(128))(t)}, "takes 512 numbers"),
    "face path": (lambda g, t: {"face": t / "none.npy"}, "no file at"),
    "size": (lambda g, t: {"size": "40x40"}, "multiple of 16"),
    "device": (lambda g, t: {"device": "nonsense"}, "--device nonsense"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_files_end_in_one_line(files: Path, tmp_path: Path, name: str, capfd: Any) -> None:
    spoil, said = BAD[name]
    out = tmp_path / "out" / "avatar.mp4"
    assert main(words(files, out, **spoil(files, tmp_path))) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("joyavatar: ") and re.search(said, lines[0]), lines
    assert not out.exists()


def test_needless_options_are_named(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(files, text_encoder=files / "text.npy")
    assert "--prompt" in caplog.text and "--face" not in caplog.text
