"""The loss of what is seen: which frames it looks at, and that it says how even a motion is."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from joyavatar_core.policy import policy
from joyavatar_core.training import clips, encoded, seen
from joyavatar_core.training.batches import Batch, make_batch
from joyavatar_core.training.common import autocast
from joyavatar_core.training.liveliness import liveliness_error
from joyavatar_core.training.sequences import Layout, Mixture, steady

from .small_training import PRESET, random_clips, small_autoencoder

FLASH = policy("joyavatar-flash")


@pytest.fixture(scope="module")
def loss(tmp_path_factory: pytest.TempPathFactory) -> seen.SeenLoss:
    """Its truth is what its decoder makes of the true latents: random ones have no frames."""
    folder = tmp_path_factory.mktemp("seen")
    found = seen.load_seen_loss(small_autoencoder(folder / "autoencoder.safetensors"), 1.0, folder)

    def truth(batch: Batch, run: slice, crops: seen.Crops) -> torch.Tensor:
        with torch.no_grad(), autocast():
            return found.decoder.decode_unclamped(seen._cut(batch.true[:, :, run], crops))[0].float()

    return replace(found, truth=truth, cells=2)


def batch(layout: Layout | None = None) -> Batch:
    return make_batch(random_clips(6), layout or steady(FLASH), torch.arange(2), PRESET.patch, Mixture(), seed=1)


def of_window(loss: seen.SeenLoss, batch: Batch, made: torch.Tensor) -> float:
    return float(loss.of_window(batch, made, random.Random(0)).detach())


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("layout", [steady(FLASH), Layout(FLASH, 0, FLASH.window_steps(0)[0].timesteps)])
def test_only_the_first_blocks_of_the_window_are_looked_at(loss: seen.SeenLoss, layout: Layout, blocks: int) -> None:
    """And there is a gradient at all of their latents, and none elsewhere."""
    one = batch(layout)
    made = one.true.clone().requires_grad_()
    replace(loss, blocks=blocks).of_window(one, made + 0.1, random.Random(0)).backward()
    assert made.grad is not None
    looked = made.grad.abs().amax(dim=(0, 1, 3, 4)) > 0
    stop = min(layout.lead + 3 * blocks, layout.latents)
    assert looked.tolist() == [layout.lead <= i < stop for i in range(layout.latents)]


def test_the_truth_costs_nothing_and_a_weight_is_a_weight(loss: seen.SeenLoss) -> None:
    one = batch()
    wrong = one.true + 0.5
    assert of_window(loss, one, one.true) == 0
    assert of_window(replace(loss, weight=0.5), one, wrong) == pytest.approx(0.5 * of_window(loss, one, wrong))


def test_what_was_made_before_the_window_counts_as_it_was_made(loss: seen.SeenLoss) -> None:
    """A window that is true beside a frame before it that is not makes a jump."""
    one = batch()
    assert of_window(loss, replace(one, x0=one.x0 + 0.5), one.true) > 0


def moving(step: int) -> torch.Tensor:
    """A bright square that goes `step` pixels to the right with every frame: [1, 3, 5, 64, 64]."""
    video = -torch.ones(1, 3, 5, 64, 64)
    for t in range(5):
        video[:, :, t, 24:40, 8 + step * t : 24 + step * t] = 1
    return video


def test_what_moves_less_or_smears_is_told_and_what_is_a_little_aside_is_not() -> None:
    true, even = moving(4), torch.ones(1, 1, 5, 64, 64)
    aside = torch.roll(true, 1, dims=4)
    ghost = (torch.roll(true, 3, dims=4) + torch.roll(true, -3, dims=4)) / 2
    still = torch.cat([true[:, :, :1], true[:, :, :1], true[:, :, 2:3], true[:, :, 2:3], true[:, :, 4:]], dim=2)
    errors = [float(liveliness_error(made, true, even)) for made in (true, aside, ghost, still)]
    assert errors[0] == 0 and 1.5 * errors[1] < errors[2] < errors[3]
    blurred = torch.nn.functional.avg_pool2d(true.flatten(0, 2)[:, None], 5, 1, 2).view_as(true)
    assert liveliness_error(blurred, true, even, edges=1.0) > 2 * liveliness_error(blurred, true, even, 0.0)


def test_mouths_weigh_as_they_are_told(loss: seen.SeenLoss) -> None:
    cells = torch.ones(1, 1, 3, 2, 2)
    cells[0, 0, 1, 0, 0] = 5
    weights = seen._of_frames(cells, 4)
    assert weights.shape == (1, 1, 9, 8, 8) and weights.mean() == pytest.approx(1)
    heavy = weights == weights.max()
    assert heavy[0, 0].flatten(1).sum(1).tolist() == [0, 16, 16, 16, 16, 0, 0, 0, 0]
    assert heavy[0, 0, 1:5, :4, :4].all()


def test_the_square_is_about_the_mouth_and_inside_the_picture(loss: seen.SeenLoss) -> None:
    mouth = torch.zeros(3, 9, 12)
    mouth[:, 7, 2] = 1
    drawn = [replace(loss, cells=4)._crop(mouth, random.Random(seed)) for seed in range(50)]
    assert all(rows.stop - rows.start == 4 == columns.stop - columns.start for rows, columns in drawn)
    assert all(0 <= rows.start <= 5 and 0 <= columns.start <= 8 for rows, columns in drawn)
    shown = sum(rows.start <= 7 < rows.stop and columns.start <= 2 < columns.stop for rows, columns in drawn)
    assert shown > 30


def test_a_file_is_loaded_frozen(tmp_path: Path) -> None:
    found = seen.load_seen_loss(small_autoencoder(tmp_path / "autoencoder.safetensors"), 0.3, tmp_path)
    assert found.weight == 0.3 and not any(p.requires_grad for p in found.decoder.parameters())


@pytest.mark.parametrize("context", [0, 1])
def test_true_frames_are_those_of_the_window_at_the_same_place(context: int, tmp_path: Path) -> None:
    """Of whole pictures and of close-ups, which know where they were cut."""
    path = small_autoencoder(tmp_path / "autoencoder.safetensors")
    for seed in (3, 4):
        clips.write_clip(tmp_path, seed, 57, (128, 192))
    store = encoded.LatentStore(clips.list_clips(tmp_path), tmp_path, path, PRESET.patch)
    store.encode()
    (whole,) = store.load()
    layout = Layout(FLASH, context, FLASH.window_steps(context + FLASH.lead_blocks)[-1].timesteps[:2])
    run = slice(layout.lead - layout.motion, layout.lead + 3)
    for cells in (0, 4):
        data = whole.close_ups(torch.tensor([1, 0]), cells, PRESET.patch, random.Random(5)) if cells else whole
        one = make_batch(data, layout, torch.tensor([1, 0]), PRESET.patch, Mixture(), seed=2)
        crops = [(slice(1, 3), slice(0, 2)), (slice(0, 2), slice(2, 4))]
        found = seen.StoredFrames(tmp_path, 16)(one, run, crops)
        assert found.shape == (2, 3, 4 * (3 + layout.motion) - 3, 32, 32)
        for i, (rows, columns) in enumerate(crops):
            video = encoded.as_video(clips.read_clip(clips.clip_path(tmp_path, int(one.seeds[i]))).video)[0]
            y, x = (16 * int(first) for first in one.corner[i])
            first = 4 * int(one.frames[i, run][0])
            there = video[:, first : first + found.shape[2], y:, x:]
            assert torch.equal(found[i], there[..., 16 * rows.start :, 16 * columns.start :][..., :32, :32])
    with pytest.raises(OSError, match="clip_000000004"):
        clips.clip_path(tmp_path, 4).unlink()
        seen.StoredFrames(tmp_path, 16)(one, run, crops)
