"""Nodes that describe the work: how blocks are sampled, decoded, pasted back, and what all that will need."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..joyavatar_core import policy as policies
from ..joyavatar_core.estimate import cost_lines
from ..joyavatar_core.policy import RolloutPolicy
from . import host
from .sockets import CATEGORY, Frames, Latents, Model, Reference, Voice
from .streams import FramePlan, LatentPlan

AS_MODEL = "auto"
AS_POLICY = "policy"
SWITCH = [AS_POLICY, "on", "off"]


class StreamingSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="JoyAvatarStreamingSampler",
            display_name="JoyAvatar Streaming Sampler",
            category=CATEGORY,
            description="How the video is sampled, block by block, at any length in constant memory. The work begins "
            "when an output node asks for it.",
            search_aliases=["sampler", "talking avatar", "audio to video", "infinite length", "rolling forcing"],
            inputs=[
                Model.Input("model", tooltip="From JoyAvatar Load Model."),
                Reference.Input("reference", tooltip="Who speaks: from JoyAvatar Reference."),
                Voice.Input("voice", tooltip="What is said: from JoyAvatar Audio Encoder."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="The same seed gives the same video.",
                ),
                io.Combo.Input(
                    "policy",
                    options=[AS_MODEL, *policies.POLICIES],
                    tooltip="How blocks follow each other. auto: the way the model was trained.",
                ),
                *_advanced(),
            ],
            outputs=[Latents.Output("latents")],
        )

    @classmethod
    def execute(cls, model: Any, reference: Any, voice: Any, seed: int, policy: str, **options: Any) -> io.NodeOutput:
        chosen = model.profile.policy if policy == AS_MODEL else policy
        plan = LatentPlan(model, reference, voice, policy_of(chosen, **options), seed)
        plan.check()
        return io.NodeOutput(plan)


def _advanced() -> list[Any]:
    """Inputs that change single values of a policy; their defaults leave it as it is."""
    return [
        io.Int.Input(
            "steps",
            default=0,
            min=0,
            max=50,
            advanced=True,
            tooltip="Main denoising steps, and so many blocks in a rolling window; 0: as the policy says.",
        ),
        io.Combo.Input(
            "psb",
            options=SWITCH,
            advanced=True,
            tooltip="Progressive Step Bootstrapping: more steps for the first blocks.",
        ),
        io.Combo.Input(
            "mci",
            options=SWITCH,
            advanced=True,
            tooltip="Motion Condition Injection: the last finished frame leads the next blocks.",
        ),
        io.Combo.Input(
            "urcr",
            options=SWITCH,
            advanced=True,
            tooltip="Unbounded RoPE via Cache-Resetting: positions stay below rope_limit at any length.",
        ),
        io.Int.Input(
            "rope_limit",
            default=0,
            min=0,
            max=100_000,
            advanced=True,
            tooltip="N of URCR, in latent frames; 0: as the policy says.",
        ),
        io.Int.Input(
            "sink_blocks",
            default=-1,
            min=-1,
            max=16,
            advanced=True,
            tooltip="First blocks that are never forgotten; they keep the person; -1: as the policy says.",
        ),
        io.Int.Input(
            "local_blocks",
            default=-1,
            min=-1,
            max=64,
            advanced=True,
            tooltip="Newest blocks that are remembered; more cost memory; -1: as the policy says.",
        ),
        io.Combo.Input(
            "kv_level",
            options=[AS_POLICY, "last_step", "clean", "per_step"],
            advanced=True,
            tooltip="Noise level at which a block is remembered; clean costs a pass more for each block.",
        ),
    ]


def policy_of(
    name: str,
    steps: int = 0,
    psb: str = AS_POLICY,
    mci: str = AS_POLICY,
    urcr: str = AS_POLICY,
    rope_limit: int = 0,
    sink_blocks: int = -1,
    local_blocks: int = -1,
    kv_level: str = AS_POLICY,
) -> RolloutPolicy:
    """The policy that the widgets describe. ValueError for values that cannot go together."""
    chosen = policies.policy(name)
    if steps:
        chosen = policies.with_steps(chosen, steps)
    changes: dict[str, object] = {}
    if psb != AS_POLICY:
        changes["bootstrap"] = (chosen.bootstrap or chosen.window_blocks) if psb == "on" else 0
    if mci != AS_POLICY:
        changes["motion_frame"] = mci == "on"
    if sink_blocks >= 0:
        changes["sink_blocks"] = sink_blocks
    if local_blocks >= 0:
        changes["local_blocks"] = local_blocks
    if kv_level != AS_POLICY:
        changes["kv_level"] = kv_level
    if urcr == "off":
        changes["rope_limit"] = None
    elif rope_limit:
        changes["rope_limit"] = rope_limit
    elif urcr == "on" and chosen.rope_limit is None:
        changes["rope_limit"] = policies.changed(chosen, changes).span_latents
    return policies.changed(chosen, changes)


class StreamDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="JoyAvatarStreamDecode",
            display_name="JoyAvatar Stream Decode",
            category=CATEGORY,
            description="From latent blocks to pictures, a block at a time.",
            search_aliases=["vae decode", "decoder"],
            inputs=[
                Latents.Input("latents", tooltip="From JoyAvatar Streaming Sampler."),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Wan2.1's VAE; without it the model's own decoder, or the Reference's VAE.",
                ),
            ],
            outputs=[Frames.Output("frames")],
        )

    @classmethod
    def execute(cls, latents: LatentPlan, vae: Any = None) -> io.NodeOutput:
        decoder = latents.autoencoder if vae is None else host.autoencoder_of(vae)
        if decoder.channels != latents.model.config.out_channels:
            raise ValueError(
                f"{decoder.name} decodes {decoder.channels} latent channels, {latents.model.name} makes "
                f"{latents.model.config.out_channels}: leave vae empty to use the model's own decoder"
            )
        return io.NodeOutput(FramePlan(latents, decoder))


class PasteBack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="JoyAvatarPasteBack",
            display_name="JoyAvatar Paste Back",
            category=CATEGORY,
            description="Puts the speaking part back into the whole picture of the Reference, with a soft edge.",
            search_aliases=["composite", "uncrop", "stitch", "face region"],
            inputs=[
                Frames.Input(
                    "frames", tooltip="From JoyAvatar Stream Decode; the fit of its Reference must not be pad."
                ),
                io.Int.Input(
                    "feather",
                    default=12,
                    min=0,
                    max=50,
                    tooltip="Width of the soft edge, in per cent of the part's shorter side.",
                ),
            ],
            outputs=[Frames.Output("frames")],
        )

    @classmethod
    def execute(cls, frames: FramePlan, feather: int) -> io.NodeOutput:
        plan = FramePlan(frames.latents, frames.decoder, feather / 100)
        _ = plan.paste  # what cannot be pasted is refused here
        return io.NodeOutput(plan)


class RolloutInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="JoyAvatarRolloutInfo",
            display_name="JoyAvatar Rollout Info",
            category=CATEGORY,
            description="What a run will do and need: schedule, memory, disk. It runs nothing.",
            search_aliases=["estimate", "memory", "schedule", "vram"],
            inputs=[Latents.Input("latents", tooltip="From JoyAvatar Streaming Sampler.")],
            outputs=[io.String.Output("info")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, latents: LatentPlan) -> io.NodeOutput:
        text = describe(latents)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def describe(plan: LatentPlan) -> str:
    """The run in words and figures."""
    import folder_paths

    policy, geometry, needs = plan.policy, plan.geometry, plan.estimate()
    free = shutil.disk_usage(folder_paths.get_output_directory()).free
    weights = plan.model.patcher.model_size()
    limit = "no limit" if policy.rope_limit is None else f"below {policy.rope_limit}"
    return "\n".join(
        (
            f"{plan.model.name}, {geometry.width}x{geometry.height}, {float(geometry.fps):g} frames a second",
            f"{float(plan.voice.duration):.2f} s of sound: {needs.frames} frames in {needs.blocks} blocks, "
            f"{needs.forwards} forwards",
            f"steps of the first blocks: {_steps(policy)}",
            f"window of {policy.window_blocks} blocks, sink {policy.sink_blocks}, local {policy.local_blocks}, "
            f"K/V {policy.kv_level}, positions {limit}, motion frame {'on' if policy.motion_frame else 'off'}",
            f"memory: weights {_bytes(weights)}, keys and values {_bytes(needs.cache_bytes)}, "
            f"work about {_bytes(needs.work_bytes)}; the same at any length",
            f"video: about {_bytes(needs.video_bytes)}; {_bytes(free)} free in the output folder",
            f"live sound must be {needs.lookahead_s:.2f} s ahead",
            *cost_lines(plan.model.config, policy, geometry, needs.blocks, torch.finfo(plan.model.dtype).bits // 8),
        )
    )


def _steps(policy: RolloutPolicy) -> str:
    """Forwards that each of the first blocks goes through."""
    blocks = policy.bootstrap + policy.window_blocks + 1
    counts = [0] * blocks
    for window in range(policy.num_windows(blocks)):
        for step in policy.window_steps(window, blocks):
            for block in step.blocks:
                counts[block] += 1
    return ", ".join(map(str, counts)) + " ..."


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
