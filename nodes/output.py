"""Nodes that run a stream into a video file: as it goes, resumable, with a live preview; and parts made again."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

from comfy_api.latest import InputImpl, io

from ..joyavatar_core import retake as retakes
from ..joyavatar_core.checkpoint import CheckpointError
from ..joyavatar_core.generate import Progress, Resume, StateShelf, generate
from ..joyavatar_core.media import MediaError
from ..joyavatar_core.media.mp4 import PRESETS, Part, finished_video
from ..joyavatar_core.media.writer import VideoWriter, cancelled_path, part_path
from ..joyavatar_core.multi_gpu.child import Asked
from ..joyavatar_core.rollout import Reseed
from . import host, processes
from .preview import SESSIONS, Session
from .sockets import CATEGORY, Frames
from .streams import FramePlan

STATE, SHELF = ".state.safetensors", ".states"
RETAKE_OF = "joyavatar_retake_of"


class StreamToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="JoyAvatarStreamToVideo",
            display_name="JoyAvatar Stream to Video",
            category=CATEGORY,
            description="Makes the video and shows it as it grows. Cancel keeps what is there; a run that was broken "
            "off goes on where it stopped.",
            search_aliases=["save video", "preview", "render", "talking avatar", "mp4", "live preview"],
            inputs=[
                Frames.Input("frames", tooltip="From JoyAvatar Stream Decode or Paste Back."),
                io.String.Input(
                    "filename_prefix",
                    default="video/JoyAvatar",
                    tooltip="Where under ComfyUI's output folder; a number is added.",
                ),
                *_advanced(),
            ],
            outputs=[io.Video.Output("video")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        frames: FramePlan,
        filename_prefix: str,
        fps: float = 0.0,
        crf: int = 18,
        preset: str = "veryfast",
        resume: bool = True,
        retake_every: float = 10.0,
        gpus: int = 1,
        parallel: str = processes.PARALLEL[0],
    ) -> io.NodeOutput:
        place = Place.of(filename_prefix, frames.size)
        rate = Fraction(fps).limit_denominator(1001) if fps else frames.latents.geometry.fps
        options = {"output_fps": rate, "crf": crf, "preset": preset}
        alone = gpus == 1
        path = (
            place.unfinished(lambda part: _begun_by(part, frames, options)) if resume and alone else None
        ) or place.next_file()
        job = Job(frames, path, place, options, str(cls.hidden.unique_id), _tags(cls.hidden))
        with job.session(retake_every > 0 and alone) as session:
            if alone:
                job.run(session, path.with_suffix(STATE), retake_every, go_on=part_path(path).exists())
            else:
                job.run_apart(session, gpus, parallel)
        return _result(session, path)


def _advanced() -> list[Any]:
    """Inputs of the file and of how it is made."""
    return [
        io.Float.Input(
            "fps",
            default=0.0,
            min=0.0,
            max=120.0,
            step=1.0,
            advanced=True,
            tooltip="Frames a second of the file, by repeating frames; 0: the model's own.",
        ),
        io.Int.Input(
            "crf",
            default=18,
            min=1,
            max=51,
            advanced=True,
            tooltip="Quality of H.264: lower is better and larger.",
        ),
        io.Combo.Input(
            "preset",
            options=list(PRESETS),
            default="veryfast",
            advanced=True,
            tooltip="Effort of H.264: slower makes smaller files.",
        ),
        io.Boolean.Input(
            "resume",
            default=True,
            advanced=True,
            tooltip="Go on with an unfinished file of the same settings, after a crash or a restart.",
        ),
        io.Float.Input(
            "retake_every",
            default=10.0,
            min=0.0,
            max=600.0,
            step=1.0,
            advanced=True,
            tooltip="Keep a state every so many seconds beside the video, for Retake; 0 keeps none.",
        ),
        io.Int.Input(
            "gpus",
            default=1,
            min=1,
            max=16,
            optional=True,
            advanced=True,
            tooltip="Processes that make the video together, a GPU each; 1: ComfyUI itself makes it.",
        ),
        io.Combo.Input(
            "parallel",
            options=list(processes.PARALLEL),
            optional=True,
            advanced=True,
            tooltip="How several processes share the work. auto suits policy and number.",
        ),
    ]


class Retake(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        seconds = {"min": 0.0, "max": 100_000.0, "step": 0.05}
        return io.Schema(
            node_id="JoyAvatarRetake",
            display_name="JoyAvatar Retake",
            category=CATEGORY,
            description="Makes some seconds of a finished video again with another seed. All else stays as it is.",
            search_aliases=["regenerate", "redo", "fix part", "inpaint time"],
            inputs=[
                io.Video.Input("video", tooltip="From JoyAvatar Stream to Video or another Retake."),
                Frames.Input("frames", tooltip="The same frames as those of the video."),
                io.Float.Input("start", default=0.0, tooltip="Second to begin at; whole blocks are made.", **seconds),
                io.Float.Input("end", default=3.0, tooltip="Second to end at; whole blocks are made.", **seconds),
                io.Int.Input(
                    "seed",
                    default=1,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Another seed than the video's gives another take.",
                ),
                io.Int.Input(
                    "blend",
                    default=4,
                    min=0,
                    max=32,
                    advanced=True,
                    tooltip="Frames that fade from the old take to the new one and back, inside the part.",
                ),
            ],
            outputs=[io.Video.Output("video")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, video: Any, frames: FramePlan, start: float, end: float, seed: int, blend: int = 4
    ) -> io.NodeOutput:
        base = _file_of(video)
        found = finished_video(base)
        layout, geometry = found.layout, frames.latents.geometry
        if found.tags.get("settings") and json.loads(found.tags["settings"]) != _settings(frames):
            raise ValueError("the frames are not those of the video: connect the Stream Decode that made it, unchanged")
        part = retakes.part_of(start, end, geometry, found.frames)
        place = Place.beside(base)
        path = place.next_file()
        options = {"output_fps": layout.output_fps, "crf": layout.crf, "preset": layout.preset, "base": base}
        first = base.with_name(Path(found.tags.get(RETAKE_OF, base.name)).name)  # the video that the states are of
        job = Job(frames, path, place, options, str(cls.hidden.unique_id), _tags(cls.hidden) | {RETAKE_OF: first.name})
        with job.session(retake=True, part=part) as session:
            job.retake(session, part, seed, blend, StateShelf(_shelf_of(first), 0))
        return _result(session, path)


class Place:
    """A folder under the host's output, and the names of files there."""

    def __init__(self, folder: Path, name: str, subfolder: str) -> None:
        self.folder, self.name, self.subfolder = folder, name, subfolder

    @classmethod
    def of(cls, prefix: str, size: tuple[int, int]) -> Place:
        """From the prefix a user typed. Raises ValueError for a place outside the output folder."""
        import folder_paths

        try:
            found = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory(), *size)
        except OSError as error:
            raise MediaError(f"filename_prefix {prefix!r}: no folder can be made there ({error.strerror})") from None
        except Exception as error:
            if "outside the output folder" not in str(error):
                raise
            raise ValueError(f"filename_prefix {prefix!r} lies outside ComfyUI's output folder") from None
        folder, name, _, subfolder, _ = found
        return cls(Path(folder), name, subfolder)

    @classmethod
    def beside(cls, base: Path) -> Place:
        """For a retake of a file; where that is not under output, the output folder itself."""
        import folder_paths

        root = Path(folder_paths.get_output_directory()).resolve()
        folder = base.resolve().parent
        name = f"{base.stem.removesuffix('_').split('_retake')[0]}_retake"
        if folder.is_relative_to(root):
            return cls(folder, name, folder.relative_to(root).as_posix().removeprefix("."))
        return cls(root, name, "")

    def next_file(self) -> Path:
        """NAME_00001_.mp4 and so on, as the host counts; names of unfinished and cancelled files are taken too."""
        taken = [p.name[len(self.name) + 1 :].split("_")[0] for p in self._files("*")]
        number = 1 + max((int(word) for word in taken if word.isdigit()), default=0)
        return self.folder / f"{self.name}_{number:05}_.mp4"

    def unfinished(self, ours: Callable[[Path], bool]) -> Path | None:
        """The newest unfinished file, with a state to go on from, that is `ours`."""
        for part in sorted(self._files("*.part.mp4"), key=lambda p: p.stat().st_mtime, reverse=True):
            path = part.with_name(part.name.removesuffix(".part.mp4") + ".mp4")
            if path.with_suffix(STATE).exists() and ours(part):
                return path
        return None

    def _files(self, ending: str) -> list[Path]:
        return list(self.folder.glob(f"{glob.escape(self.name)}_{ending}"))

    def saved(self, path: Path) -> dict[str, str]:
        """How the host names a file under output."""
        return {"filename": path.name, "subfolder": self.subfolder, "type": "output"}


class Job:
    """A run of a stream into a file."""

    def __init__(
        self, frames: FramePlan, path: Path, place: Place, options: dict[str, Any], node: str, tags: dict[str, str]
    ) -> None:
        self.frames, self.path, self.place = frames, path, place
        self.options, self.node, self.tags = options, node, tags
        self.geometry = frames.latents.geometry
        self.workflow = json.loads(tags.get("workflow", "{}")).get("id")

    @contextmanager
    def session(self, retake: bool, part: retakes.Part | None = None) -> Iterator[Session]:
        """The run as the browser sees it; its end is told whatever happens."""
        plan = self.frames.latents
        session = SESSIONS.open(
            Session(
                node=self.node,
                path=None if part else self.path,
                geometry=self.geometry,
                size=self.frames.size,
                window=plan.policy.window_blocks,
                total_frames=plan.estimate().frames,
                workflow=self.workflow,
                retake=retake,
            )
        )
        session.send()
        try:
            yield session
        except host.cancelled_by():
            kept = cancelled_path(self.path)
            session.end("cancelled", self.place.saved(kept) if kept.exists() else None)
            raise
        except Exception as error:
            session.end("failed", message=str(error).splitlines()[0] if str(error) else type(error).__name__)
            raise
        session.end("done", self.place.saved(self.path))

    def run(self, session: Session, state: Path, retake_every: float, go_on: bool) -> None:
        """The whole clip."""
        plan, shelf = self.frames.latents, None
        if retake_every:
            per_block = len(self.geometry.frames_of_block(1)) / self.geometry.fps
            shelf = StateShelf(_shelf_of(self.path), max(1, round(retake_every / float(per_block))))
        tell = self._teller(session, plan.estimate().blocks)
        writers: list[VideoWriter] = []

        def open_sink(frames_done: int) -> Any:
            session.before = frames_done
            writers.append(self._writer(frames_done))
            return self.frames.into(writers[0])

        try:
            with self.frames.run() as stream:
                kept = Resume(state, go_on=go_on, shelf=shelf)
                generate(stream, plan.voice, open_sink, kept, tell, host.overlap_beside(plan.model.patcher))
        except BaseException as error:
            for writer in writers:
                writer.__exit__(type(error), error, error.__traceback__)
            raise
        else:
            writers[0].close()
        finally:
            if not part_path(self.path).exists():
                state.unlink(missing_ok=True)

    def run_apart(self, session: Session, gpus: int, parallel: str) -> None:
        """The whole clip by several processes; no states are kept."""
        plan, progress = self.frames.latents, Progress()
        tell = self._teller(session, plan.estimate().blocks)
        writer = {key: value for key, value in self.options.items() if key != "output_fps"}
        asked = Asked(plan.policy, _settings(self.frames), self.tags, writer)

        def on_block(told: Mapping[str, Any]) -> None:
            progress.blocks, progress.frames = told["blocks"], told["frames"]
            progress.blocks_total = told["blocks_total"]
            progress.first_frame_s = progress.first_frame_s or progress.seconds  # processes and weights included
            tell(progress)

        processes.run(self.frames, self.path, gpus, parallel, asked, self.options["output_fps"], on_block)

    def retake(self, session: Session, part: retakes.Part, seed: int, blend: int, shelf: StateShelf) -> None:
        """Some blocks."""
        plan = self.frames.latents
        state = retakes.earliest_state(part, plan.policy, shelf)
        tell = self._teller(session, part.blocks.stop)
        with self._writer(0) as writer:
            writer.start_at(part.frames.start)
            try:
                with self.frames.run(Reseed(part.blocks, seed)) as stream:
                    retakes.retake(
                        stream, plan.voice, part, state, writer, self.options["base"], blend, self.frames.finished, tell
                    )
            except CheckpointError:
                raise ValueError(
                    "the states kept with the video belong to other settings: connect the nodes that made it, unchanged"
                ) from None

    def _teller(self, session: Session, blocks: int) -> Any:
        bar = host.progress_bar(blocks, self.node)

        def tell(progress: Progress) -> None:
            session.tell(progress)
            bar(progress.blocks)
            host.check_interrupt()

        return tell

    def _writer(self, frames_done: int) -> VideoWriter:
        voice, (width, height) = self.frames.latents.voice, self.frames.size
        return VideoWriter.resume(
            self.path,
            width,
            height,
            frames_done=frames_done,
            source_fps=self.geometry.fps,
            audio_rate=voice.rate,
            audio_channels=voice.samples.shape[0],
            settings=_settings(self.frames),
            tags=self.tags,
            segment_frames=len(self.geometry.frames_of_block(1)),
            first_segment_frames=len(self.geometry.frames_of_block(0)),
            cancelled_by=host.cancelled_by(),
            **self.options,
        )


def _settings(frames: FramePlan) -> dict[str, str]:
    """What decides the pictures, as far as words can say; the rest is in the state's identity."""
    plan = frames.latents
    return {
        "seed": str(plan.seed),
        "model": plan.model.name,
        "size": "{}x{}".format(*plan.view.size),
        "close_up": str(plan.view.paste.region) if plan.view.paste else "",
        "policy": json.dumps(asdict(plan.policy)),
        "seconds": f"{float(plan.voice.duration):.3f}",
        "paste_back": "" if frames.feather is None else f"{frames.feather:g}",
    }


def _begun_by(part: Path, frames: FramePlan, options: dict[str, Any]) -> bool:
    """Whether a run of these settings, into a file like that, left this part."""
    try:
        begun = Part.read(part)
    except MediaError:
        return False
    same_file = all(getattr(begun.layout, key) == value for key, value in options.items())
    return same_file and json.loads(begun.tags.get("settings", "{}")) == _settings(frames)


def _tags(hidden: Any) -> dict[str, str]:
    """Prompt and workflow, so that the file dropped on a canvas brings them back."""
    from comfy.cli_args import args

    if args.disable_metadata:
        return {}
    tags = {"prompt": json.dumps(hidden.prompt)} if hidden.prompt else {}
    return tags | {key: json.dumps(value) for key, value in (hidden.extra_pnginfo or {}).items()}


def _shelf_of(path: Path) -> Path:
    return path.with_suffix(SHELF)


def _file_of(video: Any) -> Path:
    """The file behind a VIDEO. ValueError for one that lies in memory."""
    source = video.get_stream_source() if hasattr(video, "get_stream_source") else None
    if not isinstance(source, (str, Path)):
        raise ValueError("this VIDEO is not a file of JoyAvatar: connect Stream to Video")
    return Path(source)


def _result(session: Session, path: Path) -> io.NodeOutput:
    detail = session.detail()
    return io.NodeOutput(
        InputImpl.VideoFromFile(str(path)),
        ui={"joyavatar": [detail], "images": [session.file], "animated": (True,)},
    )
