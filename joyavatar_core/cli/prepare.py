"""`joyavatar prepare`: a folder of talking videos, or drawn avatars, to shards of training samples.

torch is imported when the command runs, so that `joyavatar --help` needs none.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import size_of

if TYPE_CHECKING:
    import torch

    from ..audio import AudioFrontEnd
    from ..geometry import Geometry
    from ..training.prepare.encode import Encoders, PictureEncoder, Prompts
    from ..training.prepare.faces import FaceDetector
    from ..training.prepare.run import Task
    from ..training.prepare.settings import Content, VideoOptions

TEXT_LENGTH = 512
"""Tokens of a prompt that Wan2.1 keeps."""

NEGATIVE = (
    "blurred, overexposed, low quality, compression artefacts, still picture, subtitles, watermark, deformed face"
)


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    p = commands.add_parser("prepare", help="a folder of talking videos to training data")
    p.add_argument("videos", nargs="?", metavar="FOLDER", help="folder of the videos, searched with all folders in it")
    p.add_argument("--out", required=True, metavar="DIR", help="folder of the shards; goes on with what is there")
    p.add_argument("--drawn", type=int, default=0, metavar="N", help="draw N avatars that talk (needs espeak-ng)")
    p.add_argument("--first-seed", type=int, default=1_000_000, metavar="S", help="seed of the first one (%(default)s)")
    p.add_argument("--size", default="256x256", metavar="WxH", help="size of the clips in pixels (%(default)s)")
    p.add_argument("--fps", type=int, default=16, metavar="N", help="16 or 25 pixel frames a second (%(default)s)")
    p.add_argument("--latents", type=int, default=27, metavar="N", help="latent frames of a clip (%(default)s)")
    _add_faces(p)
    _add_encoders(p)
    p.add_argument("--workers", type=int, metavar="N", help="processes that decode and look; 0: none (cores - 1)")
    p.add_argument("--shard-mb", type=int, default=256, metavar="N", help="largest shard in megabytes (%(default)s)")
    p.add_argument("--preview", metavar="PNG", help="write a contact sheet of the first clips, lip masks outlined")
    p.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ... for the encoders (%(default)s)")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    p.add_argument("--threads", type=int, help="CPU threads of the encoders")
    p.set_defaults(run=run)


def _add_faces(parser: argparse.ArgumentParser) -> None:
    p = parser.add_argument_group("faces")
    p.add_argument("--face-detector", metavar="FILE", help="YuNet from the OpenCV Zoo, an .onnx file")
    p.add_argument("--points", metavar="FILE", help="boxes and five points by hand, a .json file, instead")
    p.add_argument("--min-face", type=int, default=80, metavar="PX", help="least height of a face (%(default)s)")
    p.add_argument("--face-share", type=float, default=0.45, metavar="S", help="face height in the crop (%(default)s)")
    p.add_argument("--detect-every", type=int, default=2, metavar="N", help="frames between two looks (%(default)s)")
    p.add_argument("--cut", type=float, default=12.0, metavar="D", help="change of a picture, of 255, that is a cut")


def _add_encoders(parser: argparse.ArgumentParser) -> None:
    p = parser.add_argument_group("encoders")
    p.add_argument("--vae", metavar="FILE", help="Wan2.1 VAE or a light autoencoder (the embedded model's)")
    p.add_argument("--audio-encoder", metavar="PATH", help="wav2vec2 folder or .safetensors file (log-mel without)")
    p.add_argument("--audio-layers", choices=("last", "all"), default="last", help="hidden states of wav2vec2")
    p.add_argument("--text-encoder", metavar="DIR", help="umT5 folder")
    p.add_argument("--prompt", default="a person talks to the camera", help="of videos without a NAME.txt beside them")
    p.add_argument("--negative-prompt", default=NEGATIVE, metavar="TEXT", help="embedded once for the data set")
    p.add_argument("--clip-vision", metavar="DIR", help="CLIP-vision folder")
    p.add_argument("--face-embedder", metavar="FILE", help="ArcFace network, an .onnx file")


def run(args: argparse.Namespace) -> int:
    """`joyavatar prepare`."""
    import torch

    from ..training.prepare.report import table
    from ..training.prepare.run import prepare

    _check(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    task = _task(args)
    encoders = _encoders(args, task.content)
    with _Bar() as bar:
        report = prepare(task, encoders, bar, Path(args.preview) if args.preview else None)
    print(json.dumps(report.as_json(), indent=1) if args.json else table(report))
    return 0


def _check(args: argparse.Namespace) -> None:
    if not args.videos and args.drawn < 1:
        raise ValueError("nothing to prepare: give a folder of videos, or --drawn N for avatars that are drawn")
    if args.videos and bool(args.face_detector) == bool(args.points):
        raise ValueError("videos need --face-detector FILE or --points FILE (one of them) to know where the face is")
    if args.drawn and args.fps != 16:
        raise ValueError(f"--drawn makes clips at 16 frames a second, not at --fps {args.fps}")
    for name, least in (("drawn", 0), ("workers", 0), ("shard_mb", 1), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least}")


def _task(args: argparse.Namespace) -> Task:
    from ..training.prepare.run import Task
    from ..training.prepare.sources import list_sources

    sources = list_sources(Path(args.videos), args.prompt) if args.videos else []
    detector = _detector(args) if sources else None
    return Task(
        out=Path(args.out),
        content=_content(args),
        sources=sources,
        video=_video_options(args) if sources else None,
        detector=detector,
        drawn=range(args.first_seed, args.first_seed + args.drawn),
        workers=max(0, (os.cpu_count() or 1) - 1) if args.workers is None else args.workers,
        shard_bytes=args.shard_mb * 1_000_000,
        faces=_read_face,
    )


def _content(args: argparse.Namespace) -> Content:
    from ..avatar import ASSETS, EMBEDDED_FILES
    from ..training.prepare.settings import Content, fingerprint

    width, height = size_of(args.size)
    return Content(
        width=width,
        height=height,
        fps=args.fps,
        latents=args.latents,
        autoencoder=fingerprint(args.vae or ASSETS / EMBEDDED_FILES["autoencoder"]),
        audio=f"{fingerprint(args.audio_encoder)} {args.audio_layers}" if args.audio_encoder else "log-mel",
        text_encoder=_named(args.text_encoder),
        negative_prompt=args.negative_prompt if args.text_encoder else "",
        clip_vision=_named(args.clip_vision),
        face_embedder=_named(args.face_embedder),
    )


def _named(path: str | None) -> str:
    from ..training.prepare.settings import fingerprint

    return fingerprint(path) if path else ""


def _video_options(args: argparse.Namespace) -> VideoOptions:
    from ..training.prepare.settings import VideoOptions

    return VideoOptions(
        detector=_named(args.face_detector) or "by hand",  # entries for more videos may be added
        prompt=args.prompt if args.text_encoder else "",
        min_face=args.min_face,
        face_share=args.face_share,
        detect_every=args.detect_every,
        cut=args.cut,
    )


def _detector(args: argparse.Namespace) -> FaceDetector:
    from ..training.prepare.faces import YuNet, read_points

    if args.points:
        return read_points(Path(args.points))
    detector = YuNet(Path(args.face_detector))
    detector.check()
    return detector


def _read_face(path: Path) -> torch.Tensor:
    import torch

    from ..media.face import read_embedding

    return torch.from_numpy(read_embedding(path))


# Encoders


def _encoders(args: argparse.Namespace, content: Content) -> Encoders:
    import torch

    from ..avatar import ASSETS, EMBEDDED_FILES, default_dtype, load_autoencoder
    from ..training.prepare.encode import Encoders, clip_geometry
    from .full_size import load_clip_vision
    from .options import dtype_of

    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    dtype = dtype_of(args.dtype) or default_dtype(device)
    autoencoder = load_autoencoder(args.vae or ASSETS / EMBEDDED_FILES["autoencoder"]).requires_grad_(False)
    geometry = clip_geometry(content.width, content.height, content.fps, autoencoder)
    text = _prompts(args, device, dtype)
    return Encoders(
        autoencoder=_placed(autoencoder, device, dtype),
        front_end=_front_end(args, geometry, device),
        geometry=geometry,
        device=device,
        dtype=dtype,
        text=text,
        clip_vision=load_clip_vision(args.clip_vision, device, dtype) if args.clip_vision else None,
        face=_recogniser(args.face_embedder) if args.face_embedder else None,
    )


def _placed(autoencoder: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """On its device; a light autoencoder on a CPU stays in float32, as its encoding casts for itself."""
    from ..autoencoder import LightAutoencoder

    light_on_cpu = isinstance(autoencoder, LightAutoencoder) and device.type == "cpu"
    return autoencoder if light_on_cpu else autoencoder.to(device, dtype)


def _front_end(args: argparse.Namespace, geometry: Geometry, device: torch.device) -> AudioFrontEnd:
    from ..audio import LogMel
    from ..wav2vec import Wav2Vec2Windows, load_wav2vec2

    if not args.audio_encoder:
        return LogMel(geometry)
    model: Any = load_wav2vec2(args.audio_encoder)
    return Wav2Vec2Windows(model.to(device), geometry, layers=args.audio_layers)


def _prompts(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Prompts | None:
    from ..training.prepare.encode import Prompts
    from .full_size import load_text_encoder

    if not args.text_encoder:
        return None
    return Prompts(Path(args.out) / "text", load_text_encoder(args.text_encoder, TEXT_LENGTH, device, dtype))


def _recogniser(path: str) -> PictureEncoder:
    """An ArcFace network for faces that are in its place already."""
    import torch

    from ..media import face

    network = face.load_recogniser(path)
    return lambda picture: torch.from_numpy(face.embed(picture, face.TEMPLATE, network))


class _Bar:
    """Progress in a terminal: clips made of those that are known."""

    def __enter__(self) -> _Bar:
        from tqdm import tqdm

        self._bar = tqdm(total=0, unit="clip", disable=None, dynamic_ncols=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def planned(self, clips: int) -> None:
        self._bar.total = (self._bar.total or 0) + clips
        self._bar.refresh()

    def made(self, key: str) -> None:
        self._bar.set_postfix_str(key, refresh=False)
        self._bar.update()
