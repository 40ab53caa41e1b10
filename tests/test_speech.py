"""Speech with a known mouth: espeak-ng's sounds in time with its audio, and the shapes they ask of the lips."""

# ruff: noqa: RUF001 (letters of the phonetic alphabet that look like Latin ones)

from __future__ import annotations

import logging

import numpy as np
import pytest

from joyavatar_core.training import espeak, mouth, speech, spoken, texts
from joyavatar_core.training.speech import HELD_OUT_SEED, KINDS, Speech, synthesize

needs_espeak = pytest.mark.skipif(not espeak.installed(), reason="espeak-ng is not installed on this machine")
SEEDS = [*range(12), *range(HELD_OUT_SEED, HELD_OUT_SEED + 6)]


@pytest.fixture(scope="module")
def clips() -> list[Speech]:
    return [synthesize(seed, 5.0) for seed in SEEDS]


def level(clip: Speech, start: float, end: float) -> float:
    part = clip.audio[max(0, round(start * 16_000)) : max(1, round(end * 16_000))]
    return float(np.sqrt(np.square(part).mean())) if len(part) else 0.0


def near(clip: Speech, start: float, end: float) -> np.ndarray:
    middles = (np.arange(len(clip.open)) + 0.5) / float(clip.fps)
    return (middles > start) & (middles < end)


def test_sounds_cover_the_clip_without_gaps(clips: list[Speech]) -> None:
    for clip in clips:
        assert clip.phones[0].start == 0 and clip.phones[-1].end == 5.0
        assert all(a.end == b.start and a.start < a.end for a, b in zip(clip.phones, clip.phones[1:], strict=False))
        assert all(phone.kind in KINDS and (phone.kind == "silence") == (not phone.label) for phone in clip.phones)


def test_lips_meet_for_every_bilabial_and_teeth_show_for_every_labiodental(clips: list[Speech]) -> None:
    for clip in clips:
        for phone in clip.phones:
            frames = near(clip, phone.start - 0.07, phone.end + 0.03)
            if phone.start < 0.1 or phone.end > 4.9 or not frames.any():
                continue
            if phone.kind == "bilabial":
                assert clip.open[frames].min() < 0.05
            if phone.kind == "labiodental":
                assert clip.teeth[frames].max() > 0.4


def test_mouth_is_shut_in_long_silence_and_open_in_long_open_vowels(clips: list[Speech]) -> None:
    vowels = []
    for clip in clips:
        for phone in clip.phones:
            length = phone.end - phone.start
            if phone.kind == "silence" and length > 0.4:
                frames = near(clip, phone.start + 0.1, phone.end - 0.15)
                assert (clip.open[frames] < 0.02).all()
                assert level(clip, phone.start + 0.02, phone.end - 0.02) < 5e-3  # babble fades
            if phone.kind == "open" and length > 0.1 and phone.end < 4.9:
                vowels += list(clip.open[near(clip, phone.start, phone.end)])
    assert np.mean(vowels) > 0.45


@needs_espeak
def test_sounds_are_where_their_labels_say(clips: list[Speech]) -> None:
    """p is silent before its release, s crosses zero more often than a, both by a wide margin."""
    closures, vowels, crossings = [], [], {"s": [], "a": []}
    for clip in clips:
        if clip.source == "babble":
            continue
        sign = np.signbit(clip.audio)
        for phone in clip.phones:
            length = phone.end - phone.start
            first, last = round((phone.start + 0.2 * length) * 16_000), round((phone.end - 0.2 * length) * 16_000)
            if phone.label == "p":
                closures.append(level(clip, phone.start + 0.002, phone.start + 0.018))
            if phone.kind == "open":
                vowels.append(level(clip, phone.start, phone.end))
            name = "s" if phone.label == "s" else "a" if phone.kind == "open" else ""
            if name and last > first + 100:
                crossings[name].append(np.diff(sign[first:last]).mean())
    assert np.median(closures) < 0.02 * np.median(vowels)
    assert np.median(crossings["s"]) > 3 * np.median(crossings["a"])


@needs_espeak
def test_a_seed_decides_the_clip_whatever_was_said_before() -> None:
    first = [synthesize(seed, 2.0) for seed in range(4)]
    for seed, before in reversed(list(enumerate(first))):
        again = synthesize(seed, 2.0)
        assert np.array_equal(again.audio, before.audio) and again.phones == before.phones
        assert np.array_equal(again.open, before.open) and again.source == before.source


@needs_espeak
def test_most_training_clips_and_all_held_out_ones_are_spoken() -> None:
    training = [synthesize(seed, 0.1).source == "babble" for seed in range(40)]
    assert 1 <= sum(training) <= 12
    assert all(synthesize(HELD_OUT_SEED + seed, 0.1).source.startswith("espeak-ng") for seed in range(8))


def test_held_out_voices_and_texts_are_never_heard_in_training() -> None:
    training, held_out = ({name for group in spoken.variants(side) for name in group} for side in (False, True))
    assert training and held_out and not training & held_out
    rng = np.random.default_rng(0)
    for language in texts.languages():
        sides = [{texts.sentence(rng, language, side) for _ in range(60)} for side in (False, True)]
        assert sides[0] and sides[1] and not sides[0] & sides[1]
        assert not any("{" in line or "[" in line for side in sides for line in side)


@needs_espeak
def test_every_language_and_variant_can_be_spoken() -> None:
    assert set(spoken.LANGUAGES) == set(texts.languages())
    with espeak.Espeak(0) as library:
        for names in spoken.LANGUAGES.values():
            assert all(library.has(name) for name in names)
        for side in (False, True):
            assert all(library.has(f"en-us+{name}") for group in spoken.variants(side) for name in group)


@needs_espeak
def test_stress_falls_on_the_marked_vowel() -> None:
    with espeak.Espeak(0) as library:
        said = library.say(espeak.Voice("en-us", 160, 50, 50), "banana")
        with pytest.raises(ValueError, match="no voice"):
            library.say(espeak.Voice("xx-none", 160, 50, 50), "banana")
    vowels = [stress for label, stress in zip(said.labels, said.stressed, strict=True) if label and label[0] in "aæəɐ"]
    assert vowels == [0.0, 1.0, 0.0]


def test_without_espeak_everything_is_babbled_after_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise OSError("espeak-ng is not installed")

    monkeypatch.setattr(espeak, "_load", missing)
    espeak.installed.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            sources = {synthesize(seed, 0.5).source for seed in (0, 1, HELD_OUT_SEED)}
    finally:
        espeak.installed.cache_clear()
    assert sources == {"babble"} and len(caplog.records) == 1


@pytest.mark.parametrize(
    ("label", "kind"),
    [
        ("", "silence"), ("m", "bilabial"), ("pʰ", "bilabial"), ("v", "labiodental"), ("uː", "rounded"),
        ("iː", "spread"), ("aɪ", "open"), ("tʃ", "sibilant"), ("ä", "open"), ("ɛ̃", "spread"), ("k", "other"),
        ("☃", "other"), ("(en)", "other"),
    ],
)  # fmt: skip
def test_kinds_of_sounds(label: str, kind: str) -> None:
    if label == "(en)":
        assert mouth.kind(label) in KINDS  # not IPA: no promise but that it does not raise
    else:
        assert mouth.kind(label) == kind


def test_a_diphthong_moves_and_a_consonant_takes_the_shape_of_its_vowel() -> None:
    loud = np.ones(201)
    moving = mouth.curves(mouth.timed(["aɪ"], [0.0], 1.0), loud)
    assert moving[0, 50] > 0.8 > 0.5 > moving[0, 150] and moving[1, 150] > moving[1, 50] + 0.3
    for vowel in ("u", "i"):
        _, wide, _ = mouth.curves(mouth.timed([vowel, "k", vowel], [0.0, 0.4, 0.5], 1.0), loud)
        assert abs(wide[90]) > 0.6


def test_speech_constants_are_those_of_the_parts() -> None:
    assert speech.SAMPLE_RATE == spoken.SAMPLE_RATE
