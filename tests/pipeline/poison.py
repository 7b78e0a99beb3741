"""A decoder that hangs, crashes or swallows memory on some clips: run in the decode child."""

import ctypes
import os
import time
from pathlib import Path

from pipeline.config import FeatureSpec
from pipeline.decode.clip import Clip
from pipeline.decode.clip import extract as decode


def extract(path: str, start_s: float | None, end_s: float | None, spec: FeatureSpec) -> Clip:
    """Like pipeline.decode.clip, but for the 4th, 12th and 20th file of the folder."""
    rank = sorted(os.listdir(Path(path).parent)).index(Path(path).name)
    if rank == 3:
        # Native code that never returns and never lets go of the GIL.
        ctypes.PyDLL(None).pause()
    if rank == 11:
        ctypes.string_at(0)
    kept = []
    while rank == 19:
        kept.append(b"x" * (8 << 20))
        time.sleep(0.001)
    return decode(path, start_s, end_s, spec)


def extract_and_replace(
    path: str, start_s: float | None, end_s: float | None, spec: FeatureSpec
) -> Clip:
    """Like pipeline.decode.clip, but every fifth file is replaced by another once it was read."""
    names = sorted(os.listdir(Path(path).parent))
    rank = names.index(Path(path).name)
    clip = decode(path, start_s, end_s, spec)
    neighbour = Path(path).with_name(names[rank - 1])
    if rank % 5 == 4 and Path(path).stat().st_size != neighbour.stat().st_size:
        Path(path).write_bytes(neighbour.read_bytes())
    return clip
