"""From a folder of talking videos, or from drawn avatars, to shards of training samples.

`sources` lists, `video` reads, `shots` and `faces` look, `track` decides what is kept and how it is cut, `jobs` is what
worker processes do, `encode` what the main process does, `writer` puts samples into shards, `run` is the whole of it.
The shards are read by `training/shards.py`.
"""
