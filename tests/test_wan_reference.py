"""The transformer against the numbers of the public ones, with the same weights.

The golden numbers came from two public implementations, run in float64 (their float32 casts made float64 too, their
flash attention made the plain one) with the weights of `helpers.fill` and the inputs of `golden_inputs`; both are made
here again from seeds, in sorted key order:
- "text" and "image": Wan2.1's bidirectional model, text to video and image to video, one timestep of each clip;
- "latents" and "cached": Self-Forcing's causal variant, a timestep of each latent, first without a past and then after
  the keys and values of that first window (which it keeps rotated, and this one does not).

They differ from this model by less than 3e-14 in float64, and by less than 1e-6 in float32 without any change of casts.

Shape legend: B batch, C channels, F latent frames, h w latent size, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from joyavatar_core.cache import KV
from joyavatar_core.config import ModelConfig
from joyavatar_core.model import JoyAvatarDiT, Past

from .helpers import WAN as TEXT
from .helpers import assert_golden, fill

torch.set_num_threads(2)

IMAGE = replace(TEXT, in_channels=12, image_dim=6)
TIMESTEPS = [[731.25] * 3, [12.5] * 3]  # of clip 0 and clip 1
FIRST = [[1000.0, 640.0, 640.0], [930.0, 310.5, 0.0]]
SECOND = [[250.0, 250.0, 0.0], [500.0, 999.0, 62.5]]
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 5e-6)])

# fmt: off
GOLDEN: dict[str, dict[str, Any]] = {
    "text": {
        "samples": [
            -1.13949616144270, 0.24808791954856, 0.25200313268454, -0.03639041256742, 1.36137578085235,
            -0.46473569551889, 1.45227903182873, -0.21625488004481,
        ],
        "frames": [
            0.67644268365793, 0.67430077879823, 0.72558672859863,
        ],
        "order": -2.50612271137835,
    },
    "image": {
        "samples": [
            -1.69423759106911, 0.42976063760277, 1.26540799518021, 0.07615192795387, -0.85566797924328,
            0.78163053468989, -0.46654078681998, 0.88032105840512,
        ],
        "frames": [
            0.67115683307736, 0.73359526921724, 0.81075961210108,
        ],
        "order": 3.03566938684505,
    },
    "latents": {
        "samples": [
            -0.76223945059837, 0.21154188344115, 0.50764311581770, 0.01051542230876, 1.05856339834192,
            -0.45900297215610, 1.61218096194994, -0.22076975205514,
        ],
        "frames": [
            0.66826143505005, 0.73416733867641, 0.73676291746229,
        ],
        "order": -6.02305015307394,
    },
    "cached": {
        "samples": [
            0.05657844970671, 0.29910192707090, 1.33567862929588, -0.89447540238957, 0.54786189052680,
            -0.87109452051119, -0.80964462081276, -0.38178633550470,
        ],
        "frames": [
            0.68922548422676, 0.68513661424614, 0.71003057547541,
        ],
        "order": -33.45580371903408,
    },
}
# fmt: on


@dataclass(frozen=True)
class Inputs:
    """x, later [2, 4, 3, 4, 6]; channels [2, 8, 3, 4, 6]; text [2, 5, 12], the second of 3 tokens; image [2, 5, 6]."""

    x: Tensor
    channels: Tensor
    text: Tensor
    image: Tensor
    later: Tensor


def golden_inputs(dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 4, 3, 4, 6), (2, 8, 3, 4, 6), (2, 5, 12), (2, 5, 6), (2, 4, 3, 4, 6))
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    drawn[2][1, 3:] = 0  # padding, which is attended
    return Inputs(*(t.to(dtype) for t in drawn))


@cache
def model(config: ModelConfig, dtype: torch.dtype) -> JoyAvatarDiT:
    return fill(JoyAvatarDiT(config).to(dtype))


@dataclass(frozen=True)
class Finished:
    """A past of one window."""

    kvs: list[KV]

    def context(self, layer: int) -> KV:
        return self.kvs[layer]


@PRECISIONS
def test_text_to_video_is_wan(dtype: torch.dtype, tolerance: float) -> None:
    given, dit = golden_inputs(dtype), model(TEXT, dtype)
    out, _ = dit(given.x, torch.tensor(TIMESTEPS, dtype=dtype), range(3), dit.condition(given.text))
    assert out.dtype == dtype
    assert_golden(out, GOLDEN["text"], tolerance)


@PRECISIONS
def test_image_to_video_is_wan(dtype: torch.dtype, tolerance: float) -> None:
    given, dit = golden_inputs(dtype), model(IMAGE, dtype)
    x = torch.cat([given.x, given.channels], dim=1)
    out, _ = dit(x, torch.tensor(TIMESTEPS, dtype=dtype), range(3), dit.condition(given.text, given.image))
    assert_golden(out, GOLDEN["image"], tolerance)


@PRECISIONS
@pytest.mark.parametrize("start", [0, 40])
def test_windows_in_turn_are_self_forcing(start: int, dtype: torch.dtype, tolerance: float) -> None:
    """A timestep of each latent, and a past rotated when it is read: from any start the same as keys kept rotated."""
    given, dit = golden_inputs(dtype), model(TEXT, dtype)
    condition = dit.condition(given.text)
    here, after = range(start, start + 3), range(start + 3, start + 6)
    first, kvs = dit(given.x, torch.tensor(FIRST, dtype=dtype), here, condition)
    past = Past(Finished(kvs), tuple(here))
    second, _ = dit(given.later, torch.tensor(SECOND, dtype=dtype), after, condition, past=past)
    assert_golden(first, GOLDEN["latents"], tolerance)
    assert_golden(second, GOLDEN["cached"], tolerance)
