"""Sharded training: two processes of gloo are one process, any stop is no stop, and what is saved can be used."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import signal
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from joyavatar_core import checkpoint, flow
from joyavatar_core.attention import sdpa
from joyavatar_core.avatar import load_model
from joyavatar_core.config import MODELS, AudioConfig, FaceConfig, ModelConfig
from joyavatar_core.model import JoyAvatarDiT
from joyavatar_core.policy import policy
from joyavatar_core.training import distributed, full_size, parallel, presets, trainer
from joyavatar_core.training.common import Weights
from joyavatar_core.training.inputs import Inputs, guided, velocity
from joyavatar_core.training.presets import Clip, Scale, Stage
from joyavatar_core.training.shards import BatchStream, ShardIndex

from .small_training import add_small_preset, small_autoencoder, small_training

FULL = ModelConfig(
    dim=32, ffn_dim=40, layers=2, heads=2, text_dim=12, text_len=4, image_dim=16,
    audio=AudioConfig(features=8, width=10), face=FaceConfig(features=6, dim=16, depth=1, heads=2, queries=3, width=10),
)  # fmt: skip
"""A full-size model made narrow: all branches there are; widths that two processes cannot halve evenly included."""
SCALE = Scale(sharded=True, compute="float32", checkpointing=True)
RECIPE = trainer.Recipe(
    steps=4, save_steps=2, optimiser="adamw", learning_rate=1e-3, warmup_steps=1, average=0.5, floor=1.0
)


def written_model(path: Path, config: ModelConfig = FULL) -> Path:
    """The file of a model whose layers all do something."""
    torch.manual_seed(0)
    model = JoyAvatarDiT(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.15)
    checkpoint.write(path, model.state_dict(), {"model_config": checkpoint.config_to_json(config)})
    return path


@dataclass(kw_only=True)
class Toy(trainer.Training[trainer.Recipe]):
    """Flow matching of noise: clips `own` of every step, as shares of a common batch."""

    own: tuple[int, ...]

    def step(self) -> dict[str, float]:
        loss = torch.stack([self.loss(clip) for clip in self.own]).mean()
        loss.backward()
        norm = self.learner.update(self.recipe, self.rate_scale, self.steps)
        return {"loss": loss.item(), "norm": norm, "latents": 2.0}

    def loss(self, clip: int) -> Tensor:
        generator, model = torch.Generator().manual_seed(1000 * self.steps + clip), self.model

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        condition = model.condition(normal(1, 4, 12), normal(1, 5, 16), normal(1, 6))
        audio = model.audio(normal(1, 2, 3, 8))
        x, noise = normal(1, 36, 2, 4, 4), normal(1, 16, 2, 4, 4)
        v, _ = model(x, 1000 * torch.rand(1, 2, generator=generator), (0, 1), condition, audio)
        return (v - flow.velocity(x[:, :16], noise)).square().mean()

    def measure(self) -> dict[str, float]:
        return {}

    def clips(self) -> int:
        return 2


def sharded(out: Path, file: Path, scale: Scale = SCALE, config: ModelConfig = FULL) -> Toy:
    out.mkdir(exist_ok=True)
    model = distributed.build(config, [file], scale, distributed.join())
    learner = distributed.learner(model, RECIPE, scale)
    own = (parallel.rank(),) if parallel.world() > 1 else (0, 1)
    return Toy(recipe=RECIPE, out=out, learner=learner, policy=policy(RECIPE.policy), own=own)


def plain(out: Path, file: Path) -> Toy:
    """The same in one process without shards."""
    out.mkdir(exist_ok=True)
    learner = trainer.learner(load_model(file).train(), RECIPE)
    return Toy(recipe=RECIPE, out=out, learner=learner, policy=policy(RECIPE.policy), own=(0, 1))


# Processes


def alone(rank: int, world: int, meeting: str, work: Callable[..., None], given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    work(*given)
    parallel.wait()
    dist.destroy_process_group()


def start(world: int, folder: Path, work: Callable[..., None], *given: Any) -> list[Any]:
    """Processes that run `work` together."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_distributed", "peft", "torch.distributed.checkpoint"])
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    processes = [
        context.Process(target=alone, args=(rank, world, str(meeting), work, given), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[Any]) -> None:
    """Wait; when one fails the others, who wait for it, are ended."""
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode for process in processes):
            for process in processes:
                process.kill()
        time.sleep(0.01)
    assert all(process.exitcode == 0 for process in processes)


def train_and_save(out: Path, file: Path, name: str, scale: Scale = SCALE, config: ModelConfig = FULL) -> None:
    """Four steps; masters, put together, and figures go to a file of this process."""
    state = sharded(out, file, scale, config)
    figures = [trainer.train_step(state) for _ in range(RECIPE.steps or 0)]
    masters = {n: distributed.whole(p).detach().clone() for n, p in state.learner.weights.master.items()}
    distributed.save(state)
    torch.save({"figures": figures, "masters": masters}, out / f"{name}-{parallel.rank()}.pt")


def train_in_two(out: Path, file: Path, name: str) -> None:
    """Two steps, a state, and two more in a training that knows nothing but that state."""
    state = sharded(out, file)
    for _ in range(2):
        trainer.train_step(state)
    distributed.save_state(state)
    again = sharded(out, file)
    distributed.resume(again)
    assert again.steps == 2
    for _ in range(2):
        trainer.train_step(again)
    masters = {n: distributed.whole(p).detach().clone() for n, p in again.learner.weights.master.items()}
    torch.save({"masters": masters, "average": again.learner.weights.average}, out / f"{name}-{parallel.rank()}.pt")


def two_ranks(out: Path, file: Path, stock: Path) -> None:
    """All that two processes are asked, one after the other."""
    train_and_save(out / "straight", file, "straight")
    train_in_two(out / "halved", file, "halved")
    train_and_save(out / "adapters", stock, "adapters", replace(SCALE, lora_rank=3, lora_alpha=6))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_model(tmp_path_factory.mktemp("model") / "start.safetensors")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan2.1 without sound and face."""
    path = tmp_path_factory.mktemp("model") / "stock.safetensors"
    return written_model(path, replace(FULL, audio=None, face=None))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, file: Path, stock: Path) -> Path:
    """Where two processes left what they made."""
    folder = tmp_path_factory.mktemp("two")
    finish(start(2, folder, two_ranks, folder, file, stock))
    return folder


def results(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = (torch.load(folder / name / f"{name}-{rank}.pt", weights_only=False) for rank in (0, 1))
    return first, second


def test_two_processes_are_one(two: Path, file: Path, tmp_path: Path):
    """Same norms, losses and weights as one process without shards, in float32."""
    state = plain(tmp_path, file)
    figures = [trainer.train_step(state) for _ in range(4)]
    first, second = results(two, "straight")
    for here, a, b in zip(figures, first["figures"], second["figures"], strict=True):
        assert (a["loss"] + b["loss"]) / 2 == pytest.approx(here["loss"], rel=1e-4)
        assert a["norm"] == b["norm"] == pytest.approx(here["norm"], rel=1e-4)
    assert first["masters"].keys() == state.learner.weights.master.keys()
    before = load_model(file).state_dict()
    for name, p in state.learner.weights.master.items():
        assert torch.allclose(first["masters"][name], p.detach(), atol=1e-4), name
        assert not torch.allclose(first["masters"][name], before[name], atol=1e-4), f"{name} never moved"


def test_two_and_two_steps_are_four(two: Path):
    straight, halved = results(two, "straight")[0], results(two, "halved")[0]
    for name, tensor in straight["masters"].items():
        assert torch.equal(tensor, halved["masters"][name]), name


def test_the_saved_file_is_a_model(two: Path):
    model = load_model(two / "straight" / "transformer.safetensors")
    assert model.config == FULL and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    masters = results(two, "straight")[0]["masters"]
    apart = [float((p.detach().float() - masters[n]).abs().max()) for n, p in model.named_parameters()]
    assert 1e-4 < max(apart) < 5e-3, "averages of the last steps are near the masters and not the masters"
    assert sorted(p.name for p in (two / "straight").glob("state-*")) == ["state-00000004"]


def test_adapters_are_saved_as_the_node_reads_them(two: Path, stock: Path):
    """W + alpha / r B A of the LoRA file, and the branches, make the merged file; nothing else has moved."""
    folder = two / "adapters"
    base, lora = checkpoint.read(stock)[0], checkpoint.read(folder / "lora.safetensors")[0]
    merged = checkpoint.read(folder / "transformer.safetensors")[0]
    branches = checkpoint.read(folder / "branches.safetensors")[0]
    assert load_model([stock, folder / "branches.safetensors"]).config == FULL  # and the metadata of the second file
    layers = {name.removesuffix(".alpha") for name in lora if name.endswith(".alpha")}
    assert len(layers) == 2 * 10 and all(name.startswith("diffusion_model.blocks.") for name in layers)
    assert len(lora) == 3 * len(layers)
    for name, tensor in merged.items():
        layer = f"diffusion_model.{name.removesuffix('.weight')}"
        if name in branches:
            assert torch.equal(tensor, branches[name]) and name not in base
        elif layer in layers and name.endswith(".weight"):
            down, up = (lora[f"{layer}.lora_{side}.weight"].float() for side in "AB")
            change = float(lora[f"{layer}.alpha"]) / down.shape[0] * up @ down
            assert change.abs().max() > 1e-4, f"{name} never moved"
            assert torch.allclose(tensor.float(), base[name] + change, atol=2e-3), name
        else:
            assert torch.equal(tensor, base[name].bfloat16()), name


# The stages of the full size

SHALLOW = replace(FULL, layers=1)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """`SHALLOW` as the model "narrow"."""
    monkeypatch.setitem(MODELS, "narrow", SHALLOW)


NARROW: dict[str, Any] = {"model": "narrow", "scale": SCALE}
SHORT: dict[str, Any] = {
    "optimiser": "adamw", "steps": 3, "save_steps": 1, "warmup_steps": 1, "learning_rate": 1e-3
}  # fmt: skip
ODDS = {"main": 0.5, "blocks": [3, 4]}


def stages() -> dict[str, Stage]:
    """Short ones, of a model "narrow", the first by adapters."""
    adapted = replace(SCALE, lora_rank=2, lora_alpha=4)
    return {
        "bidirectional": Stage("narrow", scale=adapted, recipe=SHORT | {"latents": 9, "drop_audio": 0.5}),
        "flow": Stage(**NARROW, clip=Clip(latents=9), recipe=SHORT | {"drop_audio": 0.5}),
        "ode": Stage(**NARROW, teacher="narrow", clip=Clip(latents=9), recipe=SHORT | {"pairs": 2, "ode_steps": 8}),
        "dmd": Stage(**NARROW, teacher="narrow", recipe=SHORT | {"latents": 9, "critic_steps": 2, "odds": ODDS}),
    }


def write_shards(folder: Path, count: int = 4, latents: int = 12) -> Path:
    """Prepared samples of noise, all encoders there."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).half()

    with tarfile.open(folder / "shard-000000.tar", "w") as tar:
        for i in range(count):
            tensors = {
                "seed": torch.tensor(i),
                "latents": normal(latents, 16, 4, 4),
                "image": normal(5, 16, 4, 4),
                "audio": normal(latents, 3, 8),
                "audio_valid": torch.ones(latents, 3, dtype=torch.bool),
                "mouth": torch.rand(latents, 4, 4).half(),
                "eyes": torch.rand(latents, 4, 4).half(),
                "face": normal(6).float(),
                "text": normal(4, 12).bfloat16(),
                "clip_vision": normal(5, 16).bfloat16(),
            }
            for name, data in ((f"{i:04d}.safetensors", safetensors_bytes(tensors)), (f"{i:04d}.json", b"{}")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    checkpoint.write(folder / "negative.safetensors", {"text": normal(2, 12).bfloat16()}, {})
    return folder


def stop_and_go(folder: Path, file: Path) -> None:
    """Three steps of each stage at a stretch, and with an end in the middle of the third, as the command runs them."""
    MODELS["narrow"] = SHALLOW
    data, decoder = folder / "shards", folder / "autoencoder.safetensors"
    step = trainer.train_step

    def halt(state: trainer.Training[Any]) -> dict[str, float]:
        if state.steps == 2:
            raise InterruptedError
        return step(state)

    for name, stage in stages().items():
        recipe = presets.recipe(name, stage)
        for way in ("straight", "stopped"):
            files = full_size.Files(folder / f"{name}-{way}", (data,), (file,), (file,), (), decoder)
            trainer.train_step = halt if way == "stopped" else step
            try:
                full_size.run(name, stage, recipe, files, again=False)
            except InterruptedError:
                trainer.train_step = step
                full_size.run(name, stage, recipe, files, again=True)


@pytest.fixture(scope="module")
def stopped_and_straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes trained."""
    folder = tmp_path_factory.mktemp("stages")
    file = written_model(folder / "start.safetensors", SHALLOW)
    write_shards(folder / "shards")
    small_autoencoder(folder / "autoencoder.safetensors")
    finish(start(2, folder, stop_and_go, folder, file))
    return folder


@pytest.mark.parametrize("name", ["bidirectional", "flow", "ode", "dmd"])
def test_a_stage_of_the_full_size_runs_and_goes_on(stopped_and_straight: Path, name: str):
    """What moves has moved, the file is a model, and a stop changes no byte: of generator, critic and adapters."""
    straight, stopped = (stopped_and_straight / f"{name}-{way}" for way in ("straight", "stopped"))
    before = load_model(stopped_and_straight / "start.safetensors").state_dict()
    model = load_model(straight / "transformer.safetensors")
    assert model.config == SHALLOW
    still = [n for n, p in model.named_parameters() if torch.equal(p.detach(), before[n].bfloat16())]
    if name == "bidirectional":  # by adapters
        assert not any(n.startswith("blocks.0.self_attn.q.weight") for n in still)
        assert tensors_alike(straight / "lora.safetensors", stopped / "lora.safetensors")
    else:
        assert not still
    assert tensors_alike(straight / "transformer.safetensors", stopped / "transformer.safetensors")
    assert [path.name for path in distributed.states(stopped)] == ["state-00000003"]


def test_pairs_begin_with_noise(stopped_and_straight: Path):
    pairs = sorted(stopped_and_straight.glob("ode-straight/pairs-*/*.safetensors"))
    assert len(pairs) == 2
    states = checkpoint.read(pairs[0])[0]["states"]
    assert states.shape == (9, 16, 9, 4, 4) and states.dtype == torch.float16
    assert abs(float(states[0].float().std()) - 1) < 0.1


def tensors_alike(one: Path, other: Path) -> bool:
    """Whether two files hold the same tensors."""
    ours, theirs = (checkpoint.read(path)[0] for path in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_what_would_be_lost_or_ignored_is_refused(tmp_path: Path):
    """A second run in a folder, values that only the embedded trainers know, no weights, no branches to hear with."""
    data, file = write_shards(tmp_path / "shards"), written_model(tmp_path / "start.safetensors", SHALLOW)

    def run(name: str, more: dict[str, Any] | None = None, **files: Any) -> None:
        stage = stages()[name]
        stage = replace(stage, recipe=stage.recipe | (more or {}))
        given = {"out": tmp_path / name, "data": (data,), "initial": (file,), "teacher": (file,), **files}
        full_size.run(name, stage, presets.recipe(name, stage), full_size.Files(**given), again=False)

    (tmp_path / "flow" / "state-00000002").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds a training: go on with --resume, or give another folder"):
        run("flow")
    for name, value in (("ode", {"flow_share": 0.5}), ("dmd", {"regression": 0.5}), ("bidirectional", {"tokens": 64})):
        with pytest.raises(ValueError, match=f"{next(iter(value))} is for the trainers of the embedded model"):
            run(name, value)
    for name in ("ode", "dmd"):
        with pytest.raises(ValueError, match="give its file with --initial"):
            run(name, initial=(), autoencoder=small_autoencoder(tmp_path / "autoencoder.safetensors"))
    deaf = {n: t for n, t in checkpoint.read(file)[0].items() if ".processor." not in n}
    checkpoint.write(tmp_path / "deaf.safetensors", deaf, {})
    with pytest.raises(checkpoint.CheckpointError, match="a frozen model needs all its branches"):
        run("ode", teacher=(tmp_path / "deaf.safetensors",))
    assert not list(tmp_path.glob("ode/pairs-*/*"))


def test_pairs_belong_to_teacher_guidance_and_folder(tmp_path: Path):
    """Nothing that others made is taken for one's own."""
    one, other = (written_model(tmp_path / f"{n}.safetensors", replace(SHALLOW, layers=n)) for n in (1, 2))
    stage = stages()["ode"]
    recipe = presets.recipe("ode", stage)

    def place(teacher: Path = one, **values: Any) -> Path:
        files = full_size.Files(tmp_path, (), teacher=(teacher,))
        return full_size.pairs_folder(stage, replace(recipe, **values), files)

    assert place() == place()
    assert len({place(), place(other), place(guidance=3.0), place(ode_steps=16)}) == 4
    samples = [ShardIndex([write_shards(tmp_path / name, count=1)]).groups[0][0] for name in ("a", "b")]
    assert samples[0].key == samples[1].key
    assert len({full_size.pair_path(tmp_path, sample) for sample in samples}) == 2


def test_diffusion_forcing_gives_every_block_a_level_of_its_own(tmp_path: Path, file: Path):
    """Which earlier blocks do not see, and no later ones are seen from."""
    model = load_model(file, attention=full_size.block_causal)
    model.compute = torch.float32
    index = ShardIndex([write_shards(tmp_path / "shards")])
    source = full_size.Source(BatchStream(index, 2), model, torch.device("cpu"), 1.0, 1.0)
    recipe = presets.recipe("flow", stages()["flow"])
    learner, rules = trainer.learner(model, recipe), policy("joyavatar-flash")
    state = full_size.FlowMatching(
        recipe=recipe, out=tmp_path, learner=learner, policy=rules, source=source, latents=9, parts=3
    )
    drawn = state.timesteps(torch.Generator().manual_seed(0), 50)
    assert drawn.shape == (50, 9) and torch.equal(drawn[:, ::3].repeat_interleave(3, 1), drawn)
    assert len(drawn.unique()) > 120 and drawn.min() >= 20 and drawn.max() <= 980
    given = source.at(0, 9)
    x, mask = torch.randn(2, 16, 9, 4, 4), torch.ones(3, 3, dtype=torch.bool).tril()
    with torch.no_grad():
        said = velocity(model, x, drawn[:2], given.inputs, mask)
        x[:, :, 3:6] += 1
        again = velocity(model, x, drawn[:2], given.inputs, mask)
    assert torch.equal(said[:, :, :3], again[:, :, :3]) and not torch.allclose(said[:, :, 6:], again[:, :, 6:])
    whole = replace(state, parts=1).timesteps(torch.Generator().manual_seed(0), 50)
    assert torch.equal(whole, whole[:, :1].expand(-1, 9)) and len(whole.unique()) > 40


def test_a_mask_of_blocks_is_a_mask_of_tokens():
    q, k, v = (torch.randn(2, 12, 3, 8, dtype=torch.double) for _ in range(3))
    blocks = torch.arange(12) // 3
    said = full_size.block_causal(q, k, v, torch.ones(4, 4, dtype=torch.bool).tril())
    assert torch.allclose(said, sdpa(q, k, v, blocks[:, None] >= blocks[None]), atol=1e-12)
    assert torch.equal(full_size.block_causal(q, k, v), sdpa(q, k, v))


def test_guidance_goes_away_from_silence_and_the_negative_prompt(tmp_path: Path, file: Path):
    model = load_model(file)
    model.compute = torch.float32
    index = ShardIndex([write_shards(tmp_path / "shards")])
    source = full_size.Source(BatchStream(index, 2), model, torch.device("cpu"), 8.0, 2.0)
    given = source.at(0, 6)
    assert given.latents.shape == (2, 16, 6, 4, 4) and float(given.weights.mean()) == pytest.approx(1)
    quiet = given.inputs.untold()
    assert quiet.audio is not None and not quiet.audio.any() and quiet.face is given.inputs.face
    x, t = torch.randn(2, 16, 6, 4, 4), torch.full((2, 6), 500.0)
    with torch.no_grad():
        told, untold = (velocity(model, x, t, i) for i in (given.inputs, quiet))
        assert not torch.allclose(told, untold, atol=1e-3)
        both = guided(model, x, t, given.inputs, 4.0)
    assert torch.allclose(both, untold + 4 * (told - untold), atol=1e-5)
    with pytest.raises(ValueError, match="12 latents: 15 are needed"):
        source.at(0, 15)


def test_conditions_are_dropped_each_by_itself(file: Path):
    ones = Inputs(audio=torch.ones(400, 2, 3, 8), text=torch.ones(400, 4, 12), face=torch.ones(400, 6))
    made = full_size.dropped(ones, 0.25, torch.Generator().manual_seed(0))
    kept = [t.flatten(1).any(1) for t in (made.audio, made.text, made.face) if t is not None]
    assert len(kept) == 3 and all(0.68 < float(k.float().mean()) < 0.82 for k in kept)
    assert float((kept[0] & kept[1] & kept[2]).float().mean()) == pytest.approx(0.75**3, abs=0.08)


# Kills


class Slow(Toy):
    """Takes its time, so that it can be killed between two steps."""

    def step(self) -> dict[str, float]:
        time.sleep(0.2)
        return super().step()


def train_slowly(out: Path, file: Path) -> None:
    """To the end of the recipe, a state after each step."""
    state = Slow(**vars(sharded(out, file)))
    state.recipe = replace(RECIPE, save_steps=1)
    if distributed.states(out):
        distributed.resume(state)
    distributed.loop(state)


def train_small(out: Path, pause: float) -> None:
    """The embedded model's trainer, to its end, a state after each step."""
    add_small_preset(pytest.MonkeyPatch())
    state = small_training(out)
    state.recipe = replace(state.recipe, steps=4, save_steps=1)
    if (out / "train.pt").exists():
        trainer.resume(state)
    learn = state.step

    def slowly() -> dict[str, float]:
        time.sleep(pause)
        return learn()

    object.__setattr__(state, "step", slowly)
    trainer.loop(state, cast(Any, None), lambda: None)


def kill(processes: list[Any], ready: Callable[[], bool]) -> None:
    """End them, all at once and without a warning, when it is time."""
    while not ready():
        assert all(process.is_alive() for process in processes)
        time.sleep(0.002)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()


def test_killed_ranks_reach_the_same_weights(two: Path, tmp_path: Path, file: Path):
    killed, step = tmp_path / "killed", random.Random().randrange(1, 3)
    processes = start(2, tmp_path, train_slowly, killed, file)
    kill(processes, lambda: any(int(path.name[6:]) >= step for path in distributed.states(killed)))
    assert int(distributed.states(killed)[-1].name[6:]) < 4, "killed too late to show anything"
    finish(start(2, tmp_path, train_slowly, killed, file))
    one, other = (checkpoint.read(f / "transformer.safetensors")[0] for f in (two / "straight", killed))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one), f"killed after step {step}"


def test_a_killed_training_of_the_embedded_model_reaches_the_same_weights(tmp_path: Path):
    straight, killed, step = tmp_path / "straight", tmp_path / "killed", random.Random().randrange(1, 3)
    straight.mkdir()
    killed.mkdir()
    finish(start(1, tmp_path, train_small, straight, 0.0))

    def done() -> int:
        return torch.load(killed / "train.pt", weights_only=True)["steps"] if (killed / "train.pt").exists() else 0

    kill(start(1, tmp_path, train_small, killed, 0.2), lambda: done() >= step)
    assert done() < 4, "killed too late to show anything"
    finish(start(1, tmp_path, train_small, killed, 0.0))
    one, other = (torch.load(f / "train.pt", weights_only=True)["learners"]["generator"] for f in (straight, killed))
    for kind in ("master", "average"):
        for name, tensor in one["weights"][kind].items():
            assert torch.equal(tensor, other["weights"][kind][name]), f"{kind} {name}, killed after step {step}"


# One process


def test_recomputed_activations_give_the_same_gradients(file: Path, tmp_path: Path):
    states = [plain(tmp_path, file) for _ in range(2)]
    distributed.recompute_blocks(states[1].model)
    saved: list[int] = [0, 0]
    for i, state in enumerate(states):

        def keep(tensor: Tensor, i: int = i) -> Tensor:
            saved[i] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = state.loss(0)
        loss.backward()
    for (name, p), q in zip(states[0].model.named_parameters(), states[1].model.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad), name
    assert saved[1] < 0.6 * saved[0]


def test_one_process_of_shards_is_one_without(file: Path, tmp_path: Path):
    processes = start(1, tmp_path, train_and_save, tmp_path / "out", file, "one")
    state = plain(tmp_path / "plain", file)
    for _ in range(4):
        trainer.train_step(state)
    finish(processes)
    made = torch.load(tmp_path / "out" / "one-0.pt", weights_only=False)["masters"]
    for name, p in state.learner.weights.master.items():
        assert torch.allclose(made[name], p.detach(), atol=1e-4), name


def test_gradients_that_are_not_finite_are_thrown_away(file: Path):
    model = load_model(file).train()
    weights = distributed.ShardedWeights(model, 0.5)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    assert weights.collect() == float("inf")
    assert all(p.grad is None for p in model.parameters())


def test_sharded_weights_do_as_the_others(file: Path):
    """Without shards both kinds of weights say the same of the same gradients."""
    one, two = load_model(file).train(), load_model(file).train()
    for model in (one, two):
        torch.manual_seed(1)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
    mine, common = distributed.ShardedWeights(one, 0.5), Weights(two, 0.5)
    norm = mine.collect()
    assert norm == pytest.approx(common.collect(), rel=1e-5)
    for weights in (mine, common):
        weights.clip(norm, 1.0)
    for name, p in mine.master.items():
        q = common.master[name]
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)
        p.data.sub_(p.grad)
        q.data.sub_(q.grad)
    for weights in (mine, common):
        weights.publish(3)
    assert all(torch.equal(mine.average[n], common.average[n]) for n in mine.average)


def test_a_stream_of_tensors_is_a_file(tmp_path: Path):
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(4.0), "c": torch.ones(1, 2, 2)}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    path = tmp_path / "whole.safetensors"
    distributed.write_streamed(path, shapes, torch.bfloat16, tensors.items(), {"notes": "ä"})
    read, metadata = checkpoint.read(path)
    assert metadata == {"notes": "ä"} and read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor.bfloat16()) for name, tensor in tensors.items())
    with safe_open(path, "pt") as opened:
        assert torch.equal(opened.get_slice("b")[1:], tensors["b"][1:].bfloat16())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: [path / "nothing.safetensors"], "nothing.safetensors: give the path"),
        (lambda path: [written_model(path / "s.safetensors", replace(FULL, dim=64))], "of another shape"),
        (lambda path: [written_model(path / "s.safetensors", replace(FULL, layers=1))], "missing"),
        (lambda path: [written_model(path / "s.safetensors")] * 2, "repeats tensors"),
    ],
)
def test_files_that_do_not_fit_are_refused(make: Callable[[Path], list[Path]], message: str, tmp_path: Path):
    with torch.device("meta"):
        model = JoyAvatarDiT(FULL)
    with pytest.raises(checkpoint.CheckpointError, match=message):
        files = make(tmp_path)
        distributed._missing(model, distributed._places(files), files)


def test_nothing_to_resume(tmp_path: Path, file: Path):
    with pytest.raises(ValueError, match="start without --resume"):
        distributed.resume(plain(tmp_path, file))


def test_an_optimiser_of_whole_matrices_is_refused(file: Path):
    with pytest.raises(ValueError, match="takes adamw"):
        distributed.learner(load_model(file), replace(RECIPE, optimiser="muon"), SCALE)
