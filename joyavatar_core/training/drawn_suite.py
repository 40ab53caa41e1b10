"""The held-out suite: the embedded model on drawn people, styles, voices and texts that training never saw.

Every clip follows from its seed: who, what is said, the motion of the truth. The model gets what a user gives, the
first picture and the sound, and runs as the engine's own stream. What comes out is read by the mouth reader and set
against the truth of the drawing; `Report` has a figure, a 95 % interval over clips and a target for each question.

Shape legend: T pixel frames, H W pixel size, C clips. Videos are uint8 [T, H, W, 3] RGB.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..autoencoder import TEMPORAL
from ..avatar import Avatar
from ..generate import from_uint8, to_uint8
from ..measures import curves, drift, pictures, seams, statistics, sync
from ..measures.face import Face
from ..measures.mouth_reader import MouthReader, Reading
from ..measures.statistics import Interval, LoudnessPredictor
from ..measures.video import Blocks
from ..media.opencv import opencv
from ..policy import RolloutPolicy
from ..view import view_for
from .clips import SIZES
from .drawn import Clip, Image, sample_clip
from .drawn_sounds import Heard, mouth_of_sounds, spans_of
from .mouth_reader import QUANTITIES
from .speech import Speech, synthesize
from .workers import in_order, pool

log = logging.getLogger(__name__)

FIRST_SEED = 990_000_000
FIT_SEED = 700_000_000  # training clips whose loudness and truth the predictor is fitted on
_LONG_OFFSET = 100_000
_LAST = 5.0  # seconds at the end of a clip that are compared with its picture
_SILENCE_MARGIN = 0.12  # seconds from a sound that do not count as silence: two frames
_AROUND = 0.15  # of a face's height, on each side of it: where its sharpness is looked at, for heads move
_MOVING = 0.05  # change of opening, width or teeth from one frame to the next that counts as a moving mouth


@dataclass(frozen=True)
class Suite:
    """What is run: `clips` of `seconds`, in turn in all sizes (H, W), and `long_clips` of `long_seconds`.

    compared: seconds at the start of each clip that go through the autoencoder. fit_clips: training clips that the
    loudness predictor is fitted on. noise_seed: another one gives the same people other noise. Raises ValueError for
    less than two clips or clips under two seconds.
    """

    clips: int = 24
    seconds: float = 12.0
    long_clips: int = 1
    long_seconds: float = 120.0
    compared: float = 4.0
    fit_clips: int = 64
    first_seed: int = FIRST_SEED
    noise_seed: int = 0
    sizes: tuple[tuple[int, int], ...] = SIZES
    fps: int = 16

    def __post_init__(self) -> None:
        if self.clips < 2 or self.seconds < 2 or (self.long_clips and self.long_seconds < 4):
            raise ValueError(
                f"{self.clips} clips of {self.seconds} s and long ones of {self.long_seconds} s: at least 2 clips of "
                "2 s are needed for intervals, and long ones of 4 s"
            )

    def frames(self, seconds: float) -> int:
        """Pixel frames of so many seconds."""
        return round(seconds * self.fps)


QUICK = Suite(clips=4, seconds=6.0, long_seconds=30.0, fit_clips=24)


@dataclass(frozen=True)
class Figure:
    """One answer: its mean over n clips, the 95 % interval, what is asked of it, and whether the mean meets that."""

    mean: float
    low: float
    high: float
    n: int
    target: str | None = None
    met: bool | None = None


@dataclass(frozen=True)
class Target:
    """least <= figure <= most."""

    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        if self.least is None:
            return f"<= {self.most:g}"
        return f">= {self.least:g}" if self.most is None else f"{self.least:g} .. {self.most:g}"

    def met(self, value: float) -> bool:
        """Not by nan."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


DRIFTS = ("identity", "colour", "sharpness")

TARGETS: dict[str, Target] = {
    "autoencoder.psnr_whole": Target(least=35),
    "autoencoder.psnr_face": Target(least=32),
    "autoencoder.psnr_mouth": Target(least=33),
    **{f"reader.r2_{name}": Target(least=0.95) for name in QUANTITIES},
    "sync.correlation": Target(least=0.85),
    "sync.lag": Target(least=0, most=1),
    "sync.margin": Target(least=0.15),
    "closures.rate": Target(least=0.85),
    "silence.opening": Target(most=0.05),
    "blinks.ratio": Target(least=0.7, most=1.3),
    "head.ratio": Target(least=0.7, most=1.3),
    "person.histogram": Target(most=0.5),
    "person.feature": Target(most=0.5),
    "noise.slope": Target(most=0.1),
    "width.correlation": Target(least=0.6),
    "teeth.f1": Target(least=0.7),
    "seam.ratio": Target(most=1.1),
    "speech.ratio": Target(least=0.9),
    **{f"drift.{name}_errors": Target(most=2) for name in DRIFTS},
}
"""What each figure must be. All others are there to judge these by."""

MEANINGS: dict[str, str] = {
    "autoencoder.psnr_whole": "dB, true frames with a moving mouth encoded and decoded",
    "autoencoder.psnr_face": "dB, in the box of the face",
    "autoencoder.psnr_mouth": "dB, in the box of the mouth",
    "autoencoder.psnr_mouth_closer": "the same with small faces taken closer, as they are generated",
    "reader.r2_open": "R2 of the mouth reader on true frames, all clips together",
    "reader.r2_wide": "the same for width",
    "reader.r2_teeth": "the same for teeth",
    "reader.r2_blink": "the same for the blink",
    "sync.correlation": "opening read on generated frames against the truth, at the best lag",
    "sync.lag": "frames by which the generated mouth is late",
    "sync.loudness_baseline": "the same of the best causal predictor from the loudness",
    "sync.margin": "correlation above that predictor",
    "sync.on_truth": "the same read on true frames: what the reader could see at best",
    "sync.wide": "correlation of the width, same lag",
    "sync.teeth": "correlation of the teeth, same lag",
    "closures.rate": "share of m, b, p whose lips are read closed within one frame",
    "closures.on_truth": "the same on true frames",
    "closures.chance": "the same on generated frames at other times of the speech, not in pauses or on m, b, p",
    "closures.threshold": "opening under which lips count as closed, from true frames",
    "silence.opening": "mean opening in silences, two frames from any sound",
    "silence.on_truth": "the same on true frames",
    "blinks.per_minute": "blinks a minute, generated",
    "blinks.on_truth": "the same on true frames",
    "blinks.ratio": "generated against true blinks",
    "head.deviation": "deviation of the head's place over time, in half face heights",
    "head.on_truth": "the same on true frames",
    "head.ratio": "generated against true deviation",
    "person.histogram": "Hellinger distance of the colours of the last seconds of the long run from the picture's, "
    "in shares of the mean distance of other people's pictures",
    "person.feature": "the same of the layout feature (gradient directions and colours of the face's box, "
    "8 x 8 cells, mean over time, cosine distance)",
    "person.histogram_short": "the same at the end of the short clips",
    "person.feature_short": "the same at the end of the short clips",
    "person.feature_on_truth": "the same of true frames at the end of the short clips",
    "noise.level": "mean size of the Laplacian in flat parts of the long run, grey levels",
    "noise.slope": "its growth a minute, in shares of the level; the interval is over pieces of five seconds",
    "width.correlation": "width read on generated frames against the truth, on o, u, w and two frames around, same lag",
    "width.on_truth": "the same read on true frames",
    "teeth.f1": "F1 of seeing teeth on f, v, s and the like, against sounds where the truth shows none",
    "teeth.on_truth": "the same on true frames",
    "teeth.always": "the same for a mouth that always shows them",
    "teeth.threshold": "teeth from which on they count as seen, from true frames",
    "face.sharpness": "edges about the face against those of the true frames",
    "face.sharpness_moving": "the same of the quarter of frames that change most",
    "seam.jump": "change where blocks meet over change at all other frames",
    "seam.on_truth": "the same at the same places of the true frames",
    "seam.ratio": "the first over the second",
    **{
        key: text
        for name, what in (
            ("identity", "layout feature, distance from the picture"),
            ("colour", "Hellinger distance of the colours from the picture's"),
            ("sharpness", "standard deviation of the Laplacian"),
        )
        for key, text in (
            (f"drift.{name}_start", f"{what}: mean over the first 30 s of the long runs"),
            (f"drift.{name}_end", "the same over the last 30 s"),
            (f"drift.{name}_change", "the second less the first"),
            (f"drift.{name}_errors", "that change in standard errors over the long runs"),
        )
    },
    "speech.on_recorded": "opening read on generated frames against the loudness of recorded speech, best lag",
    "speech.on_synthetic": "the same on the suite's own speech",
    "speech.on_truth": "the same of the true opening on the suite's own speech",
    "speech.ratio": "the first over the last",
    "speed.fps": "frames a second of the engine's stream on this machine, as busy as it was",
}


@dataclass
class ClipResult:
    """What one clip gave; `long` clips fill only what needs no truth frame by frame."""

    seed: int
    noise_seed: int
    size: tuple[int, int]
    speech: Speech
    picture: Image
    box: NDArray[np.float32]
    values: dict[str, float] = field(default_factory=dict)
    true: Reading | None = None
    made: Reading | None = None
    truth: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    colours: NDArray[np.float64] | None = None
    layout: NDArray[np.float64] | None = None
    noise: NDArray[np.float64] | None = None  # [2, twice a second]: minutes, level in shares of its mean
    ends: dict[str, tuple[float, float]] = field(default_factory=dict)  # of a long run: start and end, by DRIFTS
    sheet: list[Image] = field(default_factory=list)


@dataclass
class Clock:
    """Seconds spent, by what."""

    spent: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def at(self, what: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._note(what, time.perf_counter() - begun)

    def add(self, other: Clock) -> None:
        """What another clock, perhaps of another process, has counted."""
        for what, seconds in other.spent.items():
            self._note(what, seconds)

    def _note(self, what: str, seconds: float) -> None:
        self.spent[what] = self.spent.get(what, 0.0) + seconds


@dataclass(frozen=True)
class Report:
    """figures by name (see MEANINGS); about: seeds, sizes, voices and seconds spent; clips: what each gave."""

    figures: dict[str, Figure]
    about: dict[str, Any]
    clips: list[ClipResult]

    def as_json(self) -> dict[str, Any]:
        """The figures by name, and `about`. What is not a number is null."""
        figures = {name: {k: _plain(v) for k, v in asdict(figure).items()} for name, figure in self.figures.items()}
        return {**figures, "about": self.about}


def _plain(value: Any) -> Any:
    return (round(value, 4) if np.isfinite(value) else None) if isinstance(value, float) else value


def check_speech(speech: Speech) -> None:
    """Raises OSError where held-out sentences cannot be spoken."""
    if speech.source == "babble":
        raise OSError(
            "the suite speaks held-out sentences with espeak-ng, which this machine does not have: install it "
            "(apt install espeak-ng, brew install espeak-ng)"
        )


@dataclass(frozen=True)
class Subject:
    """What is measured, under which policy, and what reads its mouths."""

    avatar: Avatar
    policy: RolloutPolicy
    reader: MouthReader


def run_suite(
    suite: Suite,
    subject: Subject,
    spoken: bool = True,
    on_clip: Callable[[], None] | None = None,
    recorded: Sequence[tuple[NDArray[np.float32], int]] = (),
    workers: int = 0,
) -> Report:
    """Run everything; on_clip is called after each clip. spoken: refuse to go on with babble (OSError).

    recorded: speech of real people, mono [n] and its rate, that the suite's people speak too. workers: processes of
    one thread each that share the clips; their figures are the same. ChildProcessError where one of them died.
    """
    clock, started = Clock(), time.perf_counter()
    with pool(workers) as executor:
        calls = [(None, partial(_run_clip, i, suite, subject, spoken)) for i in range(suite.clips + suite.long_clips)]
        results = []
        for _, (result, spent) in in_order(executor, calls, workers + 1):
            results.append(result)
            clock.add(spent)
            if on_clip:
                on_clip()
        short, long = results[: suite.clips], results[suite.clips :]
        follows = _recorded(recorded, suite, short, subject, executor, clock) if recorded else []
    with clock.at("baseline"):
        predictor = fit_predictor(suite)
    found = _intervals(suite, short, long, predictor)
    if recorded:
        found |= _speech(follows, suite, short)
    figures = {name: _figure(name, found[name]) for name in MEANINGS if name in found}
    return Report(figures, _about(suite, results, clock, time.perf_counter() - started), results)


def _run_clip(index: int, suite: Suite, subject: Subject, spoken: bool) -> tuple[ClipResult, Clock]:
    """One of the suite's clips, the short ones first, and the time it took."""
    clock, long = Clock(), index >= suite.clips
    seed = suite.first_seed + (index - suite.clips + _LONG_OFFSET if long else index)
    with clock.at("draw"):
        clip = sample_clip(seed, suite.frames(suite.seconds), suite.sizes[index % len(suite.sizes)], suite.fps)
    if spoken:
        check_speech(clip.speech)
    return (_long_clip if long else _short_clip)(seed, clip, suite, subject, clock), clock


def fit_predictor(suite: Suite) -> LoudnessPredictor:
    """From the loudness to the opening, on training clips."""
    speeches = [synthesize(FIT_SEED + i, suite.seconds, suite.fps) for i in range(suite.fit_clips)]
    return LoudnessPredictor.fit([_level(s) for s in speeches], [s.open for s in speeches])


def _level(speech: Speech) -> NDArray[np.float64]:
    return statistics.loudness(speech.audio, speech.sample_rate, float(speech.fps), len(speech.open))


# One clip


def _noise(seed: int, suite: Suite) -> int:
    """Seed of the noise of a clip."""
    return seed + 1_000_000_000 * suite.noise_seed


def speak(subject: Subject, picture: Image, audio: NDArray[np.float32], rate: int, seed: int) -> Iterator[Image]:
    """What `joyavatar generate` makes of a picture and a sound [n]: frames [T, H, W, 3], a block at a time."""
    avatar, policy = subject.avatar, subject.policy
    view = view_for(avatar, policy, picture, picture.shape[1::-1])
    stream = avatar.stream(from_uint8(view.picture), policy, seed)
    for piece in stream.feed(torch.from_numpy(audio), rate):
        yield view.finished(to_uint8(piece))
    for piece in stream.finish():
        yield view.finished(to_uint8(piece))


@torch.inference_mode()
def reconstructed(avatar: Avatar, video: Image) -> Image:
    """Frames [1 + 4 k, H, W, 3] encoded, and decoded as a stream decodes them."""
    frames = torch.from_numpy(video).permute(3, 0, 1, 2)[None] / 127.5 - 1
    latents = avatar.autoencoder.encode(frames.to(avatar.device, avatar.dtype))
    state, parts = None, []
    for piece in latents.split(4, dim=2):
        made, state = avatar.autoencoder.decode_stream(piece, state)
        parts.append(to_uint8(made))
    return np.concatenate(parts)


def _short_clip(seed: int, clip: Clip, suite: Suite, subject: Subject, clock: Clock) -> ClipResult:
    result = ClipResult(seed, _noise(seed, suite), clip.video.shape[1:3], clip.speech, clip.video[0], clip.boxes[0, 2])
    result.truth = {name: np.array([getattr(pose, name) for pose in clip.poses]) for name in QUANTITIES}
    with clock.at("autoencoder"):
        count = 1 + (min(len(clip.video), suite.frames(suite.compared)) - 1) // TEMPORAL * TEMPORAL
        _compare(result, clip, *_coded(subject, clip.video[:count]))
    made = np.concatenate(list(_generated(result, subject, clock)))
    _measure_motion(result, clip.video, made, subject)
    with clock.at("read"):
        result.true = subject.reader.read(torch.from_numpy(clip.video))
        result.made = subject.reader.read(torch.from_numpy(made))
    last = suite.frames(min(_LAST, suite.seconds / 2))
    _describe(result, made[-last:])
    result.values["feature_on_truth"] = _own_distance(result, clip.video[-last:])
    shown = np.linspace(0, len(made) - 1, 10).round().astype(int)
    result.sheet = [clip.video[shown], made[shown]]
    return result


def _coded(subject: Subject, video: Image) -> tuple[Image, Image]:
    """Frames encoded and decoded as they are, and with a small face taken closer, as `generate` does."""
    whole = reconstructed(subject.avatar, video)
    view = view_for(subject.avatar, subject.policy, video[0], video.shape[2:0:-1])
    return whole, view.finished(reconstructed(subject.avatar, view.taken(video))) if view.paste else whole


def _compare(result: ClipResult, clip: Clip, made: Image, closer: Image) -> None:
    """PSNR over the frames with a moving mouth, of all frames where there are none; see `_coded`."""
    true, boxes = clip.video[: len(made)], clip.boxes[: len(made)]
    change = np.max([np.abs(np.diff(result.truth[n][: len(made)], prepend=0.0)) for n in QUANTITIES[:3]], axis=0)
    moving = change > _MOVING if (change > _MOVING).any() else change >= 0
    face, mouth = boxes[moving, 2], boxes[moving, 0]
    kinds = (("whole", made, None), ("face", made, face), ("mouth", made, mouth), ("mouth_closer", closer, mouth))
    for name, shown, box in kinds:
        errors = pictures.box_errors(shown[moving], true[moving], box)
        result.values[f"psnr_{name}"] = pictures.psnr(float(errors.mean()))


def _generated(result: ClipResult, subject: Subject, clock: Clock) -> Iterator[Image]:
    """Frames as they come; only the engine's own time counts for its speed."""
    speech, spent, frames = result.speech, 0.0, 0
    stream = speak(subject, result.picture, speech.audio, speech.sample_rate, result.noise_seed)
    while True:
        begun = time.perf_counter()
        with clock.at("generate"):
            piece = next(stream, None)
        spent += time.perf_counter() - begun
        if piece is None:
            break
        frames += len(piece)
        yield piece
    result.values["fps"] = frames / spent


def _measure_motion(result: ClipResult, true: Image, made: Image, subject: Subject) -> None:
    """Jumps where blocks of the engine meet, in frames that no codec has touched, and how sharp a moving face is."""
    geometry = subject.avatar.geometry((result.size[1], result.size[0]), subject.policy)
    blocks = Blocks(len(geometry.frames_of_block(0)), len(geometry.frames_of_block(1)))
    margin = _AROUND * (result.box[3] - result.box[1])
    about = result.box + np.array([-margin, -margin, margin, margin], np.float32)
    for name, frames in (("made", made), ("true", true)):
        change, edges = seams.change(frames), pictures.edges(frames, about)
        result.values[f"seam_{name}"] = seams.jump(change, blocks.seams(len(frames))).mean
        result.values[f"sharp_{name}"] = float(edges.mean())
        result.values[f"sharp_moving_{name}"] = float(edges[change >= np.quantile(change, 0.75)].mean())


def _describe(result: ClipResult, last: Image) -> None:
    """Colours and layout of the last seconds."""
    result.colours = pictures.colour_histogram(last)
    result.layout = pictures.layout_feature(last[:: max(1, len(last) // 24)], result.box)


def _own_distance(result: ClipResult, frames: Image) -> float:
    own = pictures.layout_feature(result.picture[None], result.box)
    layout = pictures.layout_feature(frames[:: max(1, len(frames) // 24)], result.box)
    return pictures.feature_distance(layout, own)


def _long_clip(seed: int, clip: Clip, suite: Suite, subject: Subject, clock: Clock) -> ClipResult:
    """The first picture of the drawn clip and several utterances; nothing is read here."""
    speech = synthesize(seed, suite.long_seconds, suite.fps)
    result = ClipResult(seed, _noise(seed, suite), clip.video.shape[1:3], speech, clip.video[0], clip.boxes[0, 2])
    kept = _Kept(result.picture, suite)
    x0, y0, x1, y1 = (float(v) for v in result.box)
    face = Face(((x0 + x1) / 2, (y0 + y1) / 2), (y1 - y0) / 2, "given", float("nan"))
    pieces = kept.watch(_generated(result, subject, clock))
    traced = curves.trace(pieces, suite.fps, face, result.picture)
    for name, values in zip(DRIFTS, (traced.layout, traced.colours, traced.sharpness), strict=True):
        result.ends[name] = drift.windows(values, traced.seconds)
    _describe(result, np.stack(kept.last))
    noise = np.array(kept.noise)
    result.values["noise"] = float(noise.mean())
    result.noise = np.stack([np.array(kept.minutes), noise / max(float(noise.mean()), 1e-9)])
    result.sheet = [np.stack(kept.shown[:10]), np.stack(kept.shown[10:])]
    return result


class _Kept:
    """What is kept of a long run while it passes: the frames of ten minutes would not fit into memory.

    noise, minutes: twice a second. last: frames of the last seconds. shown: twenty frames, evenly over the run.
    """

    def __init__(self, picture: Image, suite: Suite) -> None:
        self.noise: list[float] = []
        self.minutes: list[float] = []
        self.last: list[Image] = []
        self.shown: list[Image] = []
        self._flat, self._fps, total = pictures.flat_pixels(picture), suite.fps, suite.frames(suite.long_seconds)
        self._from = total - suite.frames(min(_LAST, suite.long_seconds / 2))
        self._show = np.linspace(0, total - 1, 20).round().astype(int).tolist()

    def watch(self, pieces: Iterator[Image]) -> Iterator[Image]:
        """The same pieces, looked at as they pass."""
        index, half = 0, max(1, self._fps // 2)
        for piece in pieces:
            for frame in piece:
                if index and index % half == 0:  # not the first picture's copy
                    self.noise.append(float(pictures.noise(frame[None], self._flat)[0]))
                    self.minutes.append(index / self._fps / 60)
                self.shown += [frame] * self._show.count(index)
                if index >= self._from:
                    self.last.append(frame)
                index += 1
            yield piece


# All clips


def _intervals(
    suite: Suite, short: list[ClipResult], long: list[ClipResult], predictor: LoudnessPredictor
) -> dict[str, Interval]:
    found: dict[str, Interval] = {}
    for name in ("psnr_whole", "psnr_face", "psnr_mouth", "psnr_mouth_closer"):
        found[f"autoencoder.{name}"] = statistics.mean_interval([r.values[name] for r in short])
    for name in QUANTITIES:
        read, truth = [_read(r.true, name) for r in short], [r.truth[name] for r in short]
        found[f"reader.r2_{name}"] = statistics.pooled_r_squared(read, truth)
    found |= _sync(short, predictor)
    found |= mouth_of_sounds([_heard(r) for r in short], round(found["sync.lag"].mean))
    found |= _sharpness(short)
    found |= _seams(short)
    found |= _stillness(short, suite)
    found |= _person(short, long)
    if long:
        found["noise.level"] = statistics.mean_interval([r.values["noise"] for r in long])
        found["noise.slope"] = _noise_slope(long)
        found |= _drift(long)
    found["speed.fps"] = statistics.mean_interval([r.values["fps"] for r in (*short, *long)])
    return found


def _figure(name: str, value: Interval) -> Figure:
    target = TARGETS.get(name)
    met = None if target is None else target.met(value.mean)
    return Figure(value.mean, value.low, value.high, value.n, None if target is None else str(target), met)


def _read(reading: Reading | None, name: str) -> NDArray[np.float64]:
    assert reading is not None
    return getattr(reading, name).double().numpy()


def _sync(short: list[ClipResult], predictor: LoudnessPredictor) -> dict[str, Interval]:
    """Correlations of the opening at the one lag that is best for all clips together, and of what loudness tells."""
    lags = list(statistics.LAGS)
    tables = {
        "made": [statistics.correlations(_read(r.made, "open"), r.truth["open"]) for r in short],
        "true": [statistics.correlations(_read(r.true, "open"), r.truth["open"]) for r in short],
        "loud": [statistics.correlations(predictor.predict(_level(r.speech)), r.truth["open"]) for r in short],
        "wide": [statistics.correlations(_read(r.made, "wide"), r.truth["wide"]) for r in short],
        "teeth": [statistics.correlations(_read(r.made, "teeth"), r.truth["teeth"]) for r in short],
    }
    table = {name: np.array(rows) for name, rows in tables.items()}
    best = {name: lags.index(statistics.best_lag(rows)) for name, rows in table.items()}
    made, loud = table["made"][:, best["made"]], table["loud"][:, best["loud"]]
    for result, value in zip(short, made, strict=True):
        result.values["sync"] = float(value)
    return {
        "sync.correlation": statistics.mean_interval(list(made)),
        "sync.lag": statistics.bootstrap(lambda rows: statistics.best_lag(table["made"][rows]), len(short)),
        "sync.loudness_baseline": statistics.mean_interval(list(loud)),
        "sync.margin": statistics.mean_interval(list(made - loud)),
        "sync.on_truth": statistics.mean_interval(list(table["true"][:, best["true"]])),
        "sync.wide": statistics.mean_interval(list(table["wide"][:, best["made"]])),
        "sync.teeth": statistics.mean_interval(list(table["teeth"][:, best["made"]])),
    }


def _heard(result: ClipResult) -> Heard:
    true = {name: _read(result.true, name) for name in QUANTITIES}
    made = {name: _read(result.made, name) for name in QUANTITIES}
    return Heard(result.speech, true, made, result.truth)


def _seams(short: list[ClipResult]) -> dict[str, Interval]:
    made, true = ([r.values[f"seam_{name}"] for r in short] for name in ("made", "true"))
    return {
        "seam.jump": statistics.mean_interval(made),
        "seam.on_truth": statistics.mean_interval(true),
        "seam.ratio": statistics.ratio_interval(made, true),
    }


def _sharpness(short: list[ClipResult]) -> dict[str, Interval]:
    made, true, made_moving, true_moving = (
        [r.values[f"sharp_{name}"] for r in short] for name in ("made", "true", "moving_made", "moving_true")
    )
    return {
        "face.sharpness": statistics.ratio_interval(made, true),
        "face.sharpness_moving": statistics.ratio_interval(made_moving, true_moving),
    }


def _drift(long: list[ClipResult]) -> dict[str, Interval]:
    """Start, end and change of the long runs; the change in standard errors where there are several."""
    found: dict[str, Interval] = {}
    for name in DRIFTS:
        starts, ends = ([r.ends[name][i] for r in long] for i in (0, 1))
        moved = drift.change(starts, ends)
        found[f"drift.{name}_start"] = statistics.mean_interval(starts)
        found[f"drift.{name}_end"] = statistics.mean_interval(ends)
        found[f"drift.{name}_change"] = moved.change
        if len(long) > 1:
            errors = moved.standard_errors
            found[f"drift.{name}_errors"] = Interval(errors, errors, errors, len(long))
    return found


def _recorded(
    recorded: Sequence[tuple[NDArray[np.float32], int]],
    suite: Suite,
    short: list[ClipResult],
    subject: Subject,
    executor: Executor | None,
    clock: Clock,
) -> list[float]:
    """How openings follow the loudness of recorded speech, cut into clips: of each clip.

    Raises ValueError if no recording is as long as a clip.
    """
    pieces = [
        (audio[start : start + round(suite.seconds * rate)], rate)
        for audio, rate in recorded
        for start in range(0, len(audio) - round(suite.seconds * rate) + 1, round(suite.seconds * rate))
    ]
    if not pieces:
        raise ValueError(f"no recording of --speech is as long as a clip of {suite.seconds:g} s; give --seconds")
    people = [(r.picture, r.noise_seed) for r in short]
    calls = [
        (None, partial(_speaks, suite, subject, *people[i % len(people)], *piece))
        for i, piece in enumerate(pieces[: suite.clips])
    ]
    with clock.at("recorded"):
        return [value for _, value in in_order(executor, calls, len(calls))]


def _speaks(suite: Suite, subject: Subject, picture: Image, seed: int, audio: NDArray[np.float32], rate: int) -> float:
    made = np.concatenate(list(speak(subject, picture, audio, rate, seed)))
    opening = subject.reader.read(torch.from_numpy(made)).open.double().numpy()
    return _follows(opening, audio, rate, suite)


def _speech(values: list[float], suite: Suite, short: list[ClipResult]) -> dict[str, Interval]:
    """How openings follow loudness: on recorded speech (values), and on the suite's own.

    Recorded speech has no true mouth; what the true opening of synthesised speech has to do with its loudness is what
    can be asked for.
    """
    own = [_follows(_read(r.made, "open"), r.speech.audio, r.speech.sample_rate, suite) for r in short]
    truth = [_follows(r.truth["open"], r.speech.audio, r.speech.sample_rate, suite) for r in short]
    base = float(np.mean(truth))
    return {
        "speech.on_recorded": statistics.mean_interval(values),
        "speech.on_synthetic": statistics.mean_interval(own),
        "speech.on_truth": statistics.mean_interval(truth),
        "speech.ratio": statistics.mean_interval([value / base for value in values]),
    }


def _follows(opening: NDArray[np.float64], audio: NDArray[np.float32], rate: int, suite: Suite) -> float:
    return sync.relation(opening, sync.envelope(audio, rate, suite.fps, len(opening)), suite.fps).correlation


def _stillness(short: list[ClipResult], suite: Suite) -> dict[str, Interval]:
    """Lips in silence, blinks, the head."""
    silence: dict[str, list[float]] = {"true": [], "made": []}
    blinks: dict[str, list[float]] = {"true": [], "made": []}
    head: dict[str, list[float]] = {"true": [], "made": []}
    for result in short:
        spans = spans_of(result.speech, "silence")
        for name, reading in (("true", result.true), ("made", result.made)):
            assert reading is not None
            opening = _read(reading, "open")
            silence[name].append(statistics.mean_inside(opening, spans, suite.fps, _SILENCE_MARGIN))
            blinks[name].append(float(statistics.count_blinks(_read(reading, "blink"))))
            head[name].append(statistics.head_deviation(reading.place.double().numpy()))
    minutes = [len(result.truth["open"]) / suite.fps / 60 for result in short]
    found = {
        "blinks.per_minute": statistics.ratio_interval(blinks["made"], minutes),
        "blinks.on_truth": statistics.ratio_interval(blinks["true"], minutes),
        "blinks.ratio": statistics.ratio_interval(blinks["made"], blinks["true"]),
        "head.deviation": statistics.mean_interval(head["made"]),
        "head.on_truth": statistics.mean_interval(head["true"]),
        "head.ratio": statistics.ratio_interval(head["made"], head["true"]),
    }
    if np.isfinite(silence["made"]).any():
        found["silence.opening"] = statistics.mean_interval(silence["made"])
        found["silence.on_truth"] = statistics.mean_interval(silence["true"])
    return found


def _person(short: list[ClipResult], long: list[ClipResult]) -> dict[str, Interval]:
    """Distances from the own picture, in shares of the mean distance that other people's pictures have from it."""
    colours = [pictures.colour_histogram(r.picture[None]) for r in (*short, *long)]
    layouts = [pictures.layout_feature(r.picture[None], r.box) for r in (*short, *long)]
    shares: dict[str, list[float]] = {"histogram": [], "feature": [], "on_truth": []}
    for i, result in enumerate((*short, *long)):
        assert result.colours is not None and result.layout is not None
        others = [j for j in range(len(colours)) if j != i]
        far = float(np.mean([pictures.histogram_distance(colours[j], colours[i]) for j in others]))
        far_layout = float(np.mean([pictures.feature_distance(layouts[j], layouts[i]) for j in others]))
        shares["histogram"].append(pictures.histogram_distance(result.colours, colours[i]) / far)
        shares["feature"].append(pictures.feature_distance(result.layout, layouts[i]) / far_layout)
        shares["on_truth"].append(result.values.get("feature_on_truth", float("nan")) / far_layout)
    count = len(short)
    found = {
        "person.histogram_short": statistics.mean_interval(shares["histogram"][:count]),
        "person.feature_short": statistics.mean_interval(shares["feature"][:count]),
        "person.feature_on_truth": statistics.mean_interval(shares["on_truth"][:count]),
    }
    if long:
        found["person.histogram"] = statistics.mean_interval(shares["histogram"][count:])
        found["person.feature"] = statistics.mean_interval(shares["feature"][count:])
    return found


def _noise_slope(long: list[ClipResult]) -> Interval:
    """Growth a minute; the interval resamples pieces of five seconds, for there are few long runs."""
    pieces = []
    for result in long:
        assert result.noise is not None
        pieces += np.array_split(result.noise, max(1, result.noise.shape[1] // 10), axis=1)

    def growth(rows: NDArray[np.int64]) -> float:
        minutes, levels = np.concatenate([pieces[i] for i in rows], axis=1)
        return statistics.slope(levels, minutes)

    return statistics.bootstrap(growth, len(pieces))


def _about(suite: Suite, results: list[ClipResult], clock: Clock, seconds: float) -> dict[str, Any]:
    """What the figures rest on."""
    return {
        "suite": "drawn",
        "settings": {**asdict(suite), "sizes": [f"{w}x{h}" for h, w in suite.sizes]},
        "clips": [_about_clip(result) for result in results],
        "noise_seed": suite.noise_seed,
        "voices": [result.speech.source for result in results],
        "seconds": round(seconds, 1),
        "time_share": {what: round(spent / seconds, 3) for what, spent in clock.spent.items()},
        "meanings": MEANINGS,
    }


def _about_clip(result: ClipResult) -> dict[str, Any]:
    """Which clip, how large its face is in pixels, and its own figures: a mean hides who fails."""
    height, width = result.size
    face = round(float(result.box[3] - result.box[1]))
    values = {name: _plain(value) for name, value in result.values.items()}
    return {"seed": result.seed, "size": f"{width}x{height}", "face": face, **values}


# Pictures of the result


def write_pictures(report: Report, out: Path) -> list[Path]:
    """sheet.png (true frames above generated ones; of a long clip only these, in two rows) and curves.png in `out`."""
    cv2 = opencv()
    out.mkdir(parents=True, exist_ok=True)
    files = {"sheet.png": contact_sheet(report.clips), "curves.png": curve_plots(report.clips)}
    for name, picture in files.items():
        if not cv2.imwrite(str(out / name), picture[..., ::-1]):
            raise OSError(f"cannot write {out / name}: is the folder writable?")
    return [out / name for name in files]


def contact_sheet(results: list[ClipResult], height: int = 128) -> Image:
    """Rows of ten frames, evenly spaced in time: [H, W, 3]."""
    cv2, rows = opencv(), []
    for result in results:
        for frames in result.sheet:
            width = round(frames.shape[2] * height / frames.shape[1])
            small = [cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in frames]
            rows.append(np.concatenate(small, axis=1))
    widest = max(row.shape[1] for row in rows)
    return np.concatenate([np.pad(r, ((0, 0), (0, widest - r.shape[1]), (0, 0)), constant_values=255) for r in rows])


def curve_plots(results: list[ClipResult], height: int = 72, step: int = 5) -> Image:
    """A panel a clip: opening of the truth (grey) and read on the generated frames (red); blink below in blue."""
    cv2, panels = opencv(), []
    for result in results:
        if result.made is None:
            continue
        curves = (
            (result.truth["open"], (150, 150, 150), height),
            (_read(result.made, "open"), (200, 40, 40), height),
            (0.3 * _read(result.made, "blink"), (50, 90, 200), height),
        )
        panel = np.full((height + 8, len(result.truth["open"]) * step, 3), 255, np.uint8)
        for values, colour, scale in curves:
            points = np.stack([np.arange(len(values)) * step, 4 + scale * (1 - np.clip(values, 0, 1))], 1)
            cv2.polylines(panel, [np.round(points).astype(np.int32)], False, colour, 1, cv2.LINE_AA)
        panels.append(panel)
    widest = max(panel.shape[1] for panel in panels)
    return np.concatenate([np.pad(p, ((0, 0), (0, widest - p.shape[1]), (0, 0)), constant_values=255) for p in panels])
