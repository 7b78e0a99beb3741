"""Small work is done here, without Ray: the same bytes, the same faults, and at once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from support.stores import contents

from pipeline.errors import PipelineError
from pipeline.ingest.maintenance import status
from pipeline.ingest.on_ray import _DecodeActor
from pipeline.ingest.run import plan_ingest
from pipeline.ingest.shard_decoder import ShardDecoder, table_to_bytes
from pipeline.ingest.verify import verify
from pipeline.reasons import Reason
from pipeline.storage import Location
from pipeline.store.identity import store_id

SLOW = "tests.pipeline.slow_decoder:extract"


@pytest.fixture
def source(source):
    """The copied source, whose clips are all small work."""
    source.config = source.config.model_copy(update={"local_clips": 48})
    return source


def test_clips_decoded_here_are_those_decoded_through_ray(source, undisturbed):
    source.store += "-again"
    summary = source.ingest(source.spec, workers=2)
    assert source.counts(summary) == {"new": 48, "ok": 48}
    assert source.n_ray_starts == 0
    assert contents(source.store) == undisturbed
    assert source.progress[-1].committed == 48


def test_one_clip_more_than_the_line_is_rays(source):
    for file in source.files()[:3]:
        os.utime(file, ns=(1, 1))
    summary = source.ingest(local_clips=2)
    assert (summary.ok, source.n_ray_starts) == (3, 1)
    for file in source.files()[:2]:
        os.utime(file, ns=(2, 2))
    summary = source.ingest(local_clips=2)
    assert (summary.ok, source.n_ray_starts) == (2, 1)


def test_ray_is_not_even_imported_for_two_clips(source):
    first, second, third, *_ = source.files()
    shutil.copy(third, first)
    shutil.copy(third, second)
    code = (
        "import sys; from diccae.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "assert not {'ray', 'torch'} & set(sys.modules)"
    )
    arguments = ["--clips", source.csv, "--videos", source.videos, "--store", source.store]
    done = subprocess.run(
        [sys.executable, "-c", code, "ingest", *map(str, arguments), "--json"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"changed": 2' in done.stdout
    assert verify(source.store, sample=48)["problems"] == []


def test_a_hang_a_crash_and_a_leak_cost_a_clip_each_here_too(source, undisturbed):
    source.store += "-again"
    summary = source.ingest(
        source.spec, extractor="tests.pipeline.poison:extract", timeout_s=5.0, child_memory_mb=400
    )
    assert (summary.ok, summary.failed) == (45, 3)
    assert status(source.store)["by_reason"] == {"worker_died": 2, "timeout": 1}
    assert source.ingest().ok == 3
    assert contents(source.store) == undisturbed


def test_an_interrupt_keeps_what_is_done(source):
    source.store += "-again"

    def interrupt(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        source.ingest(source.spec, interrupt, shard_clips=4, commit_shards=100)
    n_kept = status(source.store)["ok"]
    assert 0 < n_kept < 48
    assert source.ingest().ok == 48 - n_kept


def test_storage_that_fails_is_told_as_through_ray(source):
    source.store += "-again"

    def block(progress):
        features = Path(source.store, "features")
        if features.is_dir():
            features.rename(features.with_name("away"))
            features.touch()

    with pytest.raises(PipelineError, match="shards in a row could not be written"):
        source.ingest(source.spec, block, shard_clips=4)


def test_a_child_that_dies_while_it_starts_costs_its_clip(source, tmp_path, monkeypatch):
    source.store += "-again"
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    (deaths / "one").touch()
    monkeypatch.setenv("TEST_DEATHS_AT_IMPORT", str(deaths))
    summary = source.ingest(source.spec, extractor=SLOW)
    assert (summary.ok, summary.failed) == (47, 1)
    (state,) = source.snapshot().clips.filter(
        [status == "failed" for status in source.snapshot().clips["status"].to_pylist()]
    ).to_pylist()  # fmt: skip
    assert state["reason"] == Reason.WORKER_DIED
    assert state["detail"].startswith("while it started: the decoder exited with code 9")
    assert source.ingest().ok == 1


def test_children_that_never_start_end_the_run_and_quarantine_next_to_nothing(source):
    source.store += "-again"
    with pytest.raises(PipelineError) as caught:
        source.ingest(source.spec, extractor="tests.pipeline.no_such_module:extract")
    message = str(caught.value)
    assert "did not start 3 times in a row" in message
    assert "No module named 'tests.pipeline.no_such_module'" in message
    assert "\n" not in message
    assert status(source.store)["clips"] == 0


def test_a_shard_that_takes_longer_than_the_stall_timeout_is_no_stall(source, monkeypatch):
    source.store += "-again"
    monkeypatch.setenv("TEST_SLOW_S", "0.5")
    source.csv.write_text("\n".join(source.csv.read_text().splitlines()[:16]))
    # One shard of 16 clips takes eight seconds.
    summary = source.ingest(source.spec, extractor=SLOW, stall_timeout_s=6.0)
    assert summary.ok == 16


def test_an_actor_is_heard_of_while_its_shard_is_unfinished(source, monkeypatch):
    monkeypatch.setattr("pipeline.ingest.on_ray._pick_service", lambda: "here")
    monkeypatch.setenv("TEST_SLOW_S", "0.2")
    config = source.config.model_copy(update={"extractor": SLOW, "stall_timeout_s": 0.4})
    source.store += "-again"
    source.ingest(source.spec)
    spec = source.spec.model_copy(update={"n_frames": 2})
    plan = plan_ingest(str(source.csv), str(source.videos), source.store, spec, config)
    actor = _DecodeActor(
        source.store, spec, config, "run", fbank_key=b"key",
        expected_id=store_id(Location(source.store)),
    )  # fmt: skip
    task = pa.table({"index": [0], "clips": [table_to_bytes(plan.todo.slice(0, 4))]})
    said = [row for result in actor(task) for row in result.to_pylist()]
    actor.close()
    assert len(said) >= 3, "a sign of life before the shard"
    assert not any(row["error"] or row["refused"] for row in said)


def test_a_decoder_that_sees_another_store_or_none_is_refused(source, tmp_path):
    shutil.copytree(source.store, tmp_path / "other")
    plan = plan_ingest(
        str(source.csv), str(source.videos), str(tmp_path / "no"), source.spec, source.config
    )
    for uri, known, said in (
        (tmp_path / "other", "another id", "another store has its store.json"),
        (tmp_path / "nothing", "an id", "there is no store.json"),
    ):
        decoder = ShardDecoder(str(uri), source.spec, source.config, "run", list, expected_id=known)
        (outcome,) = decoder.outcomes(0, plan.todo)
        decoder.close()
        assert said in outcome.refused
        assert "All nodes of a cluster must see one store" in outcome.refused
    assert not (tmp_path / "nothing").exists()


def test_a_cluster_whose_nodes_see_another_store_ends_in_one_line(source, monkeypatch):
    """What the driver takes for the id is another one than the actors, other processes, find."""
    source.store += "-again"
    monkeypatch.setattr("pipeline.ingest.on_ray.store_id", lambda location: "the driver's own")
    with pytest.raises(PipelineError, match=r"another store has its store\.json on") as caught:
        source.ingest(source.spec, local_clips=0)
    assert "\n" not in str(caught.value)
    assert status(source.store)["clips"] == 0
