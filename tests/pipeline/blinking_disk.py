"""A disk that fails and then answers again: run in the decode child."""

import os
from pathlib import Path
from typing import Any

import av

from pipeline.config import FeatureSpec
from pipeline.decode.clip import Clip
from pipeline.decode.clip import extract as decode

open_container = av.open


def extract(path: str, start_s: float | None, end_s: float | None, spec: FeatureSpec) -> Clip:
    """Like pipeline.decode.clip, but a clip of whose name TEST_BLINKS has a file is opened in vain
    once for each number in it, with that error."""

    def opened(name: str, **options: Any) -> Any:
        errors = Path(os.environ["TEST_BLINKS"], Path(name).name)
        left = errors.read_text().split() if errors.exists() else []
        if not left:
            return open_container(name, **options)
        errors.write_text(" ".join(left[1:]))
        raise av.error.classes[int(left[0])](int(left[0]), os.strerror(int(left[0])), name)

    av.open = opened
    try:
        return decode(path, start_s, end_s, spec)
    finally:
        av.open = open_container
