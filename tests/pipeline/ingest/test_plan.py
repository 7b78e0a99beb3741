"""The plan: each clip counted once, only what is affected redone."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import IngestConfig
from pipeline.errors import MassRemoval
from pipeline.ingest.plan import STATE_COLUMNS, make_plan
from pipeline.store.schema import CLIPS_SCHEMA, SOURCE_SCHEMA

SPEC = "s" * 16


def sources(*clips: dict) -> pa.Table:
    filled = [
        {
            "clip_id": clip["clip_id"],
            "uri": f"/v/{clip['clip_id']}.mp4",
            "label": "dog",
            "split": "train",
            "fp_kind": "stat",
            "fp": "9-9",
            "size": 9,
            "mtime_ns": 9,
            **clip,
        }
        for clip in clips
    ]
    return pa.Table.from_pylist(filled, SOURCE_SCHEMA)


def states(*clips: dict) -> pa.Table:
    schema = pa.schema([CLIPS_SCHEMA.field(name) for name in STATE_COLUMNS])
    done = sources(*({k: v for k, v in c.items() if k in SOURCE_SCHEMA.names} for c in clips))
    rows = [
        {"status": "ok", "attempts": 1, "spec_hash": SPEC, **row, **clip}
        for row, clip in zip(done.to_pylist(), clips, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema)


MISSING = {"fp": None, "fp_kind": None, "size": None, "mtime_ns": None}
FAILED = {"status": "failed", "reason": "video_decode"}
ANYTHING = IngestConfig(max_removed_frac=1.0)

CASES = {
    "new": ({"clip_id": "a"}, None, "new", "new"),
    "unchanged": ({"clip_id": "a"}, {"clip_id": "a"}, "unchanged", None),
    "size": ({"clip_id": "a", "size": 10, "fp": "10-9"}, {"clip_id": "a"}, "changed", "changed"),
    "mtime": (
        {"clip_id": "a", "mtime_ns": 10, "fp": "9-10"}, {"clip_id": "a"}, "changed", "changed",
    ),
    "etag": ({"clip_id": "a", "fp": "9-zz"}, {"clip_id": "a"}, "changed", "changed"),
    "window": ({"clip_id": "a", "start_s": 3.0}, {"clip_id": "a"}, "changed", "changed"),
    "same_window": (
        {"clip_id": "a", "start_s": 3.0}, {"clip_id": "a", "start_s": 3.0}, "unchanged", None,
    ),
    "spec": (
        {"clip_id": "a"}, {"clip_id": "a", "spec_hash": "old"}, "spec_changed", "spec_changed",
    ),
    "failed_stays": ({"clip_id": "a"}, {"clip_id": "a", **FAILED}, "unchanged", None),
    "failed_spec": (
        {"clip_id": "a"}, {"clip_id": "a", **FAILED, "spec_hash": "old"},
        "spec_changed", "spec_changed",
    ),
    "failed_replaced": (
        {"clip_id": "a", "mtime_ns": 10}, {"clip_id": "a", **FAILED}, "changed", "changed",
    ),
    "timeout_is_tried_once_more": (
        {"clip_id": "a"}, {"clip_id": "a", **FAILED, "reason": "timeout"}, "retried", "retried",
    ),
    "timeout_twice_stays": (
        {"clip_id": "a"}, {"clip_id": "a", **FAILED, "reason": "timeout", "attempts": 2},
        "unchanged", None,
    ),
    "vanished": ({"clip_id": "a", **MISSING}, {"clip_id": "a"}, "removed", None),
    "still_missing": (
        {"clip_id": "a", **MISSING},
        {"clip_id": "a", **MISSING, "status": "failed", "reason": "missing"}, "unchanged", None,
    ),
    "never_there": ({"clip_id": "a", **MISSING}, None, "missing", None),
    "came_back": (
        {"clip_id": "a"}, {"clip_id": "a", **MISSING, "status": "failed", "reason": "missing"},
        "new", "new",
    ),
    "relabelled": ({"clip_id": "a", "label": "cat"}, {"clip_id": "a"}, "changed", None),
    "given_more_labels": (
        {"clip_id": "a", "more_labels": "cat"}, {"clip_id": "a"}, "changed", None,
    ),
    "regrouped": ({"clip_id": "a", "group": "g"}, {"clip_id": "a"}, "unchanged", None),
    "moved": ({"clip_id": "a", "uri": "/w/a.mp4"}, {"clip_id": "a"}, "unchanged", None),
    "touched_hash": (
        {"clip_id": "a", "fp": "9-9"}, {"clip_id": "a", "fp_kind": "sha256", "fp": "ab"},
        "unchanged", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_case_is_counted_once_and_decoded_only_if_needed(name):
    now, before, counted, why = CASES[name]
    plan = make_plan(sources(now), states(*([before] if before else [])), SPEC, ANYTHING)
    assert {key: n for key, n in plan.counts.items() if n} == {counted: 1}
    assert plan.todo["why"].to_pylist() == ([why] if why else [])


def test_unlisted_clip_is_removed():
    plan = make_plan(sources({"clip_id": "a"}), states({"clip_id": "a"}, {"clip_id": "b"}), SPEC,
                     ANYTHING)  # fmt: skip
    assert plan.removed_ids == ["b"]
    assert plan.counts["removed"] == plan.counts["unchanged"] == 1


def test_retry_of_all_or_of_one_reason():
    now = sources({"clip_id": "a"}, {"clip_id": "b"})
    known = states({"clip_id": "a", **FAILED}, {"clip_id": "b", **FAILED, "reason": "no_audio"})
    retried = [
        make_plan(now, known, SPEC, config).todo["clip_id"].to_pylist()
        for config in (
            IngestConfig(),
            IngestConfig(retry_failed=True),
            IngestConfig(retry_reasons=("no_audio",)),
        )
    ]
    assert retried == [[], ["a", "b"], ["b"]]


def test_attempts_count_tries_of_the_same_file():
    failed = {**FAILED, "attempts": 3}
    known = states({"clip_id": "a", **failed}, {"clip_id": "b", **failed})
    now = sources({"clip_id": "a"}, {"clip_id": "b", "size": 1})
    plan = make_plan(now, known, SPEC, IngestConfig(retry_failed=True))
    assert plan.todo["attempts"].to_pylist() == [3, 0]


@pytest.mark.parametrize(("n_gone", "stops"), [(2, False), (3, True), (10, True)])
def test_more_than_a_fifth_vanishing_stops_the_run(n_gone, stops):
    known = states(*({"clip_id": f"c{i}"} for i in range(10)))
    now = sources(*({"clip_id": f"c{i}", **(MISSING if i < n_gone else {})} for i in range(10)))
    if stops:
        with pytest.raises(MassRemoval, match="allow-mass-delete"):
            make_plan(now, known, SPEC, IngestConfig())
        assert make_plan(now, known, SPEC, ANYTHING).counts["removed"] == n_gone
    else:
        assert make_plan(now, known, SPEC, IngestConfig()).counts["removed"] == n_gone


def test_random_tables_every_clip_is_counted_exactly_once():
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = [f"c{i}" for i in range(60)]
        now = sources(
            *(
                {
                    "clip_id": i, "size": int(rng.integers(2)),
                    **(MISSING if rng.random() < 0.2 else {}),
                }
                for i in ids if rng.random() < 0.7
            )
        )  # fmt: skip
        known = states(
            *(
                {
                    "clip_id": i, "size": int(rng.integers(2)),
                    "spec_hash": SPEC if rng.random() < 0.7 else "old",
                    **(FAILED if rng.random() < 0.3 else {}),
                }
                for i in rng.permutation(ids) if rng.random() < 0.7
            )
        )  # fmt: skip
        plan = make_plan(now, known, SPEC, ANYTHING)
        everything = {*now["clip_id"].to_pylist(), *known["clip_id"].to_pylist()}
        assert sum(plan.counts.values()) == len(everything)
