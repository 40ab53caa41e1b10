"""`joyavatar`: demo, generate, evaluate, prepare, train and more. One error, one line, exit status 2."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from .. import samples
from ..config import MODELS
from ..policy import POLICIES
from . import prepare, train
from .options import Repeatable, add_fast, add_overlap, add_several_gpus


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return args.run(args)
    except (ValueError, OSError, MemoryError, ImportError) as error:
        print(f"joyavatar: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # torch has no error of its own for memory that an allocator on the CPU refuses
        if "memory" not in str(error):
            raise
        first = str(error).strip().splitlines()[0]
        print(f"joyavatar: out of memory ({first}); use a smaller --size or fewer --local-blocks", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("joyavatar: cancelled", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """All commands and options."""
    parser = argparse.ArgumentParser(prog="joyavatar", description="A picture and a voice in, a talking avatar out.")
    parser.add_argument("--version", action="version", version=f"joyavatar {_version()}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is being done")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_generate(commands)
    _add_schedule(commands)
    _add_doctor(commands)
    _add_download(commands)
    _add_convert(commands)
    _add_bench(commands)
    _add_evaluate(commands)
    prepare.add(commands)
    _add_train(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser("demo", help="make a talking avatar with what is in the package")
    demo.add_argument("--out", default="joyavatar-demo", metavar="DIR", help="folder of the result (%(default)s)")
    demo.add_argument(
        "--image", default=samples.DEFAULT, metavar="NAME|FILE", help="a picture of the package, or your own"
    )
    demo.add_argument(
        "--audio", default=samples.DEFAULT, metavar="NAME|FILE", help="a voice of the package, or your own"
    )
    demo.add_argument("--size", metavar="WxH", help="video size in pixels")
    demo.add_argument("--list", action="store_true", help="name the pictures and voices of the package")
    demo.add_argument("--policy", choices=tuple(POLICIES), help="how blocks follow each other (joyavatar-flash)")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)


def _add_generate(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser("generate", help="picture and sound to video")
    _add_files(p)
    p.add_argument("--model", default="tiny", metavar="tiny|FILE[,FILE]", help="built-in model or checkpoint files")
    full = p.add_argument_group("full-size models")
    full.add_argument("--vae", metavar="FILE", help="Wan2.1 VAE or a light autoencoder (taew2_1)")
    full.add_argument("--decoder", metavar="FILE", help="a faster one than --vae (taew2_1, lighttaew2_1)")
    full.add_argument("--audio-encoder", metavar="PATH", help="wav2vec2 folder or .safetensors file")
    full.add_argument("--whole-audio", action="store_true", help="hear the whole sound at once (at most 60 s)")
    full.add_argument("--text-encoder", metavar="PATH", help="umT5 folder, or a file with a ready embedding")
    full.add_argument("--clip-vision", metavar="PATH", help="CLIP-vision folder, or a file with ready tokens")
    full.add_argument("--face", metavar="FILE", help="a face embedding (.npy, .safetensors, .json), or a picture")
    full.add_argument("--face-model", metavar="FILE.onnx", help="ArcFace, for a picture")
    full.add_argument("--face-detector", metavar="FILE.onnx", help="YuNet, which finds the face in the picture")
    full.add_argument("--face-points", metavar='"X,Y ..."', help="the face's five points by hand instead")
    full.add_argument("--prompt", default="", help="text prompt")
    p.add_argument("--size", metavar="WxH", help="video size in pixels")
    p.add_argument("--fit", choices=("crop", "pad"), default="crop", help="how the picture meets the size")
    p.add_argument(
        "--close-up",
        choices=("auto", "never"),
        default="auto",
        help="take a small drawn face closer, and lay it back into the rest, which stands still (embedded model; auto)",
    )
    p.add_argument("--fps", type=_fraction, metavar="N", help="output frame rate by retiming, e.g. 24, 25, 30 (native)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (%(default)s)")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    p.add_argument("--threads", type=int, help="CPU threads")
    add_overlap(p)
    _add_policy(p)
    p.set_defaults(policy=None)  # the model's own
    add_fast(p)
    add_several_gpus(p)
    p.add_argument("--pcm", default="16000:1:s16le", metavar="RATE:CHANNELS:FORMAT", help="format of - (%(default)s)")
    p.add_argument("--checkpoint-blocks", type=int, default=8, metavar="N", help="blocks between saved states; 0: none")
    p.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same settings")
    p.add_argument("--json", metavar="REPORT", help="write figures of the run to this file")
    p.set_defaults(run=_generate)


def _add_files(parser: argparse.ArgumentParser) -> None:
    """What goes in and out; each may be given several times, for several avatars at a time."""
    p = parser.add_argument_group("files; several of --image, --audio or --seed make several videos at a time")
    p.add_argument("--image", required=True, action=Repeatable, metavar="FILE")
    p.add_argument(
        "--audio", required=True, action=Repeatable, metavar="FILE|-", help="any file with sound; -: PCM from stdin"
    )
    p.add_argument(
        "--output",
        required=True,
        action=Repeatable,
        metavar="FILE.mp4|DIR",
        help="of several videos: one each, or a folder",
    )
    p.add_argument("--seed", type=int, default=0, action=Repeatable)
    p.add_argument("--batch", type=int, metavar="N", help="of several videos, so many through one rollout (all)")


def _add_policy(parser: argparse.ArgumentParser) -> None:
    p = parser.add_argument_group("rollout")
    p.add_argument("--policy", choices=tuple(POLICIES), default="joyavatar-flash")
    p.add_argument("--no-psb", action="store_true", help="no extra steps for the first blocks")
    p.add_argument("--no-mci", action="store_true", help="no motion frame before the window")
    p.add_argument("--rope-limit", type=int, metavar="N", help="URCR: temporal RoPE indices stay below N")
    p.add_argument("--sink-blocks", type=int, metavar="N")
    p.add_argument("--local-blocks", type=int, metavar="N")
    p.add_argument("--kv-level", choices=("last_step", "clean"), help="noise level at which keys are cached")
    p.add_argument(
        "--reference-ahead",
        metavar="N|N-M",
        help="live-avatar: latents from the window to the picture; of a span it is drawn for every forward",
    )
    p.add_argument(
        "--reference-refresh",
        type=int,
        metavar="N",
        help="live-avatar: blocks after which a generated latent takes the picture's place; 0: never",
    )


def _add_schedule(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser("schedule", help="print the denoising schedule")
    p.add_argument("--blocks", type=int, default=8, metavar="N")
    p.add_argument("--config", choices=tuple(MODELS), default="tiny", help="sizes for the cost (%(default)s)")
    p.add_argument("--size", default="256x256", metavar="WxH", help="video size for the cost (%(default)s)")
    _add_policy(p)
    p.set_defaults(run=_schedule)


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser("doctor", help="what is installed, what is missing, how fast this machine is")
    p.add_argument("--models", nargs="+", metavar="DIR", help="folders like ComfyUI's models, to look for weights in")
    p.set_defaults(run=_doctor)


def _add_download(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser("download", help="fetch weights of others, after their licence was shown")
    p.add_argument("profile", nargs="?", metavar="NAME", help="a system or a part of one; without it they are listed")
    p.add_argument("--to", default="models", metavar="DIR", help="folder like ComfyUI's models (%(default)s)")
    p.add_argument("--accept-licence", action="store_true", help="fetch: the licences shown without it are accepted")
    p.add_argument("--comfyui", action="store_true", help="encoders in one file, for ComfyUI's own loaders")
    p.set_defaults(run=_download)


def _add_convert(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser("convert", help="weights of other projects to one file in our layout")
    p.add_argument("files", nargs="+", metavar="FILE", help="parts of one model, and adapters (LoRA) to put in")
    p.add_argument("out", metavar="OUT.safetensors")
    p.add_argument("--profile", metavar="NAME", help="what it is, where neither keys nor file names say it")
    p.add_argument(
        "--weights",
        choices=("ema", "plain"),
        default="ema",
        help="of a training file that holds both: the averaged ones, or those themselves (%(default)s)",
    )
    p.add_argument("--dtype", choices=("keep", "float32", "bfloat16", "float16"), default="keep")
    p.add_argument("--force", action="store_true", help="replace OUT if it is there")
    p.set_defaults(run=_convert)


def _add_bench(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser("bench", help="measure speed and memory on this machine")
    p.add_argument("--config", default="tiny", choices=("tiny", "flash-1.3b", "teacher-14b"), help="which model")
    p.add_argument("--size", metavar="WxH", help="video size in pixels")
    p.add_argument("--blocks", type=int, default=40, metavar="N", help="blocks measured (%(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (%(default)s)")
    p.add_argument("--threads", type=int, help="CPU threads")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add_overlap(p)
    p.add_argument("--random", action="store_true", help="random weights instead of the embedded ones")
    p.add_argument("--baseline", action="store_true", help="measure the plain way too")
    p.add_argument("--wan-vae", action="store_true", help="measure Wan2.1's decoder too")
    p.add_argument("--batch", type=int, metavar="N", help="measure N avatars through one rollout too")
    add_fast(p)
    p.add_argument(
        "--soak", type=int, nargs="?", const=10_101, metavar="N", help="compare early and late blocks of N (%(const)s)"
    )
    p.add_argument("--plan", action="store_true", help="what cards of 8 to 80 GB run, and how; measures nothing")
    p.add_argument("--json", action="store_true", help="print nothing but the last line")
    p.set_defaults(run=_bench)


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser("evaluate", help="measure videos, or the embedded model on held-out drawn people")
    p.add_argument("video", nargs="?", metavar="VIDEO|FOLDER", help="without it: the suite (needs espeak-ng)")
    p.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    p.add_argument("--out", metavar="DIR", help="folder for report.json, a contact sheet and plots of the curves")
    p.add_argument("--reader", metavar="FILE", help="weights of the mouth reader (built-in)")
    p.add_argument("--threads", type=int, help="CPU threads")
    _add_measures(p)
    made = p.add_argument_group("the model that is measured (--pairs and the suite)")
    made.add_argument("--model", metavar="FILE", help="transformer of the embedded kind (built-in)")
    made.add_argument("--autoencoder", metavar="FILE", help="its light autoencoder (built-in)")
    made.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    suite = p.add_argument_group("the suite of held-out drawn people")
    suite.add_argument("--suite", choices=("drawn",), default="drawn")
    suite.add_argument("--clips", type=int, metavar="N", help="clips, in turn in three sizes (24)")
    suite.add_argument("--seconds", type=float, metavar="S", help="length of a clip (12)")
    suite.add_argument("--long-clips", type=int, metavar="N", help="long runs (1); several: drift with its error")
    suite.add_argument("--long-seconds", type=float, metavar="S", help="length of a long run (120); 0: none")
    suite.add_argument("--workers", type=int, default=0, metavar="N", help="processes that share the clips (0: none)")
    suite.add_argument("--speech", metavar="FOLDER", help="recorded speech to speak too")
    suite.add_argument("--quick", action="store_true", help="a few short clips: wide intervals, in a minute or two")
    _add_policy(p)
    p.set_defaults(run=_evaluate)


def _add_measures(parser: argparse.ArgumentParser) -> None:
    p = parser.add_argument_group("measures of videos (docs/evaluate.md)")
    p.add_argument("--reference", metavar="PICTURE|FOLDER", help="who is shown; in a folder, files of the same name")
    p.add_argument("--audio", metavar="SOUND|FOLDER", help="what is said, if not the video's own sound")
    p.add_argument("--truth", metavar="FOLDER", help="recorded clips to compare seams, FID and FVD with")
    p.add_argument("--block-frames", metavar="[FIRST,]N", help="frames of a block, where the file does not say it")
    p.add_argument("--face", metavar="X0,Y0,X1,Y1", help="the face in pixels, where it is not found")
    p.add_argument("--weights", metavar="DIR", help="your copies of DINOv2, SyncNet, Inception, I3D")
    p.add_argument("--q-align", metavar="COMMAND", help="scores pictures for Q_score and Q_face")
    p.add_argument("--pairs", metavar="FOLDER", help="pictures and voices of the same names: make and measure videos")
    p.add_argument("--size", metavar="WxH", help="of the videos of --pairs")
    p.add_argument("--seed", type=int, default=0, help="of the videos of --pairs")
    p.add_argument("--generate", metavar="OPTIONS", help="further options of joyavatar generate, in one word")


def _add_train(commands: argparse._SubParsersAction) -> None:
    p = commands.add_parser("train", help="train a stage of a model: joyavatar train STAGE --help")
    train.add_options(p)
    p.set_defaults(run=train.run)


# The commands are imported when they run: `joyavatar --help` and `schedule` need no torch.


def _demo(args: argparse.Namespace) -> int:
    from .generate import demo

    return demo(args)


def _generate(args: argparse.Namespace) -> int:
    from .generate import run

    return run(args)


def _schedule(args: argparse.Namespace) -> int:
    from .schedule import run

    return run(args)


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import run

    return run(args)


def _download(args: argparse.Namespace) -> int:
    from .download import run

    return run(args)


def _convert(args: argparse.Namespace) -> int:
    from .convert import run

    return run(args)


def _bench(args: argparse.Namespace) -> int:
    from .bench import run

    return run(args)


def _evaluate(args: argparse.Namespace) -> int:
    from .evaluate import run

    return run(args)


def _fraction(text: str) -> object:
    from fractions import Fraction

    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a frame rate, e.g. 25 or 30000/1001") from None
    if not 1 <= value <= 240:
        raise argparse.ArgumentTypeError(f"frame rate {text} must lie in 1 .. 240")
    return value


def _version() -> str:
    try:
        return version("joyavatar")
    except PackageNotFoundError:
        return "from source"


if __name__ == "__main__":
    sys.exit(main())
