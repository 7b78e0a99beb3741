"""Decoders that are slow, or die or stall while their module is imported: run in the decode child.

What they do is told by the environment, which a child has of the process that starts it.
"""

import os
import time
from pathlib import Path

from pipeline.config import FeatureSpec
from pipeline.decode.clip import Clip
from pipeline.decode.clip import extract as decode

_DEATHS = os.environ.get("TEST_DEATHS_AT_IMPORT", "")
if _DEATHS and (left := list(Path(_DEATHS).iterdir())):
    left[0].unlink()
    os._exit(9)


def extract(path: str, start_s: float | None, end_s: float | None, spec: FeatureSpec) -> Clip:
    """Like pipeline.decode.clip, but it takes longer; notes for which actor."""
    if folder := os.environ.get("TEST_DECODERS"):
        (Path(folder) / str(os.getppid())).touch()
    time.sleep(float(os.environ.get("TEST_SLOW_S", "0")))
    return decode(path, start_s, end_s, spec)
