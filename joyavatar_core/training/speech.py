"""Speech with a known mouth: spoken sentences where espeak-ng is installed, formant babble otherwise and in between.

Lip sync can then be measured and not guessed: the shape of the mouth is known for every frame.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from .babble import SAMPLE_RATE, babble
from .espeak import installed
from .mouth import KINDS, Speech, TimedPhone
from .spoken import speak

__all__ = ["BABBLE_SHARE", "HELD_OUT_SEED", "KINDS", "SAMPLE_RATE", "Speech", "TimedPhone", "synthesize"]

HELD_OUT_SEED = 900_000_000  # training seeds stay below; voices and texts from here on are others
BABBLE_SHARE = 0.1  # of the training seeds, where espeak-ng could have spoken


def synthesize(seed: int, seconds: float, fps: Fraction | float = 16) -> Speech:
    """Speech of one random voice: round(seconds * 16000) samples and round(seconds * fps) frames of mouth.

    The same seed gives the same speech on the same machine. Nine of ten training seeds and all held-out ones (from
    `HELD_OUT_SEED`) are spoken by espeak-ng; without it all are babbled, and one warning is logged.
    Raises ValueError when seconds or fps is not positive.
    """
    if seconds <= 0 or fps <= 0:
        raise ValueError(f"seconds {seconds} and fps {fps} must both be positive")
    rate, held_out = Fraction(fps).limit_denominator(100_000), seed >= HELD_OUT_SEED
    babbled = not held_out and np.random.default_rng((seed, 0xBA)).random() < BABBLE_SHARE
    if babbled or not installed():
        return babble(seed, seconds, rate)
    return speak(seed, seconds, rate, held_out)
