"""What a training is said to cost, against what it costs."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from joyavatar_core import attention, checkpoint
from joyavatar_core.config import MODELS, AudioConfig, FaceConfig, ModelConfig
from joyavatar_core.geometry import Geometry
from joyavatar_core.model import JoyAvatarDiT, Past
from joyavatar_core.policy import policy
from joyavatar_core.training import distributed, estimate, presets, trainer
from joyavatar_core.training.inputs import Inputs
from joyavatar_core.training.presets import PRESETS, Scale, Stage
from joyavatar_core.training.self_forcing import Odds, branch_policy, draw, roll_out

NARROW = ModelConfig(
    dim=48, ffn_dim=96, layers=3, heads=3, text_dim=20, text_len=8, image_dim=24,
    audio=AudioConfig(features=12, width=16), face=FaceConfig(12, 32, 2, 2, 4, 16),
)  # fmt: skip
SIZE = (8, 12)
TOKENS = 24


class Attention:
    """Attention by two products of matrices, which the counter knows on every device; one of them is noted."""

    product = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        self.product += 2 * q.numel() * k.shape[2]
        return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2)


def forward(model: JoyAvatarDiT, latents: int, past: int, batch: int) -> Tensor:
    """What a training step does with a model, on real numbers."""
    config = model.config
    assert config.audio and config.face
    condition = model.condition(
        torch.randn(batch, config.text_len, config.text_dim),
        torch.randn(batch, 257, config.image_dim),
        torch.randn(batch, config.face.features),
    )
    audio = model.audio(torch.randn(batch, latents, 16, config.audio.features))
    x, seen = torch.randn(batch, 36, latents, *SIZE), None
    if past:
        kv = tuple(torch.randn(batch, past * TOKENS, config.heads, config.head_dim) for _ in range(2))
        seen = Past(estimate._Seen((kv[0], kv[1])), tuple(range(past)))
    return model(x, torch.full((batch, latents), 500.0), range(past, past + latents), condition, audio, seen)[0]


@pytest.mark.parametrize(("latents", "past", "batch"), [(5, 0, 1), (4, 3, 2), (13, 15, 1)])
def test_work_is_what_the_counter_counts(latents: int, past: int, batch: int):
    """Forward and backward of a real model within 5 %, of lengths that were never traced."""
    counted = Attention()
    model, said = JoyAvatarDiT(NARROW, attention=counted), estimate.law(NARROW, SIZE, "float32")
    with FlopCounterMode(display=False) as there:
        out = forward(model, latents, past, batch)
    with FlopCounterMode(display=False) as back:
        out.square().sum().backward()
    cost = said.at(latents, past) * batch
    assert cost.forward == pytest.approx(there.get_total_flops(), rel=0.001)
    once_more = counted.product  # a fused kernel works out what attends to what again
    assert cost.backward == pytest.approx(back.get_total_flops() + once_more, rel=0.01)


@pytest.mark.parametrize("again", [False, True])
def test_activations_are_what_the_graph_keeps(again: bool):
    """With torch's attention, all kept and with the blocks computed again, within 5 %."""
    model, kept = JoyAvatarDiT(NARROW, attention=attention.sdpa), dict[int, Tensor]()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    if again:
        distributed.recompute_blocks(model)

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward(model, 5, 0, 1)
    real = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)
    said = estimate.law(NARROW, SIZE, "float32").at(5)
    assert out.requires_grad and (said.thin if again else said.kept) == pytest.approx(real, rel=0.05)


def nbytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_memory_of_weights_and_states_is_exact(optimiser: str):
    """A bfloat16 model with float32 masters, as the embedded model is trained."""
    recipe = trainer.Recipe(optimiser=optimiser)
    learner = trainer.learner(JoyAvatarDiT(NARROW).bfloat16(), recipe)
    for p in learner.model.parameters():
        p.grad = torch.randn_like(p)
    learner.update(recipe, 1.0, 0)
    masters = learner.weights.master.values()
    said = estimate.learner_memory(NARROW, Scale(), optimiser)
    assert said == {
        "weights": nbytes(masters) + nbytes(learner.model.parameters()),
        "gradients": nbytes(p.grad for p in masters),
        "optimiser": nbytes(t for o in learner.optimisers for s in o.state.values() for t in s.values()),
        "average": nbytes(learner.weights.average.values()),
    }


@pytest.mark.parametrize("rank", [0, 4])
def test_memory_of_a_share_is_exact(rank: int):
    """What process 0 of three holds: the ceiling of a third of the rows; adapters as peft makes them."""
    scale = Scale(processes=3, sharded=True, lora_rank=rank, lora_alpha=rank, average_on_cpu=True)
    model = JoyAvatarDiT(NARROW)
    if rank:
        stock = JoyAvatarDiT(replace(NARROW, audio=None, face=None)).state_dict()
        distributed.add_adapters(model, scale, [n for n, _ in model.named_parameters() if n not in stock])
    shares = {True: 0, False: 0}
    for p in model.parameters():
        shares[p.requires_grad] += p.chunk(3)[0].numel()
    moving = sum(p.requires_grad for p in model.parameters())
    said = estimate.learner_memory(NARROW, scale, "adamw", "critic ")
    assert said == {
        "critic weights": 4 * shares[True] + 2 * shares[False],
        "critic gradients": 4 * shares[True],
        "critic optimiser": 8 * shares[True] + 4 * moving,
        "critic average on the CPU": 4 * shares[True],
    }


def test_parameters_of_the_full_size():
    """Wan2.1's published counts."""
    for name, count in (("wan-i2v-1.3b", 1_564_428_608), ("wan-i2v-14b", 16_394_878_784)):
        assert estimate.counted(MODELS[name], 0, lambda model: estimate.share(model, 1, True)) == count


def test_a_steady_window_of_the_full_size():
    """Engine note 8.1: 105.5 TFLOP at 512x512 for 13 latents beside 15; sound and face come on top."""
    said = estimate.law(MODELS["wan-i2v-1.3b"], (64, 64), "bfloat16", gradient=False)
    assert (said.at(13, 15) - said.once).forward == pytest.approx(105.5e12, rel=0.01)


class Counting(nn.Module):
    """Stands where a model is, and notes what forwards it is asked for."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.compute, self.asked = config, torch.float32, list[tuple[int, int]]()
        self.weight = nn.Parameter(torch.zeros(1))

    def condition(self, **_: Any) -> Any:
        return None

    def forward(
        self, x: Tensor, timesteps: Tensor, positions: Any, condition: Any, audio: Any, past: Past | None, kept: slice
    ) -> Any:
        latents = x.shape[2]
        self.asked.append((latents, len(past.positions) if past else 0))
        kv = torch.zeros(1, latents, 1, 2)[:, kept]
        return x * self.weight, [(kv, kv)]


@pytest.mark.parametrize("seed", range(8))
def test_the_forwards_of_a_rollout_are_those_that_are_run(seed: int):
    rules, config = policy("joyavatar-flash"), replace(NARROW, layers=1, audio=None, in_channels=16)
    drawn, model = draw(random.Random(seed), rules, Odds()), Counting(config)
    geometry = Geometry(16, 16)
    inputs = Inputs(face=torch.zeros(1, 12))
    roll_out(model, rules, geometry, inputs, drawn, gradient=False, dtype=torch.float32)  # pyright: ignore
    said = [(latents, past) for latents, past, _ in estimate._forwards(rules, "policy", drawn)]
    assert said == model.asked
    carrying = [c for *_, c in estimate._forwards(rules, "policy", drawn)]
    assert 0 < sum(carrying) < len(carrying) and branch_policy(rules, drawn).block_latents == 3


def test_estimates_follow_the_machine():
    """Twice the processes: half of what is shared out, the same step, twice the work of the run."""
    preset = PRESETS["flash-1.3b"]
    stage = preset.stage("dmd")
    wide = replace(preset, dmd=replace(stage, scale=replace(stage.scale, processes=128)))
    here, there = estimate.estimate(preset, "dmd"), estimate.estimate(wide, "dmd")
    assert there.memory["weights"] == pytest.approx(here.memory["weights"] / 2, rel=0.01)
    assert there.memory["activations"] == here.memory["activations"] and there.step == here.step
    assert here.run and there.run == 2 * here.run
    bare = replace(preset, dmd=replace(stage, scale=replace(stage.scale, checkpointing=False)))
    assert estimate.estimate(bare, "dmd").memory["activations"] > 5 * here.memory["activations"]
    assert estimate.estimate(bare, "dmd").step < here.step


def test_estimates_are_json():
    made = estimate.estimate(PRESETS["teacher-14b"], "bidirectional")
    assert made.as_json()["trained"] == made.trained < made.parameters / 5
    assert checkpoint.config_to_json(made) and isinstance(presets.recipe("flow", Stage()).steps, type(None))
