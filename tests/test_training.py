"""Training of the embedded transformer: sequences, data, weights and one small training."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from joyavatar_core import flow
from joyavatar_core.avatar import load_model
from joyavatar_core.cache import KVCache
from joyavatar_core.config import MODELS, AudioConfig, ModelConfig
from joyavatar_core.geometry import Geometry
from joyavatar_core.model import JoyAvatarDiT, Past
from joyavatar_core.policy import POLICIES, policy
from joyavatar_core.schedule import warp
from joyavatar_core.training import clips, common, encoded, flow_matching, preview, sequences
from joyavatar_core.training.encoded import EncodedClips
from joyavatar_core.training.sequences import Layout, Mixture

FLASH = policy("joyavatar-flash")
STEADY = Layout(FLASH, 5, (250.0, 500.0, 750.0, 1000.0))
SMALL = ModelConfig(
    dim=24, ffn_dim=32, layers=2, heads=2, in_channels=36, patch=(2, 2), text_dim=0, text_len=0, image_dim=64,
    audio=AudioConfig(kind="window", features=8, width=16, window=10, tokens=2, hidden=12),
)  # fmt: skip


def small_model() -> JoyAvatarDiT:
    torch.manual_seed(0)
    model = JoyAvatarDiT(SMALL).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval()


def test_sequence_of_steady_state_is_the_forward_of_inference():
    context = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert STEADY.positions() == (*context, 14, *range(15, 27))
    levels = sequences.sample_levels(torch.Generator(), STEADY, 2, Mixture(exact=1, clean_motion=0, sink_late=1))
    warped = [warp(t, 5.0) for t in (125, 250, 250, 250, 250, 250, 500, 750, 1000)]
    expected = [warped[0]] * 3 + [warped[1]] * 13 + [w for w in warped[5:] for _ in range(3)]
    assert torch.allclose(levels, torch.tensor(expected).expand(2, -1), atol=1e-3)


def test_teacher_forcing_equals_the_cache():
    """One forward with the past behind the mask = past first, its keys and values cached, then the window."""
    model, layout = small_model(), Layout(FLASH, 1, (250.0, 500.0))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 36, layout.latents, 4, 4, dtype=torch.double, generator=generator)
    levels = 1000 * torch.rand(1, layout.latents, dtype=torch.double, generator=generator)
    with torch.no_grad():
        condition = model.condition(image=torch.randn(1, 4, 64, dtype=torch.double, generator=generator))
        audio = model.audio(torch.randn(1, layout.latents, 10, 8, dtype=torch.double, generator=generator))
        joint, _ = model(x, levels, layout.positions(), condition, audio, None, layout.mask(4))
        _, kv = model(x[:, :, :3], levels[:, :3], (0, 1, 2), condition, audio.select(slice(0, 3)))
        cache = KVCache(
            layers=2, batch=1, block_tokens=12, heads=2, head_dim=12, sink_blocks=1, local_blocks=4,
            dtype=torch.double, device=torch.device("cpu"),
        )  # fmt: skip
        cache.commit(0, kv)
        past, rest = Past(cache, layout.positions()[:3]), slice(3, None)
        apart, _ = model(x[:, :, 3:], levels[:, 3:], layout.positions()[3:], condition, audio.select(rest), past)
    assert torch.allclose(joint[:, :, 3:], apart, atol=1e-12)
    assert apart.std() > 0.1


def test_mask_hides_the_future_from_finished_blocks_only():
    mask = Layout(FLASH, 2, (250.0,)).mask(1)
    assert mask is not None and mask.shape == (10, 10)
    assert mask[6:].all() and mask[:3, :3].all() and mask[3:6, :6].all()
    assert not mask[:3, 3:].any() and not mask[3:6, 6:].any()
    assert Layout(FLASH, 0, (1000.0,)).mask(1) is None


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(POLICIES)))
def test_every_sequence_is_a_forward_of_its_policy(seed: int, name: str):
    random_, chosen = random.Random(seed), policy(name)
    layout = sequences.sample_layout(random_, chosen, Mixture())
    assert layout.context <= chosen.context_blocks
    frames = sequences.sample_latents(random_, layout, 12, 0.5)
    positions = layout.positions()
    assert len(frames) == len(positions) == layout.latents and max(frames) < 36
    window = frames[layout.lead :]
    assert window == list(range(window[0], window[0] + len(window))) and window[0] % 3 == 0
    assert positions[layout.lead] == chosen.window_start(layout.context)
    if layout.context:
        assert frames[:3] == [0, 1, 2] and window[0] >= 3
    if layout.motion:
        assert frames[layout.lead - 1] == window[0] - 1
    levels = sequences.sample_levels(torch.Generator().manual_seed(seed), layout, 3, Mixture())
    assert levels.shape == (3, layout.latents) and (levels >= 0).all() and (levels <= 1000).all()
    assert (levels[:, layout.lead :] > 0).all()


def test_clips_that_are_too_short_are_refused():
    with pytest.raises(ValueError, match="9 are needed"):
        sequences.sample_latents(random.Random(0), STEADY, 8, 0.5)


# Data


def test_a_clip_survives_the_disk(tmp_path: Path):
    path = clips.write_clip(tmp_path, 3, frames=5, size=(64, 64))
    clip = clips.read_clip(path)
    assert clip.video.shape == (5, 64, 64, 3) and clip.audio.shape == (5000,) and clip.open.shape == (5,)
    drawn = [clips.drawn.sample_clip(3, 5, (64, 64), photo=photo).video for photo in (False, True)]
    candidates = [torch.from_numpy(v.copy()).float() for d in drawn for v in (d, d[:, :, ::-1])]
    assert min(float((clip.video.float() - v).abs().mean()) for v in candidates) < 6
    assert clips.list_clips(tmp_path) == [path]
    path.write_bytes(b"no clip")
    with pytest.raises(OSError, match="not a stored clip"):
        clips.read_clip(path)


def test_mirroring_takes_the_boxes_along():
    clip = clips.drawn.sample_clip(1, 2, (64, 64))
    twice = clips._mirrored(clips._mirrored(clip))
    assert (twice.video == clip.video).all() and abs(twice.mouth - clip.mouth).max() < 1e-4
    assert (clips._mirrored(clip).mouth[:, 2] > clips._mirrored(clip).mouth[:, 0]).all()


def test_cell_shares_add_up_to_the_box():
    geometry = Geometry(64, 64, spatial=16, patch=(1, 1))
    boxes = torch.tensor([[8.0, 10.0, 40.0, 50.0]]).expand(5, 4)
    shares = encoded.cell_shares(boxes, geometry)
    assert shares.shape == (2, 4, 4)
    assert torch.allclose(shares.sum((1, 2)), torch.full((2,), 32 * 40 / 256))
    assert shares[0, 0, 3] == 0 and shares[0, 1, 1] == 1


# Weights


def test_masters_keep_steps_that_bfloat16_would_lose():
    model = nn.Linear(2, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    weights = common.Weights(model, 0.9)
    optimiser = torch.optim.SGD(weights.master.values(), lr=1e-3)
    for step in range(10):
        model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
        assert weights.collect() == pytest.approx(2**0.5)
        optimiser.step()
        weights.publish(step)
    assert torch.allclose(weights.master["weight"], torch.full((1, 2), 0.99))
    assert (model.weight == torch.tensor(0.99).bfloat16()).all()
    assert (weights.average["weight"] > 0.99).all()


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 24), (2, 24, 8)])
def test_orthogonal_levels_singular_values(shape: tuple[int, ...]):
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(common.orthogonal(m))
    assert values.min() > 0.3 and values.max() < 1.3


def test_muon_descends():
    target = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    p = nn.Parameter(torch.zeros(8, 8))
    optimiser = common.Muon([p], lr=0.05, weight_decay=0.0)
    for _ in range(200):
        p.grad = p.detach() - target
        optimiser.step()
    assert (p - target).norm() < 0.2 * target.norm()


# Training


def random_clips(count: int) -> EncodedClips:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).half()

    share = torch.zeros(count, 30, 4, 4).half()
    share[:, :, 2, 1:3] = 1
    steady = normal(count, 1, 16, 4, 4).expand(-1, 30, -1, -1, -1).contiguous()
    image, audio = normal(count, 8, 16, 4, 4), normal(count, 30, 10, 256)
    return EncodedClips(steady, image, audio, share, share, torch.zeros(count, 117))


@pytest.fixture(autouse=True)
def small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    audio = AudioConfig(kind="window", features=256, width=16, window=10, tokens=2, hidden=12)
    small = replace(SMALL, dim=32, patch=(4, 4), image_dim=256, audio=audio)
    monkeypatch.setitem(MODELS, "small", small)


def small_training(tmp_path: Path) -> flow_matching.Training:
    recipe = flow_matching.Recipe(model="small", tokens=200, held_out=2, warmup_steps=1, average=0.5)
    return flow_matching.begin(recipe, tmp_path, random_clips(6))


def test_training_learns_and_resumes_where_it_stopped(tmp_path: Path):
    state = small_training(tmp_path)
    state.held_out = state.data  # four clips teach nothing about a fifth
    before = flow_matching.evaluate(state)
    for _ in range(30):
        flow_matching.train_step(state)
    flow_matching.save(state)
    for _ in range(4):
        flow_matching.train_step(state)
    after = flow_matching.evaluate(state)
    assert after["all_250"] < before["all_250"] and after["start"] < before["start"]
    again = small_training(tmp_path)
    flow_matching.resume(again)
    for _ in range(4):
        flow_matching.train_step(again)
    assert again.steps == 34
    for name, p in state.weights.master.items():
        assert torch.equal(p, again.weights.master[name]), name


def test_saved_transformer_loads(tmp_path: Path):
    state = small_training(tmp_path)
    flow_matching.save(state)
    model = load_model(tmp_path / "transformer.safetensors")
    assert model.config == state.model.config
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_motion_frame_has_no_loss_and_the_mouth_counts_more():
    layout = Layout(FLASH, 1, (250.0, 500.0, 750.0, 1000.0))
    data = random_clips(2)
    batch = flow_matching.make_batch(data, layout, torch.arange(2), (4, 4), Mixture(), 0)
    recipe = flow_matching.Recipe()
    perfect = flow.velocity(batch.x0, batch.noise)

    def loss_with_error_at(latent: int, row: int) -> float:
        v = perfect.clone()
        v[:, :, latent, row, 1] += 1
        return float(flow_matching.flow_loss(batch, v, recipe))

    assert loss_with_error_at(3, 0) == 0
    assert loss_with_error_at(4, 0) > loss_with_error_at(0, 0) > 0
    assert loss_with_error_at(4, 2) > 3 * loss_with_error_at(4, 0)


def test_recipe_refuses_nonsense():
    with pytest.raises(ValueError, match="optimiser"):
        flow_matching.Recipe(optimiser="sgd")
    with pytest.raises(ValueError, match="more than the 6"):
        flow_matching.begin(replace(flow_matching.Recipe(), held_out=6), Path("."), random_clips(6))


def test_ruler_reads_the_mouth():
    clip = clips.drawn.sample_clip(5, 60, (128, 128))
    video = encoded.as_video(torch.from_numpy(clip.video))[0]
    opening = torch.tensor([p.open for p in clip.poses])
    patches = preview.mouth_patches(video, torch.from_numpy(clip.mouth[0]))
    ruler = preview.fit_ruler(patches[::2], opening[::2])
    assert preview.correlation(preview.read_ruler(ruler, patches[1::2]), opening[1::2]) > 0.8
    assert preview.correlation(opening, torch.ones(60)) == 0
