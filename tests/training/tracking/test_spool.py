"""Metrics of a run in a place that cannot append: published as a whole, cut and gone on with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.storage import Location
from pipeline.store.lease import Lease
from training.attempt import Attempt
from training.errors import RunTaken
from training.tracking import spool
from training.tracking.tracker import Tracker, read_metrics


@pytest.fixture
def place() -> Iterator[Location]:
    yield Location("memory://run")
    fsspec.filesystem("memory").store.clear()


def _lines(place: Location) -> list[dict[str, Any]]:
    with place.fetched("metrics.jsonl") as path:
        return [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(path)]


def _killed_and_resumed(place: Location) -> list[dict[str, Any]]:
    """Steps 1 to 6, a checkpoint at 4 and a kill after 6; then from 4 to 8."""
    killed = Tracker(place.uri_of("metrics.jsonl"))
    for step in range(1, 7):
        killed.log(step, {"loss": float(step)})
        if step == 4:
            killed.publish()
    resumed = Tracker(place.uri_of("metrics.jsonl"), resume_step=4)
    for step in range(5, 9):
        resumed.log(step, {"loss": float(step)})
    resumed.close()
    return _lines(place)


def test_a_killed_run_has_every_step_once_as_on_a_disk(place: Location, tmp_path: Path) -> None:
    found = _killed_and_resumed(place)
    assert found == _killed_and_resumed(Location(tmp_path))
    assert [line["step"] for line in found] == list(range(1, 9))


def test_lines_are_published_while_training_goes_on(
    place: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "PUBLISH_S", 0.01)
    tracker = Tracker(place.uri_of("metrics.jsonl"))
    step = 0
    while not _lines(place):
        step += 1
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert len(_lines(place)) == step


def test_what_another_start_took_over_gets_no_line_more(place: Location) -> None:
    with Lease(place, 30.0, "the first") as first:
        tracker = Tracker(
            place.uri_of("metrics.jsonl"), attempt=Attempt(place.uri, first.generation)
        )
    tracker.log(1, {"loss": 1.0})
    with Lease(place, 30.0, "the second"):
        before = _lines(place)
        with pytest.raises(RunTaken):
            tracker.publish()
        with pytest.raises(RunTaken):
            tracker.log(2, {"loss": 1.0})
        assert _lines(place) == before == []
