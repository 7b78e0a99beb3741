"""StoreMachine: random histories of a real store, for Hypothesis.

Changes the sources, runs ingests that are killed, stopped or robbed of their lease, looks after the
store, and compares what is stored with StoreModel row by row. No Ray and no video: a cheap decoder
writes real shards.
"""

import contextlib
import csv
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support import store_model
from support.cheap_source import CHEAP_SPECS, decode_cheaply
from support.store_model import File, Listed, StoreModel
from support.sudden_end import Killed, Steps

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.errors import MassRemoval, StoreError, StoreLocked
from pipeline.ingest import run
from pipeline.ingest.verify import verify
from pipeline.storage import Location
from pipeline.store.lease import Lease
from pipeline.store.maintenance import compact, status, vacuum
from pipeline.store.shards import ShardWriter, read_rows
from pipeline.store.snapshot import Snapshot
from pipeline.store.store import FeatureStore

HASHES = [spec.spec_hash() for spec in CHEAP_SPECS]
CLIPS = st.sampled_from([f"c{i}" for i in range(7)])
CONTENTS = st.sampled_from(["good1", "good2", "other", "longer file", "bad", "slow"])
COUNTS = ("new", "changed", "spec_changed", "removed", "missing", "unchanged", "retried")
RAMDISK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class StoreMachine(RuleBasedStateMachine):
    """The store, its sources and the model."""

    compares_plans = True

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="model-", dir=RAMDISK))
        self.uri = str(self.folder / "store")
        self.files: dict[str, File] = {}
        self.listing: dict[str, Listed] = {}
        self.clock = 10**9
        self.model = StoreModel(HASHES[0])
        self.pins: dict[str, tuple[int, dict, str]] = {}
        self.features: dict[tuple[str, int], str] = {}
        self.made = store_model.Prediction("")
        self.kind = "stat"
        self.was_killed = False
        self.at_shard = lambda: None
        self.steps = Steps()
        self.patch = pytest.MonkeyPatch()
        self.patch_store()

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.folder, ignore_errors=True)

    def patch_store(self) -> None:
        """Each write of the store becomes a moment to end at; the model hears of what landed."""

        def guarded(kind: type, name: str, landed=lambda *args: None) -> None:
            original = getattr(kind, name)

            def call(this, *args, **kwargs):
                self.steps()
                result = original(this, *args, **kwargs)
                landed(*args)
                self.steps()
                return result

            self.patch.setattr(kind, name, call)

        guarded(FeatureStore, "append", lambda rows, *_: self.landed(rows))
        guarded(FeatureStore, "put_in_force", lambda spec, *_: self.switched(spec))
        guarded(FeatureStore, "rewrite_log")
        guarded(ShardWriter, "publish")
        for name in ("write_bytes", "create_bytes", "remove", "remove_all"):
            guarded(Location, name)
        self.patch.setattr(run._Run, "_decoded", lambda this, todo: self.decode(this, todo))

    def landed(self, rows: pa.Table) -> None:
        ids = set(rows["clip_id"].to_pylist())
        if not ids <= set(self.made.todo):
            assert not self.compares_plans or ids == set(self.made.settled)
            self.model.settle(self.made)
            return
        for clip in ids:
            listed = self.listing[clip]
            self.model.decoded(self.made, clip, listed, self.files[listed.uri], self.kind)

    def switched(self, spec: FeatureSpec) -> None:
        self.model.in_force = spec.spec_hash()

    def decode(self, this: run._Run, todo: pa.Table) -> Iterator[pa.Table]:
        """What Ray does for a real run: shards of three clips."""
        if self.compares_plans:
            clips = todo.select(["clip_id", "why"]).to_pylist()
            assert {clip["clip_id"]: clip["why"] for clip in clips} == self.made.todo
        for states in decode_cheaply(this, todo):
            self.at_shard()
            yield states

    # The sources.

    @initialize(n=st.integers(2, 5), kind=st.sampled_from(["stat", "sha256"]))
    def first_clips(self, n: int, kind: str) -> None:
        for i in range(n):
            self.add(f"c{i}", "good1")
        self.ingest(0, kind, False, True)

    def write(self, uri: str, content: str, mtime_ns: int) -> None:
        path = self.folder / "videos" / uri
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        os.utime(path, ns=(mtime_ns, mtime_ns))
        self.files[uri] = File(content, mtime_ns)

    @rule(clip=CLIPS, content=CONTENTS)
    def add(self, clip: str, content: str) -> None:
        """A new clip, or the file of one replaced."""
        self.clock += 10**9
        listed = self.listing.setdefault(clip, Listed(f"a/{clip}.mp4", "dog", "train"))
        self.write(listed.uri, content, self.clock)

    def uri_of(self, clip: str) -> str:
        """Of a listed clip, else one that is no file's."""
        return self.listing[clip].uri if clip in self.listing else ""

    @rule(clip=CLIPS)
    def touch(self, clip: str) -> None:
        uri = self.uri_of(clip)
        if uri in self.files:
            self.clock += 10**9
            self.write(uri, self.files[uri].content, self.clock)

    @rule()
    def touch_all(self) -> None:
        """The clips were copied to another disk."""
        for clip in list(self.listing):
            self.touch(clip)

    @rule(clip=CLIPS)
    def replace_with_equal_size_and_mtime(self, clip: str) -> None:
        uri = self.uri_of(clip)
        if uri in self.files:
            old = self.files[uri]
            self.write(uri, old.content[:-1] + "X", old.mtime_ns)

    @rule(clip=CLIPS)
    def rename(self, clip: str) -> None:
        if clip not in self.listing:
            return
        listed = self.listing[clip]
        moved = Listed("b" + listed.uri, listed.label, listed.split)
        if listed.uri in self.files:
            old = self.files.pop(listed.uri)
            (self.folder / "videos" / listed.uri).unlink()
            self.write(moved.uri, old.content, old.mtime_ns)
        self.listing[clip] = moved

    @rule(clip=CLIPS)
    def delete_file(self, clip: str) -> None:
        uri = self.uri_of(clip)
        if self.files.pop(uri, None):
            (self.folder / "videos" / uri).unlink()

    @rule(clip=CLIPS)
    def unlist(self, clip: str) -> None:
        self.listing.pop(clip, None)

    @rule(clip=CLIPS, label=st.sampled_from(["dog", "cat"]), split=st.sampled_from(["train", "t"]))
    def relabel(self, clip: str, label: str, split: str) -> None:
        if clip in self.listing:
            self.listing[clip] = Listed(self.listing[clip].uri, label, split)

    # The runs.

    def arguments(self, spec: int, kind: str, retry: bool, anything: bool) -> tuple:
        manifest = self.folder / "clips.csv"
        with manifest.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["clip_id", "uri", "label", "split"])
            writer.writerows([clip, one.uri, one.label, one.split]
                             for clip, one in self.listing.items())  # fmt: skip
        config = IngestConfig(
            fingerprint=kind, retry_failed=retry, commit_shards=2, max_failed_frac=1.0,
            max_removed_frac=1.0 if anything else 0.2,
        )  # fmt: skip
        self.kind = kind
        self.made = self.model.predict(
            HASHES[spec], self.listing, self.files, kind, retry, anything
        )
        return str(manifest), str(self.folder / "videos"), self.uri, CHEAP_SPECS[spec], config

    def has_files(self) -> bool:
        return any(one.uri in self.files for one in self.listing.values())

    def run(self, arguments: tuple) -> run.IngestSummary:
        return run.ingest(*arguments, start_ray=lambda: None, on_progress=lambda progress: None)

    RUNS = {  # noqa: RUF012
        "spec": st.integers(0, 1),
        "kind": st.sampled_from(["stat", "sha256"]),
        "retry": st.booleans(),
        "anything": st.sampled_from([True, True, False]),
    }

    @precondition(has_files)
    @rule(**RUNS)
    def ingest(self, spec: int, kind: str, retry: bool, anything: bool) -> None:
        arguments = self.arguments(spec, kind, retry, anything)
        made = self.made
        if made.is_mass_removal:
            with pytest.raises(MassRemoval):
                self.run(arguments)
        else:
            summary = self.run(arguments).to_json()
            if self.compares_plans:
                assert {
                    what: n for what, n in summary.items() if n and what in COUNTS
                } == made.counts
                again = run.plan_ingest(*self.arguments(spec, kind, False, True))
                assert again.is_empty or set(again.todo["why"].to_pylist()) == {"retried"}
        self.check()

    @precondition(has_files)
    @rule(**RUNS, after=st.integers(0, 25))
    def ingest_that_is_killed(self, spec, kind, retry, anything, after: int) -> None:
        arguments = self.arguments(spec, kind, retry, anything)
        self.steps.arm(after)
        with contextlib.suppress(Killed, MassRemoval):
            self.run(arguments)
        self.was_killed = self.steps.is_dead
        self.steps.arm(-1)
        self.bury()
        self.check()

    def bury(self) -> None:
        """Leases of killed processes: here they were of this one, which lives."""
        for path in Path(self.uri, "lease").glob("*.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"pid_started": 0.0}))

    @precondition(has_files)
    @rule(**RUNS, after=st.integers(0, 3))
    def ingest_that_is_stopped(self, spec, kind, retry, anything, after: int) -> None:
        def stop() -> None:
            nonlocal after
            after -= 1
            if after < 0:
                raise KeyboardInterrupt

        arguments = self.arguments(spec, kind, retry, anything)
        self.at_shard = stop
        with contextlib.suppress(KeyboardInterrupt, MassRemoval):
            self.run(arguments)
        self.at_shard = lambda: None
        self.check()

    @precondition(has_files)
    @rule(**RUNS, other=st.integers(0, 1), steals=st.booleans())
    def ingest_with_a_second_writer(self, spec, kind, retry, anything, other, steals) -> None:
        """Between two shards another one comes; it takes the first for dead, or waits in vain."""

        def come() -> None:
            self.at_shard = lambda: None
            with pytest.MonkeyPatch.context() as patch:
                if not steals:
                    with pytest.raises(StoreLocked):
                        compact(self.uri)
                    return
                patch.setattr(Lease, "_is_alive", lambda *args: False)
                self.run(self.arguments(other, kind, retry, True))
                compact(self.uri)

        arguments = self.arguments(spec, kind, retry, anything)
        self.at_shard = come
        with contextlib.suppress(StoreLocked, MassRemoval):
            self.run(arguments)
        self.at_shard = lambda: None
        self.check()

    # Upkeep.

    @rule()
    def pin(self) -> None:
        snapshot = FeatureStore.open(self.uri).snapshot()
        name = f"run-{len(self.pins)}"
        FeatureStore.open(self.uri).pin(snapshot.version, name)
        self.pins[name] = (snapshot.version, self.model.live(), self.model.in_force)

    @rule(after=st.sampled_from([-1, -1, 0, 1, 2, 3, 4, 5]))
    def compact(self, after: int) -> None:
        self.steps.arm(after)
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            # Clips that move fill more than one.
            patch.setattr("pipeline.store.maintenance._SHARD_CLIPS", 3)
            compact(self.uri)
        self.steps.arm(-1)
        self.bury()
        self.check(and_pins=True)

    @rule()
    def vacuum(self) -> None:
        vacuum(self.uri, retention_hours=0.0)
        pinned = {spec for _, _, spec in self.pins.values()}
        self.model.forget_specs_but({self.model.in_force, *pinned})
        self.check(and_pins=True)

    @rule()
    def verify(self) -> None:
        assert verify(self.uri, sample=0)["problems"] == []
        about, expected = status(self.uri), self.model.status()
        assert {name: about[name] for name in expected} == expected

    @rule()
    def verify_while_storage_refuses(self) -> None:
        if not self.model.live():
            return
        shard = (
            FeatureStore.open(self.uri).snapshot().rows(None).sort_by("clip_id")["shard"][0].as_py()
        )

        def refuse(self, path, mode="rb", **options):
            if path.endswith(shard):
                raise PermissionError(13, "Permission denied", path)
            return original(self, path, mode, **options)

        kind = type(Location(self.uri).fs)
        original = kind.open
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "open", refuse)
            with pytest.raises(StoreError, match="Nothing is known to be wrong"):
                verify(self.uri, sample=0, repair=True)
        self.check()

    @rule()
    def verify_a_lost_shard(self) -> None:
        store = FeatureStore.open(self.uri)
        rows = store.snapshot().rows(None)
        pinned = {
            shard
            for version, _, _ in self.pins.values()
            for shard in store.snapshot(version).rows(None)["shard"].to_pylist()
        }
        # By clip, as names of shards are drawn anew when Hypothesis repeats a history.
        free = rows.filter(pc.invert(pc.is_in(rows["shard"], pa.array(pinned, pa.string()))))
        if len(free):
            shard = free.sort_by("clip_id")["shard"][0].as_py()
            Path(self.uri, shard).unlink()
            ids = rows.filter(pc.equal(rows["shard"], shard))["clip_id"].to_pylist()
            assert verify(self.uri, sample=0, repair=True)["repaired"] == len(ids)
            for clip in ids:
                self.model.lose(clip)
            self.check()

    # The comparison.

    def check(self, and_pins: bool = False) -> None:
        snapshot = FeatureStore.open(self.uri).snapshot()
        assert snapshot.spec_hash == self.model.in_force
        assert self.contents(snapshot) == self.model.live()
        for version, live, spec_hash in self.pins.values() if and_pins else ():
            pinned = FeatureStore.open(self.uri).snapshot(version)
            assert (self.contents(pinned), pinned.spec_hash) == (live, spec_hash)

    def contents(self, snapshot: Snapshot) -> dict[str, tuple[str, str, str]]:
        """Clip -> label, split, feature bytes."""
        found = {}
        for row in snapshot.rows(None).to_pylist():
            place = (row["shard"], row["row"])
            if place not in self.features:
                stored = read_rows(self.uri, row["shard"], np.array([row["row"]]), ["frames"])
                self.features[place] = stored["frames"][0].as_py()[0].decode()
            found[row["clip_id"]] = (row["label"], row["split"], self.features[place])
        return found
