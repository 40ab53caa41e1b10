"""JoyAvatar-Flash as an engine: a picture and a voice in, a talking avatar out, at any length in constant memory.

The names below are the public ones; they are imported when first used, so that a schedule needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Avatar": "avatar",
    "AvatarStream": "stream",
    "Geometry": "geometry",
    "JoyAvatarDiT": "model",
    "LatentStream": "stream",
    "LightAutoencoder": "autoencoder",
    "POLICIES": "policy",
    "Rollout": "rollout",
    "RolloutPolicy": "policy",
    "StreamState": "stream",
    "WanVAE": "wan_vae",
    "load_embedded": "avatar",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
