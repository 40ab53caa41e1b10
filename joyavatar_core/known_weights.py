"""Weights that people can have: for each system the files, where they go, and what their licences allow. One table.

`docs/models.md`, `joyavatar doctor`, `joyavatar download` and the loader's warnings all come from here. Nothing in this
file opens a connection. Every name says where it was read, as a commit of a public repository or a page of the Hugging
Face hub; a name that could not be read anywhere is marked `UNVERIFIED`. No weights were at hand when this was written.

Folders are those of ComfyUI, under its `models`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

UNVERIFIED = "unverified"
COMFYUI = "-comfyui"  # what the name of a part ends in that is made for ComfyUI's own loaders

Commercial = Literal["yes", "no", "conflicting", "unknown"]
"""Whether the licence allows commercial use; `conflicting`: its own texts say both."""


@dataclass(frozen=True)
class Licence:
    """name: of the licence. commercial: see `Commercial`. read_in: where it was read. note: what is special."""

    name: str
    commercial: Commercial
    read_in: str
    note: str = ""


@dataclass(frozen=True)
class WeightFile:
    """One file of a system.

    name: under `folder`, where it is looked for. repo, path: of the Hugging Face hub; empty where it cannot be fetched.
    read_in: where repository and path were read, or `UNVERIFIED`.
    """

    folder: str
    name: str
    licence: Licence
    repo: str = ""
    path: str = ""
    read_in: str = UNVERIFIED

    @property
    def place(self) -> str:
        return f"{self.folder}/{self.name}"


@dataclass(frozen=True)
class Known:
    """A system, or a part that several use.

    what: in a few words. files: its own. needs: names of the parts it takes besides. hints: beginnings of file names
    by which it is recognised, in small letters. note: what else to know.
    """

    what: str
    files: tuple[WeightFile, ...] = ()
    needs: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    note: str = ""

    @property
    def licences(self) -> tuple[Licence, ...]:
        """Of its own files, each once."""
        return tuple(dict.fromkeys(file.licence for file in self.files))


# Licences

_WAN = Licence("Apache-2.0", "yes", "Wan-Video/Wan2.1 9737cba and Wan-Video/Wan2.2 42bf4cf, README and LICENSE.txt")
_SELF_FORCING = Licence("Apache-2.0", "yes", "guandeh17/Self-Forcing 33593df, LICENSE", "the model card was not read")
_LONGLIVE = Licence(
    "Apache-2.0",
    "yes",
    "NVlabs/LongLive v1.0 e52d9ef, README and LICENSE",
    "was CC BY-NC-SA 4.0 before November 2025; the model card was not read",
)
_ROLLING_FORCING = Licence(
    "License Terms of RollingForcing",
    "no",
    "TencentARC/RollingForcing a1477d0, LICENSE",
    "academic purposes only, no commercial or production use",
)
_LIVE_AVATAR = Licence(
    "Apache-2.0",
    "yes",
    "Alibaba-Quark/LiveAvatar 9c2c38d, README and LICENSE",
    "its README calls it a research preview; the model card was not read",
)
_LIVETALK = Licence(
    "Apache-2.0 or CC BY-NC-SA 4.0",
    "conflicting",
    "GAIR-NLP/LiveTalk 53b2c22, README (Apache-2.0) against LICENSE.md (CC BY-NC-SA 4.0)",
    "ask the authors before any commercial use",
)
_AVATAR_FORCING = Licence(
    "Apache-2.0 or License Terms of RollingForcing",
    "conflicting",
    "KlingAIResearch/AvatarForcing 1b598cd, README (Apache-2.0) against LICENSE.txt (RollingForcing, academic only)",
    "ask the authors before any commercial use",
)
_LIGHTX2V = Licence("Apache-2.0", "yes", "model card of lightx2v/Autoencoders")
_TAEHV = Licence("MIT", "yes", "madebyollin/taehv 1f14a56, LICENSE", "fetched from a copy in lightx2v/Autoencoders")
_WAV2VEC2 = Licence("Apache-2.0", "yes", "page of facebook/wav2vec2-base-960h")
_WAV2VEC2_ENGLISH = Licence("Apache-2.0", "yes", "page of jonatasgrosman/wav2vec2-large-xlsr-53-english")
_UMT5 = Licence("Apache-2.0", "yes", "pages of google/umt5-xxl and Wan-AI/Wan2.2-T2V-A14B-Diffusers")
_CLIP = Licence("Apache-2.0", "yes", "Wan-Video/Wan2.1 9737cba, README", "as part of Wan2.1's repository")
_YUNET = Licence("MIT", "yes", "pages of opencv/face_detection_yunet and pollen-robotics/face_detection_yunet_2026may")
_INSIGHTFACE = Licence(
    "non-commercial research only",
    "no",
    "deepinsight/insightface 7fadd420, README",
    "the code is MIT, the models are not; other ArcFace files have other licences",
)
_OURS = Licence("Apache-2.0", "yes", "LICENSE of this project")

# Files

_TEMPLATE_S2V = "ComfyUI's workflow template video_wan2_2_14B_s2v"
_TEMPLATE_I2V = "ComfyUI's workflow template image_to_video_wan"
_WAN21, _WAN22 = "Comfy-Org/Wan_2.1_ComfyUI_repackaged", "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"
_BASE_960H = "facebook/wav2vec2-base-960h"
_TEXT_REPO, _TOKENIZER_REPO = "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"


def _folder_of(
    folder: str, names: Iterable[str], licence: Licence, repo: str, inside: str, read_in: str
) -> tuple[WeightFile, ...]:
    """Files that stay together in a folder."""
    return tuple(
        WeightFile(folder.split("/")[0], f"{folder.split('/', 1)[1]}/{n}", licence, repo, inside + n, read_in)
        for n in names
    )


KNOWN: dict[str, Known] = {
    "joyavatar-flash": Known(
        "JoyAvatar-Flash 1.3B as the paper describes it: picture and voice, real time",
        (WeightFile("diffusion_models", "joyavatar-flash-1.3b.safetensors", _OURS, read_in="named by this project"),),
        needs=("wan-vae", "umt5", "clip-vision", "wav2vec2-base"),
        hints=("joyavatar",),
        note="The authors have published no weights: this is what this project's training writes. The name is ours.",
    ),
    "self-forcing": Known(
        "Self-Forcing 1.3B: text to video, silent",
        (
            WeightFile(
                "diffusion_models",
                "self_forcing_dmd.pt",
                _SELF_FORCING,
                "gdhe17/Self-Forcing",
                "checkpoints/self_forcing_dmd.pt",
                "guandeh17/Self-Forcing 33593df, README",
            ),
        ),
        needs=("wan-vae", "umt5"),
        hints=("self_forcing", "self-forcing", "selfforcing"),
    ),
    "longlive": Known(
        "LongLive 1.3B: text to video, silent; a base and a LoRA",
        tuple(
            WeightFile(
                folder,
                f"longlive_{name}",
                _LONGLIVE,
                "Efficient-Large-Model/LongLive-1.3B",
                path,
                "NVlabs/LongLive v1.0 e52d9ef, configs/longlive_inference.yaml",
            )
            for folder, name, path in (
                ("diffusion_models", "base.pt", "models/longlive_base.pt"),
                ("loras", "lora.pt", "models/lora.pt"),
            )
        ),
        needs=("wan-vae", "umt5"),
        hints=("longlive",),
    ),
    "rolling-forcing": Known(
        "Rolling-Forcing 1.3B: text to video, silent",
        (
            WeightFile(
                "diffusion_models",
                "rolling_forcing_dmd.pt",
                _ROLLING_FORCING,
                "TencentARC/RollingForcing",
                "checkpoints/rolling_forcing_dmd.pt",
                "TencentARC/RollingForcing a1477d0, README",
            ),
        ),
        needs=("wan-vae", "umt5"),
        hints=("rolling_forcing", "rolling-forcing", "rollingforcing"),
    ),
    "live-avatar": Known(
        "Live Avatar 14B: picture and voice; Wan2.2-S2V-14B and a LoRA",
        (
            WeightFile(
                "diffusion_models",
                "wan2.2_s2v_14B_bf16.safetensors",
                _WAN,
                _WAN22,
                "split_files/diffusion_models/wan2.2_s2v_14B_bf16.safetensors",
                _TEMPLATE_S2V,
            ),
            WeightFile(
                "loras",
                "liveavatar.safetensors",
                _LIVE_AVATAR,
                "Quark-Vision/Live-Avatar",
                "liveavatar.safetensors",
                "Alibaba-Quark/LiveAvatar 9c2c38d, README",
            ),
        ),
        needs=("wan-vae", "umt5", "wav2vec2-large-english"),
        hints=("liveavatar", "live-avatar", "live_avatar"),
        note="wan2.2_s2v_14B_fp8_scaled.safetensors, in the same folder of the hub, takes half the room.",
    ),
    "livetalk": Known(
        "LiveTalk 1.3B: picture and voice",
        (
            WeightFile(
                "diffusion_models",
                "livetalk-1.3b-v0.1.safetensors",
                _LIVETALK,
                "GAIR/LiveTalk-1.3B-V0.1",
                "model.safetensors",
                "GAIR-NLP/LiveTalk 53b2c22, README and configs/causal_inference.yaml",
            ),
        ),
        needs=("wan-vae", "umt5", "wav2vec2-base"),
        hints=("livetalk",),
    ),
    "avatarforcing": Known(
        "AvatarForcing 1.3B (arXiv 2603.14331): picture and voice",
        (
            WeightFile(
                "diffusion_models",
                "avatarforcing-1.3b.pt",
                _AVATAR_FORCING,
                "lycui/AvatarForcing",
                "model.pt",
                UNVERIFIED,
            ),
        ),
        needs=("wan-vae", "umt5", "wav2vec2-base"),
        hints=("avatarforcing", "avatar-forcing", "avatar_forcing"),
        note="Its README names the repository and gives model.pt as an example only.",
    ),
    "wan-vae": Known(
        "the VAE of Wan2.1, also of Wan2.2 14B: the best picture",
        (
            WeightFile(
                "vae", "wan_2.1_vae.safetensors", _WAN, _WAN21, "split_files/vae/wan_2.1_vae.safetensors", _TEMPLATE_I2V
            ),
        ),
        hints=("wan_2.1_vae", "wan2.1_vae", "wan2_1_vae"),
    ),
    "taehv": Known(
        "TAEHV for Wan2.1: the fast decoder, for previews and live pictures",
        (
            WeightFile(
                "vae_approx",
                "taew2_1.safetensors",
                _TAEHV,
                "lightx2v/Autoencoders",
                "taew2_1.safetensors",
                "file list of daydreamlive/Autoencoders, a mirror of it",
            ),
        ),
        hints=("taew2_1",),
        note="Takes normalised latents. Its first home is github.com/madebyollin/taehv.",
    ),
    "lighttae": Known(
        "LightTAE for Wan2.1: as fast as TAEHV, nearer to the VAE",
        (
            WeightFile(
                "vae_approx",
                "lighttaew2_1.safetensors",
                _LIGHTX2V,
                "lightx2v/Autoencoders",
                "lighttaew2_1.safetensors",
                "ModelTC/LightX2V f8aee98, examples/README.md",
            ),
        ),
        hints=("lighttaew2_1",),
        note="The keys of TAEHV, but latents as the VAE has them: keep its name, it is told by it.",
    ),
    "wav2vec2-base": Known(
        "wav2vec2-base-960h: hears the voice",
        _folder_of(
            "audio_encoders/wav2vec2-base-960h",
            ("config.json", "preprocessor_config.json", "model.safetensors"),
            _WAV2VEC2,
            _BASE_960H,
            "",
            f"page of {_BASE_960H}",
        ),
        hints=("wav2vec2-base",),
    ),
    "wav2vec2-large-english": Known(
        "wav2vec2-large-xlsr-53-english: hears the voice for Wan2.2-S2V and Live Avatar",
        (
            WeightFile(
                "audio_encoders",
                "wav2vec2_large_english_fp16.safetensors",
                _WAV2VEC2_ENGLISH,
                _WAN22,
                "split_files/audio_encoders/wav2vec2_large_english_fp16.safetensors",
                _TEMPLATE_S2V,
            ),
        ),
        hints=("wav2vec2_large_english", "wav2vec2-large"),
    ),
    "umt5": Known(
        "umT5-xxl as transformers loads it: the prompt, for the command line",
        (
            *_folder_of(
                "text_encoders/umt5-xxl",
                (
                    "config.json",
                    "model.safetensors.index.json",
                    *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
                ),
                _UMT5,
                _TEXT_REPO,
                "text_encoder/",
                f"page of {_TEXT_REPO}",
            ),
            *_folder_of(
                "text_encoders/umt5-xxl/tokenizer",
                ("special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json"),
                _UMT5,
                _TOKENIZER_REPO,
                "tokenizer/",
                f"page of {_TOKENIZER_REPO}",
            ),
        ),
        hints=("umt5-xxl",),
    ),
    "umt5-comfyui": Known(
        "umT5-xxl in one file: the prompt, for ComfyUI's Load CLIP",
        (
            WeightFile(
                "text_encoders",
                "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
                _UMT5,
                _WAN21,
                "split_files/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
                _TEMPLATE_S2V,
            ),
        ),
        hints=("umt5_xxl",),
    ),
    "clip-vision": Known(
        "CLIP ViT-H as transformers loads it: the picture, for the command line",
        _folder_of(
            "clip_vision/clip-vit-h",
            ("config.json", "model.safetensors"),
            _CLIP,
            "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
            "image_encoder/",
            UNVERIFIED,
        ),
        hints=("clip-vit-h",),
    ),
    "clip-vision-comfyui": Known(
        "CLIP ViT-H in one file: the picture, for ComfyUI's Load CLIP Vision",
        (
            WeightFile(
                "clip_vision",
                "clip_vision_h.safetensors",
                _CLIP,
                _WAN21,
                "split_files/clip_vision/clip_vision_h.safetensors",
                _TEMPLATE_I2V,
            ),
        ),
        hints=("clip_vision_h",),
    ),
    "yunet": Known(
        "YuNet: finds faces, through OpenCV",
        (
            WeightFile(
                "face",
                "face_detection_yunet_2023mar.onnx",
                _YUNET,
                "opencv/face_detection_yunet",
                "face_detection_yunet_2023mar.onnx",
                "page of opencv/face_detection_yunet",
            ),
            WeightFile(
                "face",
                "face_detection_yunet_2026may.onnx",
                _YUNET,
                "pollen-robotics/face_detection_yunet_2026may",
                "face_detection_yunet_2026may.onnx",
                "model card of pollen-robotics/face_detection_yunet_2026may",
            ),
        ),
        hints=("face_detection_yunet",),
        note="2023mar for OpenCV 4, 2026may for OpenCV 5. ComfyUI has no folder for it: any will do.",
    ),
    "arcface": Known(
        "an ArcFace recogniser, 512 numbers of a face; for models that keep the identity by it",
        (
            WeightFile(
                "face",
                "w600k_r50.onnx",
                _INSIGHTFACE,
                read_in="deepinsight/insightface 7fadd420, server/backend/insightface_server/models/packages.py",
            ),
        ),
        hints=("w600k_r50", "glintr100"),
        note="Never fetched by this project. Any ArcFace-like ONNX file will do, or 512 numbers from anywhere.",
    ),
}
"""Systems first, then the parts they share."""


def known(name: str) -> Known:
    """A system or a part by its name. ValueError lists the names there are."""
    if name not in KNOWN:
        raise ValueError(f"{name!r} is not known; known are {', '.join(KNOWN)}")
    return KNOWN[name]


def with_needs(name: str, comfyui: bool = False) -> list[tuple[str, WeightFile]]:
    """(name of the system or part, file) of a system and everything it needs.

    comfyui: encoders in one file, for the host's loaders, where there are such.
    """
    needs = [part + COMFYUI if comfyui and part + COMFYUI in KNOWN else part for part in known(name).needs]
    return [(part, file) for part in (name, *needs) for file in KNOWN[part].files]


def recognised(file: str | Path) -> str | None:
    """What a file is by its name, e.g. one that somebody else made smaller; None for names that say nothing."""
    name = Path(file).name.lower()
    return next((key for key, entry in KNOWN.items() if name.startswith(entry.hints) or name in _names(entry)), None)


def _names(entry: Known) -> Iterator[str]:
    return (file.name.lower() for file in entry.files)


def licence_warning(name_or_file: str | Path) -> str:
    """One sentence for whoever chooses a model: what its licence forbids or leaves unclear; empty where all is allowed.

    name_or_file: a name of `KNOWN`, or a file, which is known by its name.
    """
    name = str(name_or_file) if str(name_or_file) in KNOWN else recognised(name_or_file)
    return " ".join(filter(None, (_warning(name, licence) for licence in KNOWN[name].licences))) if name else ""


def _warning(name: str, licence: Licence) -> str:
    if licence.commercial == "no":
        return f"{name} is not for commercial use: {licence.name} ({licence.note}; {licence.read_in})."
    if licence.commercial == "conflicting":
        return f"The licence of {name} contradicts itself: {licence.read_in}; {licence.note}."
    if licence.commercial == "unknown":
        return f"The licence of {name} is not known: {licence.note or licence.read_in}."
    return ""


def licence_tooltip() -> str:
    """For the place where a model is chosen: the systems whose licence is not simply free, in a few lines."""
    return "\n".join(filter(None, map(licence_warning, KNOWN)))


def where_to_get(name: str) -> str:
    """One sentence for errors: the files of a system, their folders, and the command that fetches them."""
    places = ", ".join(file.place for file in known(name).files)
    fetched = all(file.repo for file in KNOWN[name].files)
    return f"{name} is {places} under ComfyUI's models" + (f"; joyavatar download {name} fetches it" if fetched else "")


def found(name: str, folders: Sequence[str | Path]) -> list[tuple[WeightFile, Path | None]]:
    """Each file of a system or part and where it lies in folders laid out as ComfyUI's models, or in them directly."""
    return [(file, _first(file, map(Path, folders))) for file in known(name).files]


def _first(file: WeightFile, folders: Iterable[Path]) -> Path | None:
    places = (place for folder in folders for place in (folder / file.folder / file.name, folder / file.name))
    return next((place for place in places if place.is_file()), None)


# docs/models.md

_COMMERCIAL = {"yes": "yes", "no": "**no**", "conflicting": "**conflicting**", "unknown": "unknown"}


def tables() -> str:
    """The tables of docs/models.md."""
    return f"{_system_table()}\n\n{_file_table()}\n\n{_licence_table()}"


def _system_table() -> str:
    head = ["| name | what | licence | commercial use | needs besides |", "|---|---|---|---|---|"]
    rows = [
        f"| `{name}` | {entry.what} | {'; '.join(dict.fromkeys(item.name for item in entry.licences))} | "
        f"{', '.join(dict.fromkeys(_COMMERCIAL[item.commercial] for item in entry.licences))} | "
        f"{', '.join(f'`{part}`' for part in entry.needs)} |"
        for name, entry in KNOWN.items()
    ]
    return "\n".join(head + rows)


def _file_table() -> str:
    head = ["| of | file, under `models` | on the Hugging Face hub | name read in |", "|---|---|---|---|"]
    rows = [
        f"| `{name}` | `{file.place}` | {f'`{file.repo}`: `{file.path}`' if file.repo else 'not fetched'} | "
        f"{file.read_in} |"
        for name, entry in KNOWN.items()
        for file in entry.files
    ]
    return "\n".join(head + rows)


def _licence_table() -> str:
    head = ["| of | licence | commercial use | read in | to know |", "|---|---|---|---|---|"]
    rows = [
        f"| `{name}` | {licence.name} | {_COMMERCIAL[licence.commercial]} | {licence.read_in} | "
        f"{'; '.join(filter(None, (licence.note, entry.note)))} |"
        for name, entry in KNOWN.items()
        for licence in entry.licences
    ]
    return "\n".join(head + rows)
