"""Drawn talking heads: random identities, poses that follow speech, and the rasteriser, all on OpenCV polygons."""

from ..speech import HELD_OUT_SEED
from .avatar import Avatar, Pose, is_held_out
from .layers import Image
from .movement import motion
from .pictures import photo_like, texture
from .scene import Clip, Scene, boxes, draw, render, sample_clip

__all__ = [
    "HELD_OUT_SEED",
    "Avatar",
    "Clip",
    "Image",
    "Pose",
    "Scene",
    "boxes",
    "draw",
    "is_held_out",
    "motion",
    "photo_like",
    "render",
    "sample_clip",
    "texture",
]
