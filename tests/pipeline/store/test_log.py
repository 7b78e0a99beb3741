"""Which rows of the log are the states of the clips: against a loop over the rows."""

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given

from pipeline.config import FeatureSpec
from pipeline.store.log import LogKeys
from pipeline.store.schema import CLIPS_SCHEMA
from pipeline.store.store import FeatureStore

KINDS = {"ok": ("ok", None), "failed": ("failed", "no_audio"), "missing": ("failed", "missing"),
         "removed": ("removed", None)}  # fmt: skip
ROWS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(list(KINDS)), st.sampled_from("ST")),
    max_size=12,
)


def keys_of(rows: list[tuple[str, str, str]], order: np.ndarray, n_batches: int) -> LogKeys:
    """Args: rows: clip, kind, spec by rising seq; order: in which they stand in the files."""
    table = pa.table(
        {
            "clip_id": pa.array([clip for clip, _, _ in rows], pa.string()),
            "seq": pa.array(range(len(rows)), pa.int64()),
            "status": pa.array([KINDS[kind][0] for _, kind, _ in rows], pa.string()),
            "reason": pa.array([KINDS[kind][1] for _, kind, _ in rows], pa.string()),
            "spec_hash": pa.array([spec for _, _, spec in rows], pa.string()),
        }
    ).take(pa.array(order, pa.int64()))
    return LogKeys.read(table.to_batches(max_chunksize=max(1, len(rows) // n_batches)))


def states_by_loop(rows: list[tuple[str, str, str]], spec: str | None) -> set[int]:
    """Newest row first: what a clip's state is under a spec."""
    found: dict[str, int] = {}
    for clip in {clip for clip, _, _ in rows}:
        mine = [i for i, row in enumerate(rows) if row[0] == clip]
        found[clip] = mine[-1]
        for i in reversed(mine):
            if spec is None or rows[i][1] in ("missing", "removed"):
                break
            if rows[i][2] == spec:
                found[clip] = i
                break
    return {i for i in found.values() if rows[i][1] != "removed"}


@given(rows=ROWS, spec=st.sampled_from(["S", "T", "unknown", None]), n_batches=st.integers(1, 4),
       seed=st.integers(0, 9))  # fmt: skip
def test_states_are_those_of_a_loop_in_any_order_of_files(rows, spec, n_batches, seed):
    order = np.random.default_rng(seed).permutation(len(rows))
    keys = keys_of(rows, order, n_batches)
    assert {int(order[i]) for i in keys.states(spec)} == states_by_loop(rows, spec)


@given(rows=ROWS, specs=st.sampled_from([None, {"S"}, {"S", "T"}]))
def test_a_shorter_log_gives_the_same_states(rows, specs):
    keys = keys_of(rows, np.arange(len(rows)), 1)
    kept = keys.kept(specs)
    shorter = keys_of([rows[i] for i in kept], np.arange(len(kept)), 1)
    for spec in specs or {"S", "T"}:
        told = {rows[i][0]: i for i in keys.states(spec)}
        again = {rows[kept[i]][0]: kept[i] for i in shorter.states(spec)}
        if specs is not None:  # Clips that only forgotten specs have are forgotten.
            own = {clip for clip, i in told.items() if rows[i][2] in specs}
            gone = {clip for clip, i in told.items() if rows[i][1] == "missing"}
            told = {clip: i for clip, i in told.items() if clip in own | gone}
            again = {clip: i for clip, i in again.items() if clip in told}
        assert again == told


@pytest.mark.soak
def test_a_log_opens_whose_columns_are_longer_than_arrow_strings_can_be(tmp_path):
    """2.5 GiB of URIs, few and long: in a log of 50 million rows they are short and many."""
    store = FeatureStore.create(str(tmp_path / "store"), FeatureSpec())
    n_rows, long = 8_000, "x" * 40_000
    for begin in range(0, 8 * n_rows, n_rows):
        rows = [
            {"clip_id": f"c{i}", "uri": f"{long}{i}", "status": "ok", "spec_hash": "s"}
            for i in range(begin, begin + n_rows)
        ]
        store.append(pa.Table.from_pylist(rows, CLIPS_SCHEMA), {})
    states = store.snapshot().states(["clip_id", "uri"])
    assert len(states) == 8 * n_rows
    assert states["uri"].nbytes > 2**31
    assert states["uri"][-1].as_py() == f"{long}{states['clip_id'][-1].as_py()[1:]}"
