"""Sound of a stream: resampling to 16 kHz, a bounded buffer by absolute index, log-mel tokens per latent frame.

Shape legend: n samples, F latent frames, W tokens of a latent frame, C channels of a token, M mel bands.
The law of this file: every result is a function of absolute positions and of the samples, never of how the sound was
cut into pushes. Therefore everything is computed in pieces whose borders and shapes are fixed by absolute index.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import gcd
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .geometry import Geometry
from .types import StreamTensors

log = logging.getLogger(__name__)

SAMPLE_RATE = 16000
LOWEST_RATE, HIGHEST_RATE = 4_000, 384_000
MOST_CHANNELS = 64
LOUDEST = 65536.0  # beyond any unscaled 16-bit sample; keeps squares and spectra finite
RESAMPLER_BLOCK = Fraction(1, 50)  # seconds; the least a block of the resampler lasts
SMALLEST_BUFFER = 4096  # samples


def require(package: str, purpose: str) -> ModuleType:
    """Import a package that only some users need. Raises ImportError naming the package and the remedy."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        root = package.partition(".")[0]
        raise ImportError(f"{purpose} needs the package {root}: pip install {root}") from error


class SampleBuffer:
    """The samples [start, end) of an endless signal, by absolute index. Appending costs O(1) amortised.

    Storage is a power of two, so that a steady stream holds a constant size; it shrinks when seven eighths stand empty.
    """

    def __init__(self, start: int = 0) -> None:
        self.start = start
        self.end = start
        self._storage = torch.empty(SMALLEST_BUFFER)
        self._origin = start  # absolute index of storage[0]

    def append(self, samples: Tensor) -> None:
        """samples: float32 [n]."""
        stop = self.end + samples.numel()
        if stop - self._origin > self._storage.numel():
            self._move(stop - self.start)
        self._storage[self.end - self._origin : stop - self._origin] = samples
        self.end = stop

    def read(self, start: int, stop: int) -> Tensor:
        """Copy of the samples [start, stop), all of them held."""
        assert self.start <= start <= stop <= self.end, (self.start, start, stop, self.end)
        return self._storage[start - self._origin : stop - self._origin].clone()

    def drop(self, before: int) -> None:
        """Forget what lies before an index; at most everything held so far."""
        self.start = max(self.start, min(before, self.end))
        if self._storage.numel() > max(SMALLEST_BUFFER, 8 * (self.end - self.start)):
            self._move(self.end - self.start)

    def nbytes(self) -> int:
        return self._storage.numel() * self._storage.element_size()

    def _move(self, room: int) -> None:
        held = self.read(self.start, self.end)
        spare = room // 2  # the less is spare, the more often everything held is moved
        self._storage = torch.empty(max(SMALLEST_BUFFER, 1 << (room + spare).bit_length()))
        self._storage[: held.numel()] = held
        self._origin = self.start


def _at_16_khz(samples: int, rate: int) -> int:
    """Length at 16 kHz of so many samples: ceil(samples * 16000 / rate), as scipy.signal.resample_poly."""
    return -(-samples * SAMPLE_RATE // rate)


@lru_cache(maxsize=2)
def _polyphase_filter(up: int, down: int, lead: int) -> np.ndarray:
    """Anti-alias filter of scipy.signal.resample_poly (Kaiser 5.0, 10 zero crossings), float64, `lead` zeros first."""
    signal = require("scipy.signal", "resampling")
    widest = max(up, down)
    taps = up * signal.firwin(20 * widest + 1, 1 / widest, window=("kaiser", 5.0))
    return np.concatenate([np.zeros(lead), taps])


class Resampler:
    """Mono sound of any rate to 16 kHz, in pieces: the same bits for every cutting of the input.

    Blocks lie on a fixed absolute grid (at least 20 ms, a whole number of input and of output samples), each filtered
    with the input around it, so the output equals scipy.signal.resample_poly on the whole signal, rounded to float32.
    Rates that share no large factor with 16000 (44101 Hz) have blocks of up to one second.

    Args:
        rate_in: samples a second, 4000 to 384000. 16000 passes through without delay.
    Raises:
        ValueError: the rate is out of range.
    """

    def __init__(self, rate_in: int) -> None:
        if not LOWEST_RATE <= rate_in <= HIGHEST_RATE:
            raise ValueError(
                f"sample rate {rate_in} Hz: must be {LOWEST_RATE} to {HIGHEST_RATE} Hz; convert the sound first"
            )
        self.rate_in = rate_in
        common = gcd(rate_in, SAMPLE_RATE)
        self._up, self._down = SAMPLE_RATE // common, rate_in // common
        units = -(-(rate_in * RESAMPLER_BLOCK) // self._down)
        self._block_in, self._block_out = int(units) * self._down, int(units) * self._up
        self._half = 10 * max(self._up, self._down)  # half length of the filter on the common grid
        self._context = self._half // self._up + 1  # input samples needed on each side of a block
        self._input = SampleBuffer()
        self._received = 0
        self._blocks = 0
        self._finished = False

    @property
    def received(self) -> int:
        """Input samples so far."""
        return self._received

    def push(self, samples: Tensor) -> Tensor:
        """float32 [n] at the input rate -> the 16 kHz samples that are now determined, float32 [m].

        Raises ValueError after `finish`.
        """
        if self._finished:
            raise ValueError("the sound is finished: start a new resampler for more")
        self._received += samples.numel()
        if self._up == self._down:
            return samples
        self._input.append(samples)
        return self._filter_until(self._input.end - self._context)

    def finish(self) -> Tensor:
        """End of the input -> the tail; altogether ceil(received * 16000 / rate_in) samples come out."""
        if self._finished or self._up == self._down:
            self._finished = True
            return torch.zeros(0)
        self._finished = True
        emitted = self._blocks * self._block_out
        tail = self._filter_until(-(-self.received // self._block_in) * self._block_in)
        return tail[: _at_16_khz(self.received, self.rate_in) - emitted]

    def state(self) -> StreamTensors:
        counters = torch.tensor([self._input.start, self._received, self._blocks, self._finished])
        return {"samples": self._input.read(self._input.start, self._input.end), "counters": counters}

    def load_state(self, state: StreamTensors) -> None:
        """Take up the state of a resampler of the same rate."""
        start, self._received, self._blocks, finished = state["counters"].tolist()
        self._finished = bool(finished)
        self._input = SampleBuffer(start)
        self._input.append(state["samples"])

    def nbytes(self) -> int:
        return self._input.nbytes()

    def _filter_until(self, stop: int) -> Tensor:
        """Filter the blocks that end at or before input sample `stop`."""
        done = []
        while (self._blocks + 1) * self._block_in <= stop:
            done.append(self._filter_block(self._blocks))
            self._blocks += 1
            self._input.drop(self._blocks * self._block_in - self._context)
        return torch.cat(done) if done else torch.zeros(0)

    def _filter_block(self, block: int) -> Tensor:
        signal = require("scipy.signal", "resampling")
        # upfirdn's first output sits on the first input sample; zeros before the taps put our first output on its grid
        ahead = self._context * self._up + self._half
        skip = -(-ahead // self._down)
        taps = _polyphase_filter(self._up, self._down, skip * self._down - ahead)
        start, stop = block * self._block_in - self._context, (block + 1) * self._block_in + self._context
        around = _read_padded(self._input, start, stop).double().numpy()
        out = signal.upfirdn(taps, around, self._up, self._down)[skip : skip + self._block_out]
        return torch.from_numpy(out).float()


def _read_padded(buffer: SampleBuffer, start: int, stop: int) -> Tensor:
    """The samples [start, stop); zeros before 0 and from the buffer's end on."""
    out = torch.zeros(max(0, stop - start))
    first, last = max(start, 0), min(stop, buffer.end)
    if first < last:
        out[first - start : last - start] = buffer.read(first, last)
    return out


class AudioTrack:
    """The 16 kHz mono sound of one stream, by absolute sample index, holding only what is still needed.

    Sound of any rate (4 to 384 kHz) and up to 64 channels goes in; channels are averaged, NaN and infinite samples
    become 0 with one warning, and samples are held within +-65536.
    """

    def __init__(self) -> None:
        self._buffer = SampleBuffer()
        self._resampler: Resampler | None = None
        self._source_samples = 0
        self._finished = False
        self._warned = False

    @property
    def start(self) -> int:
        """First 16 kHz sample still held."""
        return self._buffer.start

    @property
    def end(self) -> int:
        """16 kHz samples determined so far; of a finished sound ceil(source_samples * 16000 / source_rate)."""
        return self._buffer.end

    @property
    def finished(self) -> bool:
        return self._finished

    @property
    def source_samples(self) -> int:
        """Samples received, at the source's own rate."""
        return self._source_samples

    @property
    def source_rate(self) -> int:
        """Rate of the source, Hz; 16000 before the first push."""
        return self._resampler.rate_in if self._resampler else SAMPLE_RATE

    @property
    def duration(self) -> Fraction:
        """Seconds received, exactly."""
        return Fraction(self._source_samples, self.source_rate)

    def push(self, samples: Tensor, sample_rate: int) -> None:
        """Append sound.

        Args:
            samples: floating point [channels, n] or [n], nominally in [-1, 1]; n may be 0.
            sample_rate: Hz, the same in every push.
        Raises:
            ValueError: wrong shape, type or rate, a change of rate, or the sound is finished.
        """
        samples = _checked_channels(samples)
        self._check_rate(sample_rate)
        for piece in samples.split(SAMPLE_RATE, dim=1):  # pieces keep the memory of a long push small
            self._append(_average(self._cleaned(piece)))

    def finish(self) -> None:
        """Declare the end of the sound. Twice is once."""
        if self._resampler and not self._finished:
            self._buffer.append(self._resampler.finish())
        self._finished = True

    def read(self, start: int, stop: int) -> Tensor:
        """The 16 kHz samples [start, stop): float32 [stop - start], zeros before 0 and beyond a finished end.

        Raises:
            ValueError: part of the range was dropped, or has not come yet.
        """
        if stop > self.end and not self._finished:
            raise ValueError(f"samples up to {stop} are asked for, {self.end} have come: push more sound or finish")
        if max(start, 0) < min(self.start, stop):
            raise ValueError(f"samples from {max(start, 0)} are asked for, those before {self.start} were dropped")
        return _read_padded(self._buffer, start, stop)

    def drop(self, before: int) -> None:
        """Free the samples before an index (see AudioFrontEnd.keeps)."""
        self._buffer.drop(before)

    def state(self) -> StreamTensors:
        """All of it as tensors; `load_state` gives a track that goes on bit for bit."""
        counters = [self.start, self.source_rate, self._source_samples, self._finished, self._warned]
        state = {"samples": self._buffer.read(self.start, self.end), "counters": torch.tensor(counters)}
        if self._resampler:
            state |= {f"resampler.{name}": tensor for name, tensor in self._resampler.state().items()}
        return state

    def copy(self) -> AudioTrack:
        """A track that goes on bit for bit as this one would, and shares nothing with it."""
        track = AudioTrack()
        track.load_state(self.state())
        return track

    def load_state(self, state: StreamTensors) -> None:
        """Take up a state that `state` gave. Raises ValueError if tensors are missing or left over."""
        names = {"samples", "counters"}
        inner = {"resampler.samples", "resampler.counters"}
        if set(state) not in (names, names | inner):
            raise ValueError(f"audio state holds {sorted(state)}: expected {sorted(names | inner)}; save it again")
        start, rate, self._source_samples, finished, warned = state["counters"].tolist()
        self._finished, self._warned = bool(finished), bool(warned)
        self._buffer = SampleBuffer(start)
        self._buffer.append(state["samples"])
        self._resampler = Resampler(rate) if inner <= set(state) else None
        if self._resampler:
            self._resampler.load_state({name: state[f"resampler.{name}"] for name in names})

    def nbytes(self) -> int:
        """Bytes of the storage, spare room included."""
        return self._buffer.nbytes() + (self._resampler.nbytes() if self._resampler else 0)

    def _check_rate(self, rate: int) -> None:
        if self._finished:
            raise ValueError("the sound is finished: start a new track for more")
        if self._resampler is None:
            self._resampler = Resampler(rate)
        elif rate != self._resampler.rate_in:
            raise ValueError(
                f"sample rate {rate} Hz after {self._resampler.rate_in} Hz: "
                "one stream keeps one rate; convert the sound or start a new stream"
            )

    def _cleaned(self, samples: Tensor) -> Tensor:
        samples = samples.detach().to("cpu", torch.float32)
        if not self._warned and not bool(samples.isfinite().all()):
            self._warned = True
            log.warning("the sound holds samples that are NaN or infinite: they are played as silence")
        return samples.nan_to_num(0.0, 0.0, 0.0).clamp(-LOUDEST, LOUDEST)

    def _append(self, mono: Tensor) -> None:
        assert self._resampler is not None
        self._source_samples += mono.numel()
        self._buffer.append(self._resampler.push(mono))


def _checked_channels(samples: Tensor) -> Tensor:
    """[n] or [channels, n] -> [channels, n]."""
    if not samples.is_floating_point():
        raise ValueError(f"samples are {samples.dtype}: give floating point in [-1, 1], e.g. int16 / 32768")
    if samples.ndim == 1:
        return samples[None]
    if samples.ndim != 2 or not 1 <= samples.shape[0] <= MOST_CHANNELS:
        raise ValueError(
            f"samples have shape {list(samples.shape)}: give [n] or [channels, n] with 1 to {MOST_CHANNELS} channels"
        )
    return samples


def _average(samples: Tensor) -> Tensor:
    """[channels, n] -> [n]. Added one by one: a reduction may order its sums by n, and so by the cutting."""
    total = samples[0]
    for channel in samples[1:]:
        total = total + channel
    return total / samples.shape[0]


@dataclass(frozen=True)
class AudioTokens:
    """Audio of F latent frames. tokens: float32 [F, W, C]; valid: bool [F, W], at least one per latent frame.

    Of several avatars side by side (`stack`): [B, F, W, C] and [B, F, W].
    """

    tokens: Tensor
    valid: Tensor

    def __post_init__(self) -> None:
        assert self.valid.shape == self.tokens.shape[:-1] and self.tokens.ndim in (3, 4), self.tokens.shape

    @staticmethod
    def stack(parts: Sequence[AudioTokens]) -> AudioTokens:
        """The same latent frames of several avatars."""
        return AudioTokens(torch.stack([p.tokens for p in parts]), torch.stack([p.valid for p in parts]))


class AudioFrontEnd(Protocol):
    """What a stream asks of an audio front end.

    Positions are absolute: latent frames from the start of the stream, samples at 16 kHz.
    """

    @property
    def channels(self) -> int:
        """C of the tokens."""
        ...

    @property
    def tokens_per_latent(self) -> int:
        """W of the tokens."""
        ...

    def needs(self, latent_stop: int) -> int:
        """Samples that must have come (AudioTrack.end), or the sound be finished, for the latents < latent_stop."""
        ...

    def keeps(self, latent_start: int) -> int:
        """First sample still needed for the latents >= latent_start: everything before may be dropped."""
        ...

    def features(self, track: AudioTrack, latents: range) -> AudioTokens:
        """Tokens of consecutive latent frames (step 1). Raises ValueError where `track.read` does."""
        ...


@lru_cache(maxsize=4)
def mel_filters(mels: int, n_fft: int) -> Tensor:
    """librosa's mel filterbank for 16 kHz (Slaney scale and norm, 50 to 8000 Hz): float32 [mels, n_fft / 2 + 1]."""
    librosa = require("librosa", "the mel filterbank")
    return torch.from_numpy(librosa.filters.mel(sr=SAMPLE_RATE, n_fft=n_fft, n_mels=mels, fmin=50.0, fmax=8000.0))


class LogMel:
    """Log-mel tokens: one per pixel frame, made of `hops_per_frame` columns stacked (column by column).

    Column k of pixel frame f is centred on second (f + (k + 1/2) / hops_per_frame) / fps, rounded to a sample; window
    Hann of 400 samples, FFT of 512. Latent frame i has the tokens of pixel frames 4i-3-before .. 4i+after; frames
    before 0 and beyond the end are silence. A column is (log10(max(power, 1e-6)) + 4) / 2: silence is exactly -1,
    speech has mean about 0 and deviation about 1, and no statistics run along.

    Args:
        filters: mel filterbank [mels, 257], e.g. from a checkpoint; None takes librosa's.
    Raises:
        ValueError: a count is out of range or the filters have another shape.
    """

    window = 400
    n_fft = 512
    floor = 1e-6

    def __init__(
        self,
        geometry: Geometry,
        mels: int = 64,
        hops_per_frame: int = 4,
        before: int = 6,
        after: int = 6,
        filters: Tensor | None = None,
    ) -> None:
        if mels < 1 or hops_per_frame < 1 or before < 0 or after < 0:
            raise ValueError(
                f"mels {mels} and hops_per_frame {hops_per_frame} must be at least 1, "
                f"before {before} and after {after} at least 0"
            )
        filters = mel_filters(mels, self.n_fft) if filters is None else filters.float()
        if filters.shape != (mels, self.n_fft // 2 + 1):
            raise ValueError(f"mel filters have shape {list(filters.shape)}: must be [{mels}, {self.n_fft // 2 + 1}]")
        self.geometry, self.before, self.after = geometry, before, after
        self.mels, self.hops_per_frame = mels, hops_per_frame
        self.filters = filters
        self._hann = torch.hann_window(self.window)

    @property
    def channels(self) -> int:
        return self.mels * self.hops_per_frame

    @property
    def tokens_per_latent(self) -> int:
        return self.before + self.geometry.temporal + self.after

    def needs(self, latent_stop: int) -> int:
        return max(0, self._span(latent_stop - 1)[1]) if latent_stop > 0 else 0

    def keeps(self, latent_start: int) -> int:
        return max(0, self._span(latent_start)[0])

    def features(self, track: AudioTrack, latents: range) -> AudioTokens:
        tokens = torch.zeros(len(latents), self.tokens_per_latent, self.channels)
        # one latent at a time: shapes, and with them the bits, do not depend on which latents are asked for together
        for row, latent in enumerate(latents):
            tokens[row] = self._tokens(track, latent)
        return AudioTokens(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))

    def _centres(self, latent: int) -> Tensor:
        """Centre samples of a latent frame's columns, int64 [W * hops_per_frame]."""
        first = self.geometry.temporal * (latent - 1) + 1 - self.before
        half_hops = 2 * torch.arange(self.tokens_per_latent * self.hops_per_frame) + 1
        half_hops = half_hops + 2 * self.hops_per_frame * first
        fps = self.geometry.fps
        samples, per = SAMPLE_RATE * fps.denominator, 2 * self.hops_per_frame * fps.numerator
        return (2 * samples * half_hops + per).div(2 * per, rounding_mode="floor")

    def _span(self, latent: int) -> tuple[int, int]:
        """Samples [start, stop) under a latent frame's columns."""
        centres = self._centres(latent)
        return int(centres[0]) - self.window // 2, int(centres[-1]) + self.window // 2

    def _tokens(self, track: AudioTrack, latent: int) -> Tensor:
        centres = self._centres(latent)
        start, stop = self._span(latent)
        columns = (centres - start - self.window // 2)[:, None] + torch.arange(self.window)
        windows = track.read(start, stop)[columns] * self._hann
        power = torch.fft.rfft(windows, self.n_fft).abs().square()
        level = (power @ self.filters.T).clamp(min=self.floor).log10()
        return ((level + 4.0) / 2.0).view(self.tokens_per_latent, self.channels)
