"""wav2vec2 windows: token times, FantasyTalking's windows by absolute time, streaming equals at once, parity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from joyavatar_core.audio import SAMPLE_RATE, AudioTrack
from joyavatar_core.geometry import Geometry
from joyavatar_core.wav2vec import (
    FIELD,
    HOP,
    UNTIL_FINISHED,
    TokenWindows,
    Wav2Vec2Whole,
    Wav2Vec2Windows,
    load_wav2vec2,
)

from .sound import noise, stream_features, track_of

transformers = pytest.importorskip("transformers")
GEOMETRY = Geometry(256, 256)
LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
GROUP_NORM = {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False}


def tiny_config(**changes):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 32}
    convolutions = {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
    return transformers.Wav2Vec2Config(**{**sizes, **convolutions, **GROUP_NORM, **changes})


def tiny_model(**changes):
    torch.manual_seed(0)
    return transformers.Wav2Vec2Model(tiny_config(**changes)).eval()


def local_model():
    """A model whose tokens see their own samples only: no attention, no positions, norms over channels."""
    model = tiny_model(**LAYER_NORM)
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.attention.out_proj.weight.zero_()
            layer.attention.out_proj.bias.zero_()
        for parameter in model.encoder.pos_conv_embed.parameters():
            parameter.zero_()
        model.encoder.pos_conv_embed.conv.parametrizations.weight.original1.fill_(1.0)
    return model


# token windows


def test_windows_at_16_fps():
    windows = TokenWindows(GEOMETRY)
    assert (windows.half, windows.width) == (6, 21)
    assert [windows.of(i).start for i in range(4)] == [-14, -2, 10, 23]
    assert all(len(windows.of(i)) == 21 for i in range(100))


@pytest.mark.parametrize(("fps", "width"), [(16, 21), (23, 17), (25, 17)])
def test_windows_agree_with_fantasy_talking(fps, width):
    """81 frames: widths and valid counts that its release gives (checkpoint note 3.2; 25 fps has 2 tokens a frame)."""
    windows = TokenWindows(Geometry(256, 256, fps=fps))
    assert windows.width == width
    if fps == 23:
        tokens = 176  # 81 frames at 50 / 23 tokens
        valid = [len(range(max(w.start, 0), min(w.stop, tokens))) for w in map(windows.of, range(21))]
        assert valid[:3] == [6, 14, 17] and set(valid[2:-1]) == {17} and valid[-1] in (14, 15)


@pytest.mark.parametrize("fps", [12, 16, 24, 25, 30])
def test_windows_are_centred_on_their_frames(fps):
    geometry = Geometry(256, 256, fps=fps)
    for latent in range(1, 200):
        window = TokenWindows(geometry).of(latent)
        token_time = ((window.start + window.stop - 1) / 2 * HOP + FIELD / 2) / SAMPLE_RATE
        frames = geometry.frames_of_latent(latent)
        assert abs(token_time - (frames.start + frames.stop) / 2 / fps) < 0.03


# tokens and time


def test_impulse_lights_exactly_the_tokens_over_it():
    model, at = local_model(), 20_000
    front = Wav2Vec2Windows(model, GEOMETRY, history=1.2, normalise=False)
    silent, sounding = torch.zeros(40_000), torch.zeros(40_000)
    sounding[at] = 1.0
    quiet, loud = (front.features(track_of(s), range(9)) for s in (silent, sounding))
    assert torch.equal(quiet.valid, loud.valid)
    changed = (quiet.tokens - loud.tokens).abs().amax(-1) > 1e-6
    for latent in range(9):
        first = max(0, front.windows.of(latent).start)
        for slot in range(int(quiet.valid[latent].sum())):
            token = first + slot
            assert bool(changed[latent, slot]) == (HOP * token <= at < HOP * token + FIELD), (latent, token)
    assert changed.any()


def test_first_latent_and_end_are_clipped_and_padded_on_the_right():
    front = Wav2Vec2Windows(tiny_model(), GEOMETRY, history=2.0)
    features = front.features(track_of(noise(SAMPLE_RATE)), range(6))  # 49 tokens of sound
    counts = features.valid.sum(1).tolist()
    assert features.tokens.shape == (6, 21, 64)
    assert counts == [7, 19, 21, 21, 14, 1]
    assert all(row[:n].all() and not row[n:].any() for row, n in zip(features.valid, counts, strict=True))
    assert features.tokens[~features.valid].count_nonzero() == 0
    assert (features.tokens[features.valid].abs().sum(-1) > 0).all()


def test_latents_beyond_the_sound_see_its_silence():
    front = Wav2Vec2Windows(tiny_model(), GEOMETRY, history=2.0)
    track = track_of(noise(SAMPLE_RATE // 2))
    track.drop(track.end)
    far = front.features(track, range(300, 303))
    assert far.valid.all() and far.tokens.isfinite().all()
    silent = front.features(track_of(torch.zeros(1)), range(300, 303))
    assert torch.equal(far.tokens, silent.tokens)


# streaming


@pytest.mark.parametrize("norms", [GROUP_NORM, LAYER_NORM])
@pytest.mark.parametrize("source", [(8000, 2, 0.001), (44100, 1, 0.1), (48000, 1, 1.0)])
def test_regular_chunks_give_the_same_tokens(norms, source):
    rate, channels, seconds = source
    front, samples = Wav2Vec2Windows(tiny_model(**norms), GEOMETRY, history=1.2), noise(channels, int(2.1 * rate))
    whole = front.features(track_of(samples, rate), range(9))
    cuts = range(0, samples.shape[1], int(rate * seconds))
    tokens, valid = stream_features(Wav2Vec2Windows(front.encoder.model, GEOMETRY, 1.2), samples, rate, cuts, 9)
    assert torch.equal(tokens, whole.tokens) and torch.equal(valid, whole.valid)


@settings(max_examples=6, deadline=None)
@given(source=st.sampled_from([(8000, 2), (44100, 1), (48000, 1)]), cuts=st.lists(st.floats(0, 1), max_size=8))
def test_wav2vec_does_not_see_the_cutting(source, cuts):
    rate, channels = source
    front, samples = Wav2Vec2Windows(tiny_model(), GEOMETRY, history=1.2), noise(channels, int(1.4 * rate))
    whole = front.features(track_of(samples, rate), range(6))
    tokens, valid = stream_features(front, samples, rate, [int(c * samples.shape[1]) for c in cuts], 6)
    assert torch.equal(tokens, whole.tokens) and torch.equal(valid, whole.valid)


def test_any_range_and_any_order_give_the_same_tokens():
    front, track = Wav2Vec2Windows(tiny_model(), GEOMETRY, history=1.2), track_of(noise(48000))
    whole = front.features(track, range(12))
    other = track_of(noise(48000, seed=1))
    for latents in (range(4, 8), range(9, 12), range(1), range(3, 3)):
        front.features(other, range(3))  # the memo must not leak from one sound to another
        part = front.features(track, latents)
        rows = slice(latents.start, latents.stop)
        assert torch.equal(part.tokens, whole.tokens[rows]) and torch.equal(part.valid, whole.valid[rows])


@pytest.mark.parametrize("fps", [16, 24, 25, 30, 60])
def test_needs_and_keeps_are_enough_and_tight(fps):
    geometry = Geometry(256, 256, fps=fps)
    front, samples = Wav2Vec2Windows(tiny_model(), geometry, history=1.2), noise(6 * SAMPLE_RATE)
    latents = range(18, 21)
    whole = front.features(track_of(samples), latents)
    needs, keeps = front.needs(21), front.keeps(18)
    track = track_of(samples[:needs], finish=False)
    track.drop(keeps)
    part = front.features(track, latents)
    assert torch.equal(part.tokens, whole.tokens) and part.valid.all()
    with pytest.raises(ValueError, match="have come"):
        front.features(track_of(samples[: needs - 1], finish=False), latents)
    track.drop(keeps + 1)
    with pytest.raises(ValueError, match="dropped"):
        front.features(track, latents)
    end_of_block = SAMPLE_RATE * geometry.frames_of_latents(21) / fps
    assert 0 <= needs - end_of_block <= 4 * HOP + FIELD
    assert front.needs(0) == front.keeps(0) == 0


def test_window_is_bounded_over_an_hour():
    front = Wav2Vec2Windows(tiny_model(), GEOMETRY)
    spans = {front.needs(3 * b + 3) - front.keeps(3 * b) for b in range(20, 4800, 97)}
    assert spans == {HOP * 404 + FIELD - HOP}
    track, sizes = AudioTrack(), []
    for block in range(400):
        track.push(torch.zeros(12000), SAMPLE_RATE)
        track.drop(front.keeps(3 * block))
        sizes.append(track.nbytes())
    assert len(set(sizes[50:])) == 1


# normalisation


def input_of(samples, latents, **options):
    """What the model is given for a block of latents."""
    model, given = tiny_model(), []
    model.feature_extractor.register_forward_pre_hook(lambda _, args: given.append(args[0][0]))
    Wav2Vec2Windows(model, GEOMETRY, history=1.2, **options).features(track_of(samples), latents)
    assert len(given) == 1
    return given[0]


def test_sound_is_normalised_and_silence_stays_silent():
    samples = 0.1 * noise(40_000) + 0.5
    given = input_of(samples, range(3, 6))
    assert abs(float(given.mean())) < 1e-5 and float(given.std()) == pytest.approx(1, abs=1e-3)
    assert input_of(torch.zeros(40_000), range(3, 6)).count_nonzero() == 0
    assert input_of(torch.full((40_000,), 0.5), range(3, 6)).count_nonzero() == 0
    assert float(input_of(1e-5 * samples, range(3, 6)).std()) < 0.01
    first = Wav2Vec2Windows(tiny_model(), GEOMETRY, history=1.2).keeps(3)
    assert torch.equal(input_of(samples, range(3, 6), normalise=False), samples[first:][: len(given)])


def test_zeros_after_the_end_take_no_part_in_the_statistics():
    samples = noise(8000) + 0.3
    given = input_of(samples, range(3))
    assert given[8000:].count_nonzero() == 0 and len(given) > 10_000
    expected = (samples - samples.mean()) / (samples.var(correction=0) + 1e-7).sqrt()
    torch.testing.assert_close(given[:8000], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norms", [GROUP_NORM, LAYER_NORM])
def test_loudness_and_offset_do_not_matter(norms):
    front, samples = Wav2Vec2Windows(tiny_model(**norms), GEOMETRY, history=1.2), noise(2 * SAMPLE_RATE)
    tokens = front.features(track_of(samples), range(6)).tokens
    louder = front.features(track_of(samples * 3 + 0.1), range(6)).tokens
    torch.testing.assert_close(louder, tokens, rtol=0, atol=1e-3)


# parity with the whole utterance


@pytest.mark.parametrize("norms", [GROUP_NORM, LAYER_NORM])
@pytest.mark.parametrize("layers", ["last", "all"])
def test_window_over_the_whole_clip_is_the_whole_mode(norms, layers):
    """A clip within the history that ends with a block's window: the last block is encoded from the same samples."""
    model = tiny_model(**norms)
    windows, whole = Wav2Vec2Windows(model, GEOMETRY, layers=layers), Wav2Vec2Whole(model, GEOMETRY, layers=layers)
    track = track_of(noise(windows.needs(9)))
    a, b = windows.features(track, range(6, 9)), whole.features(track, range(6, 9))
    assert a.tokens.shape[-1] == windows.channels == whole.channels == (64 if layers == "last" else 3 * 64)
    assert torch.equal(a.valid, b.valid)
    torch.testing.assert_close(a.tokens, b.tokens, rtol=0, atol=1e-6)


def test_without_attention_every_block_is_the_whole_mode():
    """Tokens that see only their own samples, same statistics: streaming loses nothing, at any block."""
    model, track = local_model(), track_of(noise(3 * SAMPLE_RATE))
    windows = Wav2Vec2Windows(model, GEOMETRY, history=1.2, normalise=False).features(track, range(12))
    whole = Wav2Vec2Whole(model, GEOMETRY, normalise=False).features(track, range(12))
    assert torch.equal(windows.valid, whole.valid)
    torch.testing.assert_close(windows.tokens, whole.tokens, rtol=0, atol=1e-5)


def test_with_attention_the_missing_future_makes_the_difference():
    model, track = tiny_model(**LAYER_NORM), track_of(noise(3 * SAMPLE_RATE))
    windows, whole = Wav2Vec2Windows(model, GEOMETRY), Wav2Vec2Whole(model, GEOMETRY)
    a, b = windows.features(track, range(12)).tokens, whole.features(track, range(12)).tokens
    assert 1e-4 < (a - b).norm() / b.norm() < 0.2


def test_whole_mode_waits_for_the_end_and_refuses_long_sound():
    front = Wav2Vec2Whole(tiny_model(), GEOMETRY, limit=1.0)
    assert front.needs(3) == UNTIL_FINISHED and front.needs(0) == front.keeps(100) == 0
    with pytest.raises(ValueError, match="finish"):
        front.features(track_of(noise(8000), finish=False), range(3))
    with pytest.raises(ValueError, match="limit"):
        front.features(track_of(noise(16001)), range(3))


@pytest.mark.parametrize("length", [0, 1, 399, 400, 5000])
def test_very_short_sound(length):
    model, track = tiny_model(), track_of(noise(length)) if length else AudioTrack()
    track.finish()
    for front in (Wav2Vec2Windows(model, GEOMETRY), Wav2Vec2Whole(model, GEOMETRY)):
        features = front.features(track, range(3))
        assert features.valid.any(1).all() and features.tokens.isfinite().all()


# arguments and files


def test_bad_arguments():
    model = tiny_model()
    with pytest.raises(ValueError, match="lookahead"):
        Wav2Vec2Windows(model, GEOMETRY, lookahead_tokens=3)
    with pytest.raises(ValueError, match="history"):
        Wav2Vec2Windows(model, GEOMETRY, history=0.5)
    with pytest.raises(ValueError, match="layers"):
        Wav2Vec2Windows(model, GEOMETRY, layers="first")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="per 160 samples"):
        Wav2Vec2Windows(tiny_model(conv_stride=(5, 2, 2, 2, 2, 2, 1)), GEOMETRY)


def same_output(model, other):
    samples = noise(1, 4000)
    with torch.no_grad():
        return torch.allclose(model(samples).last_hidden_state, other(samples).last_hidden_state, atol=1e-6)


def test_load_folder(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = load_wav2vec2(tmp_path)
    assert same_output(model, loaded) and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert same_output(model, load_wav2vec2(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("norms", [GROUP_NORM, LAYER_NORM])
@pytest.mark.parametrize("old_names", [False, True])
def test_load_bare_file_of_a_ctc_model(tmp_path, norms, old_names):
    torch.manual_seed(0)
    ctc = transformers.Wav2Vec2ForCTC(tiny_config(**norms)).eval()
    tensors = {k: t.contiguous() for k, t in ctc.state_dict().items()}
    if old_names:
        for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
            tensors = {k.replace(f"parametrizations.weight.{new}", old): t for k, t in tensors.items()}
    save_file(tensors, tmp_path / "encoder.safetensors")
    assert same_output(ctc.wav2vec2, load_wav2vec2(tmp_path / "encoder.safetensors"))


def test_load_refuses_what_is_not_a_model(tmp_path):
    with pytest.raises(OSError, match=r"config\.json"):
        load_wav2vec2(tmp_path / "nowhere")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(OSError, match="broken"):
        load_wav2vec2(tmp_path / "broken.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a wav2vec2 model"):
        load_wav2vec2(tmp_path / "other.safetensors")
    tensors = {k: t.contiguous() for k, t in tiny_model().state_dict().items()}
    del tensors["encoder.layers.1.final_layer_norm.weight"]
    save_file(tensors, tmp_path / "partial.safetensors")
    with pytest.raises(ValueError, match="missing"):
        load_wav2vec2(tmp_path / "partial.safetensors")
    save_file(
        tensors | {"encoder.layers.1.final_layer_norm.weight": torch.zeros(64), "x.y": torch.zeros(1)},
        tmp_path / "more.safetensors",
    )
    with pytest.raises(ValueError, match=r"x\.y"):
        load_wav2vec2(tmp_path / "more.safetensors")
