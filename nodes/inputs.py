"""Nodes for what goes in: built-in samples, the reference picture, the voice, folders of both.

Shape legend: B batch, H W pixels, 3 = RGB, C audio channels, n samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io
from torch import Tensor

from ..joyavatar_core import samples
from ..joyavatar_core.audio import HIGHEST_RATE, LOWEST_RATE
from ..joyavatar_core.avatar import Encoded
from ..joyavatar_core.media.face import unit
from . import host
from . import streams as values
from .sockets import CATEGORY, Reference, Voice

SIZES = {
    "auto": None,
    **{f"{w}x{h}": (w, h) for w, h in (*values.EMBEDDED_SIZES, *values.FULL_SIZES, *values.LIVE_AVATAR_SIZES)},
}
MOST_CHANNELS = 8  # AAC's


class Sample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="JoyAvatarSample",
            display_name="JoyAvatar Sample",
            category=CATEGORY,
            description="A picture and a voice that come with the pack, to try a workflow without files of your own.",
            search_aliases=["demo", "example", "built-in picture", "built-in voice"],
            inputs=[
                io.Combo.Input("picture", options=list(samples.pictures()), tooltip="A drawn face of the package."),
                io.Combo.Input("voice", options=list(samples.voices()), tooltip="A spoken sentence of the package."),
            ],
            outputs=[io.Image.Output("image"), io.Audio.Output("audio")],
        )

    @classmethod
    def execute(cls, picture: str, voice: str) -> io.NodeOutput:
        return io.NodeOutput(read_image(samples.picture(picture)), read_audio(samples.voice(voice)))


class ReferenceNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        pixels = {"default": 0, "min": 0, "max": 16384, "advanced": True}
        return io.Schema(
            node_id="JoyAvatarReference",
            display_name="JoyAvatar Reference",
            category=CATEGORY,
            description="Who speaks: a picture, brought to the video's size, and what full-size models ask of it.",
            search_aliases=["reference image", "portrait", "face", "avatar image", "identity"],
            inputs=[
                io.Image.Input("image", tooltip="The person. Any picture will do; a face that looks at you is best."),
                io.Combo.Input(
                    "fit",
                    options=["close-up", "crop", "pad", "region"],
                    tooltip="crop fills the size and cuts the sides off, close-up does so too but makes a small drawn "
                    "face at full size and lays it back (embedded model), pad shows the whole picture, region takes "
                    "the rectangle given below (for Paste Back).",
                ),
                io.Combo.Input(
                    "size",
                    options=[*SIZES, "custom"],
                    tooltip="Size of the video. auto takes the model's size that is nearest to the picture's shape.",
                ),
                io.Int.Input(
                    "width",
                    default=256,
                    min=16,
                    max=4096,
                    step=16,
                    advanced=True,
                    tooltip="Width in pixels for size custom.",
                ),
                io.Int.Input(
                    "height",
                    default=256,
                    min=16,
                    max=4096,
                    step=16,
                    advanced=True,
                    tooltip="Height in pixels for size custom.",
                ),
                io.Int.Input("region_x", tooltip="Left edge of the region, in pixels of the picture.", **pixels),
                io.Int.Input("region_y", tooltip="Upper edge of the region, in pixels of the picture.", **pixels),
                io.Int.Input("region_width", tooltip="Width of the region; 0 goes to the right edge.", **pixels),
                io.Int.Input("region_height", tooltip="Height of the region; 0 goes to the lower edge.", **pixels),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Wan2.1's VAE, for full-size models. The embedded model has its own."
                ),
                io.ClipVisionOutput.Input(
                    "clip_vision_output", optional=True, tooltip="From CLIP Vision Encode, for full-size models."
                ),
                io.Conditioning.Input(
                    "conditioning", optional=True, tooltip="From CLIP Text Encode (umT5), for full-size models."
                ),
                io.AnyType.Input(
                    "face_embedding",
                    optional=True,
                    tooltip="512 numbers from a face recogniser, for models that keep the identity by it.",
                ),
            ],
            outputs=[Reference.Output("reference")],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        fit: str,
        size: str,
        width: int,
        height: int,
        region_x: int,
        region_y: int,
        region_width: int,
        region_height: int,
        vae: Any = None,
        clip_vision_output: Any = None,
        conditioning: Any = None,
        face_embedding: Any = None,
    ) -> io.NodeOutput:
        picture = to_picture(image)
        region = None
        if fit == "region":
            region = _region(picture, region_x, region_y, region_width, region_height)
        return io.NodeOutput(
            values.Reference(
                picture=picture,
                fit=fit,
                size=(width, height) if size == "custom" else SIZES[size],
                region=region,
                encoded=Encoded(
                    text=None if conditioning is None else conditioning[0][0],
                    image=None if clip_vision_output is None else clip_vision_output["penultimate_hidden_states"],
                    face=None if face_embedding is None else _face(face_embedding),
                ),
                autoencoder=None if vae is None else host.autoencoder_of(vae),
            )
        )


class AudioEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="JoyAvatarAudioEncoder",
            display_name="JoyAvatar Audio Encoder",
            category=CATEGORY,
            description="What is said. Sound of any length is heard piece by piece while the video is made.",
            search_aliases=["voice", "speech", "wav2vec2", "audio to video", "lip sync"],
            inputs=[
                io.Audio.Input("audio", tooltip="Speech; any sample rate, any length."),
                io.AudioEncoder.Input(
                    "audio_encoder",
                    optional=True,
                    tooltip="wav2vec2 from Audio Encoder Loader, for full-size models. The embedded model needs none.",
                ),
                io.Float.Input(
                    "history",
                    default=8.0,
                    min=1.0,
                    max=30.0,
                    step=0.5,
                    advanced=True,
                    tooltip="Seconds of past sound that wav2vec2 hears with every block.",
                ),
                io.Combo.Input(
                    "layers",
                    options=["last", "all"],
                    advanced=True,
                    tooltip="Which layers of wav2vec2 the model was trained with.",
                ),
            ],
            outputs=[Voice.Output("voice")],
        )

    @classmethod
    def execute(
        cls, audio: dict, audio_encoder: Any = None, history: float = 8.0, layers: str = "last"
    ) -> io.NodeOutput:
        rate, sound = int(audio["sample_rate"]), audio["waveform"][0].float().cpu()
        if not sound.shape[-1]:
            raise ValueError("the audio has 0 samples: there is nothing to speak; check the file or the trim before")
        if not LOWEST_RATE <= rate <= HIGHEST_RATE:
            raise ValueError(
                f"sample rate {rate} Hz: must be {LOWEST_RATE} to {HIGHEST_RATE} Hz; convert the sound first"
            )
        if sound.shape[0] > MOST_CHANNELS:
            sound = sound.mean(0, keepdim=True)
        encoder = None if audio_encoder is None else host.HearingEncoder(audio_encoder)
        return io.NodeOutput(values.Voice(sound.contiguous(), rate, encoder, history, layers))


class FolderOfAudio(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="JoyAvatarFolderOfAudio",
            display_name="JoyAvatar Folder of Audio",
            description="All sound files of a folder under input, one after the other: what follows runs once "
            "for each.",
            **_folder_schema(io.Audio.Output("audio", is_output_list=True)),
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, limit: int) -> Any:
        return _fingerprint(folder, "audio", limit)

    @classmethod
    def execute(cls, folder: str, limit: int) -> io.NodeOutput:
        paths = _files(folder, "audio", limit)
        return io.NodeOutput([read_audio(path) for path in paths], [path.stem for path in paths])


class FolderOfImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="JoyAvatarFolderOfImages",
            display_name="JoyAvatar Folder of Images",
            description="All pictures of a folder under input, one after the other: what follows runs once for each.",
            **_folder_schema(io.Image.Output("image", is_output_list=True)),
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, limit: int) -> Any:
        return _fingerprint(folder, "image", limit)

    @classmethod
    def execute(cls, folder: str, limit: int) -> io.NodeOutput:
        paths = _files(folder, "image", limit)
        return io.NodeOutput([read_image(path) for path in paths], [path.stem for path in paths])


def _folder_schema(output: Any) -> dict[str, Any]:
    """What the two schemas share; each keeps its own node id, for ComfyUI-Manager reads those from the source."""
    return {
        "category": CATEGORY,
        "search_aliases": ["batch", "list", "directory", "load folder"],
        "inputs": [
            io.Combo.Input("folder", options=_folders(), tooltip="A folder under ComfyUI's input folder."),
            io.Int.Input("limit", default=0, min=0, max=10000, tooltip="The most files to take; 0 takes all."),
        ],
        "outputs": [output, io.String.Output("name", is_output_list=True)],
    }


def _folders() -> list[str]:
    """Folders under input, "." for input itself."""
    import folder_paths

    root = Path(folder_paths.get_input_directory())
    found = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_dir()) if root.is_dir() else []
    return [".", *found]


def _files(folder: str, kind: str, limit: int) -> list[Path]:
    """Files of a kind in a folder under input, by name. ValueError where there are none."""
    import folder_paths

    root = Path(folder_paths.get_input_directory()).resolve()
    place = (root / folder).resolve()
    if not place.is_relative_to(root) or not place.is_dir():
        raise ValueError(f"{folder!r} is not a folder under ComfyUI's input folder")
    kinds = ["audio", "video"] if kind == "audio" else [kind]
    names = folder_paths.filter_files_content_types(sorted(p.name for p in place.iterdir() if p.is_file()), kinds)
    if not names:
        raise ValueError(f"the folder {folder!r} holds no {kind} files: put some there")
    return [place / name for name in names][: limit or None]


def _fingerprint(folder: str, kind: str, limit: int) -> list[tuple[str, int]]:
    """What changes when the files do."""
    return [(path.name, path.stat().st_mtime_ns) for path in _files(folder, kind, limit)]


def read_image(path: Path) -> Tensor:
    """A picture as the host's IMAGE [1, H, W, 3], 0..1."""
    from ..joyavatar_core.media.picture import read_picture

    return torch.from_numpy(read_picture(path).astype(np.float32) / 255)[None]


def read_audio(path: Path) -> dict[str, Any]:
    """A sound as the host's AUDIO: waveform [1, C, n] and sample_rate."""
    from ..joyavatar_core.media.sound import SoundFile

    sound = SoundFile(path)
    return {"waveform": torch.from_numpy(np.concatenate(list(sound), axis=1))[None], "sample_rate": sound.sample_rate}


def to_picture(image: Tensor) -> np.ndarray:
    """The first picture of an IMAGE [B, H, W, 1, 3 or 4] as uint8 [H, W, 3]; alpha is laid on mid grey."""
    if image.ndim != 4 or not image.numel():
        raise ValueError(f"image of shape {list(image.shape)}: a picture [batch, height, width, channels] is needed")
    picture = image[0].float().cpu().nan_to_num().clamp(0, 1)
    if picture.shape[-1] == 4:
        colour, alpha = picture[..., :3], picture[..., 3:]
        picture = colour * alpha + 0.5 * (1 - alpha)
    if picture.shape[-1] < 3:
        picture = picture[..., :1].expand(-1, -1, 3)
    return (picture[..., :3] * 255).round().to(torch.uint8).contiguous().numpy()


def _region(picture: np.ndarray, x: int, y: int, width: int, height: int) -> tuple[int, int, int, int]:
    """The rectangle, held inside the picture. ValueError if nothing of it is."""
    rows, columns = picture.shape[:2]
    width = min(width or columns, columns - x)
    height = min(height or rows, rows - y)
    if width < 1 or height < 1:
        raise ValueError(f"the region begins at {x}, {y}: that lies outside the picture of {columns}x{rows}")
    return x, y, width, height


def _face(embedding: Any) -> Tensor:
    """512 numbers of any kind as [1, 512], of length one."""
    numbers = getattr(embedding, "normed_embedding", embedding)
    try:
        numbers = torch.as_tensor(numbers).float().cpu().numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the face embedding is {type(embedding).__name__}: 512 numbers are needed") from error
    return torch.from_numpy(unit(numbers, "the face embedding"))[None]
