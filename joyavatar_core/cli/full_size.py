"""`--model FILE`: a full-size system from files on this machine, and what its encoders say of picture and prompt.

Encoders of text and picture run once and are freed before the transformer takes its place on the device.

Shape legend: H W pixels, L tokens, C channels of a token.
"""

from __future__ import annotations

import argparse
import contextlib
import html
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from .. import checkpoint, front_ends
from ..audio import LogMel, require
from ..autoencoder import LightAutoencoder
from ..avatar import (
    Avatar,
    Encoded,
    FrontEndMaker,
    default_dtype,
    load_autoencoder,
    load_profiled,
    takes_reference_tokens,
)
from ..config import MODELS, AudioConfig, ModelConfig
from ..families import Profile, hearing
from ..front_ends import all_states
from ..known_weights import licence_warning
from ..media.face import face_of_file
from ..media.picture import fit_picture
from ..types import VideoAutoencoder
from ..wav2vec import Layers, load_wav2vec2
from .options import size_of

logger = logging.getLogger(__name__)

DEFAULT_SIZE = (512, 512)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def load_full_size(
    args: argparse.Namespace, picture: np.ndarray, device: str, dtype: torch.dtype | None = None
) -> tuple[Avatar, Encoded]:
    """`load_for_pictures` of one picture."""
    avatar, encoded = load_for_pictures(args, [picture], device, dtype)
    return avatar, encoded[0]


def load_for_pictures(
    args: argparse.Namespace, pictures: Sequence[np.ndarray], device: str, dtype: torch.dtype | None = None
) -> tuple[Avatar, list[Encoded]]:
    """The system that --model, --vae and the encoder options name, and what its encoders say of each picture.

    Args:
        args: options of `joyavatar generate`.
        pictures: uint8 [H, W, 3].
        device, dtype: where and in what the transformer and the autoencoder run; None: what suits the device.
    Raises:
        ValueError: the model needs an option that was not given, or parts do not fit together.
        OSError, CheckpointError: a file is missing or is not what the option asks for.
    """
    place = torch.device(device)
    dtype = dtype or default_dtype(place)
    files = model_files(args.model)
    if warning := " ".join(dict.fromkeys(filter(None, map(licence_warning, files)))):
        logger.warning("%s", warning)
    model, profile = load_profiled(files)
    _check_options(args, model.config)
    autoencoder = _autoencoder("--vae", args.vae, model.config, place, dtype)
    front_end = _front_end(args.audio_encoder, args.whole_audio, model.config, profile, place)
    size = size_of(args.size) if args.size else DEFAULT_SIZE
    encoded = _encoded(args, model.config, [fit_picture(p, *size, args.fit) for p in pictures], place, dtype)
    model = model.to(place, dtype).requires_grad_(False)
    avatar = Avatar(model, autoencoder, front_end, place, dtype, profile.fps, DEFAULT_SIZE, profile.policy)
    return avatar, encoded


def load_decoder(path: str, avatar: Avatar) -> VideoAutoencoder:
    """--decoder: what makes frames of the latents in place of the autoencoder that encodes the picture."""
    return _autoencoder("--decoder", path, avatar.model.config, avatar.device, avatar.dtype)


def model_files(text: str) -> list[Path]:
    """Files of --model: one, or several joined by commas."""
    return [Path(text)] if Path(text).exists() else [Path(part) for part in text.split(",")]


def read_tokens(path: str | Path) -> Tensor:
    """A ready embedding: the array of a .npy file, or the one tensor of a .safetensors file, in float32.

    Raises CheckpointError for anything else.
    """
    path = Path(path)
    tensor = _read_npy(path) if path.suffix == ".npy" else _only_tensor(path)
    if not tensor.isfinite().all():
        raise checkpoint.CheckpointError(f"{path.name} holds numbers that are not finite")
    return tensor


def load_text_encoder(
    folder: str | Path, length: int, device: torch.device, dtype: torch.dtype
) -> Callable[[str], Tensor]:
    """umT5 as a function of a prompt -> [1, L, C] with L <= length; longer prompts are cut, as Wan2.1 does.

    folder: as transformers saves it; the tokenizer lies there, or in `tokenizer` in it or beside it.
    """
    transformers = require("transformers", "the text encoder")
    # published in bfloat16; float16 overflows in this family
    model = _pretrained(transformers.UMT5EncoderModel, folder, torch.bfloat16 if dtype == torch.float16 else dtype)
    model = model.to(device)
    with _quiet(transformers):
        tokenizer = transformers.AutoTokenizer.from_pretrained(_tokenizer_folder(Path(folder)), local_files_only=True)

    @torch.no_grad()
    def encode(prompt: str) -> Tensor:
        prompt = " ".join(html.unescape(html.unescape(prompt)).split())
        words = tokenizer(prompt, return_tensors="pt", truncation=True, max_length=length)["input_ids"]
        if not words.numel() or int(words.max()) >= model.config.vocab_size:
            raise ValueError(f"the tokenizer in {folder} does not belong to the text encoder there")
        return model(input_ids=words.to(device)).last_hidden_state.float().cpu()

    return encode


def load_clip_vision(folder: str | Path, device: torch.device, dtype: torch.dtype) -> Callable[[np.ndarray], Tensor]:
    """CLIP-vision as a function of a picture (uint8 [H, W, 3]) -> [1, L, C]: the last block but one (Wan2.1)."""
    transformers = require("transformers", "the CLIP-vision encoder")
    model = _pretrained(transformers.CLIPVisionModel, folder, dtype).to(device)

    @torch.no_grad()
    def encode(picture: np.ndarray) -> Tensor:
        pixels = clip_pixels(picture, model.config.image_size).to(device, dtype)
        return model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2].float().cpu()

    return encode


def clip_pixels(picture: np.ndarray, size: int) -> Tensor:
    """uint8 [H, W, 3] -> CLIP's input [1, 3, size, size]; the whole picture, whatever its shape, as Wan2.1 does."""
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255
    pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = torch.tensor((CLIP_MEAN, CLIP_STD)).view(2, 1, 3, 1, 1)
    return (pixels - mean) / std


# Options against the model


def _check_options(args: argparse.Namespace, config: ModelConfig) -> None:
    """ValueError for what the model needs and was not given; a warning for what it does not take."""
    takes = {
        "--vae": (args.vae, True, "the Wan2.1 VAE or a light autoencoder"),
        "--audio-encoder": (args.audio_encoder, _takes_wav2vec2(config), "a wav2vec2 folder or file"),
        "--text-encoder": (args.text_encoder, config.text_dim > 0, "a umT5 folder or a file with a ready embedding"),
        "--clip-vision": (args.clip_vision, _takes_clip(config), "a CLIP-vision folder or a file with ready tokens"),
    }
    missing = [f"{option} ({what})" for option, (given, taken, what) in takes.items() if taken and not given]
    if missing:
        raise ValueError(f"the model {args.model} needs {', '.join(missing)}: give the path")
    needless = [option for option, (given, taken, _) in takes.items() if given and not taken]
    needless += ["--face"] if args.face and not config.face else []
    needless += ["--prompt"] if args.prompt and not (config.text_dim and Path(args.text_encoder).is_dir()) else []
    if needless:
        logger.warning("not used by this model: %s", ", ".join(needless))
    if not config.audio:
        logger.warning("this model does not listen: the sound only sets the length of the video")


def _takes_wav2vec2(config: ModelConfig) -> bool:
    return hearing(config) not in ("none", "log-mel")


def _takes_clip(config: ModelConfig) -> bool:
    return config.image_dim > 0 and not takes_reference_tokens(config)


# Parts


def _autoencoder(
    option: str, path: str, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> VideoAutoencoder:
    autoencoder = load_autoencoder(path).to(device, dtype).requires_grad_(False)
    if autoencoder.latent_channels != config.out_channels:
        raise ValueError(
            f"{option} {path} has {autoencoder.latent_channels} latent channels, the model {config.out_channels}: "
            "give the autoencoder the model was trained with"
        )
    if isinstance(autoencoder, LightAutoencoder):
        return autoencoder.to(memory_format=torch.channels_last).folded()  # pyright: ignore[reportCallIssue]
    return autoencoder


def _front_end(path: str, whole: bool, config: ModelConfig, profile: Profile, device: torch.device) -> FrontEndMaker:
    if config.audio and config.audio.kind == "window":
        _check_log_mel(config.audio)
    if config.audio is None or config.audio.kind == "window":
        return LogMel
    with _quiet(require("transformers", "the wav2vec2 front end")):
        model = load_wav2vec2(path).to(device)  # pyright: ignore[reportArgumentType]
    channels = all_states(hearing(config), model.config.hidden_size, model.config.num_hidden_layers)
    if channels is None:
        layers = _layers(path, model.config, config.audio.features)
    else:
        _check_width(path, channels, config.audio.features)
        layers = "all"
    options: dict[str, Any] = {"layers": layers, "delay": profile.audio_delay}
    make = front_ends.whole if whole else front_ends.streaming
    return lambda geometry: make(config, model, geometry, **options)


def _check_log_mel(audio: AudioConfig) -> None:
    known = MODELS["tiny"].audio
    assert known
    if (audio.features, audio.window) != (known.features, known.window):
        raise ValueError(
            f"the model listens to {audio.window} tokens of {audio.features} numbers a latent: "
            f"the log-mel front end gives {known.window} of {known.features}"
        )


def _layers(path: str, wav2vec2: Any, features: int) -> Layers:
    """Whether the model was trained on the last hidden state or on all of them."""
    width = wav2vec2.hidden_size
    if features == width * (wav2vec2.num_hidden_layers + 1):
        return "all"
    _check_width(path, width, features)
    return "last"


def _check_width(path: str, width: int, features: int) -> None:
    if features != width:
        raise ValueError(f"--audio-encoder {path} gives tokens of {width} numbers, the model takes {features}")


def _encoded(
    args: argparse.Namespace,
    config: ModelConfig,
    pictures: Sequence[np.ndarray],
    device: torch.device,
    dtype: torch.dtype,
) -> list[Encoded]:
    """What the encoders, or files with their outputs, say of each picture; None for what the model does not take."""
    text = face = None
    images: list[Tensor | None] = [None] * len(pictures)
    if config.text_dim:
        text = _tokens(
            "--text-encoder",
            args.text_encoder,
            config.text_dim,
            lambda folder: load_text_encoder(folder, config.text_len, device, dtype)(args.prompt),
        )
    if _takes_clip(config):
        see = lru_cache(lambda folder: load_clip_vision(folder, device, dtype))
        images = [
            _tokens("--clip-vision", args.clip_vision, config.image_dim, lambda folder, p=p: see(folder)(p))
            for p in pictures
        ]
        see.cache_clear()
    if config.face and args.face:
        face = _face(args, config.face.features)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the encoders held
    return [Encoded(text, image, face) for image in images]


def _tokens(option: str, path: str, channels: int, encode: Callable[[Path], Tensor]) -> Tensor:
    """Tokens [1, L, channels] from an encoder's folder or a file."""
    place = Path(path)
    tokens = encode(place) if place.is_dir() else read_tokens(place)
    tokens = tokens[None] if tokens.dim() == 2 else tokens
    if tokens.dim() != 3 or tokens.shape[0] != 1 or not tokens.shape[1] or tokens.shape[2] != channels:
        raise ValueError(f"{option} {path} gives {list(tokens.shape)}: the model takes [tokens, {channels}]")
    return tokens


def _face(args: argparse.Namespace, numbers: int) -> Tensor:
    """An embedding [1, numbers] of length one, from a file that holds one or from a picture."""
    face = torch.from_numpy(face_of_file(args.face, args.face_model, args.face_detector, args.face_points))
    if face.numel() != numbers:
        raise ValueError(f"--face {args.face} gives {face.numel()} numbers: the model takes {numbers}")
    return face[None]


# Files


def _read_npy(path: Path) -> Tensor:
    if not path.is_file():
        raise checkpoint.CheckpointError(f"no file at {path}: give the path of a .npy or .safetensors file")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise checkpoint.CheckpointError(f"{path.name} is not a readable .npy file ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise checkpoint.CheckpointError(f"{path.name} is not an array of numbers")
    return torch.from_numpy(array.astype(np.float32))


def _only_tensor(path: Path) -> Tensor:
    tensors, _ = checkpoint.read(path)
    if len(tensors) != 1:
        raise checkpoint.CheckpointError(f"{path.name} holds {len(tensors)} tensors: it must hold one, the embedding")
    return next(iter(tensors.values())).float()


def _pretrained(kind: Any, folder: str | Path, dtype: torch.dtype) -> Any:
    """A model of transformers from a folder, strictly: it makes up missing weights, which is an error here."""
    transformers = require("transformers", "the encoder")
    if not (Path(folder) / "config.json").is_file():
        raise checkpoint.CheckpointError(f"{folder} has no config.json: give a folder as transformers saves it")
    with _quiet(transformers):
        try:
            model, info = kind.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, torch_dtype=dtype
            )
        except SafetensorError as error:
            raise checkpoint.CheckpointError(f"the weights in {folder} cannot be read ({error})") from error
    wrong = sorted(info["missing_keys"]) + [str(entry) for entry in info["mismatched_keys"]]
    if wrong:
        raise checkpoint.CheckpointError(
            f"{folder} is not a {kind.__name__}: {len(wrong)} tensors are missing, e.g. {wrong[0]}"
        )
    return model.eval().requires_grad_(False)


def _tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer lies: in the folder itself, or as in the published repositories."""
    for place in (folder, folder / "tokenizer", folder.parent / "tokenizer"):
        if any((place / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "spiece.model")):
            return place
    raise checkpoint.CheckpointError(f"no tokenizer in {folder} or beside it: put its tokenizer.json there")


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no tables of keys on standard error; what is wrong is raised."""
    log = transformers.utils.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()
