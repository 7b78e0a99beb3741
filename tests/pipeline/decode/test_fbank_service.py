"""Many ask, one process makes the fbanks; it may die, and it goes when nobody needs it."""

import os

import numpy as np
import psutil
import pytest
from support.polling import wait_until
from support.processes import below, kill

from pipeline.config import FeatureSpec
from pipeline.decode.fbank_service import SharedFbanks
from pipeline.decode.payload import fbank_function
from pipeline.errors import PipelineError

SPEC = FeatureSpec(n_mels=32)
WAVEFORMS = [
    np.random.default_rng(i).uniform(-0.5, 0.5, n).astype(np.float32)
    for i, n in enumerate([16000, 32000, 8000])
]


@pytest.fixture
def name(request):
    """Of the test's own service: those of a Ray that other tests use are no concern of it."""
    yield (name := f"test-{os.getpid()}-{request.node.name}")
    kill(name)


@pytest.fixture
def shared(name):
    """Makes clients of one service."""
    key = os.urandom(16)
    return lambda: SharedFbanks(SPEC, name, key)


@pytest.fixture(scope="module")
def living():
    """A client of a service that stays for the tests that leave it alive."""
    fbanks = SharedFbanks(SPEC, name := f"test-{os.getpid()}-living", os.urandom(16))
    yield fbanks
    kill(name)


@pytest.mark.slow
def test_one_service_for_all_who_share_its_name_and_it_ends_after_them(shared, name):
    ours = [shared() for _ in range(3)]
    answers = [fbanks(WAVEFORMS) for fbanks in ours]
    (service,) = below(name)
    fbank = fbank_function(SPEC)
    for waveform, *made in zip(WAVEFORMS, *answers, strict=True):
        assert made[0].dtype == np.float16
        assert made[0].tobytes() == made[1].tobytes() == made[2].tobytes()
        np.testing.assert_allclose(made[0], fbank(waveform), atol=0.01)
    ours.clear()
    wait_until(
        lambda: not service.is_running() or service.status() == psutil.STATUS_ZOMBIE,
        60,
        "the end of the service",
    )


@pytest.mark.slow
def test_a_killed_service_is_started_again_and_gives_the_same_bits(shared, name):
    fbanks = shared()
    before = fbanks(WAVEFORMS)
    assert kill(name) == 1
    for one, other in zip(before, fbanks(WAVEFORMS), strict=True):
        assert one.tobytes() == other.tobytes()


def test_a_waveform_that_cannot_be_used_is_told_and_the_service_stays(living):
    with pytest.raises(PipelineError, match="the fbank service failed: TypeError"):
        living(["not a waveform"])
    assert len(living(WAVEFORMS)) == 3


def test_without_the_key_there_are_no_fbanks(living):
    living(WAVEFORMS[:1])
    stranger = SharedFbanks(SPEC, living._name, b"guessed")
    with pytest.raises(PipelineError, match="refused the key"):
        stranger(WAVEFORMS[:1])
    assert len(living(WAVEFORMS)) == 3
