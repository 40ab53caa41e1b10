"""The pack's own socket types, and what every node's schema shares."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "JoyAvatar"

Model = io.Custom("JOYAVATAR_MODEL")
Reference = io.Custom("JOYAVATAR_REFERENCE")
Voice = io.Custom("JOYAVATAR_VOICE")
Latents = io.Custom("JOYAVATAR_LATENTS")
Frames = io.Custom("JOYAVATAR_FRAMES")
