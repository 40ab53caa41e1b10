"""What a training costs before anything is loaded: memory of a process, work of a step and of the whole run.

Weights, gradients, optimisers and averages are counted exactly, from the model's own shapes. Work and activations are
measured: the model runs forwards and backwards on torch's meta device, which computes shapes and nothing else, with one
layer and with two, for four lengths; all others follow, for every layer costs the same, and a forward a constant, so
much a latent, and so much for each latent that sees another. Work is counted by torch.utils.flop_counter: products of
matrices, convolutions and attentions, 2 per multiplication and addition. Attention is reckoned as one fused kernel (its
matrix is never in memory, and the backward multiplies it once more).

Shape legend: B batch, F latent frames, h w latent size, L tokens, S tokens of a past, heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..autoencoder import AUTOENCODERS, LightAutoencoder
from ..avatar import takes_reference_tokens
from ..cache import KV
from ..config import MODELS, ModelConfig
from ..estimate import cache_bytes
from ..geometry import Geometry
from ..model import ConditionKV, JoyAvatarDiT, Past
from ..policy import RolloutPolicy, policy
from . import presets
from .distributed import is_adapted
from .presets import Preset, Scale, Stage
from .self_forcing import Branch, Draw, History, branch_policy, carriers
from .sequences import commit_level

_GATHERED = (
    3  # units of FSDP whose weights are put together at once: one at work, one on its way in, one on its way out
)
_AUDIO_TOKENS = 16  # of a latent at the full size: wav2vec2's 50 a second over 5 frames of 16 a second, rounded up
_IMAGE_TOKENS = 257  # CLIP-vision


@dataclass(frozen=True)
class Cost:
    """Of one forward of a model. FLOPs; bytes of what the backward needs.

    kept: with all activations, thin: with those of the blocks computed again. blocks: FLOPs of the blocks' forward,
    which are then spent twice.
    """

    forward: int = 0
    backward: int = 0
    blocks: int = 0
    kept: int = 0
    thin: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Cost) -> Cost:
        return self + other * -1

    def __mul__(self, count: int) -> Cost:
        return Cost(*(count * value for value in astuple(self)))

    def half(self) -> Cost:
        return Cost(*(value // 2 for value in astuple(self)))

    def training(self, scale: Scale) -> int:
        """FLOPs of forward and backward."""
        return self.forward + self.backward + (self.blocks if scale.checkpointing else 0)


@dataclass(frozen=True)
class Law:
    """Cost of a forward by its latents and those of the past: once, each latent, each pair that meets, each past."""

    once: Cost
    each: Cost
    pair: Cost
    past: Cost

    def at(self, latents: int, past: int = 0) -> Cost:
        return self.once + self.each * latents + self.pair * (latents * (latents + past)) + self.past * past

    def causal(self, latents: int, block: int) -> Cost:
        """As `at`, where every block of latents sees itself and earlier ones."""
        return self.once + self.each * latents + self.pair * (latents * (latents + block) // 2)


@dataclass(frozen=True)
class Estimate:
    """Of one stage. memory: bytes of a process, by what for. step, run: FLOPs of a process's step, of the whole run.

    parts: FLOPs of a step by what for. parameters, trained: numbers in the model, and those that move. exact: parts of
    the memory that are counted and not reckoned.
    """

    stage: str
    model: str
    processes: int
    steps: int | None
    parameters: int
    trained: int
    memory: dict[str, int]
    parts: dict[str, int]
    before: int = 0
    exact: tuple[str, ...] = ("weights", "gradients", "optimiser", "average")
    notes: tuple[str, ...] = ()

    @property
    def memory_bytes(self) -> int:
        return sum(size for name, size in self.memory.items() if "on the CPU" not in name)

    @property
    def step(self) -> int:
        return sum(self.parts.values())

    @property
    def run(self) -> int | None:
        """FLOPs of all steps and processes, and of what comes before."""
        return None if self.steps is None else self.before + self.steps * self.processes * self.step

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "memory_bytes": self.memory_bytes, "step": self.step, "run": self.run}


# Tracing


class _Fused(torch.autograd.Function):
    """Attention as a fused kernel does it, on no device: q, k, v, the result and a number per query are kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) @ v.transpose(1, 2)).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *_ = (t.transpose(1, 2) for t in ctx.saved_tensors[:3])
        g = grad.transpose(1, 2)
        p = q @ k.mT  # once more
        dp = g @ v.mT
        return (dp @ k).transpose(1, 2), (dp.mT @ q).transpose(1, 2), (p.mT @ g).transpose(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return _Fused.apply(q, k, v)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class _Seen:
    """A past of S tokens."""

    kv: tuple[Tensor, Tensor]

    def context(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.kv


class _Adapted(nn.Module):
    """A frozen layer with an adapter of rank r, as `distributed.add_adapters` makes it, without peft."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False, device="meta")
        self.up = nn.Linear(rank, base.out_features, bias=False, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@lru_cache(maxsize=64)
def empty(config: ModelConfig, lora_rank: int = 0) -> JoyAvatarDiT:
    """A model on no device, with its adapters; beside them the branches train that Wan2.1 has not."""
    with torch.device("meta"):
        model = JoyAvatarDiT(config, attention=_attention)
        stock = JoyAvatarDiT(replace(config, audio=None, face=None)) if lora_rank else None
    if stock:
        known = stock.state_dict().keys()
        for name, p in model.named_parameters():
            p.requires_grad_(name not in known)
        for name, layer in list(model.blocks.named_modules()):
            if isinstance(layer, nn.Linear) and is_adapted(f"blocks.{name}"):
                model.blocks.set_submodule(name, _Adapted(layer, lora_rank))
    return model


def counted(config: ModelConfig, lora_rank: int, count: Callable[[JoyAvatarDiT], int]) -> int:
    """What `count` says of the whole model, by what it says of one and of two layers."""
    one, two = (count(empty(replace(config, layers=n), lora_rank)) for n in (1, 2))
    return one + (config.layers - 1) * (two - one)


@lru_cache(maxsize=64)
def law(config: ModelConfig, size: tuple[int, int], compute: str, lora_rank: int = 0, gradient: bool = True) -> Law:
    """Of a window of latents of size (h, w); several windows cost as many times as much."""

    def layered(measure: Callable[[ModelConfig], Cost]) -> Cost:
        one, two = (measure(replace(config, layers=n)) for n in (1, 2))
        return one + (two - one) * (config.layers - 1)

    def at(latents: int, past: int) -> Cost:
        return layered(lambda config: _trace(config, size, compute, lora_rank, gradient, latents, past))

    a, b, c, d = at(1, 0), at(2, 0), at(3, 0), at(1, 1)
    pair = (c - b - (b - a)).half()
    each = b - a - pair * 3
    once = a - each - pair
    conditions = layered(lambda config: _trace(config, size, compute, lora_rank, gradient))
    return Law(conditions + once, each, pair, d - once - each - pair * 2)


def _trace(
    config: ModelConfig,
    size: tuple[int, int],
    compute: str,
    lora_rank: int,
    gradient: bool,
    latents: int = 0,
    past: int = 0,
) -> Cost:
    """Of a window of latents without its conditions; of no latents: of the conditions."""
    dtype = getattr(torch, compute)
    model = deepcopy(empty(config, lora_rank)).to(dtype)
    if not gradient:
        model.requires_grad_(False)
    tokens = size[0] * size[1] // (config.patch[0] * config.patch[1])
    given = None if not latents else _leaves(_conditions(model, tokens, dtype))
    with FlopCounterMode(display=False) as forward, _Kept(model) as kept:
        if given is None:
            made = [t for kv in _pairs(_conditions(model, tokens, dtype)) for t in kv]
        else:
            made = [_window(model, given, size, latents, past, dtype)]
    blocks = sum(sum(c.values()) for n, c in forward.get_flop_counts().items() if n.endswith(_block_names(model)))
    moving = [t for t in made if t.requires_grad]
    if not moving:
        return Cost(forward.get_total_flops(), blocks=blocks)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward(moving, [torch.empty_like(t) for t in moving])
    total, thin = kept.sizes()
    return Cost(forward.get_total_flops(), backward.get_total_flops(), blocks, total, thin)


def _window(
    model: JoyAvatarDiT,
    condition: ConditionKV,
    size: tuple[int, int],
    latents: int,
    past: int,
    dtype: torch.dtype,
) -> Tensor:
    """Velocity of a window."""
    config, audio, seen = model.config, None, None
    if config.audio:
        window = config.audio.window or _AUDIO_TOKENS
        audio = model.audio(_new(1, latents, window, config.audio.features, dtype=dtype))
    if past:
        tokens = past * size[0] * size[1] // (config.patch[0] * config.patch[1])
        keys, values = (_new(1, tokens, config.heads, config.head_dim, dtype=dtype) for _ in range(2))
        seen = Past(_Seen((keys, values)), tuple(range(past)))
    x = _new(1, config.in_channels, latents, *size)
    return model(x, _new(1, latents), range(past, past + latents), condition, audio, seen)[0]


def _block_names(model: JoyAvatarDiT) -> tuple[str, ...]:
    return tuple(f".blocks.{i}" for i in range(len(model.blocks)))


def _conditions(model: JoyAvatarDiT, tokens: int, dtype: torch.dtype) -> ConditionKV:
    config = model.config
    places = tokens if takes_reference_tokens(config) else _IMAGE_TOKENS
    return model.condition(
        text=_new(1, config.text_len, config.text_dim, dtype=dtype) if config.text_dim else None,
        image=_new(1, places, config.image_dim, dtype=dtype) if config.image_dim else None,
        face=_new(1, config.face.features, dtype=dtype) if config.face else None,
    )


def _pairs(condition: ConditionKV) -> list[KV]:
    return [kv for part in (condition.text, condition.image, condition.face) if part for kv in part]


def _leaves(condition: ConditionKV) -> ConditionKV:
    """The same without what made it."""

    def leaf(kv: KV) -> KV:
        k, v = (t.detach().requires_grad_(t.requires_grad) for t in kv)
        return k, v

    parts = {f.name: getattr(condition, f.name) for f in fields(condition)}
    return ConditionKV(**{name: part and tuple(leaf(kv) for kv in part) for name, part in parts.items()})


def _new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class _Kept:
    """Counts the bytes of the tensors that a graph keeps, weights apart, each storage once."""

    def __init__(self, model: JoyAvatarDiT) -> None:
        self.model, self.inside = model, False
        self.weights = {id(p) for p in model.parameters()}
        self.found: dict[int, tuple[Tensor, bool]] = {}
        self.entering: dict[int, Tensor] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def __enter__(self) -> _Kept:
        for block in self.model.blocks:
            block.register_forward_pre_hook(self._enter)
            block.register_forward_hook(self._leave)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def sizes(self) -> tuple[int, int]:
        """All; and with the blocks computed again: what lies outside of them, and what they are given."""
        everything = {s: t for s, (t, _) in self.found.items()}
        outside = {s: t for s, (t, within) in self.found.items() if not within} | self.entering
        return _storage_bytes(everything.values()), _storage_bytes(outside.values())

    def _enter(self, block: nn.Module, given: tuple[Any, ...]) -> None:
        self.inside = True
        self.entering[given[0].untyped_storage()._cdata] = given[0]

    def _leave(self, *_: Any) -> None:
        self.inside = False

    def _keep(self, tensor: Tensor) -> Tensor:
        if not _is_weight(tensor, self.weights):
            storage = tensor.untyped_storage()._cdata
            self.found.setdefault(storage, (tensor, self.inside))
        return tensor


def _is_weight(tensor: Tensor, weights: set[int]) -> bool:
    return id(tensor) in weights or id(tensor._base) in weights


def _storage_bytes(tensors: Any) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


# Memory


def share(model: nn.Module, processes: int, trained: bool) -> int:
    """Numbers in the rows that process 0, which has most, holds of all parameters that are trained, or that are not."""
    shapes = [p.shape for p in model.parameters() if p.requires_grad == trained]
    return sum(-(-shape[0] // processes) * shape[1:].numel() for shape in shapes)


def learner_memory(config: ModelConfig, scale: Scale, optimiser: str, who: str = "") -> dict[str, int]:
    """Bytes of weights, gradients, optimiser and average of a model in training, in a process."""
    n, each = _processes(scale), _bytes(scale)
    trained = 4 * counted(config, scale.lora_rank, lambda model: share(model, n, True))
    frozen = each * counted(config, scale.lora_rank, lambda model: share(model, n, False))
    own = 0 if scale.sharded else each * counted(config, 0, lambda model: share(model, 1, True))  # beside the masters
    average = "average on the CPU" if scale.average_on_cpu else "average"
    return {
        f"{who}weights": trained + frozen + own,
        f"{who}gradients": trained,
        f"{who}optimiser": counted(config, scale.lora_rank, lambda model: _optimiser_bytes(model, n, optimiser)),
        f"{who}{average}": trained,
    }


def _optimiser_bytes(model: JoyAvatarDiT, processes: int, optimiser: str) -> int:
    """AdamW: two numbers for each, and its steps; Muon, for the matrices of the blocks: one."""
    moving = {n: p for n, p in model.named_parameters() if p.requires_grad}
    muon = optimiser == "muon"
    matrices = [p.numel() for n, p in moving.items() if muon and n.startswith("blocks.") and p.dim() == 2]
    return 4 * (2 * share(model, processes, True) + len(moving) - len(matrices) - sum(matrices))


def gathered_memory(config: ModelConfig, scale: Scale) -> int:
    """Bytes of the weights put together at once, and of the gradients of one block before they are shared out."""
    if _processes(scale) == 1:
        return 0
    model = empty(replace(config, layers=1), scale.lora_rank)
    block = sum(p.numel() for p in model.blocks.parameters())
    rest = sum(p.numel() for p in model.parameters()) - block
    return (_GATHERED * block + rest) * _bytes(scale) + 4 * share(model.blocks, 1, True)


def _processes(scale: Scale) -> int:
    """Over how many processes the weights lie."""
    return scale.processes if scale.sharded else 1


def _bytes(scale: Scale) -> int:
    return getattr(torch, scale.compute).itemsize


# Stages


def estimate(preset: Preset, name: str) -> Estimate:
    """Of a stage of a preset, a process at a time. ValueError when it has no such stage or a value is not known."""
    stage = preset.stage(name)
    recipe = presets.recipe(name, stage)
    if name == "autoencoder":
        return _autoencoder(stage, recipe)
    return {"flow": _flow, "bidirectional": _bidirectional, "ode": _ode, "dmd": _dmd}[name](stage, recipe)


def _geometry(stage: Stage, rules: RolloutPolicy) -> Geometry:
    config = MODELS[stage.model]
    spatial = AUTOENCODERS["tiny"].spatial if config.out_channels == AUTOENCODERS["tiny"].latent_channels else 8
    return Geometry(
        stage.clip.width, stage.clip.height, block_latents=rules.block_latents, spatial=spatial, patch=config.patch
    )


@dataclass
class _Sum:
    """A stage under way: its memory and work."""

    stage: Stage
    recipe: Any
    rules: RolloutPolicy
    memory: dict[str, int] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)
    activations: int = 0

    @property
    def geometry(self) -> Geometry:
        return _geometry(self.stage, self.rules)

    def law(self) -> Law:
        """Of the model in training."""
        scale = self.stage.scale
        return law(MODELS[self.stage.model], self.geometry.latent_size, scale.compute, scale.lora_rank)

    def frozen(self, latents: int) -> int:
        """FLOPs of a forward of the frozen model."""
        config = MODELS[self.stage.teacher or self.stage.model]
        return law(config, self.geometry.latent_size, self.stage.scale.compute, gradient=False).at(latents).forward

    def batch(self, latents: int) -> int:
        """Clips of a process: of the full size as said, else as many as the recipe's tokens make."""
        if self.stage.scale.sharded:
            return self.stage.clip.batch
        return max(1, round(self.recipe.tokens / (latents * self.geometry.tokens_per_latent)))

    def learn(self, who: str = "") -> None:
        config = MODELS[self.stage.model]
        self.memory |= learner_memory(config, self.stage.scale, self.recipe.optimiser, who)
        self.gather(config)

    def freeze(self, name: str, who: str) -> None:
        """A frozen model beside."""
        n = _processes(self.stage.scale)
        self.memory[f"{who}weights"] = _bytes(self.stage.scale) * counted(MODELS[name], 0, lambda m: share(m, n, True))
        self.gather(MODELS[name])

    def gather(self, config: ModelConfig) -> None:
        if most := gathered_memory(config, self.stage.scale):
            self.memory["weights put together"] = max(self.memory.get("weights put together", 0), most)

    def keep(self, cost: Cost) -> None:
        """Activations; with recomputation those of one block at a time come back."""
        layers = MODELS[self.stage.model].layers
        again = (cost.kept - cost.thin) // layers if self.stage.scale.checkpointing else 0
        self.activations = max(self.activations, cost.thin + again if again else cost.kept)

    def done(self, name: str, before: int = 0, notes: Sequence[str] = ()) -> Estimate:
        config, rank = MODELS[self.stage.model], self.stage.scale.lora_rank
        return Estimate(
            stage=name,
            model=self.stage.model,
            processes=self.stage.scale.processes,
            steps=self.recipe.steps,
            parameters=counted(config, 0, lambda model: share(model, 1, True)),
            trained=counted(config, rank, lambda model: share(model, 1, True)),
            memory={**self.memory, "activations": self.activations},
            parts=self.parts,
            before=before,
            notes=tuple(notes),
        )


def _begin(stage: Stage, recipe: Any) -> _Sum:
    total = _Sum(stage, recipe, policy(recipe.policy))
    total.learn()
    return total


def _supervised(
    stage: Stage, recipe: Any, latents: int, name: str, before: int = 0, notes: Sequence[str] = ()
) -> Estimate:
    """One forward and backward of whole sequences."""
    total = _begin(stage, recipe)
    causal = name in ("flow", "ode") and stage.scale.sharded
    cost = total.law().causal(latents, total.rules.block_latents) if causal else total.law().at(latents)
    cost *= total.batch(latents)
    total.keep(cost)
    total.parts["forward and backward"] = cost.training(stage.scale)
    return total.done(name, before, notes)


def _flow(stage: Stage, recipe: Any) -> Estimate:
    rules = policy(recipe.policy)
    if stage.scale.sharded:
        return _supervised(stage, recipe, stage.clip.latents, "flow")
    return _supervised(stage, recipe, rules.span_latents + rules.motion_frame, "flow", notes=["the longest sequences"])


def _bidirectional(stage: Stage, recipe: Any) -> Estimate:
    return _supervised(stage, recipe, recipe.latents, "bidirectional")


def _ode(stage: Stage, recipe: Any) -> Estimate:
    """Pairs first: every step of a trajectory is a forward of the teacher, two of them under guidance."""
    total, latents = _Sum(stage, recipe, policy(recipe.policy)), stage.clip.latents
    before = recipe.pairs * recipe.ode_steps * (1 if recipe.guidance == 1 else 2) * total.frozen(latents)
    notes = [f"{recipe.pairs} pairs of {recipe.ode_steps} steps before, {before:.3g} FLOP"]
    return _supervised(stage, recipe, latents, "ode", before, notes)


def _dmd(stage: Stage, recipe: Any) -> Estimate:
    """The mean of a step: a rollout, the critic's step and the generator's, each as often as the recipe says."""
    total, teacher = _begin(stage, recipe), stage.teacher or stage.model
    total.learn("critic ")
    total.freeze(teacher, "teacher ")
    batch, config = total.batch(recipe.latents), MODELS[stage.model]
    total.memory["keys and values"] = batch * cache_bytes(config, total.rules, total.geometry, _bytes(stage.scale))
    rollout, learning = _mean_rollout(total, batch)
    critic = total.law().at(recipe.latents) * batch
    scores = (1 if recipe.guidance == 1 else 2) * batch * total.frozen(recipe.latents) + critic.forward
    total.parts |= {
        "rollout": rollout,
        "generator's gradient": learning // recipe.critic_steps,
        "scores": scores // recipe.critic_steps,
        "critic": critic.training(stage.scale) // recipe.generator_steps,
    }
    total.keep(critic)
    least, most = recipe.odds.blocks
    return total.done("dmd", notes=[f"the mean over rollouts of {least} to {most} blocks"])


def _mean_rollout(total: _Sum, batch: int) -> tuple[int, int]:
    """FLOPs of all forwards of a rollout, and of the backwards of those that carry gradient: means over the draws."""
    forwards, backwards, odds = 0.0, 0.0, 0.0
    scale, mine = total.stage.scale, total.law()
    for chance, drawn in _draws(total.rules, total.recipe):
        work, gradient, kept = mine.once.forward, 0, 0
        for latents, past, carries in _forwards(total.rules, total.recipe.history, drawn):
            cost = mine.at(latents, past)
            work += (cost if carries else cost - mine.once).forward  # without gradient conditions are made once
            if carries:
                gradient += cost.training(scale) - cost.forward
                kept += cost.thin if scale.checkpointing else cost.kept
        total.activations = max(total.activations, batch * kept)
        forwards, backwards, odds = forwards + chance * work, backwards + chance * gradient, odds + chance
    return round(batch * forwards / odds), round(batch * backwards / odds)


def _draws(rules: RolloutPolicy, recipe: Any) -> Iterator[tuple[float, Draw]]:
    """Draws with their odds: every branch, length and exit, and of the sub-steps all or none, which have that mean."""
    steps, (least, most) = len(rules.timesteps), recipe.odds.blocks
    kinds: list[tuple[Branch, float, int, float]] = [
        ("main", recipe.odds.main, rules.window_blocks, recipe.odds.bootstrap),
        ("auxiliary", 1 - recipe.odds.main, 2 * steps, recipe.odds.substep),
    ]
    for branch, odds, exits, taken in kinds:
        for blocks, last, substeps in product(range(least, most + 1), range(exits), (True, False)):
            chance = odds / exits * (taken if substeps else 1 - taken)
            quiet = (True,) * rules.num_windows(blocks)
            yield chance, Draw(branch, blocks, last, substeps, False, (substeps,) * steps, quiet, 0)


def _forwards(rules: RolloutPolicy, history: History, drawn: Draw) -> Iterator[tuple[int, int, bool]]:
    """(latents, latents of the past, whether it carries gradient) of every forward of a rollout."""
    branch, n = branch_policy(rules, drawn, history), rules.block_latents
    carrying = carriers(branch, drawn)
    for window in range(carrying[-1].window + 1):
        finished = branch.first_block(window)
        lead, past = int(branch.motion_frame and finished > 0), min(finished, branch.context_blocks) * n
        for step in branch.window_steps(window, drawn.blocks):
            yield len(step.blocks) * n + lead, past, step in carrying
            if not step.finishes or step.blocks[0] == drawn.blocks - 1:
                continue
            if branch.kv_level == "clean":
                yield n, past, False
            elif (
                drawn.branch == "auxiliary"
                and history == "policy"
                and step.timesteps[0] != commit_level(rules, step.blocks[0])
            ):
                yield n + lead, past, False


def _autoencoder(stage: Stage, recipe: Any) -> Estimate:
    """Of the light autoencoder, weights in float32: one small picture is really coded, all others cost as much."""
    frames, clips = recipe.batches[0]
    model, side = LightAutoencoder(AUTOENCODERS[recipe.model]), min(64, recipe.crop)
    weights, numbers = {id(p) for p in model.parameters()}, sum(p.numel() for p in model.parameters())
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            made = model.decode(model.encode(torch.zeros(1, 3, frames, side, side)))
        made.square().sum().backward()
    times = clips * recipe.crop**2 // side**2
    activations = _storage_bytes([t for t in kept.values() if not _is_weight(t, weights)])
    return Estimate(
        stage="autoencoder",
        model=recipe.model,
        processes=1,
        steps=recipe.steps,
        parameters=numbers,
        trained=numbers,
        memory={**dict.fromkeys(("weights", "gradients", "average"), 4 * numbers), "activations": times * activations},
        parts={"forward and backward": times * counter.get_total_flops()},
        exact=("weights", "gradients", "average"),
        notes=("optimiser not counted: as much as the weights and a little",),
    )
