"""Looking after a store: status, failures, compact, vacuum, export.

Knows nothing of decoding (`verify` does). Invariant: what a pinned or young version needs is never
deleted; a failure half-way leaves every version as readable as before.
"""

import io
import itertools
import json
import logging
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import LEASE_STALE_S, FeatureSpec, IngestConfig
from pipeline.decode.payload import fbank_array
from pipeline.errors import SourceError, StoreError
from pipeline.reasons import Reason
from pipeline.side_by_side import side_by_side
from pipeline.storage import Location
from pipeline.store.schema import CLIPS_SCHEMA, SHARD_SCHEMA, split_labels
from pipeline.store.shards import AT_ONCE, ShardWriter, shard_n_rows, with_features
from pipeline.store.store import FeatureStore, Snapshot
from pipeline.store.vacuumed import whole_snapshot

_log = logging.getLogger(__name__)

_SHARD_CLIPS = IngestConfig().shard_clips
"""Of a shard that `compact` writes: as many as of one that an ingest does by default."""
_SPARSE_FRAC = 0.5
_TAR_CLIPS = 1000
_MOST_RETENTION_HOURS = 876_000
"""A hundred years."""


def status(uri: str, version: int | None = None) -> dict[str, Any]:
    """What is in a store.

    Returns: {"clips", "ok", "failed" (decodes), "missing" (no file), "undecoded" (nothing of the
        spec in force yet), "by_reason" (of the failed), "by_split" (ok clips), "spec" (hash of the
        one in force), "version", "pins" (all pinned versions by name), "pinned_for" (the run
        folders, where pins name theirs), "shards", "bytes"} of the live shards.
        clips = ok + failed + missing + undecoded.
    Raises: StoreError, also for a version that was vacuumed.
    """
    store = FeatureStore.open(uri)
    snapshot = whole_snapshot(store, version)
    states = snapshot.states(["status", "reason", "spec_hash"])
    live = snapshot.rows(None)
    shards = set(pc.unique(live["shard"]).to_pylist())
    sizes, pins = shard_sizes(store), store.pins_in_full()
    is_missing = pc.equal(states["reason"], Reason.MISSING.value).fill_null(False)
    in_force = pc.equal(states["spec_hash"], snapshot.spec_hash)
    is_failed = pc.and_(in_force, pc.equal(states["status"], "failed"))
    failed = states.filter(pc.and_not(is_failed, is_missing))
    n_missing = pc.sum(is_missing).as_py() or 0
    return {
        "clips": len(states),
        "ok": len(live),
        "failed": len(failed),
        "missing": n_missing,
        "undecoded": len(states) - len(live) - len(failed) - n_missing,
        "by_reason": dict(Counter(failed["reason"].to_pylist()).most_common()),
        "by_split": dict(sorted(Counter(live["split"].to_pylist()).items())),
        "spec": snapshot.spec_hash,
        "version": snapshot.version,
        "pins": {name: int(about["version"]) for name, about in pins.items()},
        "pinned_for": {name: about["run"] for name, about in pins.items() if about.get("run")},
        "shards": len(shards),
        "bytes": sum(sizes.get(shard, (0, 0.0))[0] for shard in shards),
    }


def failures(
    uri: str,
    reason: str | None = None,
    *,
    examples: int,
    spec: str | None = None,
    version: int | None = None,
) -> dict[str, Any]:
    """Failed clips by reason: {reason: {"clips": n, "examples": [{clip_id, uri, detail}]}}.

    Args: reason: this one alone; examples: at most so many of each; spec: hash of the one that the
        clips failed under, None for the one in force; version: None for the newest. A missing file
        is so for every spec.
    Raises: StoreError, also for a reason or a spec that is none.
    """
    if reason not in (None, *Reason):
        raise StoreError(f"{uri}: no reason {reason!r}; there are {', '.join(Reason)}")
    if examples < 0:
        raise StoreError(f"{uri}: {examples} examples of a reason; 0 or more are allowed")
    failed = _failed(FeatureStore.open(uri).snapshot(version), spec)
    counts = Counter(failed["reason"].to_pylist())
    report = {}
    for name, n_clips in counts.most_common():
        if reason in (None, name):
            rows = failed.filter(pc.equal(failed["reason"], name)).slice(0, examples)
            report[name] = {
                "clips": n_clips,
                "examples": rows.select(["clip_id", "uri", "detail"]).to_pylist(),
            }
    return report


def _failed(snapshot: Snapshot, spec: str | None) -> pa.Table:
    """Clips that failed under a spec (hash; None: the one in force), or have no file: clip_id, uri,
    status, reason, detail, spec_hash. Raises: StoreError if no clip was decoded for such a spec."""
    specs = {snapshot.spec_hash, *snapshot.specs}
    if spec not in (None, *specs):
        there = ", ".join(sorted(specs))
        raise StoreError(
            f"{snapshot.uri}: no clip was decoded for spec {spec!r}; there are {there}"
        )
    columns = ["clip_id", "uri", "status", "reason", "detail", "spec_hash"]
    states = snapshot.states(columns, spec)
    # A clip that the spec has nothing of comes with its row of another one.
    is_own = pc.or_(
        pc.equal(states["spec_hash"], spec or snapshot.spec_hash),
        pc.equal(states["reason"], Reason.MISSING.value).fill_null(False),
    )
    is_failed = pc.and_(pc.equal(states["status"], "failed"), is_own)
    return states.filter(is_failed).sort_by("clip_id")


def shard_sizes(store: FeatureStore) -> dict[str, tuple[int, float]]:
    """Bytes and time of modification (Unix, s) of each shard file."""
    found = {}
    for entry in store.location.ls("features"):
        name = entry["name"].rsplit("/", 1)[-1]
        if name.endswith(".parquet"):
            found[f"features/{name}"] = (int(entry["size"]), store.location.modified(entry))
    return found


def compact(uri: str) -> dict[str, Any]:
    """Rewrite shards of which less than half is live, and drop superseded rows from the log.

    What other specs have is kept. Older versions keep their shards until `vacuum`. Shards that are
    small and live, as runs of few clips leave them, stay as they are: reading them costs a request
    each, moving them what they hold.

    Returns: {"shards_before", "shards_after", "clips_moved", "version"}, the last the newest one as
        it was if there was nothing to do.
    Raises: StoreLocked, StoreError.
    """
    store = FeatureStore.open(uri)
    with store.lease(LEASE_STALE_S, "store compact") as lease:
        snapshot = store.snapshot()
        live = snapshot.rows(None)
        sparse = live.filter(
            pc.is_in(live["shard"], value_set=pa.array(_sparse_shards(live, uri), pa.string()))
        )
        moved = list(_move(store, snapshot.spec, sparse))
        version = snapshot.version
        if moved or snapshot.has_superseded_rows:
            rows = _point_at(snapshot.kept_rows(), snapshot.spec_hash, moved)
            version = store.rewrite_log(rows, version, lease.check)
    after = store.snapshot().rows(None)
    return {
        "shards_before": len(pc.unique(live["shard"])),
        "shards_after": len(pc.unique(after["shard"])),
        "clips_moved": len(moved),
        "version": version,
    }


def _sparse_shards(live: pa.Table, uri: str) -> list[str]:
    counts = Counter(live["shard"].to_pylist())
    n_rows = side_by_side(lambda shard: shard_n_rows(uri, shard), counts, AT_ONCE)
    of_shards = zip(counts.items(), n_rows, strict=True)
    return [shard for (shard, n_live), n in of_shards if n_live < _SPARSE_FRAC * n]


def _move(store: FeatureStore, spec: FeatureSpec, rows: pa.Table) -> Iterator[tuple[str, str, int]]:
    """Copy rows to new shards. Yields (clip_id, shard, row)."""
    run = f"compact{time.time_ns():x}"
    writer: ShardWriter | None = None
    for _, table in with_features(store.uri, rows, SHARD_SCHEMA.names):
        for row in table.to_pylist():
            if writer is None or writer.n_rows == _SHARD_CLIPS:
                if writer is not None:
                    writer.publish()
                index = 0 if writer is None else int(writer.name.split("-")[2]) + 1
                name = f"features/part-{run}-{index:06d}-0.parquet"
                writer = ShardWriter(store.location, name, spec)
            yield row["clip_id"], writer.name, writer.add(row)
    if writer is not None:
        writer.publish()


def _point_at(rows: pa.Table, spec_hash: str, moved: list[tuple[str, str, int]]) -> pa.Table:
    """The log rows of a spec with the new places of moved features; other rows as they are."""
    ids = pa.array([clip_id for clip_id, _, _ in moved], pa.string())
    position = pc.index_in(rows["clip_id"], value_set=ids)
    is_of_spec = pc.equal(rows["spec_hash"], spec_hash)
    for name, values in (("shard", [one for _, one, _ in moved]), ("row", [i for *_, i in moved])):
        field = CLIPS_SCHEMA.field(name)
        new = pa.array(values, field.type).take(position.combine_chunks())
        has_moved = pc.and_(is_of_spec, pc.is_valid(position))
        column = pc.if_else(has_moved, new, rows[name])
        rows = rows.set_column(CLIPS_SCHEMA.get_field_index(name), field, column)
    return rows


def vacuum(uri: str, retention_hours: float, dry_run: bool = False) -> dict[str, Any]:
    """Delete shards and log files that no kept version needs, those of killed runs among them.

    Kept are the newest version, pinned ones and all younger than the retention, which must be
    longer than a run lasts: younger files are never touched. A spec that was neither in force nor
    decoded for since then is forgotten: going back to it means to decode again.

    Returns: {"shards", "bytes", "kept", "files"}, the last with the bytes of each shard.
    Raises: StoreLocked while anybody may still commit; StoreError.
    """
    # A negative one would take the shards of a run under way for old ones.
    if not 0 <= retention_hours <= _MOST_RETENTION_HOURS:
        raise StoreError(
            f"{uri}: a retention of {retention_hours:g} hours; allowed are 0 to "
            f"{_MOST_RETENTION_HOURS:,}. Nothing was removed."
        )
    store = FeatureStore.open(uri)
    with store.lease(LEASE_STALE_S, "store vacuum") as lease:
        oldest = time.time() - 3600 * retention_hours
        young, pinned = _young_versions(store, oldest), set(store.pins().values())
        newest = store.snapshot()
        needed = [newest, *(store.snapshot(version) for version in {*young[:1], *pinned})]
        # What a version in between has in force was put in force since: its spec is younger.
        specs = {snapshot.spec_hash for snapshot in needed} | store.specs_since(oldest)
        # A shard that only a version in between needs is younger than the retention.
        referenced = set[str]().union(*(snapshot.shards(specs) for snapshot in needed))
        kept = sorted({*young, *pinned, newest.version})
        if not dry_run and newest.specs - specs:
            rows = newest.kept_rows(specs)
            kept.append(store.rewrite_log(rows, newest.version, lease.check))
        garbage = {
            shard: size
            for shard, (size, modified) in shard_sizes(store).items()
            if shard not in referenced and modified < oldest
        }
        if not dry_run:
            lease.check()
            store.location.remove_all(list(garbage))
            store.drop_log_files(retention_hours, kept)
    return {"shards": len(garbage), "bytes": sum(garbage.values()), "kept": kept, "files": garbage}


def _young_versions(store: FeatureStore, oldest: float) -> list[int]:
    """Versions that the retention keeps, but for the first ones if their log files are gone.

    A vacuum of a shorter retention took those, and what only they needed; that is no reason to
    refuse every vacuum until they are old. Asked of the files, since a log that cannot be read may
    as well be storage that refuses for a moment.
    """
    young = store.versions_since(oldest)
    there = set(store.location.files("clips"))
    kept = list(itertools.dropwhile(lambda one: not store.snapshot(one).log_files <= there, young))
    if gone := young[: len(young) - len(kept)]:
        _log.warning(
            "%s: nothing is kept for %d of the versions up to %d, which are younger than the "
            "retention: an earlier vacuum of a shorter one took files of theirs",
            store.uri, len(gone), gone[-1],
        )  # fmt: skip
    return kept


def export(
    uri: str, out: str, format: Literal["folder", "webdataset"], version: int | None = None
) -> dict[str, Any]:
    """Write a version for other tools. Returns {"clips", "format", "out", "version"}.

    folder: `<out>/<split>/<clip_id>/frame_00.jpg ..., fbank.npy, clip.json`;
    webdataset: `<out>/<split>-000000.tar` of `<clip_id>.frame_00.jpg`, `.fbank.npy`, `.json`,
    a dot in an id being %2E there and a per cent sign %25. The JSON has what the shard holds of the
    clip beside frames and fbank, its `split`, `label` (the first, or null), `labels` (all) and
    `group`, which is not to be divided between training and validation (null in stores of before).

    Raises: SourceError if `out` is not an empty or new local folder, or if a split is no name for a
        folder; StoreError.
    """
    if not Location(out).is_local:
        raise SourceError(f"{out}: an export goes to a local folder; copy it from there")
    folder = Path(Location(out).path)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        what = "not empty" if folder.is_dir() else "a file"
        raise SourceError(f"{out}: {what}; name a new folder for the export")
    snapshot = whole_snapshot(FeatureStore.open(uri), version)
    write = _write_folder if format == "folder" else _write_tars
    splits = pc.unique(snapshot.rows(None)["split"]).to_pylist()
    for split in splits:
        if not split or split in (".", "..") or re.search(r"[/\\\0]", split):
            raise SourceError(
                f"{uri}: the split {split!r} is no name for a folder, so it cannot be exported. "
                "Give it another name in the list of clips and ingest again."
            )
    n_clips = 0
    for split in splits:
        n_clips += write(folder, split, _exported(snapshot, split))
    return {"clips": n_clips, "format": format, "out": out, "version": snapshot.version}


def _exported(snapshot: Snapshot, split: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Clips as small files: name -> content."""
    rows = snapshot.rows(split)
    for part, table in with_features(snapshot.uri, rows, SHARD_SCHEMA.names):
        for row, known in zip(table.to_pylist(), part.to_pylist(), strict=True):
            frames, fbank = row.pop("frames"), row.pop("fbank")
            files = {f"frame_{i:02d}.jpg": jpeg for i, jpeg in enumerate(frames)}
            buffer = io.BytesIO()
            np.save(buffer, fbank_array(fbank, snapshot.spec))
            files["fbank.npy"] = buffer.getvalue()
            first, more = known["label"], split_labels(known["more_labels"])
            about = row | {"label": first, "labels": [first, *more] if first else []}
            about |= {"split": split, "group": known["group"]}
            files["json"] = json.dumps(about, ensure_ascii=False).encode()
            yield row["clip_id"], files


def _write_folder(folder: Path, split: str, clips: Iterator[tuple[str, dict[str, bytes]]]) -> int:
    n_clips = 0
    for clip_id, files in clips:
        n_clips += 1
        place = folder / split / clip_id
        place.mkdir(parents=True)
        for name, content in files.items():
            (place / ("clip.json" if name == "json" else name)).write_bytes(content)
    return n_clips


def _write_tars(folder: Path, split: str, clips: Iterator[tuple[str, dict[str, bytes]]]) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    n_clips = 0
    for index, first in enumerate(clips):
        # The first clip of each file is drawn by the loop, the others here.
        rest = itertools.islice(clips, _TAR_CLIPS - 1)
        with tarfile.open(folder / f"{split}-{index:06d}.tar", "w") as tar:
            for clip_id, files in itertools.chain([first], rest):
                n_clips += 1
                for name, content in files.items():
                    member = tarfile.TarInfo(f"{_webdataset_key(clip_id)}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return n_clips


def _webdataset_key(clip_id: str) -> str:
    """A key ends at the first dot. `urllib.parse.unquote` gives the id back, so that no two clips
    have one key."""
    return clip_id.replace("%", "%25").replace(".", "%2E")
