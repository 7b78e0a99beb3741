"""Who may write: leases between processes, machines and clocks."""

import json
import threading
import time

import pytest

from pipeline.errors import StoreLocked
from pipeline.storage import Location
from pipeline.store import lease as lease_module
from pipeline.store.lease import Lease


def hold(location: Location, silent_s: float, stale_s: float | None, job: str = "") -> None:
    """A lease as a holder on another machine left it, some time after its last heartbeat."""
    about = json.loads(Lease(location, stale_s or 30.0, "a run elsewhere")._stamp())
    about |= {"host": "elsewhere", "beat": time.time() - silent_s, "job": job}
    if stale_s is None:
        del about["stale_s"]
    location.create_bytes("lease/00000001.json", json.dumps(about).encode())


def test_a_holder_is_judged_by_the_silence_it_promised(tmp_path):
    location = Location(str(tmp_path))
    hold(location, silent_s=100.0, stale_s=600.0)
    with pytest.raises(StoreLocked, match="silent for 600 s"), Lease(location, 3.0, "me"):
        pass


@pytest.mark.parametrize("stale_s", [0.3, None])
def test_a_holder_that_broke_its_promise_is_taken_over(tmp_path, stale_s):
    """Leases of older versions promise nothing: the taker's own measure counts."""
    location = Location(str(tmp_path))
    hold(location, silent_s=100.0, stale_s=stale_s)
    with Lease(location, 0.3, "me") as lease:
        lease.check()


def test_another_machine_of_the_same_name_is_not_asked_for_processes(tmp_path, monkeypatch):
    """Two machines made from one image: the process of the other one is not here, and lives."""
    location = Location(str(tmp_path))
    with monkeypatch.context() as there:
        there.setattr(lease_module, "_BOOT_ID", str(tmp_path / "boot_id"))
        (tmp_path / "boot_id").write_text("another boot\n")
        holder = Lease(location, 30.0, "a run on the twin")
        holder._me["pid"] = 2**22 - 1
        holder.__enter__()
    with pytest.raises(StoreLocked, match="a run on the twin"), Lease(location, 30.0, "me"):
        pass
    holder.__exit__()


@pytest.mark.parametrize("ours", ["", "diccae/other"])
def test_somebody_elses_start_is_refused_at_once(tmp_path, monkeypatch, ours):
    location = Location(str(tmp_path))
    hold(location, silent_s=0.0, stale_s=60.0, job="diccae/vgg" if ours else "")
    monkeypatch.setenv("DICCAE_JOB", ours)
    began = time.monotonic()
    with pytest.raises(StoreLocked, match="a run elsewhere"), Lease(location, 60.0, "me"):
        pass
    assert time.monotonic() - began < 1


def test_the_next_attempt_of_a_job_waits_until_two_heartbeats_are_missing(
    tmp_path, monkeypatch, caplog
):
    """It was refused with exit code 4, which used up one of the job's retries; then it waited as
    long as a stranger, which was most of the time that a killed head cost."""
    location = Location(str(tmp_path))
    hold(location, silent_s=9.0, stale_s=30.0, job="diccae/vgg")
    monkeypatch.setenv("DICCAE_JOB", "diccae/vgg")
    began = time.monotonic()
    with Lease(location, 30.0, "me") as lease:
        assert lease.generation == 2
        assert 0.5 < time.monotonic() - began < 15.0
        lease.check()
    (said,) = caplog.messages
    assert "a run elsewhere" in said
    assert "waiting for it" in said


def test_the_next_attempt_of_a_job_waits_for_one_that_lives_until_it_ends(tmp_path, monkeypatch):
    location = Location(str(tmp_path))
    monkeypatch.setenv("DICCAE_JOB", "diccae/vgg")
    with monkeypatch.context() as there:
        there.setattr(lease_module, "_BOOT_ID", str(tmp_path / "boot_id"))
        (tmp_path / "boot_id").write_text("another boot\n")
        first = Lease(location, 9.0, "a run that lives")
    with first:
        ends = threading.Timer(5.0, first.__exit__)
        ends.start()
        with Lease(location, 9.0, "me") as lease:
            assert not ends.is_alive()
            assert lease.generation == 2
