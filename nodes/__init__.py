"""The ComfyUI nodes: glue between the host and `joyavatar_core`. `host` is the only door to the host's own modules."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import collect, inputs, models, output, preview, sampling

NODES: tuple[type[io.ComfyNode], ...] = (
    inputs.Sample,
    models.LoadModel,
    models.LoRA,
    inputs.ReferenceNode,
    inputs.AudioEncoder,
    sampling.StreamingSampler,
    sampling.StreamDecode,
    output.StreamToVideo,
    output.Retake,
    sampling.PasteBack,
    collect.CollectLatents,
    collect.CollectFrames,
    inputs.FolderOfAudio,
    inputs.FolderOfImages,
    sampling.RolloutInfo,
)


class JoyAvatarExtension(ComfyExtension):
    async def on_load(self) -> None:
        preview.register_routes()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODES)


async def comfy_entrypoint() -> JoyAvatarExtension:
    """What ComfyUI asks for."""
    return JoyAvatarExtension()
