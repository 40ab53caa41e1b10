"""The suite's figures on single sounds: lips on m, b, p; width on o, u, w; teeth on f, v, s.

Shape legend: T pixel frames, C clips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..measures import spans, statistics
from ..measures.statistics import Interval
from .speech import Speech

Curves = Mapping[str, NDArray[np.float64]]

_AROUND = 2  # frames around o, u and w that count: the way there and back
_TEETH_LIMITS = (0.3, 0.5)
_TEETH_GAP = 0.2  # by which the truth of a sound without teeth stays under the threshold


@dataclass(frozen=True)
class Heard:
    """A clip: what is said, curves [T] read on true and on generated frames, and those of the drawing itself."""

    speech: Speech
    true: Curves
    made: Curves
    truth: Curves


def mouth_of_sounds(clips: Sequence[Heard], lag: int) -> dict[str, Interval]:
    """All figures of this file; lag: frames by which the generated mouths are late."""
    return _closures(clips) | _width(clips, lag) | _teeth(clips)


def spans_of(speech: Speech, *kinds: str) -> list[statistics.Span]:
    """Start and end of the sounds of these kinds, in seconds."""
    return [(phone.start, phone.end) for phone in speech.phones if phone.kind in kinds]


def _closures(clips: Sequence[Heard]) -> dict[str, Interval]:
    """The threshold is what true frames show of m, b and p; chance is the same lips at other times of the speech."""
    rng = np.random.default_rng(0)
    smallest: dict[str, list[NDArray[np.float64]]] = {"true": [], "made": [], "chance": []}
    for clip in clips:
        speech, fps = clip.speech, float(clip.speech.fps)
        closed, seconds = spans_of(speech, "bilabial"), len(speech.audio) / speech.sample_rate
        elsewhere = [s for by in rng.uniform(0, seconds, 16) for s in statistics.moved(closed, seconds, float(by))]
        # in pauses lips are shut, and on m, b, p they should be: neither is chance
        elsewhere = spans.outside(elsewhere, spans_of(speech, "silence", "bilabial"))
        smallest["true"].append(statistics.closest(clip.true["open"], closed, fps))
        smallest["made"].append(statistics.closest(clip.made["open"], closed, fps))
        smallest["chance"].append(statistics.closest(clip.made["open"], elsewhere, fps))
    threshold = statistics.closure_threshold(np.concatenate(smallest["true"]))

    def rate(name: str) -> Interval:
        shut = [float((values < threshold).sum()) for values in smallest[name]]
        return statistics.ratio_interval(shut, [float(len(values)) for values in smallest[name]])

    return {
        "closures.rate": rate("made"),
        "closures.on_truth": rate("true"),
        "closures.chance": rate("chance"),
        "closures.threshold": Interval(threshold, threshold, threshold, len(clips)),
    }


def _width(clips: Sequence[Heard], lag: int) -> dict[str, Interval]:
    """Within each clip, over the frames of its rounded sounds; clips with too few of them are left out."""
    values: dict[str, list[float]] = {"made": [], "true": []}
    for clip in clips:
        fps, truth = float(clip.speech.fps), clip.truth["wide"]
        rows = spans.near(spans_of(clip.speech, "rounded"), fps, len(truth), _AROUND / fps)
        values["made"].append(spans.correlation_near(clip.made["wide"], truth, rows, lag))
        values["true"].append(spans.correlation_near(clip.true["wide"], truth, rows, 0))
    if not np.isfinite(values["made"]).any():
        return {}
    return {
        "width.correlation": statistics.mean_interval(values["made"]),
        "width.on_truth": statistics.mean_interval(values["true"]),
    }


def _teeth(clips: Sequence[Heard]) -> dict[str, Interval]:
    """Seen: the largest reading within a frame of the sound reaches the threshold, which 19 of 20 true sounds reach.

    Sounds on which the drawing shows teeth though they are none of these (i, t, th ...) count on neither side.
    """
    should = [spans_of(clip.speech, "labiodental", "sibilant") for clip in clips]
    true = [_most(clip, clip.true, s) for clip, s in zip(clips, should, strict=True)]
    shown = np.concatenate(true)
    threshold = float(np.clip(np.quantile(shown, 0.05), *_TEETH_LIMITS)) if len(shown) else _TEETH_LIMITS[0]
    others = [spans_of(c.speech, "bilabial", "rounded", "spread", "open", "other") for c in clips]
    without = [
        [span for span in spans_ if (_most(clip, clip.truth, [span]) < threshold - _TEETH_GAP).all()]
        for clip, spans_ in zip(clips, others, strict=True)
    ]
    found = {}
    for name, key in (("made", "teeth.f1"), ("true", "teeth.on_truth")):
        yes = [_most(c, getattr(c, name), s) >= threshold for c, s in zip(clips, should, strict=True)]
        no = [_most(c, getattr(c, name), s) >= threshold for c, s in zip(clips, without, strict=True)]
        found[key] = spans.f1(yes, no)
    always = [[np.ones(len(s), bool) for s in side] for side in (should, without)]
    found["teeth.always"] = spans.f1(*always)
    found["teeth.threshold"] = Interval(threshold, threshold, threshold, len(clips))
    return found


def _most(clip: Heard, curves: Curves, sounds: Sequence[statistics.Span]) -> NDArray[np.float64]:
    return spans.largest(curves["teeth"], sounds, float(clip.speech.fps))
