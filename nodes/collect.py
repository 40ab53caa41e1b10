"""Nodes that run a stream into stock LATENT or IMAGE, for short clips: there everything must fit into memory.

Shape legend: B batch, C latent channels, F latent frames, h w latent size, T pixel frames, H W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io

from ..joyavatar_core.wan_vae import WanVAE
from .host import progress_bar
from .sockets import CATEGORY, Frames, Latents
from .streams import FramePlan, LatentPlan


def _limit() -> io.Float.Input:
    return io.Float.Input(
        "limit_gb",
        default=4.0,
        min=0.1,
        max=1024.0,
        step=0.5,
        tooltip="Refuse clips that would take more memory than this. Stream to Video needs none of it.",
    )


class CollectLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="JoyAvatarCollectLatents",
            display_name="JoyAvatar Collect Latents",
            category=CATEGORY,
            description="Runs the stream into one stock LATENT, for stock VAE Decode. For short clips.",
            search_aliases=["latent", "stream to latent"],
            inputs=[Latents.Input("latents", tooltip="From JoyAvatar Streaming Sampler."), _limit()],
            outputs=[io.Latent.Output("latent")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, latents: LatentPlan, limit_gb: float) -> io.NodeOutput:
        geometry, needs = latents.geometry, latents.estimate()
        h, w = geometry.latent_size
        count = geometry.latents_of_block(needs.blocks - 1).stop
        _refuse(latents.model.config.out_channels * count * h * w * 4, limit_gb, float(latents.voice.duration))
        bar = progress_bar(needs.blocks, cls.hidden.unique_id)
        parts = []
        for block in latents:
            parts.append(block.latents.float().cpu())
            bar(block.index + 1)
        shown = geometry.latents_of_frames(needs.frames)
        samples = torch.cat(parts, dim=2)[:, :, :shown]
        module = latents.autoencoder.module
        if isinstance(module, WanVAE):  # the host's LATENT is as the autoencoder itself gives it
            samples = module.denormalised(samples)
        return io.NodeOutput({"samples": samples})


class CollectFrames(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="JoyAvatarCollectFrames",
            display_name="JoyAvatar Collect Frames",
            category=CATEGORY,
            description="Runs the stream into stock IMAGE and AUDIO, for stock nodes. For short clips.",
            search_aliases=["images", "stream to images", "frames"],
            inputs=[Frames.Input("frames", tooltip="From JoyAvatar Stream Decode."), _limit()],
            outputs=[io.Image.Output("images"), io.Audio.Output("audio"), io.Float.Output("fps")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, frames: FramePlan, limit_gb: float) -> io.NodeOutput:
        (width, height), needs, voice = frames.size, frames.latents.estimate(), frames.latents.voice
        _refuse(needs.frames * width * height * 3 * 4, limit_gb, float(voice.duration))
        images = torch.empty(needs.frames, height, width, 3)
        bar, done = progress_bar(needs.frames, cls.hidden.unique_id), 0
        for piece in frames:
            images[done : done + len(piece)] = torch.from_numpy(piece.astype(np.float32) / 255)
            done += len(piece)
            bar(done)
        audio = {"waveform": voice.samples[None], "sample_rate": voice.rate}
        return io.NodeOutput(images, audio, float(frames.latents.geometry.fps))


def _refuse(needed: int, limit_gb: float, seconds: float) -> None:
    """Raises ValueError for a clip beyond the limit, before anything is run."""
    if needed > limit_gb * 1e9:
        raise ValueError(
            f"{seconds:.0f} s would take {needed / 1e9:.1f} GB of memory, the limit is {limit_gb:g} GB: use Stream to "
            "Video, which needs none of it, or raise limit_gb"
        )
