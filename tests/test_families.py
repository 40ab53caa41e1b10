"""What a checkpoint is, from its keys: layouts, spellings, systems, fp8, adapters, and what is said of a wrong file."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from joyavatar_core import checkpoint, families, known_weights, lora
from joyavatar_core.avatar import build_model, load_profiled
from joyavatar_core.checkpoint import CheckpointError, Tensors
from joyavatar_core.config import MODELS, AudioConfig, FaceConfig, ModelConfig
from joyavatar_core.model import JoyAvatarDiT
from joyavatar_core.policy import POLICIES

from .helpers import fill

TEXT = ModelConfig(
    dim=128,
    ffn_dim=16,
    layers=4,
    heads=1,
    in_channels=16,
    freq_dim=16,
    text_dim=6,
    text_len=512,
    image_dim=0,
)
PACKED = replace(TEXT, in_channels=33, audio=AudioConfig(kind="added", features=3, width=2, window=4))
SMALL = {
    "text": TEXT,
    "image": replace(TEXT, in_channels=36, image_dim=5),
    "audio": replace(TEXT, in_channels=36, image_dim=5, audio=AudioConfig(features=3, width=4)),
    "audio-face": replace(
        TEXT,
        in_channels=36,
        image_dim=5,
        audio=AudioConfig(features=3, width=4),
        face=FaceConfig(features=4, dim=64, depth=1, heads=1, queries=2, width=4),
    ),
    "packed-audio": PACKED,
}


def weights(config: ModelConfig, seed: int = 0) -> Tensors:
    return dict(fill(JoyAvatarDiT(config), seed).state_dict())


def saved(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    if path.suffix == ".safetensors":
        checkpoint.write(path, tensors, metadata or {})
    else:
        torch.save(tensors, path)
    return path


def said_of(path: Path | list[Path]) -> str:
    """What loading a file, or several, says: one line."""
    with pytest.raises(CheckpointError) as caught:
        load_profiled(path)
    return " ".join(str(caught.value).split())


# layouts and systems


@pytest.mark.parametrize("layout", SMALL)
def test_sizes_and_layout_from_the_shapes(layout: str) -> None:
    config = SMALL[layout]
    assert families.detect_config(weights(config)) == config
    assert families.layout_of(config) == layout


@pytest.mark.parametrize("name", families.PROFILES)
def test_every_system_has_what_it_names(name: str) -> None:
    profile = families.PROFILES[name]
    assert profile.policy in POLICIES and profile.fps > 0
    assert not profile.known or profile.known in known_weights.KNOWN
    layouts = [p.layout for p in families.PROFILES.values()]
    assert {"text", "image", "audio", "audio-face", "packed-audio", "s2v", "embedded"} == set(layouts)


def test_known_systems_have_a_profile() -> None:
    systems = {name for name, entry in known_weights.KNOWN.items() if entry.needs}
    assert systems == {profile.known for profile in families.PROFILES.values() if profile.known}


@pytest.mark.parametrize(
    ("layout", "file", "metadata", "name"),
    [
        ("text", "anything.pt", {}, "self-forcing"),
        ("text", "longlive_base.pt", {}, "longlive"),
        ("text", "rolling_forcing_dmd_fp8.safetensors", {}, "rolling-forcing"),
        ("text", "longlive_base.pt", {"profile": "rolling-forcing"}, "rolling-forcing"),
        ("text", "livetalk.safetensors", {}, "self-forcing"),  # of another layout: no clue
        ("text", "x.pt", {"profile": "nobody"}, "self-forcing"),
        ("packed-audio", "model.safetensors", {}, "livetalk"),
        ("packed-audio", "model.pt", {"adapters_inside": "model.pt"}, "avatarforcing"),
        ("packed-audio", "avatarforcing-1.3b.safetensors", {}, "avatarforcing"),
        ("audio-face", "model.safetensors", {}, "joyavatar-flash"),
        ("audio", "model.safetensors", {}, "fantasytalking"),
        ("image", "model.safetensors", {}, "wan-i2v"),
    ],
)
def test_system_of_a_file(layout: str, file: str, metadata: dict[str, str], name: str) -> None:
    assert families.profile_of(SMALL[layout], metadata, [Path("folder") / file]) == name


def test_embedded_model_is_known(tmp_path: Path) -> None:
    assert families.profile_of(MODELS["tiny"], {}) == "embedded" and families.hearing(MODELS["tiny"]) == "log-mel"
    assert families.hearing(TEXT) == "none" and families.hearing(PACKED) == "wav2vec2-frames"
    assert families.hearing(SMALL["audio"]) == "wav2vec2" and families.hearing(MODELS["wan-s2v-14b"]) == "wav2vec2-s2v"


def test_frame_rate_and_policy_come_with_the_model(tmp_path: Path) -> None:
    _, profile = load_profiled(saved(tmp_path / "avatarforcing-1.3b.safetensors", weights(PACKED)))
    assert profile.fps == Fraction(25) and POLICIES[profile.policy].block_latents == 4 and profile.audio_delay == 1


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("wan-t2v-1.3b", 825),
        ("wan-i2v-1.3b", 983),
        ("wan-t2v-14b", 1095),
        ("wan-i2v-14b", 1303),
        ("omniavatar-1.3b", 857),
        ("flash-1.3b", 1157),
        ("wan-s2v-14b", 1260),
    ],
)
def test_full_size_layouts_are_complete(name: str, count: int) -> None:
    """Counts of the references' own classes; sizes come back from the shapes, and what is missing is named."""
    with torch.device("meta"):
        tensors = build_model(MODELS[name]).state_dict()
        assert len(tensors) == count and families.detect_config(tensors) == MODELS[name]
        lost = sorted(tensors)[-1]
        tensors["extra.weight"] = tensors.pop(lost)
        with pytest.raises(CheckpointError, match=f"1 missing: {lost}; 1 left over: extra.weight"):
            checkpoint.load_into(build_model(MODELS[name]), tensors, name)


# spellings


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "model.",
        "generator.",
        "generator.model.",
        "generator_ema.model.",
        "module.model.",
        "module.",
        "model._fsdp_wrapped_module.",
        "_fsdp_wrapped_module.model.",
        "_orig_mod.",
        "diffusion_model.",
        "model.diffusion_model.",
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_prefixes(prefix: str, suffix: str, tmp_path: Path) -> None:
    own = weights(PACKED)
    model, _ = load_profiled(saved(tmp_path / f"a.{suffix}", {prefix + name: t for name, t in own.items()}))
    assert all(torch.equal(t, own[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("variant", ["ema", "plain"])
def test_averaged_weights_are_taken_unless_the_others_are_asked_for(variant: Any, tmp_path: Path) -> None:
    ema, plain = weights(TEXT, 1), weights(TEXT, 2)
    wrapped = {f"model._fsdp_wrapped_module.{n}": t for n, t in ema.items()}
    both = {"generator": {f"model.{n}": t for n, t in plain.items()}, "generator_ema": wrapped, "step": 1200}
    torch.save(both, tmp_path / "both.pt")
    flat = {f"generator.model.{n}": t for n, t in plain.items()}
    flat |= {f"generator_ema.model.{n}": t for n, t in ema.items()}
    saved(tmp_path / "both.safetensors", flat)
    wanted = ema if variant == "ema" else plain
    for path in ("both.pt", "both.safetensors"):
        tensors, _ = checkpoint.read_merged([tmp_path / path], variant)
        assert tensors.keys() == wanted.keys() and all(torch.equal(t, wanted[n]) for n, t in tensors.items())


# adapters

PEFT = ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight")
SPELLINGS = {
    "peft": PEFT,
    "peft-default": ("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
    "host": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight"),
}
MODULES = ("blocks.0.self_attn.q", "blocks.3.ffn.2")


def adapter(names: tuple[str, str], config: ModelConfig, rank: int = 4) -> tuple[Tensors, Tensors]:
    """An adapter of two modules under other names, and what its matrices add at scale 1."""
    generator, base = torch.Generator().manual_seed(9), weights(config)
    parts, updates = {}, {}
    for module in MODULES:
        rows, columns = base[f"{module}.weight"].shape
        a, b = (torch.randn(s, generator=generator) * 0.1 for s in ((rank, columns), (rows, rank)))
        parts |= {names[0].format(module): a, names[1].format(module): b}
        updates[f"{module}.weight"] = b @ a
    return parts, updates


def assert_updated(got: Tensors, base: Tensors, updates: Tensors, scale: float) -> None:
    assert got.keys() == base.keys()
    for name, tensor in base.items():
        wanted = tensor + scale * updates[name] if name in updates else tensor
        assert torch.allclose(got[name], wanted, rtol=0, atol=1e-6), name


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_adapter_is_put_in(spelling: str, tmp_path: Path) -> None:
    base = weights(TEXT)
    parts, updates = adapter(SPELLINGS[spelling], TEXT)
    files = [saved(tmp_path / "lora.safetensors", parts), saved(tmp_path / "base.safetensors", base)]
    assert_updated(checkpoint.read_merged(files)[0], base, updates, 1.0)


def test_longlive_is_a_base_and_an_adapter(tmp_path: Path) -> None:
    """Both are pickles: the trainer's dictionary, and one with the adapter under a name of its own."""
    base = weights(TEXT)
    parts, updates = adapter(PEFT, TEXT)
    torch.save({"generator": {f"model.{n}": t for n, t in base.items()}}, tmp_path / "longlive_base.pt")
    torch.save({"generator_lora": parts, "critic_lora": {}, "step": 3}, tmp_path / "longlive_lora.pt")
    files = [tmp_path / "longlive_base.pt", tmp_path / "longlive_lora.pt"]
    model, profile = load_profiled(files)
    assert_updated(dict(model.state_dict()), base, updates, 1.0)
    assert profile.policy == "longlive"


def test_alpha_of_the_file_scales(tmp_path: Path) -> None:
    base = weights(TEXT)
    parts, updates = adapter(SPELLINGS["host"], TEXT)
    parts |= {f"diffusion_model.{module}.alpha": torch.tensor(1.0) for module in MODULES}
    assert_updated(lora.merged(base, parts), base, updates, 0.25)


def test_a_lora_alone_is_no_model(tmp_path: Path) -> None:
    torch.save({"generator_lora": adapter(PEFT, TEXT)[0]}, tmp_path / "longlive_lora.pt")
    with pytest.raises(checkpoint.CheckpointError, match=r"longlive_lora.pt is a LoRA: give the file of the model"):
        load_profiled(tmp_path / "longlive_lora.pt")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_host_is_told_every_module_and_its_alpha(spelling: str) -> None:
    """ComfyUI reads names behind `diffusion_model.`, and takes a missing alpha for the rank."""
    base = weights(TEXT)
    parts, updates = adapter(SPELLINGS[spelling], TEXT)
    told = lora.spelled(parts, base)
    ends = ("lora_down.weight", "lora_up.weight", "alpha")
    assert told.keys() == {f"diffusion_model.{module}.{end}" for module in MODULES for end in ends}
    assert {float(told[f"diffusion_model.{module}.alpha"]) for module in MODULES} == {4.0}
    assert_updated(lora.merged(base, told), base, updates, 1.0)


def test_what_the_host_alone_reads_comes_back_as_it_is() -> None:
    parts, _ = adapter(("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"), TEXT)
    dora = {**adapter(PEFT, TEXT)[0], "base_model.model.blocks.0.self_attn.q.dora_scale": torch.ones(3)}
    for given in (parts, dora):
        assert lora.spelled(given, weights(TEXT)) == given
    parts, _ = adapter(PEFT, TEXT)
    parts |= {f"blocks.99.self_attn.q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    with pytest.raises(ValueError, match=r"changes blocks.99.self_attn.q, which the model does not have"):
        lora.spelled(parts, weights(TEXT))


def test_avatarforcing_carries_its_adapters(tmp_path: Path) -> None:
    base = weights(PACKED)
    parts, updates = adapter(("{}.lora_A.default.weight", "{}.lora_B.default.weight"), PACKED, rank=128)
    inside = dict(base)
    for module in MODULES:
        for kind in ("weight", "bias"):
            inside[f"{module}.base_layer.{kind}"] = inside.pop(f"{module}.{kind}")
    content = {f"model.{name}": tensor for name, tensor in (inside | parts).items()}
    torch.save({"generator": content}, tmp_path / "model.pt")
    model, profile = load_profiled(tmp_path / "model.pt")
    assert_updated(dict(model.state_dict()), base, updates, 0.5)
    assert profile == families.PROFILES["avatarforcing"]


def test_adapter_that_does_not_fit(tmp_path: Path) -> None:
    parts, _ = adapter(PEFT, TEXT)
    base = saved(tmp_path / "base.safetensors", weights(TEXT))
    half = {name: tensor for name, tensor in parts.items() if "blocks.3" not in name or "lora_A" in name}
    other = {name.replace("blocks.3", "blocks.9"): tensor for name, tensor in parts.items()}
    wide = {n: torch.cat([t, t], 1) if "lora_A" in n and "blocks.0" in n else t for n, t in parts.items()}
    for name, tensors, said in (
        ("half", half, "half.safetensors: the LoRA of blocks.3.ffn.2 has no B (up)"),
        ("other", other, "the LoRA changes blocks.9.ffn.2, which the model does not have"),
        ("wide", wide, "the LoRA of blocks.0.self_attn.q is [128, 256], the matrix [128, 128]"),
    ):
        assert said in said_of([base, saved(tmp_path / f"{name}.safetensors", tensors)])


# fp8


def scaled(config: ModelConfig, spelling: str) -> tuple[Tensors, Tensors]:
    """Weights with the blocks' matrices in scaled fp8, as ComfyUI's files have them, and what they stand for."""
    stored: Tensors = {}
    meant: Tensors = {}
    for name, tensor in weights(config).items():
        stored[name] = meant[name] = tensor
        if name.startswith("blocks.") and tensor.dim() == 2 and name.endswith(".weight"):
            scale = tensor.abs().max() / 448
            small = (tensor / scale).to(torch.float8_e4m3fn)
            module = name.removesuffix(".weight")
            stored[name], meant[name] = small, (small.float() * scale).bfloat16()
            stored[f"{module}.{spelling}"] = scale
            stored[f"{module}.{'scale_input' if spelling == 'scale_weight' else 'input_scale'}"] = torch.ones(())
            if spelling == "weight_scale":
                stored[f"{module}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    if spelling == "scale_weight":
        stored["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    return stored, meant


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_fp8_is_multiplied_out(spelling: str, prefix: str, tmp_path: Path) -> None:
    stored, meant = scaled(TEXT, spelling)
    path = saved(tmp_path / "fp8.safetensors", {prefix + name: t for name, t in stored.items()})
    model, _ = load_profiled(path)
    assert all(torch.equal(t, meant[name]) and t.dtype == meant[name].dtype for name, t in model.state_dict().items())


def test_other_precisions_are_refused(tmp_path: Path) -> None:
    own, name = weights(TEXT), "blocks.0.ffn.0.weight"
    finer = own | {name: own[name].to(torch.float8_e4m3fn), "blocks.0.ffn.0.weight_scale": torch.ones(16)}
    said = said_of(saved(tmp_path / "finer.safetensors", finer))
    assert f"{name} is quantised as torch.float8_e4m3fn with 16 scales: only fp8 with one scale" in said
    packed = own | {name: own[name].to(torch.int8), "blocks.0.ffn.0.weight_scale": torch.ones(())}
    assert "quantised as torch.int8" in said_of(saved(tmp_path / "int8.safetensors", packed))
    lost = own | {"blocks.77.ffn.0.scale_weight": torch.ones(())}
    assert "blocks.77.ffn.0.scale_weight scales blocks.77.ffn.0.weight, which is not there" in said_of(
        saved(tmp_path / "lost.safetensors", lost)
    )
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "model.gguf is GGUF, which only ComfyUI with the node pack ComfyUI-GGUF reads" in said_of(
        tmp_path / "model.gguf"
    )


# wrong files


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("condition_embedder.time_embedder.linear_1.weight", "a transformer in the layout of diffusers"),
        ("encoder.conv1.weight", "an autoencoder: it belongs to the VAE input"),
        ("token_embedding.weight", "a umT5 text encoder"),
        ("vision_model.embeddings.class_embedding", "a CLIP-vision encoder"),
        ("double_blocks.0.img_attn.proj.weight", "a transformer of the Flux family"),
    ],
)
def test_other_kinds_are_named(name: str, what: str, tmp_path: Path) -> None:
    said = said_of(saved(tmp_path / "a.safetensors", {name: torch.ones(2)}))
    assert said.startswith(f"not a Wan2.1-shaped transformer but {what}") and "patch_embedding.weight" in said


def test_relatives_with_more_parts_are_named(tmp_path: Path) -> None:
    more = weights(TEXT) | {"vace_blocks.0.before_proj.weight": torch.ones(2)}
    assert "a VACE model, which is steered by a video" in said_of(saved(tmp_path / "vace.safetensors", more))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda t: t.pop("audio_cond_projs.0.bias"), "1 missing: audio_cond_projs.0.bias"),
        (lambda t: t.update({"audio_cond_projs.1.bias": torch.ones(128)}), "1 left over: audio_cond_projs.1.bias"),
        (
            lambda t: t.update({"audio_cond_projs.0.weight": torch.ones(128, 5)}),
            "1 of another shape: audio_cond_projs.0.weight (128, 5) instead of (128, 2)",
        ),
        (lambda t: t.pop("audio_proj.norm_out.weight"), "1 missing: audio_proj.norm_out.weight"),
        (lambda t: t.pop("text_embedding.0.weight"), "1 missing: text_embedding.0.weight"),
        (lambda t: t.pop("head.head.weight"), "1 missing: head.head.weight"),
    ],
)
def test_one_wrong_key_is_named(spoil: Any, said: str, tmp_path: Path) -> None:
    tensors = weights(PACKED)
    spoil(tensors)
    assert said in said_of(saved(tmp_path / "a.safetensors", tensors))


class Harm:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    for name, content in (("bare.pt", Harm(tmp_path / "harm")), ("deep.pt", {"generator": Harm(tmp_path / "harm")})):
        torch.save(content, tmp_path / name)
        assert f"{name} holds more than weights, and no code of a file is run here" in said_of(tmp_path / name)
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps(Harm(tmp_path / "harm"), protocol=2))
    assert said_of(tmp_path / "old.ckpt")
    assert not (tmp_path / "harm").exists()


def test_cut_off_files(tmp_path: Path) -> None:
    whole = saved(tmp_path / "a.safetensors", weights(TEXT)).read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "a.safetensors is not a readable safetensors file" in said_of(tmp_path / "a.safetensors")
    whole = saved(tmp_path / "a.pt", weights(TEXT)).read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[: len(whole) // 2])
    assert "a.pt cannot be read as weights only" in said_of(tmp_path / "a.pt")


# audio that is added


@torch.no_grad()
def test_packed_audio_reaches_its_layers_only() -> None:
    model = fill(JoyAvatarDiT(PACKED)).double()
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, condition, tokens = drawn(2, 33, 3, 4, 4), model.condition(drawn(2, 5, 6)), drawn(2, 3, 4, 3)
    audio = model.audio(tokens)
    assert len(audio.layers) == len(PACKED.audio_layers) == 1 and audio.shape == (3, 1)
    times = torch.full((3,), 500.0, dtype=torch.float64)
    heard, silent = (model(x, times, range(3), condition, a)[0] for a in (audio, None))
    assert not torch.allclose(heard, silent, atol=1e-3)
    seen: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for given in (audio, None):
        model(x, times, range(3), condition, given)
    with_sound, without = seen[:4], seen[4:]
    assert all(torch.equal(a, b) for a, b in zip(with_sound[:2], without[:2], strict=True))
    added = (with_sound[2] - without[2]).unflatten(1, (3, 4))
    assert torch.allclose(added, model.audio_cond_projs[0](model.audio_proj(tokens)).unsqueeze(2).expand(-1, -1, 4, -1))
