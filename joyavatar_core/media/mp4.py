"""How the output video is coded and laid out in MP4: streams, segments, fragments, and reading back a part file.

A part file is an opening (`ftyp`, `moov`) and fragments (`moof`, `mdat`), one for each segment of the video. A segment
is a closed group of pictures from an encoder of its own. `writer` decides when to write what.
"""

from __future__ import annotations

import io
import json
import os
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.audio.codeccontext import AudioCodecContext
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from . import MediaError

AAC_FRAME = 1024
AAC_RATES = (7350, 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
AAC_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
OTHER_RATE = 48000
"""Sound of a rate that AAC does not know is resampled to this one."""


_GLOBAL_HEADER = 1 << 22  # AV_CODEC_FLAG_GLOBAL_HEADER, whose name in PyAV differs between versions
_OPENING = "empty_moov+delay_moov+default_base_moof+frag_custom+use_metadata_tags"
_SEGMENT = "empty_moov+default_base_moof+frag_custom+frag_discont+skip_trailer"
_FINAL = "faststart+use_metadata_tags"


@dataclass(frozen=True)
class Layout:
    """All that decides the coded bytes: a part file can be continued by a writer of the same layout only.

    width, height: pixels, even. source_fps, output_fps: frames a second, as exact ratios. audio_rate: Hz of the sound
    that is fed. segment_frames: source frames of a segment; first_segment_frames: of the first one, which differs
    where a rollout's first block is shorter. Raises MediaError for values that H.264, AAC or the container lack.
    """

    width: int
    height: int
    source_fps: Fraction
    output_fps: Fraction
    audio_rate: int
    audio_channels: int
    crf: int
    preset: str
    segment_frames: int
    first_segment_frames: int

    def __post_init__(self) -> None:
        if self.width < 2 or self.height < 2 or self.width % 2 or self.height % 2:
            raise MediaError(f"video size {self.width}x{self.height}: width and height must be even and at least 2")
        if not 0 < self.source_fps <= self.output_fps:
            raise MediaError(f"output_fps {self.output_fps} must be at least the source's {self.source_fps} (above 0)")
        if self.audio_channels not in AAC_LAYOUTS:
            raise MediaError(f"{self.audio_channels} audio channels: AAC holds 1 to 8; mix the sound down")
        if self.audio_rate < 1:
            raise MediaError(f"audio rate {self.audio_rate} must be at least 1 Hz")
        if self.preset not in PRESETS:
            raise MediaError(f"preset {self.preset!r} is unknown; use one of {', '.join(PRESETS)}")
        if not 1 <= self.crf <= 51:
            raise MediaError(f"crf {self.crf} must be from 1 (best) to 51 (smallest)")
        if min(self.segment_frames, self.first_segment_frames) < 2:
            raise MediaError("a segment must have at least 2 frames")  # H.264 forbids two like IDR pictures in a row

    @property
    def coded_rate(self) -> int:
        return self.audio_rate if self.audio_rate in AAC_RATES else OTHER_RATE

    def outputs(self, frames: int) -> int:
        """Output frames that the first `frames` source frames fill: round(frames * output_fps / source_fps)."""
        return int(frames * self.output_fps / self.source_fps + Fraction(1, 2))

    def end_of(self, segments: int) -> int:
        """Source frames in the first `segments` segments."""
        return self.first_segment_frames + (segments - 1) * self.segment_frames if segments else 0

    def segments_in(self, frames: int) -> int:
        """Whole segments in the first `frames` source frames."""
        beyond = frames - self.first_segment_frames
        return 1 + beyond // self.segment_frames if beyond >= 0 else 0

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, default=str)

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """Inverse of `to_json`. Raises ValueError, KeyError or TypeError for other text."""
        values = json.loads(text)
        return cls(**{**values, **{key: Fraction(values[key]) for key in ("source_fps", "output_fps")}})


@dataclass(frozen=True)
class CodedSound:
    """One AAC packet. index 0 is the one before time zero; duration in samples."""

    index: int
    duration: int
    data: bytes


class AudioTrack:
    """Codes sound into AAC packets and holds them until they are due."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._encoder = av.CodecContext.create("aac", "w")
        assert isinstance(self._encoder, AudioCodecContext)
        _configure_audio(self._encoder, layout)
        self._tail = np.zeros((layout.audio_channels, 0), np.float32)
        self._fed = 0
        self._made = 0
        self._skip = 0
        self._held: deque[CodedSound] = deque()

    @property
    def seconds_held(self) -> float:
        return len(self._held) * AAC_FRAME / self._layout.coded_rate

    def skip(self, packets: int) -> None:
        """The first `packets` are in the file. They are coded again and dropped: only so are the next ones the same."""
        self._skip = packets

    def write(self, samples: np.ndarray) -> None:
        joined = np.concatenate([self._tail, samples], axis=1)
        whole = joined.shape[1] // AAC_FRAME * AAC_FRAME
        for start in range(0, whole, AAC_FRAME):
            self._encode(joined[:, start : start + AAC_FRAME])
        self._tail = joined[:, whole:].copy()

    def finish(self) -> None:
        if not self._fed and not self._tail.shape[1]:
            return
        if self._tail.shape[1]:
            self._encode(self._tail)
            self._tail = self._tail[:, :0]
        self._hold(self._encoder.encode(None))
        self._trim()

    def due(self, end: Fraction | None) -> list[CodedSound]:
        """Held packets that begin before `end` seconds (all of them for None). They stay held until `drop`."""
        if end is None:
            return list(self._held)
        rate = self._layout.coded_rate
        return list(takewhile(lambda packet: (packet.index - 1) * AAC_FRAME < end * rate, self._held))

    def drop(self, packets: int) -> None:
        for _ in range(packets):
            self._held.popleft()

    def _encode(self, samples: np.ndarray) -> None:
        packed = np.ascontiguousarray(samples.T).reshape(1, -1)  # planar fails in PyAV from 8 channels on
        frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=AAC_LAYOUTS[self._layout.audio_channels])
        frame.sample_rate = self._layout.audio_rate
        frame.time_base = Fraction(1, self._layout.audio_rate)
        frame.pts = self._fed
        self._fed += samples.shape[1]
        self._hold(self._encoder.encode(frame))

    def _hold(self, packets: list[av.Packet]) -> None:
        for packet in packets:
            if self._made >= self._skip:
                self._held.append(CodedSound(self._made, AAC_FRAME, bytes(packet)))
            self._made += 1

    def _trim(self) -> None:
        """Let the last packet end with the sound: the encoder fills it up, and PyAV before 16 counts the filling."""
        total = round(Fraction(self._fed * self._layout.coded_rate, self._layout.audio_rate))
        while self._held and (self._held[-1].index - 1) * AAC_FRAME >= max(total, 1):
            self._held.pop()
        if self._held:
            last = self._held.pop()
            self._held.append(replace(last, duration=min(AAC_FRAME, total - (last.index - 1) * AAC_FRAME)))


class Segment:
    """One closed group of pictures: a small container of its own, whose `moof` and `mdat` go into the part."""

    def __init__(self, layout: Layout, number: int) -> None:
        self.number = number
        self.frames = 0
        self._layout = layout
        self._buffer = io.BytesIO()
        options = {"fragment_index": str(number + 1), "use_editlist": "0", "avoid_negative_ts": "disabled"}
        self._container = _open_mp4(self._buffer, _SEGMENT, **options)
        self._video, self._audio = _add_streams(self._container, layout)
        self._packets: list[av.Packet] = []

    def encode(self, frame: av.VideoFrame, index: int) -> None:
        """Add a yuv420p frame as the video's output frame `index`."""
        frame.pts = index
        frame.time_base = 1 / self._layout.output_fps
        self.frames += 1
        self._packets += self._video.encode(frame)

    def finish(self, sound: list[CodedSound]) -> bytes:
        """The fragment, with this sound. The segment cannot be used afterwards."""
        if self.frames:
            self._packets += self._video.encode(None)
        with self._container as container:
            container.start_encoding()
            for packet in self._packets:
                packet.duration = 1
                container.mux_one(packet)
            for coded in sound:
                # with the edit list's 1024 samples added: this is the time in the file, not that of the player
                container.mux_one(_packet(self._audio, coded.data, coded.index * AAC_FRAME, coded.duration))
        data = self._buffer.getvalue()
        return data[next(box.start for box in boxes(io.BytesIO(data)) if box.kind == b"moof") :]


def _packet(
    stream: AudioStream | VideoStream, data: bytes, time: int, duration: int, keyframe: bool = True
) -> av.Packet:
    """A packet whose time and duration count the samples or frames of its stream."""
    packet = av.Packet(data)
    packet.stream = stream
    packet.pts = packet.dts = time
    packet.duration = duration
    packet.time_base = stream.codec_context.time_base
    packet.is_keyframe = keyframe
    return packet


def _open_mp4(target: BinaryIO | str, movflags: str, **options: str) -> OutputContainer:
    return av.open(target, "w", format="mp4", options={"movflags": movflags, **options})


def _add_streams(container: OutputContainer, layout: Layout) -> tuple[VideoStream, AudioStream]:
    try:
        video = container.add_stream("libx264", rate=layout.output_fps)
        audio = container.add_stream("aac", rate=layout.coded_rate)
    except ValueError as error:
        raise MediaError(f"this build of PyAV has no encoder for H.264 or AAC ({error}); pip install av") from None
    assert isinstance(video, VideoStream) and isinstance(audio, AudioStream)
    _configure_video(video.codec_context, layout)
    _configure_audio(audio.codec_context, layout)
    return video, audio


def _configure_video(context: VideoCodecContext, layout: Layout) -> None:
    context.width, context.height, context.pix_fmt = layout.width, layout.height, "yuv420p"
    context.framerate, context.time_base = layout.output_fps, 1 / layout.output_fps
    context.color_primaries = context.color_trc = context.colorspace = 1  # bt709
    context.color_range = 1  # limited
    context.flags |= _GLOBAL_HEADER
    # one key frame a segment, nothing that looks past it, and one thread, so that equal frames give equal bytes. No
    # macroblock tree: x264's vector code for it is not repeatable while other threads work
    context.options = {
        "crf": str(layout.crf),
        "preset": layout.preset,
        "bf": "0",
        "g": "1000000",
        "sc_threshold": "0",
        "mbtree": "0",
        "threads": "1",
    }


def _configure_audio(context: AudioCodecContext, layout: Layout) -> None:
    rate = layout.coded_rate
    context.sample_rate, context.time_base = rate, Fraction(1, rate)
    context.layout, context.format = AAC_LAYOUTS[layout.audio_channels], "fltp"
    context.bit_rate = min(96000, 5 * rate) * layout.audio_channels
    context.flags |= _GLOBAL_HEADER


def opening_of(layout: Layout, tags: Mapping[str, str]) -> bytes:
    """`ftyp` and `moov` of the part.

    The edit list, which lets the sound begin 1024 samples early, is only written by a muxer that has seen a packet of
    each track; so it gets empty ones, and all after the `moov` is thrown away.
    """
    buffer = io.BytesIO()
    with _open_mp4(buffer, _OPENING) as container:
        video, audio = _add_streams(container, layout)
        container.metadata.update(tags)
        try:
            container.start_encoding()
        except FFmpegError as error:
            raise MediaError(
                f"H.264 or AAC refuses {layout.width}x{layout.height} pixels at {layout.output_fps} frames a second "
                f"or sound of {layout.coded_rate} Hz ({error.strerror}); choose a smaller size"
            ) from None
        container.mux_one(_packet(video, bytes(16), 0, 1))
        container.mux_one(_packet(audio, bytes(16), -AAC_FRAME, AAC_FRAME))
    data = buffer.getvalue()
    return data[: next(box.start for box in boxes(io.BytesIO(data)) if box.kind == b"moof")]


def copy_packets(source: Path, target: Path, layout: Layout, tags: Mapping[str, str]) -> None:
    """Remux without coding again.

    Streams are set up as for coding: `add_stream_from_template` of PyAV 14.0 replaces the H.264 header by one of its
    own. Paths are absolute, lest a colon in a name be taken for a protocol.
    """
    with av.open(str(source.absolute())) as given:
        _mux(_stored(given, layout), target, layout, tags)


def splice_packets(
    base: Path, piece: Path, first: int, stop: int, target: Path, layout: Layout, tags: Mapping[str, str]
) -> None:
    """Remux `base` with the pictures of its source frames first .. stop (ends of segments) from `piece`."""
    inside = range(layout.outputs(first), layout.outputs(stop))

    def pictures_and_sound(whole: InputContainer, part: InputContainer) -> Iterator[Stored]:
        new = [packet for packet in _stored(part, layout) if packet.video]
        for packet in _stored(whole, layout):
            if not (packet.video and packet.time in inside):
                yield packet
            elif packet.time == inside.start:
                yield from new

    with av.open(str(base.absolute())) as whole, av.open(str(piece.absolute())) as part:
        _mux(pictures_and_sound(whole, part), target, layout, tags)


@dataclass(frozen=True)
class Stored:
    """A packet of a file: its time in frames (video) or samples (sound)."""

    video: bool
    data: bytes
    time: int
    duration: int
    keyframe: bool


def _stored(container: InputContainer, layout: Layout) -> Iterator[Stored]:
    """Packets of a file of ours, pictures as an encoder gives them."""
    for packet in container.demux():
        if packet.dts is None or packet.pts is None:
            continue
        if packet.stream.type == "video":
            time = round(packet.pts * packet.time_base * layout.output_fps)
            yield Stored(True, _annex_b(bytes(packet)), time, 1, packet.is_keyframe)
        else:
            yield Stored(False, bytes(packet), packet.pts, packet.duration or AAC_FRAME, True)


def _mux(packets: Iterable[Stored], target: Path, layout: Layout, tags: Mapping[str, str]) -> None:
    with _open_mp4(str(target.absolute()), _FINAL) as made:
        made.metadata.update(tags)
        video, audio = _add_streams(made, layout)
        made.start_encoding()
        for stored in packets:
            stream = video if stored.video else audio
            made.mux_one(_packet(stream, stored.data, stored.time, stored.duration, stored.keyframe))
    with target.open("r+b") as file:
        os.fsync(file.fileno())


@dataclass(frozen=True)
class Finished:
    """A finished video of this program: its layout, source frames and metadata."""

    layout: Layout
    frames: int
    tags: Mapping[str, str]

    def check(self, layout: Layout, path: Path) -> None:
        """Raises MediaError unless pictures of `layout` fit into it."""
        if self.layout != layout:
            was, now = asdict(self.layout), asdict(layout)
            key = next(key for key, value in now.items() if was[key] != value)
            raise MediaError(f"{path.name} was made with {key} {was[key]}, not {now[key]}; use the same settings")


def finished_video(path: Path) -> Finished:
    """Raises MediaError for a file that is missing or not a finished video of this program."""
    try:
        with av.open(str(path.absolute())) as container:
            tags = dict(container.metadata)
            return Finished(Layout.from_json(tags["joyavatar_layout"]), int(tags["source_frames"]), tags)
    except (OSError, FFmpegError, KeyError, TypeError, ValueError):
        raise MediaError(f"{path}: is not a finished video of this program") from None


def source_frames(path: Path, layout: Layout, frames: range) -> Iterator[np.ndarray]:
    """Source frames of a finished video, uint8 [H, W, 3] RGB: of each its first showing."""
    wanted = [layout.outputs(frame) for frame in frames]
    with av.open(str(path.absolute())) as container:
        video = container.streams.video[0]
        assert video.time_base
        container.seek(int(wanted[0] / layout.output_fps / video.time_base), stream=video, backward=True)
        for frame in container.decode(video):
            assert frame.pts is not None and frame.time_base
            index = round(frame.pts * frame.time_base * layout.output_fps)
            if index > wanted[-1]:
                return
            if index in wanted:
                rgb = frame.reformat(format="rgb24", src_colorspace="ITU709", src_color_range="MPEG")  # pyright: ignore
                yield rgb.to_ndarray()


def _annex_b(data: bytes) -> bytes:
    """H.264 with the lengths that MP4 puts before its units replaced by start codes, as an encoder gives it."""
    units, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        units.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return b"".join(b"\0\0\0\1" + unit for unit in units)


@dataclass(frozen=True)
class _Box:
    kind: bytes
    start: int
    body: int
    end: int


def boxes(file: BinaryIO, start: int = 0, end: int | None = None) -> Iterator[_Box]:
    """The boxes of an MP4 file, or of a box's body from `start` to `end`, up to the first that is not whole."""
    stop = file.seek(0, io.SEEK_END) if end is None else end
    while start + 8 <= stop:
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(8))
        body = start + 8
        if size == 1:
            size, body = struct.unpack(">Q", file.read(8))[0], start + 16
        if size < body - start or start + size > stop:
            return
        yield _Box(kind, start, body, start + size)
        start += size


@dataclass(frozen=True)
class Fragment:
    """A whole fragment of a part: where it ends, how many output frames and AAC packets it holds."""

    end: int
    frames: int
    sound: int


@dataclass(frozen=True)
class Part:
    """What a part file holds, by its boxes."""

    path: Path
    layout: Layout
    headers: bytes
    fragments: list[Fragment]
    tags: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> Part:
        """Raises MediaError for a missing file or one that this writer did not make."""
        try:
            with path.open("rb") as file, av.open(str(path.absolute())) as container:
                tags = dict(container.metadata)
                layout = Layout.from_json(tags["joyavatar_layout"])
                return cls(path, layout, _headers(container), list(_fragments(file)), tags)
        except FileNotFoundError:
            raise MediaError(f"{path}: there is nothing to resume; start without resuming") from None
        except (OSError, FFmpegError, KeyError, TypeError, ValueError, struct.error):
            raise MediaError(f"{path}: is not an unfinished video of this program; remove or rename it") from None

    def check(self, layout: Layout, opening: bytes) -> None:
        """Raises MediaError unless segments of `layout`, under this `opening`, can follow on."""
        begun = asdict(self.layout)
        for key, value in asdict(layout).items():
            if begun[key] != value:
                raise MediaError(
                    f"{self.path}: was begun with {key} {begun[key]}, not {value}; resume with the same settings or "
                    "start anew"
                )
        with av.open(io.BytesIO(opening)) as container:
            if _headers(container) != self.headers:
                raise MediaError(f"{self.path}: was begun with another version of PyAV or x264; start anew")

    @property
    def whole_segments(self) -> int:
        """Segments from the start that are all there; a last one may be short, where a finish failed."""
        for number, fragment in enumerate(self.fragments):
            ends = self.layout.end_of(number), self.layout.end_of(number + 1)
            if fragment.frames != self.layout.outputs(ends[1]) - self.layout.outputs(ends[0]):
                return number
        return len(self.fragments)


def _headers(container: InputContainer) -> bytes:
    """H.264 parameter sets: every segment is decoded by those of the opening."""
    return bytes(container.streams.video[0].codec_context.extradata or b"")


def _fragments(file: BinaryIO) -> Iterator[Fragment]:
    counts = {1: 0, 2: 0}
    for box in boxes(file):
        if box.kind == b"moof":
            counts = _counts(file, box)
        elif box.kind == b"mdat":
            yield Fragment(box.end, counts[1], counts[2])


def _counts(file: BinaryIO, moof: _Box) -> dict[int, int]:
    """Packets of track 1 (video) and 2 (sound) in a fragment: the sample counts of its `trun` boxes."""
    counts = {1: 0, 2: 0}
    for track in boxes(file, moof.body, moof.end):
        number = 0
        for box in boxes(file, track.body, track.end) if track.kind == b"traf" else ():
            file.seek(box.body + 4)  # past version and flags
            if box.kind == b"tfhd":
                number = struct.unpack(">I", file.read(4))[0]
            elif box.kind == b"trun":
                counts[number] += struct.unpack(">I", file.read(4))[0]
    return counts
