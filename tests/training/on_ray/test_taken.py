"""A worker whose run folder was taken over ends for good, and leaves no word for the next one."""

import threading
from pathlib import Path
from typing import Any

import pytest

from clustering.errors import BadVectors, ClusteringError, RoundTimeout
from pipeline.storage import Location
from pipeline.store.lease import Lease
from training.attempt import UNHELD, Attempt
from training.errors import RunTaken, WeightsError
from training.on_ray import fit
from training.on_ray.checkpoints import report_state
from training.on_ray.fit import _Failure, _Given, _told, interruptible
from training.run.edge import Written


def _no_actor(settings: dict[str, Any], written: Written) -> None:
    raise WeightsError("an actor of this attempt is gone")


def _given(out: Path, attempt: Attempt) -> dict[str, Any]:
    written = Written(Location(out), {}, attempt)
    return _Given(_no_actor, {}, written, f"failed/error-{attempt.number}.json")._asdict()


def test_a_worker_says_that_the_folder_was_taken_and_not_what_came_of_it(tmp_path: Path) -> None:
    location = Location(str(tmp_path))
    with Lease(location, 30.0, "the first") as lease:
        first = Attempt(str(tmp_path), lease.generation)
        with pytest.raises(WeightsError, match="is gone"):
            _told(_given(tmp_path, first))
        assert [path.name for path in (tmp_path / "failed").iterdir()] == ["error-1.json"]
    with Lease(location, 30.0, "the second") as lease:
        second = Attempt(str(tmp_path), lease.generation)
        ended = _told(_given(tmp_path, first))  # As Ray starts it anew.
        assert isinstance(ended, _Failure)
        assert isinstance(ended.error, RunTaken)
        assert ended.error.exit_code == 4
        assert "locked by the second" in str(ended.error)
        with pytest.raises(RunTaken):
            report_state({"step": 1}, 0, location, first)
        with pytest.raises(WeightsError):  # The words of the first are not those of the second.
            _told(_given(tmp_path, second))


@pytest.mark.parametrize("kind", [WeightsError, BadVectors, RoundTimeout])
def test_an_error_that_would_come_again_is_told_to_the_workers_after_it(
    kind: type[Exception], tmp_path: Path
) -> None:
    """Else Ray would start them max_failures times, for a round as long as rounds.timeout_s."""

    def fails(settings: dict[str, Any], written: Written) -> None:
        raise kind("raise rounds.timeout_s")

    given = {**_given(tmp_path, UNHELD), "loop": fails}
    with pytest.raises(kind):
        _told(given)
    ended = _told(given)
    assert isinstance(ended, _Failure)
    assert type(ended.error) is kind
    assert str(ended.error) == "raise rounds.timeout_s"


def test_rows_that_found_no_actor_may_find_one_later(tmp_path: Path) -> None:
    def fails(settings: dict[str, Any], written: Written) -> None:
        raise ClusteringError("rows cannot be sent to the feature bank")

    given = {**_given(tmp_path, UNHELD), "loop": fails}
    for _ in range(2):
        with pytest.raises(ClusteringError):
            _told(given)


def test_a_driver_that_waits_for_workers_ends_once_the_folder_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers' nodes may be those of the next attempt now: they would never start."""
    monkeypatch.setattr(fit, "_ASK_S", 0.0)
    let_go = threading.Event()
    location = Location(str(tmp_path))
    with Lease(location, 30.0, "the first") as lease:
        first = Attempt(str(tmp_path), lease.generation)
        location.create_bytes(f"lease/{lease.generation + 1:08d}.json", b"{}")
        with pytest.raises(RunTaken, match="lost its lease"):
            interruptible(lambda: let_go.wait(10), first)
    let_go.set()
