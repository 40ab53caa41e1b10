"""The ComfyUI nodes: glue between the host and `joyavatar_core`. Empty until the pack itself is built."""

from __future__ import annotations


async def comfy_entrypoint():
    """What ComfyUI asks for: the list of nodes, none yet."""
    from comfy_api.latest import ComfyExtension

    class JoyAvatarExtension(ComfyExtension):
        async def get_node_list(self):
            return []

    return JoyAvatarExtension()
