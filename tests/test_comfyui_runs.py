"""Videos made inside a real ComfyUI: length, cancel, crash and resume, retake, LoRA, batches, errors, and the same bits
as the command line. Small pictures and short sounds; see test_comfyui.py for how to run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import urllib.request
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from joyavatar_core import checkpoint, lora, samples
from joyavatar_core.avatar import build_model
from joyavatar_core.config import AudioConfig, ModelConfig, S2VConfig
from joyavatar_core.model import JoyAvatarDiT
from joyavatar_core.wan_vae import WanVAE, WanVAEConfig

from .comfyui_host import ROOT, Host, HostError

pytestmark = pytest.mark.comfyui

RATE, SIDE = 16000, 64
SAMPLER = {
    "seed": 3, "policy": "joyavatar-flash", "steps": 0, "psb": "policy", "mci": "policy", "urcr": "policy",
    "rope_limit": 0, "sink_blocks": -1, "local_blocks": -1, "kv_level": "policy",
}  # fmt: skip
REGION = {"region_x": 0, "region_y": 0, "region_width": 0, "region_height": 0}
WRITER = {"fps": 0.0, "crf": 1, "preset": "ultrafast", "resume": True, "retake_every": 1.5}


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set: give the folder of a ComfyUI to test against")
    with Host(options=["--use-pytorch-cross-attention"]) as running:
        for name, seconds in (("short.wav", 3.2), ("long.wav", 40.0), ("many/a.wav", 1.0), ("many/b.wav", 1.5)):
            write_sound(running.base / "input" / name, seconds)
        (running.base / "models" / "loras").mkdir(parents=True, exist_ok=True)
        write_lora(running.base / "models" / "loras" / "ours.safetensors", rows=256)
        write_lora(running.base / "models" / "loras" / "other.safetensors", rows=320)
        write_pickles(running.base / "models" / "loras")
        write_full_size(running.base / "models")
        write_live_avatar(running.base / "models")
        write_livetalk(running.base / "models")
        (running.base / "custom_nodes" / "prompts.py").write_text(PROMPTS)
        running.restart()  # so that the lists of files are new
        yield running


def write_sound(path: Path, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    time_ = np.arange(round(seconds * RATE)) / RATE
    sound = np.sin(2 * np.pi * 150 * time_) * (0.5 + 0.5 * np.sin(2 * np.pi * 3 * time_)) * 12000
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(sound.astype("<i2").tobytes())


def write_lora(path: Path, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    name = "diffusion_model.blocks.1.self_attn.v"
    save_file(
        {
            f"{name}.lora_A.weight": torch.randn(4, rows, generator=generator) * 0.2,
            f"{name}.lora_B.weight": torch.randn(rows, 4, generator=generator) * 0.2,
        },
        path,
    )


def write_pickles(loras: Path) -> None:
    """The same LoRA as LongLive's trainer writes one, and a pickle that would run something."""
    parts = load_file(loras / "ours.safetensors")
    names = {name: name.replace("diffusion_model.", "base_model.model.") for name in parts}
    torch.save({"generator_lora": {names[n]: t for n, t in parts.items()}, "step": 3}, loras / "ours.pt")
    torch.save({"generator_lora": Path("anything")}, loras / "code.pt")


def write_full_size(models: Path) -> None:
    """A transformer, a VAE and a wav2vec2 with the names and the shape of the full-size ones, small and random."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    torch.manual_seed(0)
    config = ModelConfig(
        dim=128, ffn_dim=128, layers=2, heads=1, text_dim=0, text_len=0, image_dim=0, audio=AudioConfig(width=64)
    )
    checkpoint.write(
        models / "diffusion_models" / "small.safetensors",
        JoyAvatarDiT(config).state_dict(),
        {"model_config": checkpoint.config_to_json(config)},
    )
    checkpoint.write(models / "vae" / "small.safetensors", WanVAE(WanVAEConfig(dim=8)).state_dict(), {})
    hearing = {f"wav2vec2.{k}": v.half() for k, v in Wav2Vec2Model(Wav2Vec2Config()).state_dict().items()}
    checkpoint.write(models / "audio_encoders" / "small.safetensors", hearing, {})


PROMPTS = """
import sys
import torch
from PIL import Image
class Prompt:
    CATEGORY, FUNCTION, RETURN_TYPES = "test", "make", ("CONDITIONING",)
    INPUT_TYPES = classmethod(lambda cls: {"required": {"channels": ("INT", {"default": 8})}})
    def make(self, channels):
        return ([[torch.linspace(-1, 1, 5 * channels).reshape(1, 5, channels), {}]],)
class Overlap:
    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "choose", (), True
    INPUT_TYPES = classmethod(lambda cls: {"required": {"on": ("BOOLEAN", {"default": True})}})
    def choose(self, on):
        core = next(m for name, m in sys.modules.items() if name.endswith("joyavatar_core.overlap"))
        core.Overlap.suited = staticmethod(lambda device: core.Overlap(hear=on, decode=on, write=on))
        return ()
NODE_CLASS_MAPPINGS = {"TestPrompt": Prompt, "TestOverlap": Overlap}
"""
"""A text encoder for a small model; and what makes the pack take this machine for one with a GPU, as to its stages."""


def write_live_avatar(models: Path) -> None:
    """A small transformer of Wan2.2-S2V's kind, which hears all states of the small wav2vec2."""
    torch.manual_seed(0)
    config = ModelConfig(
        dim=128, ffn_dim=128, layers=2, heads=1, in_channels=16, text_dim=8, text_len=8, image_dim=0,
        audio=AudioConfig(kind="injected", features=13 * 768, window=4, tokens=4),
        s2v=S2VConfig(audio_layers=13, inject_layers=(0, 1)),
    )  # fmt: skip
    tensors = build_model(config).state_dict()
    metadata = {"model_config": checkpoint.config_to_json(config)}
    checkpoint.write(models / "diffusion_models" / "s2v.safetensors", tensors, metadata)
    adapter = {}
    for module in lora.live_avatar_modules(tensors):
        rows, columns = tensors[f"{module}.weight"].shape
        adapter[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, columns) * 0.05
        adapter[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, 2) * 0.05
    checkpoint.write(models / "loras" / "live.safetensors", adapter, {})


def write_livetalk(models: Path) -> None:
    """A small transformer of OmniAvatar's kind, which hears all states of the small wav2vec2 at the frame rate."""
    torch.manual_seed(0)
    config = ModelConfig(
        dim=128, ffn_dim=128, layers=6, heads=1, in_channels=33, text_dim=8, text_len=8, image_dim=0,
        audio=AudioConfig(kind="added", features=14 * 768, width=32, window=4),
    )  # fmt: skip
    metadata = {"model_config": checkpoint.config_to_json(config)}
    checkpoint.write(models / "diffusion_models" / "omni.safetensors", build_model(config).state_dict(), metadata)


def full_size(dtype: str = "fp32", hearing: bool = True, **sampler: Any) -> dict[str, Any]:
    """As `stream`, with the small model of the full-size kind."""
    prompt = stream(audio="many/a.wav", sampler=sampler)
    prompt["2"]["inputs"] = {"model": "small.safetensors", "dtype": dtype}
    prompt["21"] = node("VAELoader", vae_name="small.safetensors")
    prompt["22"] = node("AudioEncoderLoader", audio_encoder_name="small.safetensors")
    prompt["3"]["inputs"]["vae"] = ["21", 0]
    if hearing:
        prompt["4"]["inputs"]["audio_encoder"] = ["22", 0]
    return prompt


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def stream(audio: str = "short.wav", sampler: dict[str, Any] | None = None, **reference: Any) -> dict[str, Any]:
    """A prompt up to the decoded frames: node 6. 1 picture, 2 model, 3 reference, 4 voice, 5 sampler, 9 sound."""
    size = {"fit": "crop", "size": "custom", "width": SIDE, "height": SIDE, **REGION, **reference}
    return {
        "1": node("JoyAvatarSample", picture="demo", voice="demo"),
        "2": node("JoyAvatarLoadModel", model="embedded", dtype="auto"),
        "3": node("JoyAvatarReference", image=["1", 0], **size),
        "9": node("LoadAudio", audio=audio),
        "4": node("JoyAvatarAudioEncoder", audio=["9", 0], history=8.0, layers="last"),
        "5": node(
            "JoyAvatarStreamingSampler", model=["2", 0], reference=["3", 0], voice=["4", 0], **SAMPLER | (sampler or {})
        ),
        "6": node("JoyAvatarStreamDecode", latents=["5", 0]),
    }


def video(name: str, frames: str = "6", **options: Any) -> dict[str, Any]:
    return {"7": node("JoyAvatarStreamToVideo", frames=[frames, 0], filename_prefix=f"t/{name}", **WRITER | options)}


def file_of(host: Host, entry: dict[str, Any], number: str = "7") -> Path:
    (found,) = entry["outputs"][number]["images"]
    return host.base / "output" / found["subfolder"] / found["filename"]


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def wait_until(condition: Any, seconds: float = 120) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(HostError, OSError):
            if found := condition():
                return found
        time.sleep(0.05)
    raise TimeoutError


def session(host: Host, state: str) -> dict[str, Any] | None:
    return next((s for s in reversed(host.get("/joyavatar/sessions")) if s["state"] == state), None)


def test_a_video_as_long_as_its_sound_once(host: Host) -> None:
    entry = host.run({**stream(), **video("plain")})
    path = file_of(host, entry)
    assert len(frames_of(path)) == round(3.2 * 16)
    (detail,) = entry["outputs"]["7"]["joyavatar"]
    assert detail["state"] == "done" and detail["frames"] == 51 and detail["file"]["filename"] == path.name
    again = host.run({**stream(), **video("plain")})
    assert file_of(host, again) == path, "nothing changed: nothing runs again"
    assert sorted(p.name for p in path.parent.glob("plain*.mp4")) == [path.name]
    with av.open(str(path)) as container:
        tags = container.metadata
        assert container.streams.audio[0].codec_context.name == "aac"
    assert json.loads(tags["prompt"])["5"]["class_type"] == "JoyAvatarStreamingSampler"
    assert tags["ai_generated"] == "true"


def test_two_consumers_of_one_stream(host: Host) -> None:
    prompt = {
        **stream(sampler={"seed": 5}),
        **video("twice"),
        "8": node("JoyAvatarCollectFrames", frames=["6", 0], limit_gb=1.0),
    }
    prompt["10"] = node("SaveImage", images=["8", 0], filename_prefix="t/frame")
    entry = host.run(prompt)
    images = [host.base / "output" / i["subfolder"] / i["filename"] for i in entry["outputs"]["10"]["images"]]
    frames = frames_of(file_of(host, entry))
    assert len(images) == len(frames) == 51
    from PIL import Image

    first = np.asarray(Image.open(images[20]))
    assert np.abs(first.astype(int) - frames[20]).mean() < 4  # H.264 lies between


def test_the_same_bits_as_the_command_line(host: Host, tmp_path: Path) -> None:
    path = file_of(host, host.run({**stream(), **video("bits", crf=18, preset="veryfast")}))
    voice, out = host.base / "input" / "short.wav", tmp_path / "cli.mp4"
    picture = ROOT / "joyavatar_core" / "assets" / "samples" / "demo.png"
    command = [host.python, "-m", "joyavatar_core.cli.main", "generate", "--image", str(picture), "--audio", str(voice)]
    command += ["--output", str(out), "--size", f"{SIDE}x{SIDE}", "--seed", "3"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    mine, theirs = frames_of(path), frames_of(out)
    assert mine.shape == theirs.shape and (mine == theirs).all()


def test_cancel_keeps_whole_blocks_and_the_host(host: Host) -> None:
    prompt = host.submit({**stream("long.wav"), **video("cancel")})
    wait_until(lambda: (s := session(host, "running")) and s["blocks"] >= 6)
    host.interrupt()
    with pytest.raises(HostError) as caught:
        host.wait(prompt)
    assert caught.value.interrupted
    detail = wait_until(lambda: session(host, "cancelled"))
    path = host.base / "output" / "t" / detail["file"]["filename"]
    frames = len(frames_of(path))
    assert frames == detail["frames"] == 9 + 12 * (detail["blocks"] - 1)
    assert not list(path.parent.glob("cancel*.part.mp4")) and not list(path.parent.glob("cancel*.state.safetensors"))
    assert file_of(host, host.run({**stream(sampler={"seed": 6}), **video("after")})).exists()


def test_written_behind_the_prompt(host: Host) -> None:
    """As beside a GPU, by a thread: the same frames; a cancel keeps whole blocks, as many as the browser is told."""
    before = frames_of(file_of(host, host.run({**stream(sampler={"seed": 12}), **video("inline")})))
    host.run({"12": node("TestOverlap", on=True)})
    try:
        behind = frames_of(file_of(host, host.run({**stream(sampler={"seed": 12}), **video("behind")})))
        assert before.shape == behind.shape and (before == behind).all()
        prompt = host.submit({**stream("long.wav", sampler={"seed": 12}), **video("stopped")})
        wait_until(lambda: (s := session(host, "running")) and s["blocks"] >= 3)
        host.interrupt()
        with pytest.raises(HostError) as caught:
            host.wait(prompt)
        assert caught.value.interrupted
        detail = wait_until(lambda: session(host, "cancelled"))
        path = host.base / "output" / "t" / detail["file"]["filename"]
        assert path.name.startswith("stopped") and not list(path.parent.glob("stopped*.part.mp4"))
        assert len(frames_of(path)) == detail["frames"] == 9 + 12 * (detail["blocks"] - 1)
    finally:
        host.run({"12": node("TestOverlap", on=False)})


def test_several_processes(host: Host) -> None:
    """On the CPU: the same video as ComfyUI's own; a full-size model with what is connected; what is refused."""
    one = frames_of(file_of(host, host.run({**stream(), **video("own")})))
    entry = host.run({**stream(), **video("two", gpus=2)}, timeout=900)
    two = frames_of(file_of(host, entry))
    assert one.shape == two.shape and np.abs(one.astype(int) - two).mean() < 1
    (detail,) = entry["outputs"]["7"]["joyavatar"]
    assert detail["state"] == "done" and detail["frames"] == 51 and detail["blocks"] == 5
    with av.open(str(file_of(host, entry))) as container:
        assert json.loads(container.metadata["prompt"])["7"]["inputs"]["gpus"] == 2
    full = host.run({**full_size(), **video("full_two", gpus=2, parallel="vae")}, timeout=900)
    assert len(frames_of(file_of(host, full))) == 16
    prompt = {**stream(), **video("refused", gpus=2)}
    prompt["11"] = node("JoyAvatarLoRA", model=["2", 0], lora="ours.safetensors", strength=1.0)
    prompt["5"]["inputs"]["model"] = ["11", 0]
    with pytest.raises(HostError, match="a LoRA is not in it: set gpus to 1"):
        host.run(prompt)


def test_several_processes_cancelled_and_killed(host: Host) -> None:
    """A file that plays, the host's own answer to Cancel, one line for a rank that is gone, nobody left."""
    assert host.process
    host_process = psutil.Process(host.process.pid)
    before = {p.pid for p in host_process.children(recursive=True)}

    def ours() -> list[psutil.Process]:
        return [p for p in host_process.children(recursive=True) if p.pid not in before]

    prompt = host.submit({**stream("long.wav", sampler={"seed": 21}), **video("cancel_two", gpus=2)})
    wait_until(lambda: (s := session(host, "running")) and s["blocks"] >= 2, 900)
    host.interrupt()
    with pytest.raises(HostError) as caught:
        host.wait(prompt, timeout=900)
    assert caught.value.interrupted and not ours()
    detail = wait_until(lambda: session(host, "cancelled"))
    path = host.base / "output" / "t" / detail["file"]["filename"]
    assert path.name.startswith("cancel_two") and len(frames_of(path)) >= 9 + 12
    prompt = host.submit({**stream("long.wav", sampler={"seed": 22}), **video("killed_two", gpus=2)})
    wait_until(lambda: (s := session(host, "running")) and s["blocks"] >= 2, 900)
    next(p for p in ours() if "spawn_main" in " ".join(p.cmdline())).kill()
    with pytest.raises(HostError, match=r"rank \d of 2 was killed \(SIGKILL\); .*plays, with the frames so far"):
        host.wait(prompt, timeout=900)
    assert not ours() and list((host.base / "output" / "t").glob("killed_two*.mp4"))


def test_the_growing_file_is_served_and_plays(host: Host, tmp_path: Path) -> None:
    prompt = host.submit({**stream("long.wav", sampler={"seed": 8}), **video("live")})
    detail = wait_until(lambda: (s := session(host, "running")) and s["blocks"] >= 2 and s)
    assert detail["part"] and len(detail["sid"]) == 32 and str(host.base) not in json.dumps(detail)
    with urllib.request.urlopen(f"{host.url}/joyavatar/stream/{detail['sid']}") as answer:
        assert answer.headers["Content-Type"] == "video/mp4" and answer.headers["Cache-Control"] == "no-store"
        data = answer.read(32768 * 4)
    (tmp_path / "part.mp4").write_bytes(data)
    shown = 0
    with av.open(str(tmp_path / "part.mp4")) as container, contextlib.suppress(av.FFmpegError):  # cut in a picture
        for _ in container.decode(video=0):
            shown += 1
    assert shown >= 9
    for bad in ("0" * 32, "..%2f..%2fetc%2fpasswd", "x"):
        with pytest.raises(HostError) as caught:
            host.get(f"/joyavatar/stream/{bad}")
        assert caught.value.status == 404
    host.interrupt()
    with pytest.raises(HostError):
        host.wait(prompt)


def test_a_killed_host_goes_on_where_it_was(host: Host) -> None:
    prompt = {**stream("long.wav", sampler={"seed": 9}), **video("killed")}
    whole = frames_of(file_of(host, host.run({**prompt, **video("unbroken")}, timeout=600)))
    host.submit(prompt)
    state = wait_until(lambda: next((host.base / "output" / "t").glob("killed*.state.safetensors"), None))
    wait_until(lambda: session(host, "running")["blocks"] >= 12)
    host.restart()
    entry = host.run(prompt, timeout=600)
    (detail,) = entry["outputs"]["7"]["joyavatar"]
    path = file_of(host, entry)
    assert path.stem == state.name.split(".")[0] and detail["made"] < detail["frames"] == len(whole), (
        "only the rest was made"
    )
    assert (frames_of(path) == whole).all()
    assert not state.exists() and not list(path.parent.glob("killed*.part.mp4"))


def test_retake_changes_its_seconds_only(host: Host) -> None:
    prompt = {**stream("long.wav", sampler={"seed": 9}), **video("retaken")}
    prompt["8"] = node("JoyAvatarRetake", video=["7", 0], frames=["6", 0], start=20.0, end=21.0, seed=77, blend=2)
    entry = host.run(prompt, timeout=600)
    before, after = frames_of(file_of(host, entry)), frames_of(file_of(host, entry, "8"))
    changed = np.flatnonzero((before != after).any((1, 2, 3))) / 16
    assert len(changed) and changed.min() >= 20.0 - 0.75 and changed.max() <= 21.0 + 0.75
    (whole,), (part,) = (entry["outputs"][n]["joyavatar"] for n in ("7", "8"))
    assert part["made"] < whole["made"] / 4, "the cost is in proportion"


def test_lora_off_is_exactly_as_before(host: Host) -> None:
    def made(name: str, strength: float | None, file: str = "ours.safetensors") -> np.ndarray:
        prompt = {**stream(), **video(name)}
        if strength is not None:
            prompt["11"] = node("JoyAvatarLoRA", model=["2", 0], lora=file, strength=strength)
            prompt["5"]["inputs"]["model"] = ["11", 0]
        return frames_of(file_of(host, host.run(prompt)))

    before, with_it, after, zero = made("l1", None), made("l2", 1.0), made("l3", None), made("l4", 0.0)
    assert (before != with_it).any()
    assert (before == after).all() and (before == zero).all()
    assert (made("l5", 1.0, "ours.pt") == with_it).all(), "a trainer's pickle is the same LoRA"


def test_full_size_with_stock_loaders_and_stock_decode(host: Host) -> None:
    """The stream's own decoder and the host's VAE Decode of the collected latents show the same."""
    prompt = {**full_size(), **video("full", resume=False)}
    prompt["8"] = node("JoyAvatarCollectLatents", latents=["5", 0], limit_gb=1.0)
    prompt["23"] = node("VAEDecode", samples=["8", 0], vae=["21", 0])
    prompt["24"] = node("JoyAvatarCollectFrames", frames=["6", 0], limit_gb=1.0)
    prompt["25"] = node("SaveImage", images=["23", 0], filename_prefix="t/stock")
    prompt["26"] = node("SaveImage", images=["24", 0], filename_prefix="t/own")
    entry = host.run(prompt)
    assert len(frames_of(file_of(host, entry))) == 16
    from PIL import Image

    stock, own = (
        np.stack(
            [np.asarray(Image.open(host.base / "output" / "t" / i["filename"])) for i in entry["outputs"][n]["images"]]
        )
        for n in ("25", "26")
    )
    assert len(own) == 16 <= len(stock)
    assert np.abs(stock[:16].astype(int) - own).max() <= 2


def test_live_avatar_at_its_own_rate_and_policy(host: Host) -> None:
    """Policy auto: 25 pictures a second, beside a prefilled reference."""
    prompt = {**full_size(policy="auto"), **video("s2v", resume=False)}
    prompt["2"]["inputs"]["model"] = "s2v.safetensors"
    prompt["3"]["inputs"] |= {"conditioning": ["31", 0], "width": 128, "height": 128}
    prompt["31"] = node("TestPrompt", channels=8)
    frames = frames_of(file_of(host, host.run(prompt)))
    assert len(frames) == 25 and frames.std() > 0, "a second of sound"


@pytest.mark.parametrize(
    ("name", "model", "frames"), [("live_avatar", "s2v.safetensors", 25), ("livetalk", "omni.safetensors", 16)]
)
def test_workflows_for_public_weights_run(host: Host, name: str, model: str, frames: int) -> None:
    """As stored but for the files, a small size, a second of sound and a text encoder of the tests."""
    prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    small = {
        "JoyAvatarLoadModel": {"model": model},
        "JoyAvatarLoRA": {"lora": "live.safetensors"},
        "VAELoader": {"vae_name": "small.safetensors"},
        "AudioEncoderLoader": {"audio_encoder_name": "small.safetensors"},
        "JoyAvatarReference": {"size": "custom", "width": 128, "height": 128},
        "JoyAvatarAudioEncoder": {"audio": ["100", 0]},
    }
    for given in prompt.values():
        given["inputs"] |= small.get(given["class_type"], {})
    numbers = {given["class_type"]: number for number, given in prompt.items()}
    prompt |= {"100": node("LoadAudio", audio="many/a.wav"), numbers["CLIPTextEncode"]: node("TestPrompt", channels=8)}
    del prompt[numbers["CLIPLoader"]]
    prompt["101"] = node("JoyAvatarRolloutInfo", latents=[numbers["JoyAvatarStreamingSampler"], 0])
    entry = host.run(prompt)
    shown = frames_of(file_of(host, entry, numbers["JoyAvatarStreamToVideo"]))
    assert len(shown) == frames and shown.std() > 0
    (text,) = entry["outputs"]["101"]["text"]
    assert "window 1: " in text and "K/V: " in text


@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3fn"])
def test_full_size_in_less_precision(host: Host, dtype: str) -> None:
    entry = host.run({**full_size(dtype, seed=11), **video(dtype)})
    frames = frames_of(file_of(host, entry))
    assert len(frames) == 16 and frames.std() > 0


def test_full_size_parts_that_do_not_fit_are_told_on_the_right_node(host: Host) -> None:
    deaf = {**full_size(hearing=False), **video("deaf")}
    blind = {**full_size(), **video("blind")}
    del blind["3"]["inputs"]["vae"]
    wrong = {**stream(), **video("wrong"), "21": node("VAELoader", vae_name="small.safetensors")}
    wrong["6"]["inputs"]["vae"] = ["21", 0]
    for prompt, number, message in (
        (deaf, "5", "listens through wav2vec2: connect Audio Encoder Loader"),
        (blind, "5", "has no autoencoder: connect Load VAE"),
        (wrong, "6", "decodes 16 latent channels, embedded makes 48: leave vae empty"),
    ):
        with pytest.raises(HostError, match=message) as caught:
            host.run(prompt)
        assert caught.value.node_id == number


def test_batch_runs_once_for_each_pair(host: Host) -> None:
    prompt = {**stream(), **video("batch")}
    prompt["9"] = node("JoyAvatarFolderOfAudio", folder="many", limit=0)
    entry = host.run(prompt)
    assert len(entry["outputs"]["7"]["images"]) == 2


def test_paste_back_gives_the_whole_picture(host: Host) -> None:
    region = {"fit": "region", "region_x": 16, "region_y": 16, "region_width": 128, "region_height": 128}
    prompt = {**stream(**region), **video("paste", frames="12")}
    prompt["12"] = node("JoyAvatarPasteBack", frames=["6", 0], feather=10)
    frames = frames_of(file_of(host, host.run(prompt)))
    assert frames.shape[1] > SIDE and np.abs(frames[0, -8:].astype(int) - frames[-1, -8:]).mean() < 1


def test_a_small_face_is_taken_closer_and_laid_back(host: Host) -> None:
    """Also into the whole picture, and not where the fit is crop."""
    scene = Image.new("RGB", (640, 384), (140, 150, 160))
    scene.paste(Image.open(samples.picture("demo")).convert("RGB").resize((240, 240)), (300, 120))
    scene.save(host.base / "input" / "small.png")
    shape = {"fit": "close-up", "width": 320, "height": 192}
    prompt = {**stream(**shape), **video("closer")}
    prompt["1"] = node("LoadImage", image="small.png")
    frames = frames_of(file_of(host, host.run(prompt)))
    corner = frames[:, :40, :80].astype(int)
    assert frames.shape[1:3] == (192, 320) and np.abs(corner - corner[0]).max() <= 6
    prompt["12"] = node("JoyAvatarPasteBack", frames=["6", 0], feather=12)
    prompt["7"]["inputs"]["frames"] = ["12", 0]
    pasted = frames_of(file_of(host, host.run(prompt)))
    assert pasted.shape[1:3] == (384, 640)
    halved = pasted[:, ::2, ::2].astype(int)
    assert np.abs(halved - frames).mean() < 4  # the same face in the same place
    prompt["3"]["inputs"]["fit"], prompt["7"]["inputs"]["frames"] = "crop", ["6", 0]
    whole = frames_of(file_of(host, host.run(prompt)))
    assert whole.shape == frames.shape and np.abs(whole.astype(int) - frames).mean() > 0.5


@pytest.mark.parametrize(
    ("change", "number", "message"),
    [
        ({"8": node("JoyAvatarCollectFrames", frames=["6", 0], limit_gb=0.1), "9": "long.wav", "side": 512}, "8",
         "would take 2.0 GB of memory, the limit is 0.1 GB"),
        ({"7": {"filename_prefix": "../outside"}}, "7", "outside ComfyUI's output folder"),
        ({"5": {"rope_limit": 5}}, "5", "rope_limit 5: must be at least 27"),
        ({"3": {"width": 72}}, "5", "width must be a positive multiple of 32"),
        ({"3": {"fit": "region", "region_x": 9000}}, "3", "outside the picture"),
        ({"lora": "other.safetensors"}, "11", "a LoRA of another size"),
        ({"lora": "code.pt"}, "11", "code.pt holds more than weights, and no code of a file is run"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_on_its_node(host: Host, change: dict[str, Any], number: str, message: str) -> None:
    prompt = {**stream(change.get("9", "short.wav")), **video("bad")}
    if side := change.pop("side", None):
        prompt["3"]["inputs"] |= {"width": side, "height": side}
    if lora := change.pop("lora", None):
        prompt["11"] = node("JoyAvatarLoRA", model=["2", 0], lora=lora, strength=1.0)
        prompt["5"]["inputs"]["model"] = ["11", 0]
    for key, value in change.items():
        if key == "8":
            prompt |= {"8": value, "10": node("PreviewImage", images=["8", 0])}
            del prompt["7"]
        elif key != "9":
            prompt[key]["inputs"] |= value
    with pytest.raises(HostError, match=message) as caught:
        host.run(prompt)
    assert caught.value.node_id == number and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["talking_avatar", "long_audio", "step_by_step", "retake", "paste_back", "batch"])
def test_example_workflows_leave_videos_as_long_as_their_sound(host: Host, name: str) -> None:
    prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    if name == "batch":  # the only one that needs files
        from PIL import Image

        Image.fromarray(np.full((64, 64, 3), 120, np.uint8)).save(host.base / "input" / "face.png")
        next(n for n in prompt.values() if n["class_type"] == "JoyAvatarFolderOfAudio")["inputs"]["folder"] = "many"
    entry = host.run(prompt, timeout=600)
    found = [
        host.base / "output" / file["subfolder"] / file["filename"]
        for output in entry["outputs"].values()
        for file in output.get("images", ()) or output.get("video", ())
        if file["filename"].endswith(".mp4")
    ]
    assert found, entry["outputs"].keys()
    for path in found:
        with av.open(str(path)) as container:
            sound = float(container.streams.audio[0].duration * container.streams.audio[0].time_base)
            assert abs(container.streams.video[0].frames / 16 - sound) <= 1 / 16


@pytest.mark.parametrize("size", [(1, 1), (7, 900), (2000, 3)])
def test_no_picture_is_refused(host: Host, size: tuple[int, int]) -> None:
    prompt = {**stream("many/a.wav"), **video("odd")}
    prompt["1"] = node("EmptyImage", width=size[0], height=size[1], batch_size=2, color=0x30A0F0)
    frames = frames_of(file_of(host, host.run(prompt)))
    assert frames.shape == (16, SIDE, SIDE, 3)


def test_no_sound_is_told_on_the_audio_encoder(host: Host) -> None:
    prompt = {**stream(), **video("silent")}
    prompt["9"] = node("EmptyAudio", duration=0.0, sample_rate=44100, channels=2)
    with pytest.raises(HostError, match="the audio has 0 samples: there is nothing to speak") as caught:
        host.run(prompt)
    assert caught.value.node_id == "4"


def test_a_folder_that_cannot_be_made_is_told(host: Host) -> None:
    (host.base / "output" / "taken").write_text("a file where a folder is wanted")
    prompt = {**stream(), "7": node("JoyAvatarStreamToVideo", frames=["6", 0], filename_prefix="taken/a", **WRITER)}
    with pytest.raises(HostError, match="filename_prefix 'taken/a': no folder can be made there") as caught:
        host.run(prompt)
    assert caught.value.node_id == "7"


@pytest.mark.slow
def test_ten_minutes_in_constant_memory(host: Host) -> None:
    """Resident memory of the host after the first minute of video, and at any later moment."""
    write_sound(host.base / "input" / "ten.wav", 600.0)
    host.restart()
    prompt = host.submit({**stream("ten.wav", fit="crop", width=256, height=256), **video("ten", crf=18)})
    seen: list[tuple[float, int]] = []
    while not host.get("/history").get(prompt):
        if running := session(host, "running"):
            seen.append((running["frames"] / 16, host.rss_bytes()))
        time.sleep(1)
    path = file_of(host, host.wait(prompt))
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 9600
    first = max(rss for second, rss in seen if second <= 60)
    later = [rss for second, rss in seen if second > 60]
    print(json.dumps({"first_minute_mb": first / 1e6, "most_mb": max(later) / 1e6, "last_mb": later[-1] / 1e6}))  # noqa: T201
    assert max(later) < 1.03 * first
