"""One training over many processes: FSDP2, recomputed activations, adapters, and states that any number can resume.

    torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        -m joyavatar_core.cli.main train dmd --config flash-1.3b --data SHARDS --out DIR ...

Every process holds a share of the rows of every weight, in float32, with its gradient, optimiser states and average;
the layers of a block are put together, in bfloat16, while the block runs. On a CPU two processes of gloo do the same.
In DIR, which all nodes must see: transformer.safetensors (averaged weights, whole, bfloat16, for nodes and command
line), curve.jsonl, `state-<step>` (what --resume reads), and of a training of adapters lora.safetensors.

Shape legend: tensors are parameters of any shape; n rows, N processes, r rank of an adapter.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as recomputed

from .. import checkpoint
from ..attention import AttentionFn, sdpa
from ..config import ModelConfig
from ..model import Block, JoyAvatarDiT
from . import parallel, trainer
from .common import kept_share, write_whole
from .presets import Scale

log = logging.getLogger(__name__)

_BRANCHES = ("proj_model.", "face_proj.", ".processor.", ".to_k_ip.", ".to_v_ip.")
"""In the names of what an audio-driven model has more than Wan2.1."""
_SILENT = (".v_proj.", ".to_v_ip.")
"""Of those, what begins at zero, so that a model with new branches begins as the one without."""
_ADAPTED = r"blocks\.\d+\.((self_attn|cross_attn)\.[qkvo]|ffn\.[02])"
"""Linear layers of a block that have an adapter."""
_ADAPTER = "default"


# Processes


def join() -> DeviceMesh:
    """Meet the other processes, or be one alone; a mesh of all."""
    parallel.join()
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nothing writes into it
    gpu = "nccl" in parallel.backend()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group(parallel.backend(), store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore
    return init_device_mesh("cuda" if gpu else "cpu", (parallel.world(),))


# Models


def build(
    config: ModelConfig,
    files: Sequence[Path],
    scale: Scale,
    mesh: DeviceMesh,
    seed: int = 0,
    trained: bool = True,
    attention: AttentionFn = sdpa,
) -> JoyAvatarDiT:
    """A transformer over all processes, filled from files that are read a share of the rows at a time.

    Args:
        files: read as one, see `checkpoint.read_merged`; none: weights drawn from the seed. What an audio-driven model
            has more than Wan2.1 may be missing of one in training: it is drawn, and silent at first.
        trained: False for a frozen score, which keeps `scale.compute` in place of float32.

    Raises:
        CheckpointError: a file does not fit.
    """
    compute = getattr(torch, scale.compute)
    with torch.device("meta"):
        model = JoyAvatarDiT(config, attention=attention, compute=compute)
    places = _places(files)
    missing = _missing(model, places, files)
    if missing and not trained:
        names, some = ", ".join(path.name for path in files), ", ".join(sorted(missing)[:3])
        raise checkpoint.CheckpointError(f"{names}: a frozen model needs all its branches, {some} are missing")
    if scale.lora_rank and trained:
        add_adapters(model, scale, also=missing)
    model.requires_grad_(False) if not trained else None
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else compute)
    if scale.checkpointing:
        recompute_blocks(model)
    shard(model, mesh, compute)
    model.to_empty(device=device_of(mesh))
    fill(model, places, seed)
    return model.train(trained)


def recompute_blocks(model: JoyAvatarDiT) -> None:
    """Keep of a block's activations only its input, and compute the others again in the backward."""
    for block in model.blocks:
        block.forward = partial(recomputed, block.forward, use_reentrant=False, preserve_rng_state=False)


def shard(model: JoyAvatarDiT, mesh: DeviceMesh, compute: torch.dtype) -> None:
    """FSDP2 over blocks and root; layers that are called apart from both (`condition`, `audio`) stand for themselves.

    The weights are multiplied in `compute`, gradients are averaged over the processes in float32.
    """
    whole = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)  # blocks are given float32 times
    alone = replace(whole, cast_forward_inputs=True)
    for block in model.blocks:
        for layer in _condition_layers(cast(Block, block)):
            fully_shard(layer, mesh=mesh, mp_policy=alone)
        fully_shard(block, mesh=mesh, mp_policy=whole)
    for name in ("text_embedding", "img_emb", "proj_model", "face_proj"):
        if hasattr(model, name):
            fully_shard(getattr(model, name), mesh=mesh, mp_policy=alone)
    fully_shard(model, mesh=mesh, mp_policy=whole)
    for method in ("condition", "audio"):  # FSDP must know its root before it meets a layer
        register_fsdp_forward_method(model, method)


def _condition_layers(block: Block) -> list[nn.Module]:
    """Layers of a block that its forward does not call: those that make keys and values of the conditions."""
    names = ("k", "v", "norm_k", "k_img", "v_img", "norm_k_img", "to_k_ip", "to_v_ip")
    heard = getattr(block.cross_attn, "processor", None)
    layers = [getattr(block.cross_attn, n) for n in names if hasattr(block.cross_attn, n)]
    return layers + ([heard.k_proj, heard.v_proj] if heard else [])


def device_of(mesh: DeviceMesh) -> torch.device:
    """Where this process works."""
    return torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")


# Filling


@dataclass(frozen=True)
class Place:
    """A tensor in a file: the file, its name there and its shape."""

    file: Path
    name: str
    shape: tuple[int, ...]


def _places(files: Sequence[Path]) -> dict[str, Place]:
    """Our names -> where their tensors lie. CheckpointError for files that cannot be read or hold a tensor twice."""
    places: dict[str, Place] = {}
    for path in files:
        if path.suffix != ".safetensors" or not path.is_file():
            raise checkpoint.CheckpointError(f"{path}: give the path of a .safetensors file, which is read in shares")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                found = {n: Place(path, n, tuple(file.get_slice(n).get_shape())) for n in file.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise checkpoint.CheckpointError(f"{path.name} is not a readable safetensors file ({error})") from error
        renamed = checkpoint.translate(cast(Any, found), checkpoint.detect_family(found))
        if twice := renamed.keys() & places.keys():
            raise checkpoint.CheckpointError(f"{path.name} repeats tensors of another file: {sorted(twice)[0]}")
        places |= cast("dict[str, Place]", renamed)
    return places


def _missing(model: nn.Module, places: Mapping[str, Place], files: Sequence[Path]) -> frozenset[str]:
    """Parameters that the files do not hold. CheckpointError unless they are whole branches that Wan2.1 has not."""
    own = {n: tuple(p.shape) for n, p in model.named_parameters()}
    missing = own.keys() - places.keys()
    bad = [n for n in missing if not any(part in n for part in _BRANCHES)] if files else []
    bad += places.keys() - own.keys()
    both = own.keys() & places.keys()
    bad += [f"{n} {places[n].shape} instead of {own[n]}" for n in both if places[n].shape != own[n]]
    if bad:
        names, some = ", ".join(path.name for path in files), ", ".join(sorted(bad)[:3])
        raise checkpoint.CheckpointError(f"{names}: {len(bad)} tensors missing, left over or of another shape: {some}")
    return frozenset(missing)


@torch.no_grad()
def fill(model: nn.Module, places: Mapping[str, Place], seed: int) -> None:
    """This process's rows of every parameter, from its place or drawn from the seed."""
    with ExitStack() as stack:
        paths = {place.file for place in places.values()}
        files = {path: stack.enter_context(safetensors.safe_open(path, "pt")) for path in paths}
        for name, p in model.named_parameters():
            place, mine = places.get(name.replace(".base_layer", "")), local(p)
            if place:
                rows = _rows(p)
                mine.copy_(files[place.file].get_slice(place.name)[rows.start : rows.stop])
            else:
                mine.copy_(_drawn(name, p.shape, seed)[_rows(p)])


def _drawn(name: str, shape: torch.Size, seed: int) -> Tensor:
    """A parameter at the beginning, the same in every process."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    p = torch.ones(shape)
    if "lora_B" in name or any(part in name for part in _SILENT):
        return p.zero_()
    if name == "face_proj.latents":
        return p.normal_(generator=generator) * shape[-1] ** -0.5
    trainer.initialise_parameter(name, p, generator)
    return p


def _rows(p: Tensor) -> slice:
    """The rows of a parameter that this process holds."""
    if not isinstance(p, DTensor):
        return slice(0, p.shape[0])
    mesh = p.device_mesh
    each, rank = -(-p.shape[0] // mesh.size()), mesh.get_local_rank()
    return slice(min(rank * each, p.shape[0]), min((rank + 1) * each, p.shape[0]))


def local(p: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return p.to_local() if isinstance(p, DTensor) else p


def whole(p: Tensor) -> Tensor:
    """A tensor put together; every process must ask for it."""
    return p.full_tensor() if isinstance(p, DTensor) else p


# Adapters


def is_adapted(layer: str) -> bool:
    """Whether the layer of this name has an adapter."""
    return re.fullmatch(_ADAPTED, layer) is not None


def add_adapters(model: JoyAvatarDiT, scale: Scale, also: Iterable[str] = ()) -> None:
    """LoRA (Hu et al. 2021) in the linear layers of the blocks: these train, and the parameters named in `also`.

    ImportError where peft is not installed.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ImportError("training adapters (lora_rank) needs peft: pip install peft") from error
    settings = peft.LoraConfig(r=scale.lora_rank, lora_alpha=scale.lora_alpha, target_modules=_ADAPTED)
    also = frozenset(also)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights on no device, which are filled later
        peft.inject_adapter_in_model(settings, model, adapter_name=_ADAPTER)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or name in also)


def _adapters(model: nn.Module) -> list[str]:
    """Names of the layers that have an adapter."""
    end = ".base_layer.weight"
    return [name.removesuffix(end) for name, _ in model.named_parameters() if name.endswith(end)]


# Weights


class ShardedWeights:
    """As common.Weights, of a model over many processes: its own float32 parameters are the masters.

    FSDP averages the gradients. What is frozen is left out. master: this process's share as DTensors; average: the same
    as plain tensors, on a CPU if wished.
    """

    def __init__(self, model: nn.Module, decay: float, on_cpu: bool = False) -> None:
        self.model, self.decay = model, decay
        self.master = {n: p for n, p in model.named_parameters() if p.requires_grad}
        device = "cpu" if on_cpu else None
        self.average = {n: local(p.detach()).to(device, copy=True) for n, p in self.master.items()}

    def collect(self) -> float:
        """The norm of all gradients; such that are not finite are thrown away."""
        mine = [local(p.grad).double().square().sum() for p in self._moving()]
        total = torch.stack(mine).sum() if mine else torch.zeros((), dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(total)
        norm = math.sqrt(float(total)) if math.isfinite(float(total)) else math.inf
        if norm == math.inf:
            self._forget()
        return norm

    def clip(self, norm: float, limit: float) -> None:
        """Shorten the gradients, of this norm, to the limit."""
        if norm > limit:
            for p in self._moving():
                local(p.grad).mul_(limit / norm)

    @torch.no_grad()
    def publish(self, step: int) -> None:
        """After an optimiser step: masters into the average (young averages forget faster); gradients are done with."""
        keep = kept_share(self.decay, step)
        for name, p in self.master.items():
            self.average[name].lerp_(local(p).to(self.average[name].device), 1 - keep)
        self._forget()

    def state(self) -> dict[str, Any]:
        """The masters themselves, and averages laid out like them, for `load` after they were filled."""
        return {"master": {n: p.detach() for n, p in self.master.items()}, "average": self.spread()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        for name, p in self.master.items():
            local(p).copy_(local(state["master"][name]))
            self.average[name].copy_(local(state["average"][name]))

    def spread(self) -> dict[str, Tensor]:
        """The averages, each laid out over the processes as its parameter."""
        return {name: self._spread(name) for name in self.average}

    def whole(self, name: str) -> Tensor:
        """A parameter of the model, averaged where it is trained, put together; every process must ask for it."""
        return whole(self._spread(name) if name in self.average else self.model.get_parameter(name).detach())

    def _spread(self, name: str) -> Tensor:
        p, own = self.master[name].detach(), self.average[name]
        if not isinstance(p, DTensor):
            return own
        own = own.to(local(p).device)
        return DTensor.from_local(own, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())

    def _moving(self) -> Iterator[Any]:
        return (p for p in self.master.values() if p.grad is not None)

    def _forget(self) -> None:
        for p in self.master.values():
            p.grad = None


class ShardedLearner(trainer.Learner):
    """A Learner whose weights are ShardedWeights."""

    weights: ShardedWeights  # pyright: ignore[reportIncompatibleVariableOverride]

    def averaged(self) -> JoyAvatarDiT:
        """A model of its own with all averaged weights; every process must ask for it and has room for it."""
        config, compute = self.model.config, self.model.compute
        with torch.device("meta"):
            empty = JoyAvatarDiT(config, compute=compute)
        whole = {name: tensor.to(compute, copy=True) for name, tensor in whole_tensors(self)}
        return checkpoint.load_into(empty, whole, "the averaged weights").eval().requires_grad_(False)


def learner(model: JoyAvatarDiT, recipe: trainer.Recipe, scale: Scale, rate: float | None = None) -> ShardedLearner:
    """A model of `build` at the beginning of its training. ValueError for an optimiser that needs whole matrices."""
    if recipe.optimiser != "adamw":
        raise ValueError(f"optimiser {recipe.optimiser}: a sharded training takes adamw")
    weights, rate = ShardedWeights(model, recipe.average, scale.average_on_cpu), rate or recipe.learning_rate
    optimisers = trainer.make_optimisers(recipe, cast(Any, weights), rate)
    return ShardedLearner(model, cast(Any, weights), optimisers, rate)


# Files


def whole_tensors(learner: ShardedLearner) -> Iterator[tuple[str, Tensor]]:
    """Names and averaged parameters in the model's order, adapters added to the layers they belong to.

    One is put together at a time; every process must take them all.
    """
    weights, model = learner.weights, learner.model
    for name, _ in model.named_parameters():
        if "lora_" in name:
            continue
        tensor = weights.whole(name)
        if name.endswith(".base_layer.weight"):
            layer = name.removesuffix(".base_layer.weight")
            down, up = (weights.whole(f"{layer}.lora_{side}.{_ADAPTER}.weight").float() for side in "AB")
            tensor = tensor.float() + _strength(model, layer) * (up @ down)
        yield name.replace(".base_layer", ""), tensor


def _strength(model: nn.Module, layer: str) -> float:
    """lora_alpha over the rank."""
    return cast(Any, model.get_submodule(layer)).scaling[_ADAPTER]


_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def write_streamed(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """A safetensors file, whole or not at all, with one tensor in memory at a time, in the order of `shapes`."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(part: Path) -> None:
        with open(part, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for (name, tensor), expected in zip(tensors, shapes, strict=True):
                assert name == expected and tuple(tensor.shape) == tuple(shapes[name]), (name, expected, tensor.shape)
                file.write(tensor.to(dtype).cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    write_whole(path, write)


def save_transformer(path: Path, learner: ShardedLearner, metadata: Mapping[str, str]) -> None:
    """The averaged weights as one file for nodes and command line, written by process 0."""
    names = {n.replace(".base_layer", ""): p.shape for n, p in learner.model.named_parameters() if "lora_" not in n}
    tensors = whole_tensors(learner)
    if parallel.rank():
        for _ in tensors:  # the others only give their shares
            pass
    else:
        write_streamed(path, names, torch.bfloat16, tensors, metadata)
    parallel.wait()


def save_adapters(folder: Path, learner: ShardedLearner, metadata: Mapping[str, str]) -> None:
    """lora.safetensors, in the names that the LoRA node reads, and in branches.safetensors what else was trained."""
    weights, model, tensors = learner.weights, learner.model, dict[str, Tensor]()
    for layer in _adapters(model):
        down, up = (weights.whole(f"{layer}.lora_{side}.{_ADAPTER}.weight") for side in "AB")
        name = f"diffusion_model.{layer}"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(_strength(model, layer) * down.shape[0])
    branches = {name: weights.whole(name).bfloat16() for name in weights.master if "lora_" not in name}
    if not parallel.rank():
        checkpoint.write(folder / "lora.safetensors", {n: t.bfloat16() for n, t in tensors.items()}, metadata)
        if branches:
            checkpoint.write(folder / "branches.safetensors", branches, metadata)
    parallel.wait()


# States


def _tensors(learners: Mapping[str, trainer.Learner]) -> dict[str, Tensor]:
    """Everything that changes, by name: masters, averages, and what the optimisers know of each master."""
    found: dict[str, Tensor] = {}
    for who, learner in learners.items():
        weights = cast(ShardedLearner, learner).weights
        for kind, tensors in weights.state().items():
            found |= {f"{who}.{kind}.{name}": tensor for name, tensor in tensors.items()}
        for name, p in weights.master.items():
            for optimiser in learner.optimisers:
                found |= {f"{who}.optimiser.{name}.{what}": t for what, t in optimiser.state.get(p, {}).items()}
    return found


def _make_room(learners: Mapping[str, trainer.Learner], names: Iterable[str]) -> None:
    """Empty optimiser states for all that a saved training has."""
    for name in names:
        who, kind, rest = [*name.split(".", 2), "", ""][:3]
        if kind == "optimiser":
            parameter, _, what = rest.rpartition(".")
            p = cast(ShardedLearner, learners[who]).weights.master[parameter]
            (optimiser,) = learners[who].optimisers
            optimiser.state[p][what] = torch.zeros(()) if what == "step" else torch.zeros_like(p.detach())


def states(out: Path) -> list[Path]:
    """Saved states in a folder, the oldest first."""
    return sorted(path for path in out.glob("state-*") if path.is_dir() and path.suffix == "")


def save_state(state: trainer.Training) -> None:
    """A new state in the folder, whole or not at all; older ones are then deleted. Every process must call it."""
    from torch.distributed.checkpoint.state_dict_saver import save as write

    path = state.out / f"state-{state.steps:08d}"
    part = path.with_suffix(".part")
    if parallel.agreed(path.exists()):
        return
    if not parallel.rank():
        shutil.rmtree(part, ignore_errors=True)
    parallel.wait()
    counts = {"steps": torch.tensor(state.steps), "spent": torch.tensor(state.spent, dtype=torch.float64)}
    write(dict(counts | _tensors(state.learners())), checkpoint_id=part)
    parallel.wait()
    if not parallel.rank():
        os.replace(part, path)
        for old in states(state.out):
            if old != path:
                shutil.rmtree(old)
    parallel.wait()


def resume(state: trainer.Training) -> None:
    """Go on from the newest state, whatever the number of processes was. ValueError when there is none."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    found = states(state.out)
    if not found:
        raise ValueError(f"nothing to resume in {state.out}: start without --resume")
    saved = FileSystemReader(found[-1]).read_metadata().state_dict_metadata
    learners = state.learners()
    _make_room(learners, saved)
    tensors = _tensors(learners)
    counts = {"steps": torch.tensor(0), "spent": torch.tensor(0.0, dtype=torch.float64)}
    if unknown := (tensors.keys() | counts.keys()) ^ saved.keys():
        raise ValueError(f"{found[-1]} is of another training ({sorted(unknown)[0]}): resume with its configuration")
    load(dict(counts | tensors), checkpoint_id=found[-1])
    for who, learner in learners.items():
        averages = {n: tensors[f"{who}.average.{n}"] for n in cast(ShardedLearner, learner).weights.average}
        masters = {n: tensors[f"{who}.master.{n}"] for n in averages}
        learner.weights.load({"master": masters, "average": averages})
    state.steps, state.spent = int(counts["steps"]), float(counts["spent"])
    log.info("resumed at step %d, %.1f minutes spent", state.steps, state.spent / 60)


def save(state: trainer.Training) -> None:
    """The state, and the files that others use. Every process must call it."""
    save_state(state)
    learner = cast(ShardedLearner, state.learner)
    metadata = trainer.metadata(learner.model, state.recipe, trainer.notes(state))
    if _adapters(learner.model):
        save_adapters(state.out, learner, metadata)
    save_transformer(state.out / "transformer.safetensors", learner, metadata)


def loop(state: trainer.Training) -> None:
    """Train until the steps, or the time, of the recipe are spent; saves every save_steps and at the end."""
    with trainer.Curve(state) as curve:
        while state.progress < 1:
            curve.note(trainer.train_step(state))
            curve.tick()
            if state.recipe.save_steps and state.steps % state.recipe.save_steps == 0 and state.progress < 1:
                save(state)
    save(state)
