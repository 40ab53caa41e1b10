"""Several avatars through one rollout: each as if it had been alone; who ends first leaves, the others go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from joyavatar_core.audio import AudioTokens
from joyavatar_core.cli.main import main
from joyavatar_core.conditioning import image_channels, reference_tokens
from joyavatar_core.generate import Progress, generate
from joyavatar_core.overlap import Overlap
from joyavatar_core.policy import POLICIES, RolloutPolicy
from joyavatar_core.rollout import Condition, Fast, Rollout, RolloutState
from joyavatar_core.stream import AvatarStream, LatentStream
from joyavatar_core.together import Speaker, generate_together
from joyavatar_core.types import batched

from .helpers import GEOMETRY, SMALL, audio_tokens, small_model, small_rollout
from .test_cli import frames_of, picture, write_sound  # noqa: F401
from .test_live_avatar import s2v_rollout
from .test_overlap import BOTH, Kept, StopError, nobody_left
from .test_stream import RATE, make_stream, sound

SECONDS = (3.2, 5.3, 0.3, 5.0)


def streams(hears: str = "log-mel", dtype: torch.dtype = torch.float32, **policy: object) -> list[AvatarStream]:
    """Four avatars of one model: another picture, seed and sound each."""
    first, made = make_stream(hears=hears), []
    rollout = first.latents.rollout
    model = rollout.model.to(dtype)
    autoencoder = first.frames.autoencoder
    for i in range(len(SECONDS)):
        shown = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(i)) * 2 - 1
        with torch.no_grad():
            channels = image_channels(autoencoder, shown)
            channels = replace(channels, channels=channels.channels.to(dtype))
            condition = Condition(
                model.condition(image=reference_tokens(channels.picture, model.config.patch)), channels
            )
        own = replace(rollout, seed=10 + i, condition=condition, dtype=dtype, policy=replace(rollout.policy, **policy))
        made.append(AvatarStream(LatentStream(own, first.latents.front_end), autoencoder))
    return made


def sounds(i: int) -> list[tuple[np.ndarray, int]]:
    whole = sound(6.0).roll(1000 * i, dims=1)[:, : round(SECONDS[i] * RATE)]
    return [(piece.numpy(), RATE) for piece in whole.split(7000, dim=1)]


def speakers(made: Iterable[AvatarStream], sinks: list[Kept], seconds: Iterable[float] = SECONDS) -> list[Speaker]:
    return [
        Speaker(s.latents.rollout, s.latents.front_end, s.frames.autoencoder, sounds(i), sinks[i], length)
        for i, (s, length) in enumerate(zip(made, seconds, strict=True))
    ]


def alone(made: list[AvatarStream]) -> list[Kept]:
    sinks = [Kept() for _ in made]
    for i, stream in enumerate(made):
        generate(stream, sounds(i), lambda _, i=i: sinks[i])
    return sinks


@pytest.mark.parametrize("overlap", [None, BOTH], ids=str)
@pytest.mark.parametrize("seconds", [SECONDS, (0.0,) * 4], ids=["sorted", "lengths unknown"])
def test_each_is_as_if_it_had_been_alone(overlap: Overlap | None, seconds: tuple[float, ...]) -> None:
    """In float64, where rounding hardly shows in a byte. Lengths of 5, 8, 1 and 7 blocks."""
    singles, together = alone(streams(dtype=torch.float64)), [Kept() for _ in SECONDS]
    told: list[list[int]] = [[] for _ in SECONDS]
    figures = generate_together(
        speakers(streams(dtype=torch.float64), together, seconds),
        lambda i, progress: told[i].append(progress.blocks),
        overlap,
    )
    assert [len(kept.frames) for kept in together] == [5, 8, 1, 7]
    for i, (one, many) in enumerate(zip(singles, together, strict=True)):
        assert len(many.video) == round(SECONDS[i] * 16) == figures[i].frames
        assert np.array_equal(np.concatenate(one.sound, 1), np.concatenate(many.sound, 1))
        assert np.abs(one.video.astype(int) - many.video).max() <= 1 and (one.video != many.video).mean() < 1e-3
        assert told[i] == list(range(1, len(many.frames) + 1)) and figures[i].blocks_total == len(many.frames)
    assert not np.array_equal(singles[1].video[:60], singles[3].video[:60]), "they differ among each other"
    assert nobody_left()


def latents_of(rollout: Rollout, audio: Callable[[int], AudioTokens], blocks: int) -> Tensor:
    state, made = rollout.start(), []
    with torch.inference_mode():
        while state.window < rollout.policy.num_windows(blocks):
            if state.window < blocks:
                state.audio[state.window] = audio(state.window)
            made += [done.latents for done in rollout.run_window(state, blocks)]
    return torch.cat(made, dim=2)


def random_audio(item: int, block: int, latents: int) -> AudioTokens:
    generator = torch.Generator().manual_seed(100 * item + block)
    valid = torch.ones(latents, 5, dtype=torch.bool)
    valid[-1, 2 + item :] = block < 2  # not all of them hear as much
    return AudioTokens(torch.randn(latents, 5, 6, generator=generator), valid)


CASES = [
    (name, torch.float64, 1e-10) for name in ("joyavatar-flash", "rolling-forcing", "self-forcing", "avatarforcing")
]


@pytest.mark.parametrize(("policy", "dtype", "tolerance"), [*CASES, ("joyavatar-flash", torch.float32, 1e-4)])
def test_latents_within_rounding(policy: str, dtype: torch.dtype, tolerance: float) -> None:
    """Whole batches and parts of them; tokens that are valid for one avatar only."""
    config = replace(SMALL, audio=replace(SMALL.audio, kind="tokens", features=6, window=0))  # pyright: ignore
    model, chosen = small_model(dtype=dtype, config=config), POLICIES[policy]
    geometry = replace(GEOMETRY, **chosen.block_sizes)
    rollouts = []
    for item in range(3):
        generator = torch.Generator().manual_seed(item)
        channels = torch.randn(1, 8, 30, *GEOMETRY.latent_size, dtype=dtype, generator=generator)
        made = image_channels_of(channels)
        with torch.no_grad():
            kv = model.condition(image=reference_tokens(channels[:, 4:, 0], SMALL.patch))
        rollouts.append(Rollout(model, chosen, geometry, Condition(kv, made), item, torch.device("cpu"), dtype))

    def heard(item: int, block: int) -> AudioTokens:
        return random_audio(item, block, len(geometry.latents_of_block(block)))

    whole = Rollout.together(rollouts)
    many = latents_of(whole, lambda b: AudioTokens.stack([heard(i, b) for i in range(3)]), 7)
    part = latents_of(whole.part(slice(1, 3)), lambda b: AudioTokens.stack([heard(i, b) for i in (1, 2)]), 7)
    for item, rollout in enumerate(rollouts):
        one = latents_of(rollout, lambda b, i=item: heard(i, b), 7)
        limit = tolerance * one.abs().max()
        assert (many[item : item + 1] - one).abs().max() <= limit
        assert item == 0 or (part[item - 1 : item] - one).abs().max() <= limit
    assert not torch.allclose(many[0], many[1], atol=0.1)


@pytest.mark.parametrize(
    ("fast", "tolerance"), [(Fast(), 1e-10), (Fast(capture=True), 1e-10), (Fast(small_cache=True), 1e-2)], ids=str
)
def test_parted_on_the_way(fast: Fast, tolerance: float) -> None:
    """In steady state, when forwards are played from a recording, and with keys in eight bits."""
    singles = [replace(small_rollout(RolloutPolicy(), seed=i), fast=fast) for i in range(3)]
    singles = [replace(single, model=singles[0].model) for single in singles]

    def advance(rollout: Rollout, state: RolloutState, stop: int) -> Tensor:
        made = []
        while state.window < stop:
            state.audio[state.window] = AudioTokens.stack([audio_tokens(state.window)] * rollout.batch)
            made += [done.latents for done in rollout.run_window(state)]
        return torch.cat(made, dim=2)

    with torch.inference_mode():
        whole = Rollout.together(singles)
        state = whole.start()
        before = advance(whole, state, 12)
        parts = [slice(0, 2), slice(2, 3)]
        after = torch.cat([advance(whole.part(items), state.part(items), 18) for items in parts])
        for item, single in enumerate(singles):
            one = advance(single, single.start(), 18)
            many = torch.cat([before[item : item + 1], after[item : item + 1]], dim=2)
            assert (many - one).abs().max() <= tolerance * one.abs().max()


def image_channels_of(channels: Tensor) -> object:
    from joyavatar_core.conditioning import ImageChannels

    return ImageChannels(channels)


def test_a_reference_each() -> None:
    """Live Avatar (Wan2.2-S2V): keys of the reference, and its refresh, are each avatar's own."""
    live = replace(POLICIES["live-avatar"], reference_refresh=2)
    rollouts = [replace(s2v_rollout(live), seed=seed) for seed in (1, 2)]
    rollouts[1] = replace(rollouts[1], model=rollouts[0].model)
    picture_ = rollouts[1].condition.picture
    assert picture_
    turned = batched(lambda t: t.flip(-1), picture_)
    rollouts[1] = replace(rollouts[1], condition=replace(rollouts[1].condition, reference=turned))
    audio = rollouts[0].model.config.audio
    assert audio

    def tokens(item: int, block: int) -> AudioTokens:
        generator = torch.Generator().manual_seed(10 * block + item)
        shape = (live.block_latents, audio.window, audio.features)
        return AudioTokens(torch.randn(shape, generator=generator), torch.ones(shape[:2], dtype=torch.bool))

    many = latents_of(Rollout.together(rollouts), lambda b: AudioTokens.stack([tokens(0, b), tokens(1, b)]), 5)
    for item, rollout in enumerate(rollouts):
        one = latents_of(rollout, lambda b, i=item: tokens(i, b), 5)
        assert (many[item : item + 1] - one).abs().max() <= 1e-4 * one.abs().max()


def test_what_cannot_stand_side_by_side() -> None:
    made = [stream.latents.rollout for stream in streams()[:2]]
    with pytest.raises(ValueError, match="one model, policy and size"):
        Rollout.together([made[0], replace(made[1], policy=POLICIES["rolling-forcing"])])
    faced = replace(made[1].condition, kv=replace(made[1].condition.kv, face=made[1].condition.kv.image))
    with pytest.raises(ValueError, match="give all of them"):
        Rollout.together([made[0], replace(made[1], condition=faced)])
    drawn = [replace(r, policy=replace(POLICIES["live-avatar"], reference_ahead=(4, 30))) for r in made]
    with pytest.raises(ValueError, match="reference_ahead 4-30 is drawn for each avatar"):
        Rollout.together(drawn)


@pytest.mark.parametrize("overlap", [None, BOTH], ids=str)
def test_stopped_all_files_hold_what_was_made(overlap: Overlap | None) -> None:
    sinks, figures = [Kept() for _ in SECONDS], {}

    def stop(item: int, progress: Progress) -> None:
        figures[item] = progress
        if item == 1 and progress.blocks == 3:
            raise StopError

    with pytest.raises(StopError):
        generate_together(speakers(streams(), sinks), stop, overlap)
    assert nobody_left() and len(sinks[2].frames) == 1
    for item, progress in figures.items():
        assert progress.blocks == len(sinks[item].frames) and progress.frames == len(sinks[item].video)
    with pytest.raises(ValueError, match="0 samples"):
        empty = speakers(streams(), sinks)
        generate_together([empty[0], replace(empty[1], sound=[(np.zeros((1, 0), np.float32), RATE)])])


# The command line


def batch_words(tmp_path: Path, pictures: list[str], voices: list[Path], *more: str) -> list[str]:
    found = ["generate", "--size", "64x64", "--dtype", "float32"]
    for image in pictures:
        found += ["--image", image]
    for voice in voices:
        found += ["--audio", str(voice)]
    return [*found, *more]


def test_several_on_the_command_line(picture: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    """Two pictures, two voices, two files in a folder; one of them as by a run of its own."""
    from joyavatar_core import samples

    voices = [write_sound(tmp_path / f"{name}.wav", length) for name, length in (("a", 1.0), ("b", 2.3))]
    pictures = [str(picture), str(samples.picture("cat"))]
    out, report = tmp_path / "out", tmp_path / "r.json"
    more = ("--output", str(out), "--seed", "4", "--seed", "5", "--json", str(report))
    assert main(batch_words(tmp_path, pictures, voices, *more)) == 0
    files = sorted(out.iterdir())
    assert [f.name for f in files] == ["a picture.mp4", "cat.mp4"]
    one = tmp_path / "one.mp4"
    assert main(batch_words(tmp_path, pictures[1:], voices[1:], "--output", str(one), "--seed", "5")) == 0
    alone_, many = frames_of(one), frames_of(files[1])
    assert alone_.shape == many.shape == (37, 64, 64, 3) and len(frames_of(files[0])) == 16
    assert np.abs(alone_.astype(int) - many).mean() < 1.0
    figures = json.loads(report.read_text())
    assert [f["frames"] for f in figures["files"]] == [16, 37] and figures["frames"] == 53 and figures["batch"] == 2


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (
            ["--audio", "a.wav", "--audio", "b.wav", "--audio", "c.wav", "--output", "out"],
            "2 of --image and 3 of --audio",
        ),
        (["--audio", "a.wav", "--output", "a.mp4", "--output", "a.mp4"], "a.mp4 is named twice"),
        (["--audio", "a.wav", "--output", "out", "--seed", "1", "--seed", "2", "--seed", "3"], "3 of --seed"),
        (["--audio", "-", "--output", "out"], "--audio -: live sound is one"),
        (["--audio", "a.wav", "--output", "out", "--resume"], "--resume: several avatars at a time save no states"),
        (
            ["--audio", "a.wav", "--output", "out", "--gpus", "2"],
            "--gpus: several avatars at a time run in one process",
        ),
        (["--audio", "a.wav", "--output", "out", "--face", "f.npy"], "--face is of one person"),
        (["--audio", "a.wav", "--output", "out", "--batch", "0"], "--batch 0 must be at least 1"),
    ],
)
def test_what_several_refuse(tmp_path: Path, capsys, monkeypatch, more: list[str], word: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--image", "a.png", "--image", "b.png", *more]) == 2
    said = capsys.readouterr().err.strip()
    assert word in said and len(said.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_into_one_file_goes_the_last(tmp_path: Path, capsys, caplog) -> None:
    """As of any option that is given twice; and it is said."""
    more = ["--audio", "a.wav", "--output", str(tmp_path / "a.mp4")]
    assert main(["generate", "--image", "a.png", "--image", "b.png", *more]) == 2
    assert "--image b.png is used, the last of 2: for a video each give a folder" in caplog.text
    assert "a.wav" in capsys.readouterr().err
