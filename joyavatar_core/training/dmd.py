"""Distribution matching distillation of the streaming generator by its own rollouts (JoyAvatar-Flash 4.1).

    python -m joyavatar_core.training.dmd --initial GENERATOR --teacher FILE --autoencoder FILE --clips CLIPS --out DIR
        --minutes 40 [--lips FILE] [--resume]

Three models. The generator makes clips as at inference, by `self_forcing.roll_out`: the joint main branch or the
block-wise auxiliary one, sub-steps of PSB drawn at random, the gradient through one forward a block. The real score,
the frozen teacher of `bidirectional`, and the fake score, the critic, which learns by flow matching what the generator
makes just now, say where a noised clip came from; the generator moves along their difference (Yin et al. 2023, 2024;
Self-Forcing). Nothing but pictures and sounds is taken from the clips, unless there is a judge of lips (`lips`): then
what the generator makes is to have the lips of the clip. In DIR the files of every training (`trainer`).

Shape legend: B batch, C latent channels, F latent frames of a clip, h w latent size, W audio tokens of a latent.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .. import flow
from ..audio import LogMel
from ..autoencoder import TEMPORAL, LightAutoencoder
from ..avatar import load_light_autoencoder, load_model
from ..conditioning import ImageChannels, image_channels, reference_tokens
from ..geometry import Geometry
from ..manner import HEARD
from ..model import JoyAvatarDiT
from . import flow_matching, lips, parallel, preview, trainer
from .batches import predict, regression_loss, weighted_mean
from .bidirectional import sample_timesteps, timestep_weights, whole_clips
from .common import training_dtype
from .encoded import EncodedClips
from .inputs import Inputs, guided, velocity
from .lips import LipLoss, Lips, load_lip_loss
from .listening import listen
from .self_forcing import History, Odds, block_gradients, draw, roll_out

_NEW_SPEECH = 500_000_000  # first seed


@dataclass(frozen=True)
class Recipe(flow_matching.Recipe):
    """The recipe of the distillation.

    learning_rate, critic_rate: of generator and critic (paper: 2e-6 and 4e-7 at 64 clips a step).
    critic_steps: steps of the critic for each of the generator (Self-Forcing: 5); generator_steps: the reverse, as the
    paper words it. One of the two is 1.
    guidance: how far the real score goes from deaf to hearing, 1: not beyond (Self-Forcing's 3 in this convention: 4).
    guidance_elsewhere: the same away from the mouth, if not None: what guidance does for lips it overdoes for lids.
    latents: what the scores see of a rollout: its last latents. odds: of the kinds of rollouts.
    history: level at which the auxiliary branch keeps keys and values (`self_forcing.roll_out`). block_by_block: the
    gradient of one forward at a time (Live Avatar, algorithm 2): less memory, more forwards of the scores.
    new_speech: share of steps whose rollouts hear speech made for them (espeak-ng), not that of their clips.
    regression: weight of a regression to true clips beside the scores and the judge, at the timesteps of rollouts and
    with their true past (in place of DMD's regression to a teacher's trajectories, Yin et al. 2023, section 3.2).
    lip_weight: of the judge's loss; shut: how much more frames count in which lips touch (`lips.LipLoss`).
    """

    minutes: float = 40.0
    optimiser: str = "adamw"
    learning_rate: float = 1e-4
    critic_rate: float = 1e-4
    betas: tuple[float, float] = (0.0, 0.999)
    average: float = 0.99
    critic_steps: int = 5
    generator_steps: int = 1
    guidance: float = 4.0
    guidance_elsewhere: float | None = None
    latents: int = 21
    odds: Odds = field(default_factory=Odds)
    history: History = "policy"
    block_by_block: bool = False
    new_speech: float = 0.0
    regression: float = 0.0
    drop_audio: float = 0.0
    lip_weight: float = 0.05
    shut: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        critic, generator = self.critic_steps, self.generator_steps
        if min(critic, generator) != 1:
            raise ValueError(
                f"critic_steps {critic} and generator_steps {generator}: one must be 1, the other at least 1"
            )


@dataclass(frozen=True)
class Given:
    """What clips give a rollout, weights [B, F, h, w] of its gradient, and the lips wanted, where they are known."""

    inputs: Inputs
    weights: Tensor
    lips: Lips | None = None

    def last(self, count: int, channels: ImageChannels, still: int) -> Given:
        """Of the last `count` latents, under other image channels; the first `still` of them without gradient."""
        cut = self.weights.shape[1] - count
        weights = self.weights[:, cut:].clone()
        weights[:, :still] = 0
        lips = None if self.lips is None else self.lips.part(cut)
        return Given(replace(self.inputs.part(slice(cut, None)), channels=channels), weights, lips)


@dataclass(frozen=True)
class Generated:
    """What the scores see: latents [B, C, F, h, w], and what they were made for."""

    latents: Tensor
    given: Given


# Scores


def clean(
    model: JoyAvatarDiT, x_t: Tensor, timesteps: Tensor, inputs: Inputs, guidance: float | Tensor = 1.0
) -> Tensor:
    """Clean latents [B, C, F, h, w] that a bidirectional model sees in noised clips x_t at timesteps [B]."""
    each = timesteps[:, None].expand(-1, x_t.shape[2])
    return flow.to_x0(x_t, guided(model, x_t, each, inputs, guidance), each)


def distribution_gradient(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """(fake - real) over the clip's mean distance from the real score's clean latents (DMD, equations 7 and 8)."""
    size = (x - real).abs().mean(dim=tuple(range(1, x.dim())), keepdim=True)
    return torch.nan_to_num((fake - real) / size)


def distribution_loss(x: Tensor, gradient: Tensor, weights: Tensor) -> Tensor:
    """A loss whose gradient with respect to x is the given one, weighted and averaged over all numbers of x.

    x, gradient [B, C, F, h, w]; weights [B, F, h, w].
    """
    target = (x - gradient).detach().double()
    return 0.5 * ((x.double() - target).square() * weights[:, None]).mean()


def critic_loss(model: JoyAvatarDiT, made: Generated, timesteps: Tensor, noise: Tensor) -> Tensor:
    """Flow matching on what the generator makes; made.latents without gradient."""
    each = timesteps[:, None].expand(-1, noise.shape[2])
    x_t = flow.add_noise(made.latents, noise, each)
    error = (velocity(model, x_t, each, made.given.inputs) - flow.velocity(made.latents, noise)).square().mean(dim=1)
    return weighted_mean(error, made.given.weights * timestep_weights(model, each))


# Clips for the scores


def last_latents(latents: Tensor, given: Given, count: int, block: int, autoencoder: LightAutoencoder) -> Generated:
    """The last `count` latents of a rollout as a clip of their own, as the scores know clips.

    A clip begins with a latent of one pixel frame. Of a longer rollout, the frame before the last count - 1 latents is
    decoded and encoded again as the first one, also into the image channels; its block of `block` latents then has no
    gradient (Self-Forcing). The reference tokens stay the picture's.
    """
    cut = latents.shape[2] - count
    if cut < 0:
        raise ValueError(f"a rollout of {latents.shape[2]} latents is shorter than the {count} that the scores see")
    if not cut:
        return Generated(latents, given)
    with torch.no_grad():
        picture = autoencoder.decode(latents[:, :, : cut + 1].float())[:, :, -1]
        channels = image_channels(autoencoder, picture)
    first = channels.picture[:, :, None].to(latents)
    return Generated(torch.cat([first, latents[:, :, cut + 1 :]], dim=2), given.last(count, channels, block))


# Training


@dataclass(kw_only=True)
class Training(flow_matching.Training[Recipe]):
    """Distillation with `real` as the real score; the learner is the generator, `critic` the fake score.

    judge: of the lips, if there is one.
    """

    critic: trainer.Learner
    real: JoyAvatarDiT
    autoencoder: LightAutoencoder
    judge: LipLoss | None = None
    figures: dict[str, float] = field(default_factory=dict)

    def learners(self) -> dict[str, trainer.Learner]:
        return {"generator": self.learner, "critic": self.critic}

    def step(self) -> dict[str, float]:
        """A step of the generator where it is due, then one of the critic where that is due, on the same clips.

        A judge of lips moves the generator at every step. Figures are of the last step of each. loss: the critic's.
        norm, distance: gradient of the generator, and what it is made of, mean |fake - real| in shares of the distance
        to the real score's clean latents. lips: the judge's loss.
        """
        due = self.steps % self.recipe.critic_steps == 0
        if due or self.judge:
            made = self._teach_generator(due)
        else:
            (made,) = self._rollouts(gradient=False)
        if self.steps % self.recipe.generator_steps == 0:
            self._teach_critic(made)
        latents = made.latents.shape[0] * made.latents.shape[2] * parallel.world()
        return {"latents": float(latents), **self.figures}

    def _teach_critic(self, made: Generated) -> None:
        """The critic learns what the generator makes now."""
        loss = critic_loss(self.critic.model, made, *self._noise(made, "critic"))
        loss.backward()
        self.critic.update(self.recipe, self.rate_scale, self.steps)
        self.figures["loss"] = loss.item()

    def _teach_generator(self, scored: bool = True) -> Generated:
        """The generator moves along the difference of the scores, and as the judge of lips says; what it made, without
        gradient. scored: or as the judge says alone."""
        made, figures = None, {}
        for made in self._rollouts(gradient=True):
            losses = []
            if scored:
                direction = self._direction(made)
                figures.setdefault("distance", []).append(direction.abs().mean().item())
                losses.append(distribution_loss(made.latents, direction, made.given.weights))
            if self.judge and made.given.lips:
                losses.append(self.judge(made.latents, made.given.lips, made.given.weights.amax((2, 3)).sign()))
                figures.setdefault("lips", []).append(losses[-1].item())
            torch.stack(losses).sum().backward()
        assert made is not None
        if self.recipe.regression:
            batch = self.batch()
            loss = regression_loss(batch, predict(self.model, batch), self.recipe.mouth, self.recipe.eyes, past=0.0)
            (self.recipe.regression * loss).backward()
            figures["regression"] = [loss.item()]
        figures["norm"] = [self.learner.update(self.recipe, self.rate_scale, self.steps)]
        self.figures |= {name: sum(values) / len(values) for name, values in figures.items()}
        return replace(made, latents=made.latents.detach())

    @torch.no_grad()
    def _direction(self, made: Generated) -> Tensor:
        """What the generator is to move against, [B, C, F, h, w]; a step has one noise and timestep."""
        timesteps, noise = self._noise(made, "scores")
        x = made.latents.detach()
        x_t = flow.add_noise(x, noise, timesteps[:, None].expand(-1, x.shape[2]))
        real = clean(self.real, x_t, timesteps, made.given.inputs, self._guidance(made.given))
        return distribution_gradient(x, real, clean(self.critic.model, x_t, timesteps, made.given.inputs))

    def _guidance(self, given: Given) -> float | Tensor:
        """Of the real score: one number, or one for each cell, [B, 1, F, h, w]."""
        mouth, elsewhere = self.recipe.guidance, self.recipe.guidance_elsewhere
        if elsewhere is None or given.lips is None:
            return mouth
        return elsewhere + (mouth - elsewhere) * given.lips.mouth[:, None]

    def _noise(self, made: Generated, purpose: str) -> tuple[Tensor, Tensor]:
        """Timesteps [B] and noise for a score: a function of the step, the process and the purpose."""
        _, own = self.draws()
        generator = torch.Generator().manual_seed(random.Random(f"{purpose} {own.random()}").randrange(2**31))
        timesteps = sample_timesteps(generator, len(made.latents), self.policy.shift)
        device = made.latents.device
        return timesteps.to(device), torch.randn(made.latents.shape, generator=generator).to(device)

    def _rollouts(self, gradient: bool) -> Iterator[Generated]:
        """The generator's clips of this step, as the scores see them: one, or one for each block with a gradient."""
        common, own = self.draws()
        drawn = draw(common, self.policy, self.recipe.odds)
        given = self._given(drawn.blocks * self.policy.block_latents, common, own)
        drawn = replace(drawn, seed=own.randrange(2**31))
        rollout = (self.model, self.policy, self._geometry(given.weights), given.inputs, drawn)
        history, dtype = self.recipe.history, self.model.compute or next(self.model.parameters()).dtype
        if gradient and self.recipe.block_by_block:
            samples = block_gradients(*rollout, history=history, dtype=dtype)
        else:
            samples = iter([roll_out(*rollout, gradient=gradient, history=history, dtype=dtype)])
        for sample in samples:
            yield last_latents(sample.latents, given, self.recipe.latents, self.policy.block_latents, self.autoencoder)

    def _given(self, latents: int, common: random.Random, own: random.Random) -> Given:
        """What this step's clips give rollouts of so many latents."""
        layout, patch = whole_clips(self.policy, latents), self.model.config.patch
        data, clips = self.recipe.framing.draw(self.data, layout, self.tokens, patch, (common, own))
        given = conditions(data, clips, latents, patch, self.recipe)
        if own.random() < self.recipe.new_speech:
            return spoken_anew(given, latents, own)
        if self.judge and given.lips:
            true = data.latents[clips, :latents].float().transpose(1, 2)
            given = replace(given, lips=self.judge.seen(true, given.lips))
        return given

    def _geometry(self, cells: Tensor) -> Geometry:
        """Of clips with latents [..., h, w]."""
        height, width = (n * self.autoencoder.spatial for n in cells.shape[-2:])
        n, patch = self.policy.block_latents, self.model.config.patch
        return Geometry(width, height, block_latents=n, spatial=self.autoencoder.spatial, patch=patch)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """How lively rollouts of held-out people are: deviation over time, in shares of the truth's."""
        model, clips = self.averaged(), self.held_out.select(slice(0, 4))
        what = preview.Preview((), clips, self.autoencoder, self._geometry(clips.latents))
        made = torch.cat([self.show(model, what, i) for i in range(len(what.clips))]).transpose(1, 2)
        true = what.clips.latents[:, : made.shape[1]].float()
        return {
            f"lively_{name}": round(_deviation(made, where) / _deviation(true, where), 4)
            for name, where in (("mouth", what.clips.mouth), ("eyes", what.clips.eyes))
        }


def _deviation(latents: Tensor, where: Tensor) -> float:
    """Deviation over time of latents [N, F, C, h, w], mean over channels and the cells `where` [N, F, h, w]."""
    cells = where.float().mean(dim=1)  # [N, h, w]
    return float(weighted_mean(latents.std(dim=1).mean(dim=1), cells))


def conditions(data: EncodedClips, clips: Tensor, latents: int, patch: tuple[int, int], recipe: Recipe) -> Given:
    """What clips [B] give a rollout of so many latents; the weights of its gradient are 1 on average."""
    frames = torch.arange(latents)[None].expand(len(clips), -1)
    channels = data.image_channels(clips, frames, TEMPORAL)
    picture = reference_tokens(data.image[clips, 0].float(), patch)
    rows = clips[:, None]
    mouth, eyes = data.mouth[rows, frames].float(), data.eyes[rows, frames].float()
    weights = 1 + (recipe.mouth - 1) * mouth + (recipe.eyes - 1) * eyes
    audio, manner = data.audio[rows, frames].float(), data.manner(clips, frames)
    inputs = Inputs(picture=picture, channels=ImageChannels(channels), audio=audio, manner=manner)
    return Given(inputs, weights / weights.mean(), Lips(frames, mouth))


def spoken_anew(given: Given, latents: int, random_: random.Random) -> Given:
    """The same pictures with sound that was never heard before and the lips that belong to it.

    A rollout needs no true clip. The clips' few voices would be learnt by heart.
    """
    assert given.lips is not None
    geometry = Geometry(64, 64)
    front_end, frames = LogMel(geometry), geometry.frames_of_latents(latents)
    heard = [listen(_NEW_SPEECH + random_.randrange(10**8), front_end, geometry, frames) for _ in given.lips.frames]
    columns = [HEARD.index(name) for name in lips.TRUTH]
    wanted = torch.stack([h.truth[..., columns] for h in heard])
    inputs = replace(given.inputs, audio=torch.stack([h.tokens for h in heard]))
    return replace(given, inputs=inputs, lips=replace(given.lips, wanted=wanted))


def begin(
    recipe: Recipe,
    out: Path,
    data: tuple[EncodedClips, ...],
    start: Path,
    teacher: Path,
    autoencoder: Path,
    judge: LipLoss | None = None,
) -> Training:
    """A distillation at step 0: the generator from `start`, both scores from the teacher; ears stay as they are."""
    state = flow_matching.begin(recipe, out, data, start=start)
    real, fake = (load_model(teacher).to(training_dtype()) for _ in range(2))
    fake.proj_model.requires_grad_(False)
    decoder = load_light_autoencoder(autoencoder)
    return Training(
        **{**vars(state), "recipe": recipe},
        critic=trainer.learner(fake, recipe, recipe.critic_rate),
        real=real.eval().requires_grad_(False),
        autoencoder=decoder,
        judge=judge,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Distil the streaming generator by distribution matching.")
    trainer.add_options(parser)
    parser.add_argument(
        "--initial", type=Path, required=True, help="generator: transformer.safetensors of ode_regression"
    )
    parser.add_argument("--teacher", type=Path, required=True, help="transformer.safetensors of bidirectional")
    parser.add_argument("--critic-rate", type=float)
    parser.add_argument("--critic-steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--guidance-elsewhere", type=float, help="the same away from the mouth")
    parser.add_argument("--lips", type=Path, metavar="FILE", help="lips.safetensors of training.lips")
    parser.add_argument("--new-speech", type=float, metavar="SHARE", help="of steps with speech made for them")
    parser.add_argument("--history", choices=("policy", "clean", "exit"))
    parser.add_argument("--block-by-block", action="store_true", default=None)
    options, recipe = trainer.parse(parser, Recipe, arguments)

    def start(data: tuple[EncodedClips, ...]) -> Training:
        files = (options.initial, options.teacher, options.autoencoder)
        judge = load_lip_loss(options.lips, recipe.lip_weight, recipe.shut) if options.lips else None
        return begin(recipe, options.out, data, *files, judge)

    flow_matching.train(recipe, options.out, options.clips, options.autoencoder, start, options.resume)


if __name__ == "__main__":
    main()
