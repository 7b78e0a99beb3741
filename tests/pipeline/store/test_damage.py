"""A damaged shard is told from storage that refuses; only the former may be forgotten."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from support.cheap_source import CHEAP_SPECS, CheapSource

from pipeline.errors import DamagedShard, StoreError
from pipeline.ingest.verify import verify
from pipeline.store.shards import read_rows
from pipeline.store.store import FeatureStore
from pipeline.store.versions import versions


@pytest.fixture
def source(tmp_path, monkeypatch) -> CheapSource:
    """Six clips in two shards."""
    made = CheapSource(tmp_path, 6, monkeypatch)
    made.ingest(CHEAP_SPECS[0])
    return made


def shards(source: CheapSource) -> list[Path]:
    return sorted(Path(source.store, "features").iterdir())


def refusing(path: Path, how: str, monkeypatch) -> None:
    """Storage that does not give this file, or breaks off in the middle of it."""
    kind = type(FeatureStore.open(str(path.parent.parent)).location.fs)
    original = kind.open

    class BreaksOff:
        def __init__(self, file) -> None:
            self.file = file

        def read(self, *args):
            raise OSError(116, "Stale file handle")

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.file.close()

    def opened(self, name, mode="rb", **options):
        if not str(name).endswith(path.name):
            return original(self, name, mode, **options)
        if how == "denied":
            raise PermissionError(13, "Permission denied")
        return BreaksOff(original(self, name, mode, **options))

    monkeypatch.setattr(kind, "open", opened)


@pytest.mark.parametrize("how", ["denied", "breaks off"])
def test_repair_forgets_nothing_when_storage_refuses(source, how, monkeypatch):
    before = FeatureStore.open(source.store).snapshot()
    refusing(shards(source)[0], how, monkeypatch)
    with pytest.raises(StoreError, match="Nothing is known to be wrong") as caught:
        verify(source.store, sample=0, repair=True)
    assert not isinstance(caught.value, DamagedShard)
    after = FeatureStore.open(source.store).snapshot()
    assert (after.version, after.digest) == (before.version, before.digest)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    """Noise where the pages are; the footer stays whole."""
    content = bytearray(path.read_bytes())
    content[4:400] = os.urandom(396)
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [cut, garble, Path.unlink, lambda path: path.write_bytes(b"")])
def test_repair_forgets_the_clips_of_a_damaged_shard_alone(source, harm):
    harm(shards(source)[0])
    assert verify(source.store, sample=0, repair=True)["repaired"] == 3
    assert len(FeatureStore.open(source.store).snapshot().rows(None)) == 3
    assert source.ingest().ok == 3
    assert verify(source.store, sample=0)["problems"] == []


def test_repair_leaves_what_another_spec_has_of_the_clips(source):
    there = set(shards(source))
    source.ingest(CHEAP_SPECS[1])
    min(set(shards(source)) - there).unlink()
    assert verify(source.store, sample=0, repair=True)["repaired"] == 3
    assert versions(source.store)[0]["by"] == "verify --repair"
    source.ingest()
    assert len(source.decoded) == 3
    source.ingest(CHEAP_SPECS[0])
    assert source.decoded == []
    assert verify(source.store, sample=0)["problems"] == []


def test_repair_leaves_clips_that_were_decoded_anew_while_it_looked(source, monkeypatch):
    shards(source)[0].unlink()
    lease = FeatureStore.lease

    def another_first(store, *args):
        monkeypatch.setattr(FeatureStore, "lease", lease)
        assert verify(source.store, sample=0, repair=True)["repaired"] == 3
        assert source.ingest().ok == 3
        return lease(store, *args)

    monkeypatch.setattr(FeatureStore, "lease", another_first)
    report = verify(source.store, sample=0, repair=True)
    snapshot = FeatureStore.open(source.store).snapshot()
    assert (report["repaired"], report["version"]) == (0, snapshot.version)
    assert len(snapshot.rows(None)) == 6


def test_a_damaged_shard_is_told_to_whoever_reads_it(source):
    shard = FeatureStore.open(source.store).snapshot().rows(None)["shard"][0].as_py()
    with pytest.raises(DamagedShard, match="3 rows, the clips table points at row 7"):
        read_rows(source.store, shard, np.array([7]), ["clip_id"])


def test_others_may_read_a_shared_store(source):
    """Shards have the rights that the umask gives any file, as the rest of the store."""
    umask = os.umask(0)
    os.umask(umask)
    for folder, _, names in os.walk(source.store):
        for name in names:
            mode = stat.S_IMODE(os.stat(Path(folder, name)).st_mode)
            assert mode == 0o666 & ~umask, f"{folder}/{name} is {mode:o}"
