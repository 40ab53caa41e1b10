"""What is trained, how and on how many machines: named presets, and files that change them.

A preset has the stages of one model: `tiny` all of the embedded one, `bidirectional-1.3b` and `teacher-14b` the
audio-driven bidirectional models, `flash-1.3b` the streaming generator that is made of both. JoyAvatar-Flash section
4.1 gives the figures of `flash-1.3b`: 10,000 ODE pairs, then 10,000 steps of 64 GPUs with one clip each, up to 27
latents, AdamW with betas 0.9 and 0.999, 2e-6 for the generator and 4e-7 for the critic. Where it is silent:
Self-Forcing and CausVid (guidance, average, clipping, 3000 steps of ODE regression with two pairs a GPU),
FantasyTalking (the bidirectional models: 100,000 steps at 1e-4, conditions dropped one time in ten), Live Avatar (the
14B model by adapters of rank 128, and diffusion forcing, `flow`: 25,000 steps at 1e-5). The mouth counts more in the
bidirectional models alone. Pixels and frame rate are ours: Wan2.1's rate, the size of the engine note's figures.

A file, TOML or JSON, begins from a preset and changes single values:

    preset = "flash-1.3b"

    [dmd.recipe]
    learning_rate = 1e-6
    [dmd.scale]
    processes = 8
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from ..checkpoint import CheckpointError, config_from_json
from ..config import MODELS

MODULES = {
    "autoencoder": "autoencoder",
    "flow": "flow_matching",
    "bidirectional": "bidirectional",
    "ode": "ode_regression",
    "dmd": "dmd",
}
"""Stage -> the module beside this file that has its Recipe and, for the embedded model, its main."""


@dataclass(frozen=True)
class Clip:
    """What a process works on at a step: `batch` clips of `latents` latent frames, pixels, pixel frames a second."""

    width: int = 256
    height: int = 256
    fps: int = 16
    latents: int = 27
    batch: int = 1

    def __post_init__(self) -> None:
        for name in ("width", "height", "fps", "latents", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class Scale:
    """How the work is laid out.

    processes: GPUs the figures are for, what --dry-run reckons with; torchrun says how many there are.
    sharded: weights, gradients and optimisers over all processes (FSDP2), data from shards; else every process has all.
    compute: dtype of the activations. checkpointing: activations of a block are computed again in the backward.
    average_on_cpu: where the averaged weights lie. lora_rank: of the adapters that are trained in place of the weights,
    0 for none; lora_alpha: their scale times the rank.
    """

    processes: int = 1
    sharded: bool = False
    compute: Literal["bfloat16", "float32"] = "bfloat16"
    checkpointing: bool = False
    average_on_cpu: bool = False
    lora_rank: int = 0
    lora_alpha: int = 0

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"processes {self.processes} must be at least 1")
        if self.compute not in ("bfloat16", "float32"):
            raise ValueError(f"compute {self.compute!r} is not known: use bfloat16 or float32")
        if self.lora_rank < 0 or (self.lora_rank and self.lora_alpha <= 0):
            raise ValueError(f"lora_rank {self.lora_rank} and lora_alpha {self.lora_alpha}: both positive, or both 0")
        if self.lora_rank and not self.sharded:
            raise ValueError(f"lora_rank {self.lora_rank}: adapters are for the full size, set sharded = true")


@dataclass(frozen=True)
class Stage:
    """One training.

    model: its name in config.MODELS; teacher: of the frozen model beside it, "" for none. recipe: values of the
    stage's own recipe that differ from its defaults.
    """

    model: str = "tiny"
    teacher: str = ""
    clip: Clip = field(default_factory=Clip)
    scale: Scale = field(default_factory=Scale)
    recipe: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in filter(None, (self.model, self.teacher)):
            if name not in MODELS:
                raise ValueError(f"model {name!r} is not known; known: {', '.join(MODELS)}")


@dataclass(frozen=True)
class Preset:
    """The stages of a model, None for those it has not."""

    name: str
    autoencoder: Stage | None = None
    flow: Stage | None = None
    bidirectional: Stage | None = None
    ode: Stage | None = None
    dmd: Stage | None = None

    def stages(self) -> dict[str, Stage]:
        """Those there are, in their order."""
        return {name: stage for name in MODULES if isinstance(stage := getattr(self, name), Stage)}

    def stage(self, name: str) -> Stage:
        """One stage. ValueError names those there are."""
        if name not in MODULES:
            raise ValueError(f"stage {name!r} is not known; known: {', '.join(MODULES)}")
        if name not in self.stages():
            raise ValueError(f"{self.name} has no stage {name}; it has {', '.join(self.stages())}")
        return self.stages()[name]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Preset:
        """The same again. ValueError for anything else."""
        return config_from_json(Preset, text)


_FULL_CLIP = Clip(512, 512, 16, latents=21)
_ON_64 = Scale(processes=64, sharded=True, checkpointing=True, average_on_cpu=True)
_ADAMW = {"optimiser": "adamw", "betas": [0.9, 0.999], "weight_decay": 0.01, "floor": 1.0}
_FLOW = {
    **_ADAMW, "save_steps": 1000, "warmup_steps": 1000, "clip_norm": 1.0, "average": 0.9999, "drop_audio": 0.1
}  # fmt: skip
_EVEN = {"mouth": 1.0, "eyes": 1.0}  # weights of the loss there
_BIDIRECTIONAL = Stage(
    model="flash-1.3b",
    clip=_FULL_CLIP,
    scale=_ON_64,
    recipe={**_FLOW, "steps": 100_000, "learning_rate": 1e-4, "latents": 21},
)

PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        name="tiny",
        autoencoder=Stage(),
        flow=Stage(),
        bidirectional=Stage(clip=Clip(latents=21)),
        ode=Stage(teacher="tiny"),
        dmd=Stage(teacher="tiny"),
    ),
    "bidirectional-1.3b": Preset(name="bidirectional-1.3b", bidirectional=_BIDIRECTIONAL),
    "teacher-14b": Preset(
        name="teacher-14b",
        bidirectional=replace(
            _BIDIRECTIONAL,
            model="teacher-14b",
            scale=replace(_ON_64, lora_rank=128, lora_alpha=64),
            recipe={**_BIDIRECTIONAL.recipe, "steps": 25_000, "learning_rate": 1e-5},
        ),
    ),
    "flash-1.3b": Preset(
        name="flash-1.3b",
        flow=replace(_BIDIRECTIONAL, recipe={**_FLOW, "steps": 25_000, "learning_rate": 1e-5, **_EVEN}),
        ode=Stage(
            model="flash-1.3b",
            teacher="teacher-14b",
            clip=replace(_FULL_CLIP, batch=2),
            scale=_ON_64,
            recipe={
                **_ADAMW,
                "steps": 3000,
                "save_steps": 500,
                "learning_rate": 2e-6,
                "warmup_steps": 1,
                "clip_norm": 10.0,
                "average": 0.99,
                "pairs": 10_000,
                "ode_steps": 48,
                "guidance": 4.0,
                **_EVEN,
            },
        ),
        dmd=Stage(
            model="flash-1.3b",
            teacher="teacher-14b",
            clip=replace(_FULL_CLIP, latents=27),
            scale=_ON_64,
            recipe={
                **_ADAMW,
                "steps": 10_000,
                "save_steps": 250,
                "learning_rate": 2e-6,
                "critic_rate": 4e-7,
                "warmup_steps": 1,
                "clip_norm": 10.0,
                "average": 0.99,
                "critic_steps": 5,
                "guidance": 4.0,
                "latents": 21,
                **_EVEN,
                "odds": {"main": 0.5, "bootstrap": 0.5, "substep": 0.5, "noisy_motion": 0.7, "blocks": [7, 9]},
            },
        ),
    ),
}


def named(name: str) -> Preset:
    """A preset by name. ValueError names the known ones."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not known; known: {', '.join(PRESETS)}, or the path of a file")
    return PRESETS[name]


def read(source: str) -> Preset:
    """A preset by name, or from a TOML or JSON file that changes values of one (`preset = "..."`).

    ValueError for unknown names and keys, OSError for a file that cannot be read.
    """
    path = Path(source)
    if path.suffix not in (".toml", ".json"):
        return named(source)
    changes = _parsed(path)
    base = changes.pop("preset", None)
    if base is None:
        raise ValueError(f'{source} names no preset: begin it with preset = "flash-1.3b" ({", ".join(PRESETS)})')
    try:
        return Preset.from_json(json.dumps(_changed(asdict(named(base)), changes, "")))
    except CheckpointError as error:
        raise ValueError(f"{source}: {error.__cause__}") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _parsed(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    try:
        value = json.loads(text) if path.suffix == ".json" else _toml(text)
    except ValueError as error:  # of JSON and of TOML
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no table of values")
    return value


def _toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError as error:
        raise ImportError("TOML files need Python 3.11: write the file as JSON, or use a newer Python") from error
    return tomllib.loads(text)


def _changed(base: Mapping[str, Any], changes: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The values with those of `changes`, tables value by value; what a recipe knows is asked of the recipe later."""
    unknown = sorted(changes.keys() - base.keys())
    if unknown and ".recipe" not in place:
        known = ", ".join(key for key in base if key != "name")
        raise ValueError(f"unknown {', '.join(f'{place}{key}' for key in unknown)}; known: {known}")
    out = dict(base)
    for key, value in changes.items():
        before = asdict(Stage()) if not place and key in MODULES and base[key] is None else base.get(key)
        if not _alike(before, value):
            raise ValueError(f"{place}{key} = {value!r}: a value like {before!r} is needed")
        out[key] = _changed(before, value, f"{place}{key}.") if isinstance(before, dict) else value
    return out


def _alike(before: Any, value: Any) -> bool:
    """Whether a value may stand where another does; None says nothing."""
    if isinstance(before, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return before is None or type(value) is type(before)


def check(preset: Preset) -> None:
    """Refuse values that a recipe does not know, and those it does not take: ValueError says which. Needs torch."""
    for name, stage in preset.stages().items():
        try:
            recipe(name, stage)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def values(name: str, stage: Stage) -> dict[str, Any]:
    """Of the stage's recipe, with the model where the recipe names one."""
    named = "model" in {f.name for f in fields(_kind(name))}
    return {"model": stage.model, **stage.recipe} if named else stage.recipe


def _kind(name: str) -> Any:
    from importlib import import_module

    return import_module(f".{MODULES[name]}", __package__).Recipe


def recipe(name: str, stage: Stage) -> Any:
    """The stage's recipe: the defaults of its module with the stage's values. ValueError names unknown ones."""
    kind = _kind(name)
    try:
        return config_from_json(kind, json.dumps(values(name, stage)))
    except CheckpointError as error:
        known = ", ".join(f.name for f in fields(kind))
        raise ValueError(f"recipe: {error.__cause__}; known: {known}") from error
