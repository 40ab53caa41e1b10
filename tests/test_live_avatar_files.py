"""Live Avatar from files: names and counts of the published size, its LoRA in both spellings, and what it hears."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from joyavatar_core import checkpoint, lora
from joyavatar_core.audio import SAMPLE_RATE
from joyavatar_core.avatar import build_model, load_profiled, still_reference
from joyavatar_core.checkpoint import CheckpointError
from joyavatar_core.cli.main import main
from joyavatar_core.config import MODELS, AudioConfig, ModelConfig, S2VConfig
from joyavatar_core.families import config_of_shapes, detect_config
from joyavatar_core.geometry import Geometry
from joyavatar_core.model import JoyAvatarDiT
from joyavatar_core.s2v import FramePacker, S2VDiT
from joyavatar_core.s2v_audio import S2VFrames, S2VFramesWhole
from joyavatar_core.stream import LEAD_LATENTS, FrameStream, LatentBlock
from joyavatar_core.wan_vae import WanVAE, WanVAEConfig

from .helpers import fill
from .sound import noise, stream_features, track_of
from .test_cli import write_sound
from .test_s2v import given, model

GEOMETRY = Geometry(128, 128, fps=Fraction(25))
# the published number of layers and injectors, everything else as small as the shapes allow
NARROW = replace(
    MODELS["wan-s2v-14b"],
    dim=128,
    ffn_dim=4,
    heads=1,
    freq_dim=4,
    text_dim=2,
    audio=AudioConfig(kind="injected", features=25 * 16, window=4, tokens=4),
)


@cache
def on_meta(config: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build_model(config).state_dict()


@cache
def empty() -> JoyAvatarDiT:
    with torch.device("meta"):
        return build_model(NARROW)


@cache
def published() -> dict[str, Tensor]:
    return fill(build_model(NARROW).to(torch.bfloat16)).state_dict()


@cache
def adapter(rank: int = 2) -> dict[str, Tensor]:
    """peft's names, of a LoRA that changes every module."""
    made, generator = {}, torch.Generator().manual_seed(4)
    for module in sorted(lora.live_avatar_modules(published())):
        rows, columns = published()[f"{module}.weight"].shape
        made[f"{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        made[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    return made


# The published size


def test_layout_of_the_published_size() -> None:
    tensors = on_meta(MODELS["wan-s2v-14b"])
    assert (len(tensors), sum(t.numel() for t in tensors.values())) == (1260, 16_295_755_609)
    assert len(lora.live_avatar_modules(tensors)) == 448
    assert detect_config(tensors) == MODELS["wan-s2v-14b"]
    names = set(on_meta(MODELS["wan-t2v-14b"]))
    assert names < set(tensors) and len(set(tensors) - names) == 1260 - 1095


def test_parameters_of_the_published_lora() -> None:
    tensors = on_meta(MODELS["wan-s2v-14b"])
    shapes = [tensors[f"{module}.weight"].shape for module in lora.live_avatar_modules(tensors)]
    assert sum(128 * (rows + columns) for rows, columns in shapes) == 676_331_520


def test_sizes_come_from_the_shapes() -> None:
    assert config_of_shapes({n: tuple(t.shape) for n, t in published().items()}) == NARROW
    fewer = {n: tuple(t.shape) for n, t in published().items() if not n.startswith("audio_injector.injector.11.")}
    with pytest.raises(CheckpointError, match="11 audio injectors in 40 layers"):
        config_of_shapes(fewer)


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="belong together"):
        replace(NARROW, s2v=None)
    with pytest.raises(ValueError, match="inject_layers"):
        replace(NARROW, s2v=S2VConfig(inject_layers=(0, 40)))
    with pytest.raises(ValueError, match="features 400"):
        replace(NARROW, s2v=S2VConfig(audio_layers=24))
    with pytest.raises(ValueError, match="build S2VDiT"):
        JoyAvatarDiT(NARROW)
    with pytest.raises(ValueError, match="build JoyAvatarDiT"):
        S2VDiT(MODELS["wan-t2v-1.3b"])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t.pop("casual_audio_encoder.encoder.conv2.conv.bias"), "1 missing: casual_audio_encoder"),
        (lambda t: t.update({"frame_packer.proj_8x.bias": torch.zeros(1)}), "1 left over: frame_packer.proj_8x.bias"),
        (lambda t: t.update({"cond_encoder.bias": torch.zeros(3)}), "cond_encoder.bias .3,. instead of .128,."),
    ],
)
def test_a_wrong_key_is_named(change, word: str) -> None:
    tensors = dict(published())
    change(tensors)
    with pytest.raises(CheckpointError, match=word):
        checkpoint.load_into(empty(), tensors, "it")


# The LoRA


@pytest.mark.parametrize(("prefix", "default"), [("", ""), ("base_model.model.", ".default"), ("diffusion_model.", "")])
def test_both_spellings_are_put_in_at_half_the_rank(tmp_path: Path, prefix: str, default: str) -> None:
    """alpha 64 over the rank: 0.5 of the published 128, here 32 of 2."""
    spelt = {prefix + re.sub(r"\.weight$", f"{default}.weight", n): t for n, t in adapter().items()}
    save_file(published(), tmp_path / "base.safetensors")
    save_file(spelt, tmp_path / "liveavatar.safetensors")
    out, _ = checkpoint.read_merged([tmp_path / "base.safetensors", tmp_path / "liveavatar.safetensors"])
    for module in ("blocks.39.ffn.2", "audio_injector.injector.11.o", "blocks.0.cross_attn.k"):
        a, b = adapter()[f"{module}.lora_A.weight"], adapter()[f"{module}.lora_B.weight"]
        true = (published()[f"{module}.weight"].float() + 32 * (b @ a)).to(torch.bfloat16)
        assert torch.equal(out[f"{module}.weight"], true)
    untouched = "audio_injector.injector_adain_layers.3.linear.weight"
    assert out.keys() == published().keys() and torch.equal(out[untouched], published()[untouched])


def test_at_rank_128_the_scale_is_a_half() -> None:
    module = "blocks.1.self_attn.q"
    wide = dict(adapter(128))
    out = lora.live_avatar(published(), wide)[f"{module}.weight"]
    update = 0.5 * (wide[f"{module}.lora_B.weight"] @ wide[f"{module}.lora_A.weight"])
    assert torch.equal(out, (published()[f"{module}.weight"].float() + update).to(torch.bfloat16))


def without(*modules: str) -> dict[str, Tensor]:
    return {n: t for n, t in adapter().items() if not n.startswith(tuple(f"{m}." for m in modules))}


@pytest.mark.parametrize(
    ("broken", "word"),
    [
        (lambda: without("blocks.7.ffn.0"), "lacks 1 modules, e.g. blocks.7.ffn.0: it changes 447"),
        (
            lambda: {**adapter(), **{f"head.head.lora_{s}.weight": torch.zeros(2, 2) for s in "AB"}},
            "has too many 1 modules, e.g. head.head",
        ),
        (
            lambda: {n: t for n, t in adapter().items() if n != "blocks.0.self_attn.q.lora_B.weight"},
            "blocks.0.self_attn.q has no B",
        ),
        (lambda: {**adapter(), "head.bias": torch.zeros(3)}, r"head.bias \[3\] is no part of a LoRA"),
        (lambda: {**adapter(), "head.head.bias": torch.zeros(3)}, r"head.head.bias \[3\] .* the model has \[64\]"),
    ],
)
def test_a_lora_that_is_not_whole_is_refused(tmp_path: Path, broken, word: str) -> None:
    save_file(published(), tmp_path / "base.safetensors")
    save_file(broken(), tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=word):
        checkpoint.read_merged([tmp_path / "base.safetensors", tmp_path / "lora.safetensors"])


def test_the_host_is_told_the_scale_that_the_file_does_not_say() -> None:
    """alpha 64 whatever the rank; of any other LoRA of this model, the rank."""
    told = lora.spelled({f"base_model.model.{n}": t for n, t in adapter().items()}, published())
    assert len(told) == 3 * 448 and {float(t) for n, t in told.items() if n.endswith("alpha")} == {64.0}
    other = {n: t for n, t in adapter().items() if n.startswith("blocks.7.")}
    assert {float(t) for n, t in lora.spelled(other, published()).items() if n.endswith("alpha")} == {2.0}
    with pytest.raises(ValueError, match=r"lacks 1 modules, e.g. blocks.7.ffn.0"):
        lora.spelled(without("blocks.7.ffn.0"), published())
    with pytest.raises(ValueError, match=r"head.bias is no part of a LoRA: join it"):
        lora.spelled({**adapter(), "head.bias": torch.zeros(3)}, published())


def test_other_tensors_of_its_file_replace_the_model_s() -> None:
    """As in the release, whose loader reads them as full weights."""
    mask = torch.ones(3, 128)
    out = lora.live_avatar(published(), {**adapter(), "base_model.model.trainable_cond_mask.weight": mask})
    assert torch.equal(out["trainable_cond_mask.weight"], mask.bfloat16())
    assert not torch.equal(published()["trainable_cond_mask.weight"], mask.bfloat16())


# The reference


def test_what_a_prefill_needs() -> None:
    dit, inputs = model(torch.float64), given(torch.float64)
    condition = dit.condition(inputs.text)
    with pytest.raises(ValueError, match="needs the motion latents"):
        dit.prefill(inputs.picture, condition, 30)
    with pytest.raises(ValueError, match="latents of 16x4: must be at least 8"):
        dit.prefill(inputs.picture[..., :4, :], condition, 30, inputs.motion[..., :4, :])


def test_a_short_past_is_preceded_by_zeros_and_a_long_one_cut() -> None:
    pack, motion = fill(FramePacker(replace(NARROW, dim=8), torch.nn)), torch.randn(1, 16, 25, 16, 16)
    filled = torch.cat([torch.zeros(1, 16, 16, 16, 16), motion[:, :, -3:]], dim=2)
    assert pack(motion).shape == (1, 96, 8) and torch.equal(pack(motion), pack(motion[:, :, -19:]))
    assert torch.equal(pack(motion[:, :, -3:]), pack(filled)) and not torch.equal(pack(filled), pack(motion))


def test_the_picture_stands_still_before_the_stream() -> None:
    class Recorder:
        def encode(self, video: Tensor) -> Tensor:
            return video[:, :1, :: 4, ::8, ::8]  # a latent of every fourth frame  # fmt: skip

    picture = torch.randn(1, 3, 64, 64)
    made = still_reference(Recorder(), picture)  # pyright: ignore[reportArgumentType]
    assert made.motion is not None and made.latent.shape[2] == 1 and made.motion.shape[2] == 19
    assert all(torch.equal(made.motion[:, :, i], made.latent[:, :, 0]) for i in range(19))


def test_the_decoder_comes_from_the_still_picture() -> None:
    """Seven latents before the stream are decoded and not shown: as one video of ten of which the rest is shown."""
    torch.manual_seed(0)
    vae, motion, block = fill(WanVAE(WanVAEConfig(dim=4))), torch.randn(1, 16, 19, 4, 4), torch.randn(1, 16, 3, 4, 4)
    frames = FrameStream(vae, None, motion[:, :, :LEAD_LATENTS], extra=3)
    shown = frames.decode(LatentBlock(0, block, 9))
    with torch.inference_mode():
        whole, _ = vae.decode_stream(torch.cat([motion[:, :, :7], block], dim=2), None)
    assert whole.shape[2] == 25 + 12 and torch.equal(shown, whole[:, :, -9:])
    more = frames.decode(LatentBlock(1, block, 5))
    assert more.shape[2] == 5, "later blocks drop nothing but what lies past the end"


# The sound


def test_audio_knows_nothing_of_other_blocks() -> None:
    """The release repeats the first frame of every block 73 times before it: once is enough, and is what is done."""
    dit, tokens = model(torch.float64), given(torch.float64).audio[None, :3]
    heard = dit.audio(tokens)
    frames = tokens.flatten(1, 2)
    mixed = dit.casual_audio_encoder
    weights = torch.nn.functional.silu(mixed.weights).flatten()
    one = torch.einsum("btlc,l->btc", frames.unflatten(-1, (25, -1)), weights) / weights.sum()
    local, _ = mixed.encoder(torch.cat([one[:, :1].expand(-1, 73, -1), one], dim=1))
    k, *_ = heard.layers[0]
    again, _ = dit.audio_injector.injector[0].kv(local[:, 19:])
    assert heard.shape == (3, 5) and torch.allclose(k, again, rtol=0, atol=1e-12)


def tiny_wav2vec2(layers: int = 2) -> Any:
    """Random, with the real strides and the norms of a large model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 1}
    sizes |= {"intermediate_size": 8}
    sizes |= {"conv_dim": (4,) * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    norms = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
    return transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**sizes, **norms)).eval()


def test_a_latent_hears_the_frames_it_shows() -> None:
    """30 places a second at 25 frames; the release is three frames late. Latent 0 shows one frame."""
    ours, release = (S2VFramesWhole(tiny_wav2vec2(), GEOMETRY, lead=lead) for lead in (0, 3))
    assert [ours.places(i) for i in range(3)] == [[0, 0, 0, 0], [1, 2, 4, 5], [6, 7, 8, 10]]
    assert [release.places(i) for i in range(2)] == [[0, 1, 2, 4], [5, 6, 7, 8]]
    assert ours.channels == 3 * 16 and ours.tokens_per_latent == 4


@pytest.mark.parametrize("cuts", [(), (3_000, 3_001, 20_000), tuple(range(1000, 48_000, 1600))])
def test_the_cutting_of_the_sound_is_not_heard(cuts: tuple[int, ...]) -> None:
    wav2vec, samples = tiny_wav2vec2(), noise(1, 48_000)
    front = S2VFrames(wav2vec, GEOMETRY, history=1.2)
    whole = front.features(track_of(samples), range(18))
    tokens, valid = stream_features(S2VFrames(wav2vec, GEOMETRY, history=1.2), samples, SAMPLE_RATE, cuts, 18)
    assert torch.equal(tokens, whole.tokens) and bool(valid.all()) and whole.tokens.std() > 0.1


def test_past_the_end_there_are_zeros_in_both() -> None:
    wav2vec, track = tiny_wav2vec2(), track_of(noise(1, SAMPLE_RATE))  # 49 tokens: 29 places, 24 frames and more
    for front in (S2VFrames(wav2vec, GEOMETRY), S2VFramesWhole(wav2vec, GEOMETRY)):
        tokens = front.features(track, range(9)).tokens
        silent = tokens.abs().sum(-1) == 0
        assert silent.flatten().tolist() == [p >= 29 for i in range(9) for p in front.places(i)]


def test_streaming_is_close_to_the_whole_while_the_window_holds_it() -> None:
    """All of the sound in one window: they differ by the stretch of the whole alone, less than a token."""
    wav2vec, track = tiny_wav2vec2(), track_of(noise(1, 32_000))
    streamed = S2VFrames(wav2vec, GEOMETRY, lookahead_tokens=60).features(track, range(9)).tokens
    whole = S2VFramesWhole(wav2vec, GEOMETRY).features(track, range(9)).tokens
    assert (streamed - whole).abs().mean() < 0.15 * whole.abs().mean() and not torch.equal(streamed, whole)


@pytest.mark.parametrize("latent", [0, 3, 30, 3000])
def test_needs_and_keeps_are_enough_and_tight(latent: int) -> None:
    front = S2VFrames(tiny_wav2vec2(), GEOMETRY, history=1.0)
    needs, keeps = front.needs(latent + 3), front.keeps(latent)
    end = SAMPLE_RATE * GEOMETRY.frames_of_latents(latent + 3) // 25
    assert keeps < end < needs < end + 0.15 * SAMPLE_RATE and needs - keeps < 1.2 * SAMPLE_RATE
    if latent > 300:
        return
    track = track_of(noise(1, needs), finish=False)
    track.drop(keeps)
    assert front.features(track, range(latent, latent + 3)).tokens.isfinite().all()
    with pytest.raises(ValueError, match="have come"):
        front.features(track_of(noise(1, needs - 1), finish=False), range(latent, latent + 3))


def test_front_ends_say_what_they_cannot() -> None:
    with pytest.raises(ValueError, match=r"history 0\.2 s"):
        S2VFrames(tiny_wav2vec2(), GEOMETRY, history=0.2)
    with pytest.raises(ValueError, match="lead -1"):
        S2VFrames(tiny_wav2vec2(), GEOMETRY, lead=-1)
    whole = S2VFramesWhole(tiny_wav2vec2(), GEOMETRY, limit=0.5)
    with pytest.raises(ValueError, match="finish the track first"):
        whole.features(track_of(noise(1, 4000), finish=False), range(1))
    with pytest.raises(ValueError, match=r"limit for encoding it at once is 0\.5 s"):
        whole.features(track_of(noise(1, 16_000)), range(1))


def test_picture_and_voice_through_the_command_line(tmp_path: Path) -> None:
    """Files in the published names -> 25 frames a second, on the model's own policy."""
    save_file(published(), tmp_path / "wan2.2_s2v_14B_bf16.safetensors")
    save_file(adapter(), tmp_path / "liveavatar.safetensors")
    checkpoint.write(tmp_path / "vae.safetensors", WanVAE(WanVAEConfig(dim=4)).state_dict(), {})
    tiny_wav2vec2(24).save_pretrained(tmp_path / "wav2vec2")
    np.save(tmp_path / "text.npy", np.zeros((3, 2), np.float32))
    write_sound(tmp_path / "voice.wav", 0.6)
    Image.fromarray(np.random.default_rng(2).integers(0, 255, (40, 60, 3), np.uint8)).save(tmp_path / "picture.png")
    files = [str(tmp_path / name) for name in ("wan2.2_s2v_14B_bf16.safetensors", "liveavatar.safetensors")]
    options = {"image": "picture.png", "audio": "voice.wav", "vae": "vae.safetensors", "audio-encoder": "wav2vec2"}
    words = [part for name, file in options.items() for part in (f"--{name}", str(tmp_path / file))]
    words += ["--model", ",".join(files), "--text-encoder", str(tmp_path / "text.npy"), "--size", "64x64"]
    words += ["--output", str(tmp_path / "out.mp4"), "--policy", "live-avatar", "--device", "cpu"]
    loaded, profile = load_profiled(files)
    assert isinstance(loaded, S2VDiT) and (profile.policy, profile.fps) == ("live-avatar", 25)
    assert main(["generate", *words]) == 0
    with av.open(str(tmp_path / "out.mp4")) as video:
        stream = video.streams.video[0]
        assert stream.average_rate == 25 and sum(1 for _ in video.decode(stream)) == 15
