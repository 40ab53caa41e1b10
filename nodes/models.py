"""Nodes that load weights."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..joyavatar_core.known_weights import licence_tooltip
from . import host
from .sockets import CATEGORY, Model


class LoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="JoyAvatarLoadModel",
            display_name="JoyAvatar Load Model",
            category=CATEGORY,
            description="The embedded model, which needs no download and runs on a CPU, or a checkpoint of your own.",
            search_aliases=["checkpoint", "diffusion model", "talking avatar model", "loader"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=[host.EMBEDDED, *host.transformer_files()],
                    tooltip="embedded: drawn avatars, in the pack. Others: files in models/diffusion_models.\n"
                    + licence_tooltip(),
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(host.PRECISIONS),
                    advanced=True,
                    tooltip="Precision. auto suits the device; fp8 halves the memory of large models.",
                ),
            ],
            outputs=[Model.Output("model")],
        )

    @classmethod
    def execute(cls, model: str, dtype: str = "auto") -> io.NodeOutput:
        return io.NodeOutput(host.load_transformer(model, dtype))


class LoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        import folder_paths

        return io.Schema(
            node_id="JoyAvatarLoRA",
            display_name="JoyAvatar LoRA",
            category=CATEGORY,
            description="Adds a LoRA to a JoyAvatar model. The model before this node stays as it is.",
            search_aliases=["lora", "load lora", "adapter"],
            inputs=[
                Model.Input("model", tooltip="From JoyAvatar Load Model."),
                io.Combo.Input(
                    "lora", options=folder_paths.get_filename_list("loras"), tooltip="A file in models/loras."
                ),
                io.Float.Input(
                    "strength", default=1.0, min=-10.0, max=10.0, step=0.05, tooltip="0 is off, 1 as it was trained."
                ),
            ],
            outputs=[Model.Output("model")],
        )

    @classmethod
    def execute(cls, model: Any, lora: str, strength: float) -> io.NodeOutput:
        return io.NodeOutput(host.with_lora(model, lora, strength) if strength else model)
