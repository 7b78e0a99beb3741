"""Large work goes to Ray: where the line lies, the same bytes, and actors that are heard of."""

import os

import pyarrow as pa
import pytest
from support.decoders import decoding_by
from support.stores import contents

from pipeline.errors import PipelineError
from pipeline.ingest.on_ray import _DecodeActor, _table_to_bytes
from pipeline.ingest.run import plan_ingest
from pipeline.storage import Location
from pipeline.store.identity import store_id
from pipeline.store.maintenance import status

SLOW = "tests.pipeline.slow_decoder:extract"


@pytest.fixture(autouse=True)
def on_ray(ray_session):
    """Every test here."""


def test_clips_decoded_through_ray_are_those_decoded_here(source, undisturbed):
    source.store += "-again"
    summary = source.ingest(source.spec, workers=2, local_clips=0)
    assert source.counts(summary) == {"new": 48, "ok": 48}
    assert source.n_ray_starts == 1
    assert contents(source.store) == undisturbed
    assert source.progress[-1].done == source.progress[-1].committed == 48


@pytest.mark.slow
def test_one_clip_more_than_the_line_is_rays(source):
    for file in source.files()[:3]:
        os.utime(file, ns=(1, 1))
    summary = source.ingest(local_clips=2)
    assert (summary.ok, source.n_ray_starts) == (3, 1)
    for file in source.files()[:2]:
        os.utime(file, ns=(2, 2))
    summary = source.ingest(local_clips=2)
    assert (summary.ok, source.n_ray_starts) == (2, 1)


@pytest.mark.slow
def test_an_actor_is_heard_of_while_its_shard_is_unfinished(source, monkeypatch):
    monkeypatch.setattr("pipeline.ingest.on_ray._pick_service", lambda: "here")
    monkeypatch.setenv("TEST_SLOW_S", "0.2")
    config = decoding_by(source.config.model_copy(update={"stall_timeout_s": 0.4}), SLOW)
    source.store += "-again"
    source.ingest(source.spec)
    spec = source.spec.model_copy(update={"n_frames": 2})
    plan = plan_ingest(str(source.csv), str(source.videos), source.store, spec, config)
    actor = _DecodeActor(
        source.store, spec, config, "run", fbank_key=b"key",
        expected_id=store_id(Location(source.store)),
    )  # fmt: skip
    task = pa.table({"index": [0], "clips": [_table_to_bytes(plan.todo.slice(0, 4))]})
    said = [row for result in actor(task) for row in result.to_pylist()]
    actor.close()
    assert len(said) >= 3, "a sign of life before the shard"
    assert not any(row["error"] or row["refused"] for row in said)


def test_a_cluster_whose_nodes_see_another_store_ends_in_one_line(source, monkeypatch):
    """What the driver takes for the id is another one than the actors, other processes, find."""
    source.store += "-again"
    monkeypatch.setattr("pipeline.ingest.on_ray.store_id", lambda location: "the driver's own")
    with pytest.raises(PipelineError, match=r"another store has its store\.json on") as caught:
        source.ingest(source.spec, local_clips=0)
    assert "\n" not in str(caught.value)
    assert status(source.store)["clips"] == 0
