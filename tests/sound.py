"""Sound for tests, and an audio front end driven as a live stream drives it."""

import torch

from joyavatar_core.audio import SAMPLE_RATE, AudioTrack


def noise(*shape, seed=0):
    return 0.2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def track_of(samples, rate=SAMPLE_RATE, chunk=None, finish=True):
    track = AudioTrack()
    for piece in samples.split(chunk or samples.shape[-1], dim=-1):
        track.push(piece, rate)
    if finish:
        track.finish()
    return track


def stream_features(front, samples, rate, cuts, latents):
    """Features as a live stream makes them: block by block, as soon as `needs` allows, history dropped by `keeps`."""
    track, blocks, done = AudioTrack(), [], 0
    pieces = torch.tensor_split(samples, sorted(cuts), dim=-1)
    for i, piece in enumerate(pieces):
        track.push(piece, rate)
        if i == len(pieces) - 1:
            track.finish()
        while done < latents and (track.finished or track.end >= front.needs(done + 3)):
            track.drop(front.keeps(done))
            blocks.append(front.features(track, range(done, done + 3)))
            done += 3
    return torch.cat([b.tokens for b in blocks]), torch.cat([b.valid for b in blocks])
