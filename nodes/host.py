"""The host behind one door: what the pack asks of ComfyUI's own modules. They are imported when they are used.

Shape legend: B batch, L tokens, H W pixels, T pixel frames, C latent channels, F latent frames.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..joyavatar_core import checkpoint, lora
from ..joyavatar_core.attention import AttentionFn
from ..joyavatar_core.autoencoder import LightAutoencoder, light_config
from ..joyavatar_core.avatar import (
    ASSETS,
    EMBEDDED_FILES,
    default_dtype,
    folded,
    load_light_autoencoder,
    load_profiled,
    stored_model,
    wan_vae_of,
)
from ..joyavatar_core.config import ModelConfig
from ..joyavatar_core.families import PROFILES, Profile
from ..joyavatar_core.known_weights import licence_warning, recognised, where_to_get
from ..joyavatar_core.model import JoyAvatarDiT
from ..joyavatar_core.overlap import Overlap
from ..joyavatar_core.types import VideoAutoencoder
from ..joyavatar_core.wan_vae import WanVAE

logger = logging.getLogger(__name__)

EMBEDDED = "embedded"
LIGHT_MARK, LIGHT_CHANNELS = "decoder.22.bias", 16  # as the host tells a light autoencoder, and one of Wan2.1
FP8 = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GGUF_FOLDER = "unet_gguf"  # of ComfyUI-GGUF: the same folders, other endings
PRECISIONS = ("auto", *DTYPES, *FP8)


@dataclass(frozen=True)
class HostAutoencoder:
    """An autoencoder under the host's memory management.

    folded: a faster twin for a CPU, where nothing is ever moved; None elsewhere.
    """

    name: str
    patcher: Any
    dtype: torch.dtype
    folded: LightAutoencoder | None = None

    @property
    def module(self) -> VideoAutoencoder:
        """The module to run, once the host has loaded it."""
        return self.folded or self.patcher.model

    @property
    def channels(self) -> int:
        return self.patcher.model.latent_channels


@dataclass(frozen=True)
class HostModel:
    """A transformer under the host's memory management, and what belongs to it.

    dtype: of the activations. autoencoder: the model's own; None where a VAE must be connected. profile: the system.
    """

    name: str
    patcher: Any
    config: ModelConfig
    dtype: torch.dtype
    autoencoder: HostAutoencoder | None = None
    profile: Profile = PROFILES["embedded"]


class _Wrapper(nn.Module):
    """The transformer as the host's patcher and its LoRA reader want it: under `diffusion_model`."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.diffusion_model = model
        self.model_config = SimpleNamespace(unet_config={})
        self.manual_cast_dtype = dtype

    def get_dtype(self) -> torch.dtype:
        return self.manual_cast_dtype


def load_transformer(name: str, precision: str) -> HostModel:
    """The embedded model, or a file of the folder `diffusion_models`. CheckpointError for one that does not fit.

    precision: one of PRECISIONS. With fp8 the large matrices are stored so, and computed in the device's own choice.
    """
    import comfy.model_management as mm

    path = ASSETS / EMBEDDED_FILES["model"] if name == EMBEDDED else transformer_path(name)
    if warning := licence_warning(name):
        logger.warning("%s", warning)
    device = mm.get_torch_device()
    compute = DTYPES.get(precision) or _compute_dtype(device)
    model, profile = _stored(path, compute, device) or _plain(path, compute, FP8.get(precision), device)
    model.eval().requires_grad_(False)
    patcher = _patcher(_Wrapper(model, compute), device, mm.unet_offload_device())
    own = embedded_autoencoder() if name == EMBEDDED else None
    return HostModel(name, patcher, model.config, compute, own, profile)


def transformer_path(name: str) -> Path:
    """The file of a transformer. CheckpointError if it is gone."""
    return Path(_file("diffusion_models", name))


def transformer_files() -> list[str]:
    """Names for `load_transformer`: GGUF files too, where the node pack ComfyUI-GGUF is installed."""
    import folder_paths

    names = folder_paths.get_filename_list("diffusion_models")
    return [*names, *(folder_paths.get_filename_list(GGUF_FOLDER) if GGUF_FOLDER in _folders() else ())]


def _plain(
    path: Path, compute: torch.dtype, small: torch.dtype | None, device: torch.device
) -> tuple[JoyAvatarDiT, Profile]:
    import comfy.ops

    ops = comfy.ops.pick_operations(small or compute, compute, load_device=device)
    model, profile = load_profiled(path, ops, attention(), compute)
    _store(model, compute, small)
    return model, profile


def _stored(path: Path, compute: torch.dtype, device: torch.device) -> tuple[JoyAvatarDiT, Profile] | None:
    """A model whose matrices stay as the file has them, in layers of the host or of ComfyUI-GGUF; None for others."""
    import comfy.ops
    import comfy.utils

    if path.suffix == ".gguf":
        tensors, ops = _gguf(path)
        return stored_model(tensors, {}, path.name, ops, attention(), compute)
    if not hasattr(comfy.utils, "convert_old_quants") or not checkpoint.is_scaled(path):
        return None
    tensors, metadata = checkpoint.read(path)
    tensors = checkpoint.translate(tensors, checkpoint.detect_family(tensors))
    checkpoint.multiplied_out({n: t.to("meta") if t.numel() > 1 else t for n, t in tensors.items()})  # what is refused
    tensors, _ = comfy.utils.convert_old_quants(tensors, "", metadata)
    quantised = SimpleNamespace(quant_config=comfy.utils.detect_layer_quantization(tensors, ""))
    ops = comfy.ops.pick_operations(None, compute, load_device=device, model_config=quantised)
    return stored_model(tensors, metadata, path.name, ops, attention(), compute, checkpoint.SCALES)


def _gguf(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensors of a GGUF file and the layers for them, both of the node pack ComfyUI-GGUF."""
    known = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})  # the host's, which is loaded before any pack
    loader = known.get("UnetLoaderGGUF")
    package = loader.__module__.rpartition(".")[0] if loader else ""
    parts = [sys.modules.get(f"{package}.{part}") for part in ("loader", "ops")]
    if not loader or None in parts:
        raise checkpoint.CheckpointError(
            f"{path.name} is GGUF: install the node pack ComfyUI-GGUF, or take a safetensors file"
        )
    read, ops = parts[0].gguf_sd_loader, parts[1].GGMLOps  # pyright: ignore[reportOptionalMemberAccess]
    try:
        tensors = read(str(path))
        tensors = tensors[0] if isinstance(tensors, tuple) else tensors
    except (ValueError, OSError) as error:
        raise checkpoint.CheckpointError(f"{path.name} cannot be read as GGUF ({error}); fetch it again") from error
    tensors = {n: t.as_subclass(Tensor) if t.dtype.is_floating_point else t for n, t in tensors.items()}  # not packed
    return checkpoint.translate(tensors, checkpoint.detect_family(tensors)), ops


def _folders() -> Any:
    import folder_paths

    return folder_paths.folder_names_and_paths


def _file(folder: str, name: str) -> str:
    import folder_paths

    folders = [folder, *([GGUF_FOLDER] if folder == "diffusion_models" and GGUF_FOLDER in _folders() else [])]
    found = next(filter(None, (folder_paths.get_full_path(f, name) for f in folders)), None)
    if not found:
        known = recognised(name)
        hint = f"; {where_to_get(known)}" if known else ""
        raise checkpoint.CheckpointError(f"{name} is not in the folder models/{folder}: put it there and press R{hint}")
    return found


def _compute_dtype(device: torch.device) -> torch.dtype:
    """What the host computes in on this device; on a CPU the engine knows better."""
    import comfy.model_management as mm

    if device.type == "cpu":
        return default_dtype(device)
    weights = mm.unet_dtype(device=device, supported_dtypes=[torch.bfloat16, torch.float16, torch.float32])
    return mm.unet_manual_cast(weights, device, [torch.bfloat16, torch.float16, torch.float32]) or weights


def _store(model: nn.Module, dtype: torch.dtype, small: torch.dtype | None) -> None:
    """Weights in `dtype`; the matrices of the blocks in `small`, if there is one, or as they came where that is fp8."""
    for name, parameter in model.named_parameters():
        if parameter.dtype in FP8.values() and small is None:
            continue
        matrix = parameter.ndim == 2 and name.startswith("blocks.")
        parameter.data = parameter.data.to(small if small and matrix else dtype)


def _patcher(module: nn.Module, load: torch.device, offload: torch.device) -> Any:
    """The host's handle on a module; which class that is, it decides at start-up."""
    import comfy.model_management as mm
    import comfy.model_patcher

    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    patcher = kind(module, load_device=load, offload_device=offload)
    if hasattr(mm, "archive_model_dtypes"):
        mm.archive_model_dtypes(module)
    return patcher


def embedded_autoencoder() -> HostAutoencoder:
    """The autoencoder of the package."""
    return _managed(EMBEDDED, load_light_autoencoder(ASSETS / EMBEDDED_FILES["autoencoder"], _autoencoder_ops()))


def autoencoder_of(vae: Any) -> HostAutoencoder:
    """The weights of a VAE of the host in the engine's own streaming decoder: Wan2.1's, or TAEHV's or LightTAE's.

    The host's decoder streams too, but by inner calls that change from version to version. ValueError for a VAE that
    is of another model.
    """
    tensors = {name: tensor.cpu() for name, tensor in (vae.get_sd() if hasattr(vae, "get_sd") else {}).items()}
    try:
        module = _light_of(vae, tensors) if LIGHT_MARK in tensors else wan_vae_of(tensors, _autoencoder_ops())
    except checkpoint.CheckpointError as error:
        raise ValueError(f"this VAE cannot be used: {error}. Load wan_2.1_vae.safetensors with Load VAE") from None
    return _managed("the connected VAE", module)


def _light_of(vae: Any, tensors: dict[str, Tensor]) -> LightAutoencoder:
    """A light autoencoder of the host. It keeps no file name; how it scales latents tells LightTAE from TAEHV."""
    raw = getattr(vae.first_stage_model, "latent_format", None) is None
    name = "lighttaew2_1" if raw and tensors["decoder.1.weight"].shape[1] == LIGHT_CHANNELS else "taew2_1"
    with torch.device("meta"):
        empty = LightAutoencoder(light_config(name, {}, tensors), _autoencoder_ops())
    return checkpoint.load_into(empty, tensors, "the VAE")


def _autoencoder_ops() -> Any:
    import comfy.ops

    return comfy.ops.disable_weight_init


def _managed(name: str, module: WanVAE | LightAutoencoder) -> HostAutoencoder:
    import comfy.model_management as mm

    device = mm.vae_device()
    on_cpu = device.type == "cpu" and isinstance(module, LightAutoencoder)
    dtype = default_dtype(device) if on_cpu else mm.vae_dtype(device, [torch.bfloat16, torch.float32])
    module = module.to(dtype).eval().requires_grad_(False)
    if isinstance(module, WanVAE):
        module.compute = dtype
    twin = folded(module, device, dtype) if isinstance(module, LightAutoencoder) and on_cpu else None
    return HostAutoencoder(name, _patcher(module, device, mm.vae_offload_device()), dtype, twin)


def with_lora(model: HostModel, name: str, strength: float) -> HostModel:
    """The model with a LoRA of the folder `loras`; the given one is as before. ValueError for one of another model.

    A pickle (LongLive's .pt) is read as weights only. Live Avatar's, whose file does not say its scale, gets it.
    """
    import comfy.sd

    tensors, _ = checkpoint.read(_file("loras", name))
    inner = model.patcher.model.diffusion_model.state_dict()
    try:
        tensors = lora.spelled(tensors, inner)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    patcher, _ = comfy.sd.load_lora_for_models(model.patcher, None, tensors, strength, 0)
    if not patcher.patches:
        raise ValueError(f"{name} fits nothing in {model.name}: it is a LoRA of another model")
    sizes = {f"diffusion_model.{key}": tuple(value.shape) for key, value in inner.items()}
    for key, patches in patcher.patches.items():
        _check_patch(name, model.name, key, patches[-1], sizes)
    return replace(model, patcher=patcher)


def _check_patch(file: str, model: str, key: str, patch: Any, sizes: dict[str, tuple[int, ...]]) -> None:
    """The host only logs patches of another size, and leaves them out."""
    up, down = [*getattr(patch[1], "weights", ()), None, None][:2]
    if isinstance(up, Tensor) and isinstance(down, Tensor) and up.ndim == down.ndim == 2:
        given = (up.shape[0], down.shape[1])
        if given != sizes[key][:2]:
            raise ValueError(f"{file} has {given} where {model} has {sizes[key][:2]} ({key}): a LoRA of another size")


def attention() -> AttentionFn:
    """The host's attention switch (--use-sage-attention, --use-flash-attention, ...) as the engine calls it."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        from comfy.ldm.modules.attention import optimized_attention

        out = optimized_attention(*(t.flatten(2) for t in (q, k, v)), heads=q.shape[2], mask=mask)
        return out.unflatten(-1, (q.shape[2], -1))

    return attend


def device_of(patcher: Any) -> torch.device:
    return patcher.load_device


def overlap_beside(patcher: Any) -> Overlap:
    """What may work beside a model of the host: writing, on a GPU. All that uses weights stays in the prompt's thread
    and on its CUDA stream, where the host brings them.
    """
    return replace(Overlap.suited(device_of(patcher)), hear=False, decode=False)


def check_interrupt() -> None:
    """Raises the host's own exception when the user has pressed Cancel."""
    import comfy.model_management as mm

    mm.throw_exception_if_processing_interrupted()


def cancelled_by() -> tuple[type[BaseException], ...]:
    """What the host raises for Cancel (an Exception until 0.32, a BaseException since)."""
    import comfy.model_management as mm

    return (mm.InterruptProcessingException, KeyboardInterrupt)


@contextmanager
def loaded(patchers: Sequence[Any], working_bytes: int, hint: str) -> Iterator[None]:
    """Weights on their devices, with so many bytes left for the work. Out of memory: the hint goes into the log."""
    import comfy.model_management as mm

    mm.load_models_gpu([p for i, p in enumerate(patchers) if p not in patchers[:i]], memory_required=working_bytes)
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        logger.error("out of memory: %s", hint)
        raise
    finally:
        mm.soft_empty_cache()


def let_go() -> None:
    """All models of the host leave the GPU, for processes that need it."""
    import comfy.model_management as mm

    mm.unload_all_models()
    mm.soft_empty_cache()


def progress_bar(total: int, node_id: str | None) -> Callable[[int], None]:
    """Of the host, in steps done."""
    import comfy.utils

    bar = comfy.utils.ProgressBar(max(1, total), node_id=node_id)
    return lambda done: bar.update_absolute(done, max(1, total))


class HearingEncoder:
    """The host's wav2vec2 in the shape the engine's audio front end calls (that of transformers' Wav2Vec2Model)."""

    def __init__(self, encoder: Any) -> None:
        layers = getattr(getattr(encoder.model, "encoder", None), "layers", None)
        if layers is None or not hasattr(encoder.model, "feature_projection"):
            raise ValueError("this AUDIO_ENCODER is not wav2vec2: load a wav2vec2 file with Audio Encoder Loader")
        self.source, self.patcher = encoder, encoder.patcher
        self.dtype = torch.float32
        self.config = SimpleNamespace(
            hidden_size=encoder.model.encoder.layer_norm.weight.shape[0],
            num_hidden_layers=len(layers),
            conv_kernel=(10, 3, 3, 3, 3, 2, 2),
            conv_stride=(5, 2, 2, 2, 2, 2, 2),
            add_adapter=False,
        )

    @property
    def device(self) -> torch.device:
        return self.source.load_device

    def eval(self) -> HearingEncoder:
        return self

    def __call__(self, samples: Tensor, output_hidden_states: bool = False) -> SimpleNamespace:
        """samples [B, n] -> last_hidden_state [B, L, D], hidden_states of every layer."""
        last, layers = self.source.model(samples[:, None])
        return SimpleNamespace(last_hidden_state=last, hidden_states=layers)

    # the parts, for those that hear at the frame rate (wav2vec_frames)

    def feature_extractor(self, samples: Tensor) -> Tensor:
        """samples [B, n] -> [B, C, L], as transformers has it."""
        return self.source.model.feature_extractor(samples).transpose(1, 2)

    @property
    def feature_projection(self) -> nn.Module:
        return self.source.model.feature_projection

    @property
    def encoder(self) -> nn.Module:
        return self.source.model.encoder
