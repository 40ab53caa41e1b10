"""What a checkpoint is, from its keys alone: one row for every layout of names, one for every system that uses it.

A layout says which names there are and how sizes are read from shapes; a system adds what no key says: how its
generator was trained to be rolled out, its frame rate, and under which name its files and licence are known. Systems
that share all their keys (Self-Forcing, LongLive, Rolling-Forcing) are told apart by the profile in our own metadata,
by how the file is called, or else taken for the first of them. Spellings and prefixes are `checkpoint.TRANSLATIONS`.

No tensor is read here, only names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

from . import known_weights
from .checkpoint import CheckpointError, Tensors
from .config import MODELS, AudioConfig, FaceConfig, ModelConfig, S2VConfig

Shapes = Mapping[str, tuple[int, ...]]
Layout = Literal["text", "image", "audio", "audio-face", "packed-audio", "s2v", "embedded"]
Hearing = Literal["none", "log-mel", "wav2vec2", "wav2vec2-frames", "wav2vec2-s2v"]


@dataclass(frozen=True)
class Profile:
    """A system: what fits the weights of one layout.

    what: in a few words. policy: name in policy.POLICIES. fps: pixel frames a second. known: name in
    known_weights.KNOWN, which has files and licences; empty where it has none. audio_delay: pixel frames by which the
    model hears later than it shows (`wav2vec_frames`).
    """

    layout: Layout
    what: str
    policy: str
    fps: Fraction = Fraction(16)
    known: str = ""
    audio_delay: int = 0


PROFILES: dict[str, Profile] = {
    # of systems with one layout, the first is what a file without a better clue is taken for
    "embedded": Profile("embedded", "the model in the package, and its like", "joyavatar-flash"),
    "self-forcing": Profile("text", "Self-Forcing: silent text to video", "self-forcing", known="self-forcing"),
    "longlive": Profile("text", "LongLive: silent text to video", "longlive", known="longlive"),
    "rolling-forcing": Profile(
        "text", "Rolling-Forcing: silent text to video", "rolling-forcing", known="rolling-forcing"
    ),
    "wan-i2v": Profile("image", "Wan2.1 image to video: silent", "joyavatar-flash"),
    "fantasytalking": Profile("audio", "Wan2.1 image to video that hears, as FantasyTalking", "joyavatar-flash"),
    "joyavatar-flash": Profile(
        "audio-face", "JoyAvatar-Flash: picture and voice", "joyavatar-flash", known="joyavatar-flash"
    ),
    "livetalk": Profile("packed-audio", "LiveTalk: picture and voice", "livetalk", known="livetalk"),
    "live-avatar": Profile(
        "s2v", "Live Avatar, Wan2.2-S2V with its LoRA: picture and voice", "live-avatar", Fraction(25), "live-avatar"
    ),
    "avatarforcing": Profile(
        "packed-audio",
        "AvatarForcing: picture and voice",
        "avatarforcing",
        Fraction(25),
        "avatarforcing",
        audio_delay=1,
    ),
}

# Beginnings of names, and what a file that has them is. All of these have been taken for a transformer of Wan2.1.
_OTHERS = (
    ("vace_blocks.", "a VACE model, which is steered by a video"),
    ("control_adapter.", "a camera-control model"),
    ("condition_embedder.", "a transformer in the layout of diffusers: take the original or ComfyUI's file"),
    ("joint_blocks.", "a transformer of Stable Diffusion 3"),
    ("double_blocks.", "a transformer of the Flux family"),
    ("input_blocks.", "a U-Net of Stable Diffusion"),
    ("encoder.conv1.", "an autoencoder: it belongs to the VAE input"),
    ("encoder.", "an encoder or autoencoder"),
    ("decoder.", "a decoder"),
    ("token_embedding.", "a umT5 text encoder"),
    ("shared.", "a T5 text encoder"),
    ("vision_model.", "a CLIP-vision encoder"),
    ("wav2vec2.", "a wav2vec2 audio encoder"),
    ("feature_extractor.", "a wav2vec2 audio encoder"),
)


def layout_of(config: ModelConfig) -> Layout:
    """The layout that belongs to sizes."""
    if config.audio is None:
        return "image" if config.image_dim or config.has_image_channels else "text"
    kinds: dict[str, Layout] = {"window": "embedded", "added": "packed-audio", "injected": "s2v"}
    return kinds.get(config.audio.kind) or ("audio-face" if config.face else "audio")


def hearing(config: ModelConfig) -> Hearing:
    """The front end a model hears through."""
    if config.audio is None:
        return "none"
    kinds: dict[str, Hearing] = {
        "window": "log-mel",
        "added": "wav2vec2-frames",
        "tokens": "wav2vec2",
        "injected": "wav2vec2-s2v",
    }
    return kinds[config.audio.kind]


def profile_of(config: ModelConfig, metadata: Mapping[str, str], files: Iterable[str | Path] = ()) -> str:
    """Name in PROFILES of the system that a file's sizes, metadata and name point to.

    The metadata's `profile` goes before adapters found inside (AvatarForcing's), those before a file's name. A clue
    that names a system of another layout counts for nothing.
    """
    layout = layout_of(config)
    clues = [metadata.get("profile"), "avatarforcing" if "adapters_inside" in metadata else None]
    clues += [known_weights.recognised(file) for file in files]
    fitting = [name for name, profile in PROFILES.items() if profile.layout == layout]
    return next((clue for clue in clues if clue in fitting), fitting[0])


def detect_config(tensors: Tensors) -> ModelConfig:
    """Sizes of a Wan2.1-shaped transformer from its tensors. CheckpointError, saying what it is, for something else."""
    return config_of_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})


def config_of_shapes(shapes: Shapes) -> ModelConfig:
    """Sizes of a Wan2.1-shaped transformer from the shapes of its tensors, under our names; see `detect_config`."""
    try:
        return _config(shapes)
    except KeyError as missing:
        what = next((f" but {what}" for start, what in _OTHERS if any(n.startswith(start) for n in shapes)), "")
        raise CheckpointError(f"not a Wan2.1-shaped transformer{what}: {missing} is missing") from missing


def _config(shapes: Shapes) -> ModelConfig:
    """Wan2.1 has heads of 128 channels in all its sizes."""
    patch = shapes["patch_embedding.weight"]
    if len(patch) != 5 or patch[0] % 128:
        raise CheckpointError(
            f"not a Wan2.1-shaped transformer: patch_embedding.weight is {list(patch)}, must be "
            "[dim, channels, 1, height, width] with dim a multiple of 128"
        )
    for start, what in _OTHERS[:2]:
        if any(name.startswith(start) for name in shapes):
            raise CheckpointError(f"not a transformer this engine runs but {what}: {start}* are left over")
    return _sized(patch, shapes)


def _sized(patch: tuple[int, ...], shapes: Shapes) -> ModelConfig:
    """Names that every transformer needs and this one lacks keep Wan2.1's sizes here; loading then names them."""
    base = MODELS["wan-i2v-1.3b"]
    try:
        return replace(
            base,
            dim=patch[0],
            ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
            layers=numbered(shapes, "blocks"),
            heads=patch[0] // 128,
            in_channels=patch[1],
            out_channels=shapes.get("head.head.weight", (patch[3] * patch[4] * 16,))[0] // (patch[3] * patch[4]),
            patch=(patch[3], patch[4]),
            freq_dim=shapes.get("time_embedding.0.weight", (0, base.freq_dim))[1],
            text_dim=shapes.get("text_embedding.0.weight", (0, base.text_dim))[1],
            image_dim=shapes["img_emb.proj.1.weight"][1] if "img_emb.proj.1.weight" in shapes else 0,
            audio=_audio(shapes),
            s2v=_s2v(shapes),
            face=_face(shapes) if "face_proj.proj_in.weight" in shapes else None,
        )
    except ValueError as error:  # sizes that cannot be
        raise CheckpointError(f"not a Wan2.1-shaped transformer: {error}") from error


def _audio(shapes: Shapes) -> AudioConfig | None:
    if "proj_model.proj.weight" in shapes:
        width, features = shapes["proj_model.proj.weight"]
        return AudioConfig(features=features, width=width)
    if "audio_proj.proj.weight" in shapes:
        width, features = shapes["audio_proj.proj.weight"]
        return AudioConfig(kind="added", features=features // 4, width=width, window=4)
    if _MIXED in shapes:
        width, features, _ = shapes["casual_audio_encoder.encoder.conv1_global.conv.weight"]
        tokens = shapes["casual_audio_encoder.encoder.conv1_local.conv.weight"][0] // width
        return AudioConfig(kind="injected", features=features * shapes[_MIXED][1], window=4, tokens=tokens)
    return None


_MIXED = "casual_audio_encoder.weights"


def _s2v(shapes: Shapes) -> S2VConfig | None:
    """No shape says after which layers Wan2.2-S2V hears, only how many they are: those of the one published size."""
    if _MIXED not in shapes:
        return None
    known, layers = S2VConfig(), numbered(shapes, "blocks")
    found = numbered(shapes, "audio_injector.injector")
    if found != len(known.inject_layers) or layers <= known.inject_layers[-1]:
        raise ValueError(
            f"{found} audio injectors in {layers} layers: known is Wan2.2-S2V-14B with "
            f"{len(known.inject_layers)} in {known.inject_layers[-1] + 1}"
        )
    return replace(known, audio_layers=shapes[_MIXED][1])


def _face(shapes: Shapes) -> FaceConfig:
    """The published resamplers have heads of 64 channels."""
    dim, features = shapes["face_proj.proj_in.weight"]
    depth, queries = numbered(shapes, "face_proj.layers"), shapes["face_proj.latents"][1]
    return FaceConfig(features, dim, depth, dim // 64, queries, width=shapes["face_proj.proj_out.weight"][0])


def numbered(shapes: Shapes, prefix: str) -> int:
    """One more than the largest number that follows the prefix in a name."""
    numbers = [n[len(prefix) + 1 :].split(".")[0] for n in shapes if n.startswith(prefix + ".")]
    return 1 + max((int(n) for n in numbers if n.isdigit()), default=-1)
