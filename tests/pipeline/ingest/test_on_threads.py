"""Small work is done here, without Ray: the same bytes, the same faults, and at once."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.polling import wait_until
from support.processes import below
from support.stores import contents

from pipeline.errors import PipelineError
from pipeline.ingest.run import plan_ingest
from pipeline.ingest.shard_decoder import ShardDecoder
from pipeline.ingest.verify import verify
from pipeline.reasons import Reason
from pipeline.store.maintenance import status
from pipeline.store.shards import ShardWriter

SLOW = "tests.pipeline.slow_decoder:extract"


@pytest.mark.slow
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


def test_no_more_decoders_than_cores_that_may_be_used(source, monkeypatch):
    """As `taskset` or `docker --cpus` leaves one of many."""
    source.store += "-again"
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    made, make = [], ShardDecoder

    def counted(*args, **options):
        made.append(make(*args, **options))
        return made[-1]

    monkeypatch.setattr("pipeline.ingest.on_threads.ShardDecoder", counted)
    assert source.ingest(source.spec, workers=None).ok == 48
    assert len(made) == 1


def test_an_interrupt_keeps_what_is_done(source):
    source.store += "-again"

    def interrupt(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        source.ingest(source.spec, interrupt, shard_clips=4, commit_shards=100)
    n_kept = status(source.store)["ok"]
    assert 0 < n_kept < 48
    assert source.ingest().ok == 48 - n_kept


def test_the_end_of_the_command_is_the_end_of_all_its_processes(source):
    """Whoever reads its output through a pipe waits for whatever still holds the pipe's end."""
    code = (
        "from pipeline.config import IngestConfig; from diccae.cli import run\n"
        f"IngestConfig.extractor = {SLOW!r}\n"
        "run()"
    )
    command = [sys.executable, "-c", code, "ingest", "--clips", source.csv]
    command += ["--videos", source.videos, "--store", f"{source.store}-again"]
    command += ["--ingest.workers", "1"]
    run = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "TEST_SLOW_S": "60", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    names = ["pipeline.decode.fbank_service", "pipeline.decode.sandbox"]
    wait_until(lambda: all(map(below, names)), 60, "decoding", running=run)
    run.kill()
    # Without an end of its own the service stays for a minute.
    run.communicate(timeout=20)


@pytest.mark.slow
def test_storage_that_fails_is_told_as_through_ray(source):
    source.store += "-again"

    def block(progress):
        features = Path(source.store, "features")
        if features.is_dir():
            features.rename(features.with_name("away"))
            features.touch()

    with pytest.raises(PipelineError, match="shards in a row could not be written"):
        source.ingest(source.spec, block, shard_clips=4)


def test_a_disk_full_in_mid_shard_gives_no_clip_the_features_of_another(
    source, undisturbed, monkeypatch
):
    """The child is at the next clip when a row of this one cannot be written."""
    source.store += "-again"
    # Else a shard of 16 writes nothing before its last clip was decoded.
    monkeypatch.setattr("pipeline.ingest.shard_decoder._FBANKS_AT_ONCE", 2)
    monkeypatch.setattr("pipeline.ingest.shard_decoder._PAUSE_S", 0.0)
    add, tried = ShardWriter.add, []

    def full_at_first(writer, row):
        tried.append(row["clip_id"])
        if len(tried) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return add(writer, row)

    monkeypatch.setattr(ShardWriter, "add", full_at_first)
    summary = source.ingest(source.spec)
    assert (summary.ok, summary.failed) == (48, 0)
    assert contents(source.store) == undisturbed


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_shard_that_takes_longer_than_the_stall_timeout_is_no_stall(source, monkeypatch):
    source.store += "-again"
    monkeypatch.setenv("TEST_SLOW_S", "0.5")
    source.csv.write_text("\n".join(source.csv.read_text().splitlines()[:12]))
    # One shard of 12 clips takes six seconds.
    summary = source.ingest(source.spec, extractor=SLOW, stall_timeout_s=4.0)
    assert summary.ok == 12


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
