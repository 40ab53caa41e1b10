"""espeak-ng through its C library: text to sound with the start of every sound.

An optional tool of whoever trains; nothing of it is in the package. The library keeps hidden state between utterances
(the flutter of the voice, libc's rand), which would make a clip depend on those before it. So it is loaded anew for
every clip, 6 ms, and unloaded after it, and a lock keeps it to one clip at a time. It must not be initialised twice
in one load: 1.51 then hangs. Interface: espeak-ng's speak_lib.h, API revision 12 (version 1.50 and later).

Shape legend: n sound samples at the library's own rate (22050 Hz).
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_NAMES = {"darwin": ("libespeak-ng.1.dylib", "libespeak-ng.dylib")}
_ONE_CLIP = threading.Lock()
_PRIMARY, _SECONDARY = "\u02c8", "\u02cc"  # the stress marks of the phonetic alphabet
_SYNCHRONOUS, _PHONES, _IPA, _KEEP_RUNNING = 2, 0x1, 0x2, 0x8000
_RATE, _PITCH, _RANGE = 1, 3, 4  # espeak_PARAMETER
_UTF8, _FROM_CHARACTER, _PHONE_EVENT = 1, 1, 7
_BETWEEN = "_"  # stands between the sounds of espeak_TextToPhonemes


class _Name(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_void_p), ("string", ctypes.c_uint8 * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Name),
    )


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Event))


@dataclass(frozen=True)
class Voice:
    """A voice of espeak-ng: name such as "de+f3", words a minute, pitch and its range in 0..100."""

    name: str
    words_per_minute: int
    pitch: int
    pitch_range: int


@dataclass(frozen=True)
class Utterance:
    """audio: [n] float32 in [-1, 1] at `sample_rate`. labels: IPA of each sound, "" where the library names none.

    starts: [S] seconds. stressed: [S] 0, 0.5 (secondary) or 1 (primary). The last sound ends with the audio.
    """

    audio: NDArray[np.float32]
    sample_rate: int
    labels: tuple[str, ...]
    starts: tuple[float, ...]
    stressed: tuple[float, ...]


class Espeak:
    """The library for the length of a `with` block. The seed decides its noise.

    Raises OSError where it is not on the machine or has no data.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._sound: list[bytes] = []
        self._phones: list[tuple[str, float]] = []
        self._callback = _CALLBACK(self._receive)  # kept: the library holds only its address

    def __enter__(self) -> Espeak:
        _ONE_CLIP.acquire()
        try:
            self._library = _load()
            options = _PHONES | _IPA | _KEEP_RUNNING
            self.sample_rate = int(self._library.espeak_Initialize(_SYNCHRONOUS, 0, None, options))
            if self.sample_rate <= 0:
                raise OSError("espeak-ng is installed without its data")
        except OSError:
            _ONE_CLIP.release()
            raise
        self._library.espeak_SetSynthCallback(self._callback)
        ctypes.CDLL(None).srand(self._seed & 0xFFFFFFFF)
        return self

    def __exit__(self, *_: object) -> None:
        self._library.espeak_Terminate()
        _unload(self._library)
        _ONE_CLIP.release()

    def has(self, name: str) -> bool:
        """Whether a voice such as "de" or "de+f3" is there."""
        return self._library.espeak_SetVoiceByName(name.encode()) == 0

    def say(self, voice: Voice, text: str) -> Utterance:
        """One utterance without a pause at its end. Raises ValueError for a voice that is not installed."""
        self._select(voice)
        spelled = self._spelled(text)
        self._sound, self._phones = [], []
        data = ctypes.create_string_buffer(text.encode())
        self._library.espeak_Synth(data, len(data), 0, _FROM_CHARACTER, 0, _UTF8, None, None)
        audio = (np.frombuffer(b"".join(self._sound), np.int16) / 32768).astype(np.float32)
        labels, starts = tuple(label for label, _ in self._phones), tuple(start for _, start in self._phones)
        return Utterance(audio, self.sample_rate, labels, starts, _stresses(labels, spelled))

    def _select(self, voice: Voice) -> None:
        if self._library.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice.name!r}; `espeak-ng --voices` lists the voices there are")
        settings = ((_RATE, voice.words_per_minute), (_PITCH, voice.pitch), (_RANGE, voice.pitch_range))
        for parameter, value in settings:
            self._library.espeak_SetParameter(parameter, value, 0)

    def _spelled(self, text: str) -> list[str]:
        """The sounds of the text with their stress marks, which the events leave out."""
        data = ctypes.create_string_buffer(text.encode())
        rest, sounds = ctypes.c_void_p(ctypes.addressof(data)), []
        while rest.value:
            clause = self._library.espeak_TextToPhonemes(ctypes.byref(rest), _UTF8, _IPA | ord(_BETWEEN) << 8)
            sounds += clause.decode("utf-8", "replace").replace(" ", _BETWEEN).split(_BETWEEN)
        return [sound for sound in sounds if sound]

    def _receive(self, wave: int | None, count: int, events: ctypes._Pointer[_Event]) -> int:
        if wave and count > 0:
            self._sound.append(ctypes.string_at(wave, 2 * count))
        index = 0
        while events[index].type:
            if events[index].type == _PHONE_EVENT:
                name = bytes(events[index].id.string).split(b"\0")[0].decode("utf-8", "ignore")
                self._phones.append((name, events[index].audio_position / 1000))
            index += 1
        return 0


def _load() -> ctypes.CDLL:
    """Raises OSError where no library of that name can be loaded."""
    for name in _NAMES.get(sys.platform, ("libespeak-ng.so.1", "libespeak-ng.so")):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        library.espeak_Synth.argtypes = [
            *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint),
            *(ctypes.c_void_p, ctypes.c_void_p),
        ]
        return library
    raise OSError("espeak-ng is not installed")


def _unload(library: ctypes.CDLL) -> None:
    close = ctypes.CDLL(None).dlclose
    close.argtypes = [ctypes.c_void_p]
    close(library._handle)


def _is_loaded(name: str) -> bool:
    try:
        ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return False
    return True


@cache
def installed() -> bool:
    """Whether the machine has espeak-ng, and one that can be unloaded; if not, one warning is logged."""
    try:
        if sys.platform == "win32":
            raise OSError("espeak-ng is only used on Linux and macOS")
        library = _load()
        name = library._name
        _unload(library)
        if _is_loaded(name):
            raise OSError(f"{name} is held by another part of this process")
        with Espeak(0):
            return True
    except OSError as error:
        logger.warning("%s: speech is babbled; install espeak-ng (and its data) for spoken sentences", error)
        return False


def _stresses(labels: tuple[str, ...], spelled: list[str]) -> tuple[float, ...]:
    """Stress of each label, from the same sounds spelled with marks; a sound spelled otherwise has none."""
    from difflib import SequenceMatcher

    plain = [sound.strip(f"{_PRIMARY}{_SECONDARY}0123456789") for sound in spelled]
    marks = [1.0 if _PRIMARY in sound else 0.5 if _SECONDARY in sound else 0.0 for sound in spelled]
    out = [0.0] * len(labels)
    for first, second, size in SequenceMatcher(None, labels, plain, autojunk=False).get_matching_blocks():
        out[first : first + size] = marks[second : second + size]
    return tuple(out)
