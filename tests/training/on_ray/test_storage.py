"""Checkpoints as Ray Train keeps them, in a bucket: whole, found again, fenced, and patient."""

import pickle
import threading
import time
from pathlib import Path

import pytest
import torch
from support.unsteady import Unsteady

from pipeline.storage import Location
from pipeline.store.lease import Lease
from training.attempt import UNHELD, Attempt
from training.errors import RunTaken
from training.on_ray.storage import arrow_filesystem
from training.run.checkpoints import newest_checkpoint, state_in, write_state


def _kept(place: Location, step: int, attempt: Attempt = UNHELD, n: int = 1000) -> None:
    weight = torch.arange(n, dtype=torch.float32)
    state = {"step": step, "weight": weight}
    write_state(state, place.below("pretrain", f"checkpoint_{step}"), attempt.check)


def _through_ray(place: Location, attempt: Attempt, folder: Path) -> None:
    """As Ray Train itself writes below a run, in a worker: the filesystem travels."""
    from ray.train import Checkpoint
    from ray.train.v2._internal.execution.storage import StorageContext

    filesystem = pickle.loads(pickle.dumps(arrow_filesystem(place, attempt)))
    context = StorageContext(place.path, "pretrain", filesystem)
    context.persist_current_checkpoint(Checkpoint.from_directory(folder), "of-ray")


def test_the_newest_checkpoint_is_found_without_reading_its_tensors(bucket: str) -> None:
    place = Location(f"{bucket}/found")
    for step in (9, 10):
        _kept(place, step, n=2**20)
    began = Unsteady.n_bytes
    newest = newest_checkpoint(place, "pretrain")
    assert newest == (10, place.uri_of("pretrain", "checkpoint_10"))
    assert Unsteady.n_bytes - began < 2**20
    state = state_in(newest[1])
    assert torch.equal(state["weight"], torch.arange(2**20, dtype=torch.float32))
    assert Unsteady.n_bytes - began > 2**22


def test_a_checkpoint_outlives_requests_that_nobody_answers(bucket: str) -> None:
    place = Location(f"{bucket}/errs")
    Unsteady.drop = 5
    _kept(place, 3)
    assert Unsteady.drop == 0
    assert state_in(place.uri_of("pretrain", "checkpoint_3"))["step"] == 3


@pytest.mark.slow
def test_a_checkpoint_outlives_twenty_seconds_without_storage(bucket: str) -> None:
    place = Location(f"{bucket}/away")
    Unsteady.drop = 10**9
    back = threading.Timer(20.0, setattr, (Unsteady, "drop", 0))
    back.start()
    began = time.monotonic()
    _kept(place, 3)
    assert time.monotonic() - began > 20
    assert state_in(place.uri_of("pretrain", "checkpoint_3"))["step"] == 3


def test_an_attempt_that_was_taken_over_leaves_no_checkpoint_through_ray_either(
    bucket: str, tmp_path: Path
) -> None:
    place = Location(f"{bucket}/taken")
    (tmp_path / "state.pt").write_bytes(b"of Ray")
    with Lease(place, 30.0, "the first") as lease:
        first = Attempt(place.uri, lease.generation)
        _kept(place, 1, first)
        _through_ray(place, first, tmp_path)
    (tmp_path / "state.pt").write_bytes(b"too late")
    with Lease(place, 30.0, "the second"):
        with pytest.raises(RunTaken):
            _kept(place, 2, first)
        with pytest.raises(RunTaken):
            _through_ray(place, first, tmp_path)
    assert place.read_bytes("pretrain/of-ray/state.pt") == b"of Ray"
    assert place.files("pretrain/checkpoint_1") == ["state.pt"]
    assert place.entries("pretrain/checkpoint_2") == []
