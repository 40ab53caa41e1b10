"""A stream made by several processes, a GPU each: what the nodes hold, put into files for the command line.

ComfyUI's own process does not take part: see joyavatar_core/multi_gpu/child.py.

Shape legend: C channels, n sound samples, L tokens, D width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..joyavatar_core import checkpoint
from ..joyavatar_core.audio import require
from ..joyavatar_core.multi_gpu.child import Asked, follow
from . import host
from .host import HostAutoencoder
from .streams import FramePlan, Voice

PARALLEL = ("auto", "tpp", "vae", "sequence")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def check(frames: FramePlan) -> None:
    """ValueError, in one sentence, for what lives in ComfyUI's process only."""
    plan = frames.latents
    model = plan.model
    if model.patcher.patches:
        raise ValueError("gpus: the processes read the model from its file, so a LoRA is not in it: set gpus to 1")
    stored = {p.dtype for p in model.patcher.model.parameters()}
    if model.name.endswith(".gguf") or not stored <= DTYPES.keys():
        raise ValueError(f"gpus: {model.name} is in fp8 or GGUF, the processes take bf16, fp16 or fp32: set gpus to 1")
    if frames.feather is not None:
        raise ValueError("gpus: Paste Back works in ComfyUI's process only: connect Stream Decode, or set gpus to 1")
    if plan.voice.encoder is not None and plan.voice.history != Voice.history:
        raise ValueError(f"gpus: history must be {Voice.history:g} s with several processes: set it so, or gpus to 1")


def run(
    frames: FramePlan,
    path: Path,
    gpus: int,
    parallel: str,
    asked: Asked,
    fps: Any,
    on_block: Callable[[Mapping[str, Any]], None],
) -> None:
    """Make the video at `path`. The host's models are let go first; its Cancel stops the processes.

    Raises ChildProcessError with the line of what went wrong there, and the host's own exception for Cancel.
    """
    import folder_paths

    check(frames)
    with tempfile.TemporaryDirectory(dir=_made(folder_paths.get_temp_directory())) as folder:
        words = [*_words(frames, Path(folder)), "--output", str(path), "--fps", str(fps), "--gpus", str(gpus)]
        words += [] if parallel == PARALLEL[0] else ["--parallel", parallel]
        asked.write(Path(folder) / "asked.json")
        host.let_go()
        follow([*words, "--child", str(Path(folder) / "asked.json")], host.check_interrupt, on_block)


def _made(folder: str) -> str:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return folder


def _words(frames: FramePlan, folder: Path) -> list[str]:
    """The stream in the command line's words; tensors go into files of the folder."""
    from PIL import Image

    plan, (width, height) = frames.latents, frames.latents.view.size
    Image.fromarray(plan.reference.seen).save(folder / "picture.png")
    wavfile = require("scipy.io.wavfile", "handing sound to other processes")
    wavfile.write(folder / "voice.wav", plan.voice.rate, plan.voice.samples.float().T.contiguous().numpy())
    device = "cpu" if host.device_of(plan.model.patcher).type == "cpu" else "cuda"
    options = {
        "image": folder / "picture.png",
        "audio": folder / "voice.wav",
        "model": "tiny" if plan.model.name == host.EMBEDDED else host.transformer_path(plan.model.name),
        "size": f"{width}x{height}",
        "fit": plan.reference.core_fit,
        "close-up": "auto" if plan.reference.fit == "close-up" else "never",
        "seed": plan.seed,
        "device": device,
        "dtype": DTYPES[plan.model.dtype],
    }
    if plan.model.name != host.EMBEDDED:
        options |= _parts(frames, folder)
    return ["generate", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def _parts(frames: FramePlan, folder: Path) -> dict[str, Path]:
    """Options of a full-size model, and the files they name."""
    plan = frames.latents
    encoded, hears = plan.reference.encoded, plan.voice.encoder
    parts = {"vae": _autoencoder(plan.autoencoder, folder / "vae.safetensors")}
    if frames.decoder is not plan.autoencoder:
        parts["decoder"] = _autoencoder(frames.decoder, folder / "decoder.safetensors")
    if hears is not None:
        parts["audio-encoder"] = folder / "audio_encoder.safetensors"
        checkpoint.write(parts["audio-encoder"], _tensors(hears.source.model), {})
    said = {"text-encoder": encoded.text, "clip-vision": encoded.image, "face": encoded.face}
    for name, tokens in said.items():  # [1, L, D] or [1, D]
        if tokens is not None:
            parts[name] = folder / f"{name}.safetensors"
            checkpoint.write(parts[name], {"tokens": tokens.float().cpu().contiguous()}, {})
    return parts


def _autoencoder(autoencoder: HostAutoencoder, path: Path) -> Path:
    module = autoencoder.patcher.model
    checkpoint.write(path, _tensors(module), {"autoencoder_config": checkpoint.config_to_json(module.config)})
    return path


def _tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
