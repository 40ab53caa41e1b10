"""The transformer: published names and sizes, and what reaches what.

The list of names is written down here a second time, from the layout of the published checkpoints.

Shape legend: B batch, C channels, F latent frames, h w latent size, P tokens of a latent, L = F P, W audio tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from joyavatar_core.attention import sdpa
from joyavatar_core.config import MODELS, AudioConfig, FaceConfig, ModelConfig
from joyavatar_core.model import AudioKV, ConditionKV, JoyAvatarDiT

from .helpers import small_model

torch.set_num_threads(2)

TALKING = ModelConfig(
    dim=24,
    ffn_dim=32,
    layers=2,
    heads=2,
    out_channels=4,
    in_channels=12,
    freq_dim=16,
    text_dim=6,
    text_len=5,
    image_dim=7,
    audio=AudioConfig(features=5, width=8),
    face=FaceConfig(features=9, dim=16, depth=2, heads=2, queries=3, width=8),
)
FRAMES, SIZE, TOKENS = 3, 4, 4  # latent frames, latent height and width, patch tokens of a latent


def inputs(seed: int = 0, batch: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

    return {
        "x": draw(12, FRAMES, SIZE, SIZE),
        "text": draw(3, 6),
        "image": draw(4, 7),
        "face": draw(9),
        "audio": draw(FRAMES, 4, 5),
        "timesteps": torch.tensor([1000.0, 600.0, 250.0], dtype=torch.float64),
    }


def velocity(model: JoyAvatarDiT, given: dict[str, Tensor], valid: Tensor | None = None) -> Tensor:
    """[B, 4, F, h, w]"""
    condition = model.condition(given["text"], given["image"], given.get("face"))
    audio = model.audio(given["audio"], valid)
    return model(given["x"], given["timesteps"], range(FRAMES), condition, audio)[0]


def changed_latents(a: Tensor, b: Tensor) -> list[int]:
    return [i for i in range(FRAMES) if not torch.allclose(a[:, :, i], b[:, :, i], rtol=0, atol=1e-12)]


def without_self_attention(config: ModelConfig = TALKING) -> JoyAvatarDiT:
    """Latents of one window cannot see each other."""
    model = small_model(config=config)
    with torch.no_grad():
        for block in model.blocks:
            block.self_attn.o.weight.zero_()  # pyright: ignore
            block.self_attn.o.bias.zero_()  # pyright: ignore
    return model


# names and sizes


def published(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Wan2.1 checkpoint with FantasyTalking's audio weights and a face resampler beside it."""
    d, f = config.dim, config.ffn_dim

    def linear(name: str, out: int, into: int, bias: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (out, into)
        if bias:
            yield f"{name}.bias", (out,)

    def norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (width,)
        yield f"{name}.bias", (width,)

    yield "patch_embedding.weight", (d, config.in_channels, 1, 2, 2)
    yield "patch_embedding.bias", (d,)
    yield from linear("text_embedding.0", d, 4096)
    yield from linear("text_embedding.2", d, d)
    yield from linear("time_embedding.0", d, 256)
    yield from linear("time_embedding.2", d, d)
    yield from linear("time_projection.1", 6 * d, d)
    yield "head.modulation", (1, 2, d)
    yield from linear("head.head", 64, d)
    if config.image_dim:
        yield from norm("img_emb.proj.0", 1280)
        yield from linear("img_emb.proj.1", 1280, 1280)
        yield from linear("img_emb.proj.3", d, 1280)
        yield from norm("img_emb.proj.4", d)
    if config.audio:
        yield from linear("proj_model.proj", 2048, 768, bias=False)
        yield from norm("proj_model.norm", 2048)
    if config.face:
        yield "face_proj.latents", (1, 16, 1280)
        yield from linear("face_proj.proj_in", 1280, 512)
        yield from linear("face_proj.proj_out", 2048, 1280)
        yield from norm("face_proj.norm_out", 2048)
        for i in range(4):
            layer = f"face_proj.layers.{i}"
            yield from norm(f"{layer}.0.norm1", 1280)
            yield from norm(f"{layer}.0.norm2", 1280)
            yield from linear(f"{layer}.0.to_q", 1280, 1280, bias=False)
            yield from linear(f"{layer}.0.to_kv", 2560, 1280, bias=False)
            yield from linear(f"{layer}.0.to_out", 1280, 1280, bias=False)
            yield from norm(f"{layer}.1.0", 1280)
            yield from linear(f"{layer}.1.1", 5120, 1280, bias=False)
            yield from linear(f"{layer}.1.3", 1280, 5120, bias=False)
    for i in range(config.layers):
        block = f"blocks.{i}"
        yield f"{block}.modulation", (1, 6, d)
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                yield from linear(f"{block}.{attention}.{part}", d, d)
            yield f"{block}.{attention}.norm_q.weight", (d,)
            yield f"{block}.{attention}.norm_k.weight", (d,)
        yield from norm(f"{block}.norm3", d)
        yield from linear(f"{block}.ffn.0", f, d)
        yield from linear(f"{block}.ffn.2", d, f)
        if config.image_dim:
            yield from linear(f"{block}.cross_attn.k_img", d, d)
            yield from linear(f"{block}.cross_attn.v_img", d, d)
            yield f"{block}.cross_attn.norm_k_img.weight", (d,)
        if config.audio:
            yield from linear(f"{block}.cross_attn.processor.k_proj", d, 2048, bias=False)
            yield from linear(f"{block}.cross_attn.processor.v_proj", d, 2048, bias=False)
        if config.face:
            yield from linear(f"{block}.cross_attn.to_k_ip", d, 2048, bias=False)
            yield from linear(f"{block}.cross_attn.to_v_ip", d, 2048, bias=False)


def listing(shapes: dict[str, tuple[int, ...]]) -> str:
    return "\n".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))


@pytest.mark.parametrize(
    ("name", "keys", "parameters", "checksum"),
    [
        ("wan-t2v-1.3b", 825, 1_418_996_800, "83f3237464a545f0"),
        ("wan-i2v-1.3b", 983, 1_564_428_608, "47c3273a702251c4"),
        ("wan-t2v-14b", 1095, 14_288_491_584, "7ca52b13faf083dc"),
        ("wan-i2v-14b", 1303, 16_394_878_784, "129391da486fe9b9"),
        ("flash-1.3b", 1157, 2_025_471_552, "a8a65eafc9b597d8"),
        ("teacher-14b", 1517, 18_156_155_968, "15de59ba0ed82050"),
    ],
)
def test_names_and_sizes(name: str, keys: int, parameters: int, checksum: str) -> None:
    with torch.device("meta"):
        model = JoyAvatarDiT(MODELS[name])
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert shapes == dict(published(MODELS[name]))
    assert (len(shapes), sum(p.numel() for p in model.parameters())) == (keys, parameters)
    assert hashlib.sha256(listing(shapes).encode()).hexdigest().startswith(checksum)


# what reaches what


def test_gradients_reach_every_parameter() -> None:
    model = small_model(config=TALKING).requires_grad_(True)
    velocity(model, inputs()).square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-12]
    assert silent == []


@torch.no_grad()
def test_every_input_matters_to_every_latent() -> None:
    model, given = small_model(config=TALKING), inputs()
    before, other = velocity(model, given), inputs(seed=1)
    for name in ("x", "text", "image", "face", "audio"):
        assert changed_latents(before, velocity(model, given | {name: other[name]})) == [0, 1, 2], name


@torch.no_grad()
def test_timesteps_belong_to_latents() -> None:
    model, given = without_self_attention(), inputs()
    before = velocity(model, given)
    for latent in range(FRAMES):
        levels = given["timesteps"].clone()
        levels[latent] = 900.0
        assert changed_latents(before, velocity(model, given | {"timesteps": levels})) == [latent]


@torch.no_grad()
def test_timesteps_with_and_without_a_batch_axis() -> None:
    model, given = small_model(config=TALKING), inputs(batch=2)
    one = velocity(model, given)
    assert torch.equal(one, velocity(model, given | {"timesteps": given["timesteps"].repeat(2, 1)}))
    levels = torch.stack([given["timesteps"], given["timesteps"].flip(0)])
    two = velocity(model, given | {"timesteps": levels})
    assert torch.allclose(two[0], one[0], atol=1e-12) and not torch.allclose(two[1], one[1], atol=1e-3)


@torch.no_grad()
def test_time_embedding_sees_cosines_then_sines() -> None:
    model, given, seen = small_model(config=TALKING), inputs(), []
    model.time_embedding[0].register_forward_hook(lambda _, args, __: seen.append(args[0]))
    velocity(model, given)
    for place, t in enumerate(given["timesteps"].tolist()):
        angles = [t * 10000 ** (-i / 8) for i in range(8)]
        wanted = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
        assert torch.allclose(seen[0][0, place], wanted, atol=1e-10)


@torch.no_grad()
def test_padding_of_text_is_attended() -> None:
    """Wan2.1 fills the prompt with zeros to 512 tokens and masks none of them."""
    model, given = small_model(config=TALKING), inputs()
    short = velocity(model, given)
    filled = torch.cat([given["text"], torch.zeros(1, 2, 6, dtype=torch.float64)], dim=1)
    assert torch.equal(short, velocity(model, given | {"text": filled}))
    text = model.condition(given["text"], given["image"]).text
    assert text and all(k.shape[1] == 5 for k, _ in text)
    unpadded = JoyAvatarDiT(replace(TALKING, text_len=3)).double()
    unpadded.load_state_dict(model.state_dict())
    assert (velocity(unpadded, given) - short).abs().max() > 1e-3


def test_missing_and_too_long_conditions_are_named() -> None:
    model, given = small_model(config=TALKING), inputs()
    with pytest.raises(ValueError, match="needs text"):
        model.condition(image=given["image"])
    with pytest.raises(ValueError, match="needs image"):
        model.condition(text=given["text"])
    with pytest.raises(ValueError, match="text of 6 tokens: the model takes at most 5"):
        model.condition(torch.zeros(1, 6, 6, dtype=torch.float64), given["image"])


@torch.no_grad()
def test_audio_of_a_latent_reaches_that_latent_only() -> None:
    model, given = without_self_attention(replace(TALKING, layers=1)), inputs()
    before = velocity(model, given)
    for latent in range(FRAMES):
        audio = given["audio"].clone()
        audio[:, latent] += 1
        assert changed_latents(before, velocity(model, given | {"audio": audio})) == [latent]


@torch.no_grad()
def test_masked_audio_tokens_do_not_matter() -> None:
    model, given = small_model(config=TALKING), inputs()
    valid = torch.ones(FRAMES, 4, dtype=torch.bool)
    valid[1, 2:] = False
    other = given["audio"].clone()
    other[:, 1, 2:] += 5
    masked = velocity(model, given, valid)
    assert torch.equal(masked, velocity(model, given | {"audio": other}, valid))
    assert not torch.allclose(masked, velocity(model, given), atol=1e-3)
    assert torch.allclose(velocity(model, given), velocity(model, given, torch.ones_like(valid)), atol=1e-12)
    two = {k: v if k == "timesteps" else v.repeat_interleave(2, 0) for k, v in given.items()}
    assert torch.allclose(velocity(model, two, valid), masked.expand(2, -1, -1, -1, -1), atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("masked", [(0,), (2,), (0, 2), ()])
def test_joined_audio_keeps_every_mask(masked: tuple[int, ...]) -> None:
    """The first block of a stream has masked tokens and the next has none, or the other way round at the end."""
    model, tokens = small_model(config=TALKING), inputs()["audio"]
    valid = torch.ones(FRAMES, 4, dtype=torch.bool)
    for latent in masked:
        valid[latent, 1:] = False
    whole = model.audio(tokens, valid)
    parts = [model.audio(tokens[:, i : i + 1], valid[i : i + 1] if i in masked else None) for i in range(FRAMES)]
    joined = AudioKV.join(parts)
    assert (joined.valid is None) == (not masked)
    assert joined.valid is None or torch.equal(joined.valid, valid)
    for got, wanted in zip(joined.layers, whole.layers, strict=True):
        assert torch.allclose(got[0], wanted[0]) and torch.allclose(got[1], wanted[1])
    last = joined.select(slice(1, 3))
    assert last.layers[0][0].shape[1] == 2 and (last.valid is None or torch.equal(last.valid, valid[1:]))


@torch.no_grad()
def test_terms_of_the_cross_attention() -> None:
    """o(text + image + 1.0 audio + 0.5 face): FantasyPortrait's weight of the face, FantasyTalking's of the audio."""
    model, given = small_model(config=TALKING), inputs()
    attend: Any = model.blocks[0].cross_attn
    attend.o.weight.copy_(torch.eye(24))
    attend.o.bias.zero_()
    condition, audio = model.condition(given["text"], given["image"], given["face"]), model.audio(given["audio"])
    assert condition.text and condition.image and condition.face
    text, image, face, sound = condition.text[0], condition.image[0], condition.face[0], audio.layers[0]
    x = torch.randn(1, FRAMES * TOKENS, 24, dtype=torch.float64)
    q = attend.norm_q(attend.q(x)).unflatten(-1, (2, 12))
    heard = [sdpa(q[:, 4 * i : 4 * i + 4], sound[0][:, i], sound[1][:, i]) for i in range(FRAMES)]
    wanted = sdpa(q, *text) + sdpa(q, *image) + 1.0 * torch.cat(heard, dim=1) + 0.5 * sdpa(q, *face)
    got = attend(x, FRAMES, [text, image, face], sound, None)
    assert torch.allclose(got, wanted.flatten(-2), atol=1e-12)
    assert TALKING.face and MODELS["flash-1.3b"].face and MODELS["flash-1.3b"].face.scale == TALKING.face.scale == 0.5


@torch.no_grad()
def test_cells_keep_their_place() -> None:
    """Without attention a patch sees itself only, and the head's channels are laid out (row, column, channel)."""
    model, given = without_self_attention(), inputs()
    before = velocity(model, given)
    x = given["x"].clone()
    x[:, :, 1, 3, 0] += 1
    moved = (velocity(model, given | {"x": x}) - before).abs().amax((0, 1)) > 1e-9  # [F, h, w]
    expected = torch.zeros_like(moved)
    expected[1, 2:, :2] = True
    assert torch.equal(moved, expected)
    model.head.head.weight.zero_()
    model.head.head.bias.copy_(torch.arange(16))
    out = velocity(model, given)
    for row, column, channel in [(0, 0, 0), (0, 1, 3), (1, 0, 2), (3, 2, 1)]:
        value = ((row % 2) * 2 + column % 2) * 4 + channel
        assert (out[0, channel, :, row, column] == value).all()


# seams


def test_injected_ops_and_attention_do_all_the_work() -> None:
    made: list[nn.Module] = []
    ran: set[nn.Module] = set()
    calls: list[tuple[torch.Size, torch.Size]] = []

    def recording(kind: type[nn.Module]) -> type[nn.Module]:
        class Recording(kind):  # pyright: ignore
            def __init__(self, *args: Any, **named: Any) -> None:
                super().__init__(*args, **named)
                made.append(self)

            def forward(self, x: Tensor) -> Tensor:
                ran.add(self)
                return super().forward(x)

        return Recording

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        calls.append((q.shape, k.shape))
        return sdpa(q, k, v, mask)

    ops = SimpleNamespace(**{n: recording(vars(nn)[n]) for n in ("Linear", "Conv3d", "LayerNorm", "RMSNorm")})
    model = JoyAvatarDiT(TALKING, ops, attention).double()
    given = inputs()
    result = velocity(model, given)
    own = {type(m).__name__ for m in model.modules() if m not in made and list(m.parameters(recurse=False))}
    assert own == {"Block", "Head", "FaceResampler"}  # tables and queries, which are no layers
    assert ran == set(made) and len(made) > 30
    assert len(calls) == 2 + 5 * TALKING.layers  # resampler; self, text, image, audio, face in every block
    assert ((3, 4, 2, 12), (3, 4, 2, 12)) in [(tuple(q), tuple(k)) for q, k in calls]  # audio: a batch of latents
    plain = JoyAvatarDiT(TALKING).double()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(velocity(plain, given), result)


@torch.no_grad()
def test_no_state_on_the_model() -> None:
    """Two different calls leave the first one's result as it was."""
    model, given = small_model(config=TALKING), inputs()
    before = velocity(model, given)
    velocity(model, inputs(seed=5, batch=2))
    assert torch.equal(velocity(model, given), before)


@torch.no_grad()
def test_half_precision_stays_close() -> None:
    model, given = small_model(config=TALKING), inputs()
    exact = velocity(model, given)
    half = {k: v if k == "timesteps" else v.bfloat16() for k, v in given.items()}
    rough = velocity(model.bfloat16(), half)
    assert rough.dtype == torch.bfloat16
    assert (rough.double() - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_condition_of_nothing() -> None:
    """Only what the model has is asked for."""
    bare = replace(TALKING, text_dim=0, image_dim=0)
    assert JoyAvatarDiT(bare).condition() == ConditionKV()


@pytest.mark.parametrize(
    "wrong", [{"heads": 5}, {"heads": 0}, {"layers": 0}, {"dim": 6, "heads": 2}, {"in_channels": 20}]
)
def test_impossible_sizes(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        replace(TALKING, **wrong)  # pyright: ignore
