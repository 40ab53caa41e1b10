"""Where pixel frames, latent frames, blocks and tokens meet: the only home of the numbers 3, 4, 8 and 16.

Wan2.1's causal autoencoder maps 1 + 4 (n - 1) pixel frames to n latent frames: the first latent holds one pixel
frame, every later one four. A block is the unit of the rollout (JoyAvatar-Flash section 4.1: three latents).
No torch here: this file is arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction


@dataclass(frozen=True)
class Geometry:
    """Sizes of one stream. All other counts are derived from these.

    width, height: pixels, multiples of `spatial * patch` on their axis.
    fps: pixel frames a second (16 for Wan2.1).
    block_latents: latent frames in a block.
    first_latent: latent frame with which block 0 begins; those before it are given, and shown with block 0.
    temporal, spatial: compression of the autoencoder along time and along each picture axis.
    patch: (height, width) of the transformer's patch, in latent cells.
    """

    width: int
    height: int
    fps: Fraction = Fraction(16)
    block_latents: int = 3
    temporal: int = 4
    spatial: int = 8
    patch: tuple[int, int] = (2, 2)
    first_latent: int = field(default=0, repr=False)  # a repr is part of the identity of saved streams

    def __post_init__(self) -> None:
        step_h, step_w = self.spatial * self.patch[0], self.spatial * self.patch[1]
        if self.height <= 0 or self.width <= 0 or self.height % step_h or self.width % step_w:
            raise ValueError(
                f"size {self.width}x{self.height} does not fit: the width must be a positive multiple of {step_w} "
                f"and the height of {step_h}"
            )
        object.__setattr__(self, "fps", Fraction(self.fps))
        if self.fps <= 0:
            raise ValueError(f"fps {self.fps} must be positive")

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w) of a latent frame."""
        return self.height // self.spatial, self.width // self.spatial

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patch tokens in a latent frame."""
        h, w = self.latent_size
        return h // self.patch[0], w // self.patch[1]

    @property
    def tokens_per_latent(self) -> int:
        rows, columns = self.grid
        return rows * columns

    def frames_of_latents(self, latents: int) -> int:
        """Pixel frames held by the first `latents` latent frames."""
        return 1 + self.temporal * (latents - 1) if latents > 0 else 0

    def latents_of_frames(self, frames: int) -> int:
        """Latent frames needed for the first `frames` pixel frames."""
        return 1 - (-(frames - 1) // self.temporal) if frames > 0 else 0

    def frames_of_latent(self, latent: int) -> range:
        """Pixel frames of one latent frame: frame 0 for latent 0, else 4i-3 .. 4i."""
        return range(self.frames_of_latents(latent), self.frames_of_latents(latent + 1))

    def frames_told(self, latent: int) -> tuple[int, ...]:
        """`temporal` pixel frames of a latent frame: those it holds, the one of latent 0 repeated."""
        frames = self.frames_of_latent(latent)
        return tuple(frame for frame in frames for _ in range(self.temporal // len(frames)))

    def latents_of_block(self, block: int) -> range:
        """Latent frames that a block shows; block 0 those that are given before it as well."""
        start = self.first_latent + block * self.block_latents
        return range(start if block else 0, start + self.block_latents)

    def block_of_latent(self, latent: int) -> int:
        """The block that shows a latent frame."""
        return max(0, latent - self.first_latent) // self.block_latents

    def frames_of_block(self, block: int) -> range:
        latents = self.latents_of_block(block)
        return range(self.frames_of_latents(latents.start), self.frames_of_latents(latents.stop))

    def blocks_of_frames(self, frames: int) -> int:
        """Blocks needed for the first `frames` pixel frames."""
        latents = self.latents_of_frames(frames)
        return self.block_of_latent(latents - 1) + 1 if latents else 0

    def frames_of_duration(self, duration: Fraction) -> int:
        """Pixel frames shown for `duration` seconds: round(duration * fps), halves up, at least one for any sound."""
        return max(1, int(duration * self.fps + Fraction(1, 2))) if duration > 0 else 0
