"""Fbanks for whatever decodes in a test's process, made by one process beside it.

Knows nothing of clips. Invariant: the function, and so the bits, are those of a service. A service
for each ingest would import torch each time, two seconds of CPU; that services start, are replaced
and end is tested with real ones: of commands in processes of their own, of Ray's actors, and in
tests/pipeline/decode.
"""

import functools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from pipeline.config import FeatureSpec
from pipeline.decode.fbank_service import ENVIRONMENT, SharedFbanks
from pipeline.decode.payload import fbanks_function


@functools.cache
def _process() -> ProcessPoolExecutor:
    # Spawned: MKL's branch is chosen before torch is imported, which this process has done.
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, spawn, _as_a_service)


def _as_a_service() -> None:
    os.environ.update(ENVIRONMENT)


def _made(spec: FeatureSpec, waveforms: list[np.ndarray]) -> list[np.ndarray]:
    return fbanks_function(spec)(waveforms)


@contextmanager
def shared_process() -> Iterator[None]:
    """Services that would end with this process are not started."""
    asked, prepared = SharedFbanks.__call__, SharedFbanks.prepare

    def call(fbanks: SharedFbanks, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        if not fbanks._is_attached:
            return asked(fbanks, waveforms)
        return _process().submit(_made, fbanks._spec, waveforms).result()

    def prepare(fbanks: SharedFbanks) -> None:
        if not fbanks._is_attached:
            prepared(fbanks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedFbanks, "__call__", call)
        patch.setattr(SharedFbanks, "prepare", prepare)
        yield
    if _process.cache_info().currsize:
        _process().shutdown()
