"""Makes the pictures and voices that come with the package (`samples.py`): drawn by us, spoken by espeak-ng.

    python -m joyavatar_core.training.samples [--out DIR]

The lists below are the recipe; the same versions of the libraries give the same files.

Shape legend: n sound samples, H W pixel size. Pictures are uint8 [H, W, 3] RGB.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..samples import FOLDER
from .drawn import Avatar, Pose, draw
from .espeak import Espeak, Voice

log = logging.getLogger(__name__)

_PAUSE = 0.45  # seconds between sentences, and of silence at both ends
_PEAK = 0.7


@dataclass(frozen=True)
class Picture:
    """seed: of the identity. size: (H, W) pixels."""

    seed: int
    size: tuple[int, int] = (512, 512)


@dataclass(frozen=True)
class Spoken:
    """A voice of espeak-ng and what it says, sentence by sentence."""

    voice: Voice
    sentences: tuple[str, ...]


PICTURES = {
    "demo": Picture(910_000_031),
    "braids": Picture(910_000_044),
    "cat": Picture(910_000_010),
    "glasses": Picture(910_000_019),
    "hat": Picture(910_000_057),
    "rabbit": Picture(910_000_038),
    "robot": Picture(910_000_002),
    "silver": Picture(910_000_039),
    "tall": Picture(910_000_020, (640, 384)),
    "wide": Picture(910_000_046, (384, 640)),
}
_HELLO_EN = (
    "Hello! I am a drawing, and I can talk.",
    "Give me a picture and a voice, and I will move my lips, blink, and nod my head.",
    "My model is very small, but I never get tired.",
)
VOICES: dict[str, Spoken] = {
    "demo": Spoken(Voice("en-us+f3", 155, 55, 60), _HELLO_EN),
    "english": Spoken(
        Voice("en-gb-x-rp+m3", 160, 45, 60),
        ("Good morning, and welcome to the programme.", "Before breakfast, my brother baked a big plum pie.",
         "Everybody came, and we had a wonderful time."),
    ),
    "german": Spoken(
        Voice("de+m2", 155, 45, 55),
        ("Guten Tag! Schön, dass du da bist.", "Meine Mama backt am Freitagabend fünf frische Brote.",
         "Komm doch vorbei und probier ein Stück."),
    ),
    "french": Spoken(
        Voice("fr+f2", 160, 50, 60),
        ("Bonjour à tous et bienvenue.", "Mon petit frère mange une pomme devant la fenêtre.",
         "Il fait beau, partons nous promener."),
    ),
    "spanish": Spoken(
        Voice("es+m4", 160, 50, 55),
        ("¡Hola a todos y bienvenidos!", "Mi abuela prepara pan blanco para mi primo Pablo.",
         "Vamos a pasear por la playa."),
    ),
    "mandarin": Spoken(
        Voice("cmn-latn-pinyin+f1", 150, 50, 50),
        ("Nǐ hǎo, huānyíng nǐmen.", "Māma měitiān zǎoshang hē yì bēi chá.",
         "Jīntiān tiānqì hěn hǎo, wǒmen qù gōngyuán ba."),
    ),
}  # fmt: skip

_LICENSE = """\
# Pictures and voices of this folder

Made by this project with `python -m joyavatar_core.training.samples`: the pictures are drawn by
`joyavatar_core/training/drawn` (nobody is depicted), the voices are spoken by the speech synthesiser espeak-ng, whose
licence does not reach its output, from sentences written for this project. They may be used for anything, without
naming us: [CC0 1.0](https://creativecommons.org/publicdomain/zero/1.0/).
"""


def picture(wanted: Picture) -> NDArray[np.uint8]:
    """[H, W, 3], at rest, looking at the viewer."""
    return draw(Avatar.random(wanted.seed), Pose(), wanted.size)


def speech(spoken: Spoken) -> tuple[NDArray[np.float32], int]:
    """[n] and its rate in Hz. Raises OSError where espeak-ng is not installed."""
    with Espeak(seed=0) as espeak:
        rate = espeak.sample_rate
        said = [espeak.say(spoken.voice, sentence).audio for sentence in spoken.sentences]
    pause = np.zeros(round(_PAUSE * rate), np.float32)
    audio = np.concatenate([pause, *(part for sentence in said for part in (sentence, pause))])
    return audio * (_PEAK / float(np.abs(audio).max())), rate


def write_picture(path: Path, frame: NDArray[np.uint8]) -> None:
    import cv2

    cv2.imwrite(str(path), frame[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])


def write_voice(path: Path, audio: NDArray[np.float32], rate: int) -> None:
    """Ogg Vorbis, mono."""
    import soundfile  # comes with librosa

    soundfile.write(path, audio, rate, format="OGG", subtype="VORBIS")


def write(out: Path) -> None:
    """All pictures, voices and the licence note."""
    out.mkdir(parents=True, exist_ok=True)
    for name, wanted in PICTURES.items():
        write_picture(out / f"{name}.png", picture(wanted))
    for name, spoken in VOICES.items():
        write_voice(out / f"{name}.ogg", *speech(spoken))
        log.info("%s", out / name)
    (out / "LICENSE.md").write_text(_LICENSE, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the samples of the package.")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write(options.out)


if __name__ == "__main__":
    main()
