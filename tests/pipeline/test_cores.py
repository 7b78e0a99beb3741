"""Cores that a process may use: as many as it may run on, or as its control group has time for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cores
from pipeline.cores import usable_cores

V1 = "cpu,cpuacct"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """64 cores, control groups with files of the test's own: their top."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr(cores, "_MOUNTED", tmp_path / "mounted")
    monkeypatch.setattr(cores, "_OWN", tmp_path / "own")
    return tmp_path / "mounted"


def group(machine: Path, path: str, **files: str) -> None:
    for name, content in files.items():
        file = machine / path / name.replace("cpu_", "cpu.")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")


def own(machine: Path, *lines: str) -> None:
    machine.with_name("own").write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize(
    ("quota", "n"), [("400000 100000", 4), ("250000 100000", 3), ("5000 100000", 1), ("max 1", 64)]
)
def test_a_quota_of_version_2(machine, quota, n):
    group(machine, "", cpu_max=quota)
    own(machine, "0::/")
    assert usable_cores() == n


@pytest.mark.parametrize("quota", ["max 100000", "6400000 100000", "800000 100000"])
def test_the_quota_of_a_group_above_counts_too(machine, quota):
    group(machine, "slice", cpu_max="200000 100000")
    group(machine, "slice/job", cpu_max=quota)
    own(machine, "0::/slice/job")
    assert usable_cores() == 2


@pytest.mark.parametrize("told", ["/docker/1234", "/"], ids=["machine's path", "own namespace"])
def test_a_quota_of_version_1_in_a_container(machine, told):
    group(machine, V1, cpu_cfs_quota_us="400000", cpu_cfs_period_us="100000")
    own(machine, f"4:memory:{told}", f"3:{V1}:{told}", "0::/")
    assert usable_cores() == 4


def test_no_quota_of_version_1(machine):
    group(machine, V1, cpu_cfs_quota_us="-1", cpu_cfs_period_us="100000")
    own(machine, f"3:{V1}:/", "2:cpuset:/")
    assert usable_cores() == 64


def test_fewer_cores_to_run_on_than_a_quota_allows(machine, monkeypatch):
    group(machine, "", cpu_max="800000 100000")
    own(machine, "0::/")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5})
    assert usable_cores() == 2


def test_no_control_groups(machine):
    assert usable_cores() == 64


def test_taskset_counts():
    """What the system says, not what a test puts in its place."""
    first = str(min(os.sched_getaffinity(0)))
    code = "from pipeline.cores import usable_cores; print(usable_cores())"
    command = ["taskset", "-c", first, sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.check_output(command, text=True, env=env) == "1\n"
