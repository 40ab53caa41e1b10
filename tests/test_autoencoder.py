"""The light autoencoder: streaming equals one shot, folding equals not folding, the image channels settle."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from joyavatar_core.autoencoder import AUTOENCODERS, AutoencoderConfig, LightAutoencoder
from joyavatar_core.conditioning import image_channels

SMALL = AutoencoderConfig(
    latent_channels=4,
    patch=2,
    encoder_widths=(4, 6, 8),
    decoder_widths=(8, 6, 6, 4),
    encoder_blocks=(1, 2, 2),
    decoder_blocks=(1, 2, 1),
    last_blocks=1,
    latent_mean=(0.1, 0.2, 0.3, 0.4),
    latent_std=(1.0, 2.0, 0.5, 1.5),
)


@pytest.fixture(scope="module")
def autoencoder() -> LightAutoencoder:
    torch.manual_seed(0)
    return LightAutoencoder(SMALL).double().eval()


def compositions(n: int) -> list[tuple[int, ...]]:
    return [(n,)] + [(k, *rest) for k in range(1, n) for rest in compositions(n - k)]


@torch.no_grad()
@pytest.mark.parametrize("split", compositions(5))
@pytest.mark.parametrize("folded", [False, True])
def test_streaming_decode_is_one_shot_for_every_split(
    autoencoder: LightAutoencoder, split: tuple[int, ...], folded: bool
) -> None:
    decoder = autoencoder.folded() if folded else autoencoder
    latents = torch.randn(2, 4, 5, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = autoencoder.decode(latents)
    state, pieces = None, []
    for stop, size in zip(accumulate(split), split, strict=True):
        piece, state = decoder.decode_stream(latents[:, :, stop - size : stop], state)
        pieces.append(piece)
    assert whole.shape == (2, 3, 17, 32, 48) and whole.std() > 0.01
    assert (torch.cat(pieces, dim=2) - whole).abs().max() < 1e-12


@torch.no_grad()
def test_streaming_encode_is_one_shot(autoencoder: LightAutoencoder) -> None:
    video = torch.rand(1, 3, 17, 32, 48, dtype=torch.float64) * 2 - 1
    whole = autoencoder.encode(video)
    first, state = autoencoder.encode_stream(video[:, :, :5], None)
    second, _ = autoencoder.encode_stream(video[:, :, 5:], state)
    assert whole.shape == (1, 4, 5, 2, 3)
    assert (torch.cat([first, second], dim=2) - whole).abs().max() < 1e-12


@torch.no_grad()
def test_first_latent_is_the_first_frame_alone(autoencoder: LightAutoencoder) -> None:
    video = torch.rand(1, 3, 9, 32, 32, dtype=torch.float64) * 2 - 1
    other = video.clone()
    other[:, :, 1:] = 0
    a, b = autoencoder.encode(video), autoencoder.encode(other)
    assert torch.equal(a[:, :, 0], b[:, :, 0]) and not torch.allclose(a[:, :, 1], b[:, :, 1])


@torch.no_grad()
def test_image_channels_of_an_endless_clip(autoencoder: LightAutoencoder) -> None:
    """What is encoded once and repeated equals encoding the whole clip, and one latent fewer would not."""
    picture = torch.rand(1, 3, 32, 32, dtype=torch.float64) * 2 - 1
    channels = image_channels(autoencoder, picture)
    clip = torch.cat([picture[:, :, None], picture.new_zeros(1, 3, 4 * 15, 32, 32)], dim=2)
    whole = autoencoder.encode(clip)
    assert (channels.at(range(16))[:, 4:] - whole).abs().max() < 1e-12
    assert torch.equal(channels.at([0])[:, :4], torch.ones(1, 4, 1, 2, 2, dtype=torch.float64))
    assert channels.at(range(1, 40))[:, :4].abs().max() == 0
    last = autoencoder.settled_latents - 1
    assert not torch.equal(whole[:, :, last - 1], whole[:, :, last])


def test_published_keys_and_shapes() -> None:
    """taew2_1: the names and shapes of its file."""
    with torch.device("meta"):
        state = LightAutoencoder(AUTOENCODERS["taew2_1"]).state_dict()
    assert len(state) == 128
    assert state["encoder.0.weight"].shape == (64, 3, 3, 3)
    assert state["encoder.2.conv.weight"].shape == (64, 128, 1, 1)
    assert state["encoder.12.conv.weight"].shape == (64, 64, 1, 1)
    assert state["encoder.17.weight"].shape == (16, 64, 3, 3)
    assert state["decoder.1.weight"].shape == (256, 16, 3, 3)
    assert state["decoder.3.conv.0.weight"].shape == (256, 512, 3, 3)
    assert state["decoder.7.conv.weight"].shape == (256, 256, 1, 1)
    assert state["decoder.13.conv.weight"].shape == (256, 128, 1, 1)
    assert state["decoder.14.weight"].shape == (64, 128, 3, 3)
    assert state["decoder.22.weight"].shape == (3, 64, 3, 3)
    assert not any(name.endswith("skip.weight") for name in state)


def test_first_piece_must_hold_one_frame_more(autoencoder: LightAutoencoder) -> None:
    with pytest.raises(ValueError, match="4 pixel frames"):
        autoencoder.encode(torch.zeros(1, 3, 4, 32, 32, dtype=torch.float64))
