"""`diccae store quality`: every planted fault is found, nothing else, and nothing twice."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from diccae.cli import main
from pipeline.config import FeatureSpec, IngestConfig
from pipeline.errors import MassRemoval
from pipeline.ingest.run import IngestSummary, ingest, plan_ingest
from pipeline.quality import run as quality_run
from pipeline.quality.leave_out import left_out, without_left_out
from pipeline.quality.rules import RULES
from pipeline.quality.table import read_about
from pipeline.source.listing import list_sources
from pipeline.storage import Location
from pipeline.store.store import FeatureStore
from training.config import TrainingConfig
from training.run.pinned import pin

EXPECTED = {
    "still": {"still"},
    "silent": {"silent"},
    "black_borders": {"borders"},
    "one_sided": {"one_sided"},
    "clipped": {"clipped"},
    "edit_list": {"edit_list"},
    "truncated": {"cut", "cut_end"},
    "missing": {"missing"},
}


def _table(store: str) -> dict[str, dict]:
    rows = pq.read_table(f"{store}/quality/table.parquet").to_pylist()
    return {row["clip_id"].removesuffix("_000000"): row for row in rows}


def test_every_planted_fault_is_found_and_no_other(planted, copy, quality) -> None:
    told = quality(copy.store)
    rows = _table(copy.store)
    for rule, names in EXPECTED.items():
        assert {name for name, row in rows.items() if row[rule]} == names, rule
    # What was cut, muted or clipped from another clip shows or sounds like it, too.
    for name in ("dup_coded", "dup_shift", "dup_scale"):
        assert (
            {"good0", "dup_coded", "dup_shift", "dup_scale"}
            > {twin.removesuffix("_000000") for twin in rows[name]["twins"]}
            != set()
        ), name
    # The clip of the test split is kept, the train clips that equal it are its duplicates.
    kept = {row["duplicate_of"] for n, row in rows.items() if n.startswith(("dup_", "good0"))}
    assert kept == {None, "dup_scale_000000"}
    assert rows["dup_scale"]["duplicate_of"] is None
    apart = [f"good{i}" for i in range(1, 6)] + ["still", "silent"]
    assert not any(rows[name]["duplicate"] and rows[name]["twins"] == [] for name in apart)
    assert rows["good2"]["twins"] == []
    assert abs(rows["edit_list"]["edit_list_ms"] - 400) < 90
    about = read_about(Location(copy.store))
    assert about["version"] == told["version"] == FeatureStore.open(copy.store).version()
    assert about["rules"] == {rule.name: rule.version for rule in RULES}


@pytest.mark.parametrize("options", [(), ("-flvflags", "add_keyframe_index")])
def test_an_flv_is_truncated_only_if_its_end_is_not_there(
    options, ffmpeg, moving_clip, tmp_path, quality
) -> None:
    """A seek to its end finds no packets."""
    videos = tmp_path / "videos"
    videos.mkdir()
    whole, cut = videos / "whole.flv", videos / "cut.flv"
    ffmpeg("-i", moving_clip, "-t", "6", "-c:v", "libx264", "-g", "50", "-c:a", "aac",
           *options, whole)  # fmt: skip
    content = whole.read_bytes()
    cut.write_bytes(content[: int(0.6 * len(content))])
    store = str(tmp_path / "store")
    config = IngestConfig(max_failed_frac=1.0)
    ingest(
        None, str(videos), store, FeatureSpec(n_frames=2, frame_size=48), config,
        start_ray=_no_ray, on_progress=lambda progress: None,
    )  # fmt: skip
    quality(store)
    rows = _table(store)
    assert {name: row["truncated"] for name, row in rows.items()} == {"whole": False, "cut": True}
    assert rows["whole"]["lost_frac"] == 0
    assert rows["cut"]["lost_frac"] == pytest.approx(0.4, abs=0.1)


def test_second_call_looks_only_at_what_changed(copy, quality) -> None:
    n_clips = quality(copy.store)["looked_at"]
    assert n_clips == len(_table(copy.store))
    before = _table(copy.store)
    assert quality(copy.store)["looked_at"] == 0
    store = FeatureStore.open(copy.store)
    states = store.snapshot().clips
    one = states.filter(pc.equal(states["clip_id"], "good3_000000"))
    at = one.column_names.index("row_key")
    store.append(one.set_column(at, one.schema.field(at), pa.array(["another"])), {})
    assert quality(copy.store)["looked_at"] == 1
    after = _table(copy.store)
    assert after.pop("good3")["row_key"] == "another"
    del before["good3"]
    assert after == before


def test_a_clip_that_comes_later_finds_its_twin_among_the_old_ones(copy, quality) -> None:
    store = FeatureStore.open(copy.store)
    states = store.snapshot().clips
    late = pc.equal(states["clip_id"], "dup_coded_000000")
    row = states.filter(late)
    at = row.column_names.index("status")
    store.append(row.set_column(at, row.schema.field(at), pa.array(["removed"])), {})
    quality(copy.store)
    assert "dup_coded" not in _table(copy.store)
    store.append(row, {})
    assert quality(copy.store)["looked_at"] == 1
    rows = _table(copy.store)
    assert "good0_000000" in rows["dup_coded"]["twins"]
    assert "dup_coded_000000" in rows["good0"]["twins"]


def test_an_interrupted_look_goes_on_where_it_stopped(
    copy, quality, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quality_run.scan
    looked_at = []

    def interrupted(clips, settings, workers):
        looked_at.append(next(whole(clips.slice(0, 5), settings, workers)))
        yield looked_at[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(quality_run, "scan", interrupted)
    assert main(["store", "quality", "--store", copy.store]) == 130
    monkeypatch.undo()
    n_clips = FeatureStore.open(copy.store).snapshot().clips.num_rows
    assert quality(copy.store)["looked_at"] == n_clips - len(looked_at[0]) < n_clips
    assert len(_table(copy.store)) == n_clips
    assert not list(Path(copy.store, "quality", "parts").iterdir())


@pytest.mark.slow
def test_processes_find_what_one_process_finds(
    copy, quality, monkeypatch: pytest.MonkeyPatch
) -> None:
    quality(copy.store)
    alone = _table(copy.store)
    shutil.rmtree(Path(copy.store, "quality"))
    monkeypatch.setattr("pipeline.quality.scan._FEWEST_FOR_PROCESSES", 1)
    quality(copy.store)
    assert _table(copy.store) == alone


def test_what_needs_a_source_that_is_gone_is_said_to_be_unjudged(copy, quality, capsys) -> None:
    store = FeatureStore.open(copy.store)
    states = store.snapshot().clips
    at = states.column_names.index("uri")
    elsewhere = pa.array([f"/nowhere/{uri}" for uri in states["uri"].to_pylist()])
    store.append(states.set_column(at, states.schema.field(at), elsewhere), {})
    told = quality(copy.store)
    n_clips = len(states)
    assert told["sources"] == {"gone": n_clips}
    assert told["not_judged"]["edit_list"] == told["not_judged"]["truncated"] == n_clips
    rows = _table(copy.store)
    assert rows["edit_list"]["edit_list"] is None
    assert rows["still"]["still"]
    assert main(["store", "quality", "--store", copy.store]) == 0
    shown = capsys.readouterr().out
    assert f"sources not read: gone {n_clips}" in shown
    assert f"truncated {n_clips}" in shown


@pytest.mark.slow
@pytest.mark.parametrize("fewest_for_processes", [512, 1], ids=["here", "processes"])
@pytest.mark.timeout(60)  # Processes that owed rows were waited for without end.
def test_clips_whose_folder_cannot_be_entered_are_unreachable_and_have_their_rows(
    fewest_for_processes, copy, quality, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.quality.scan._FEWEST_FOR_PROCESSES", fewest_for_processes)
    store = FeatureStore.open(copy.store)
    states = store.snapshot().clips
    loop = copy.folder / "loop"
    loop.symlink_to(loop)  # Refuses everybody, unlike a mode that root does not mind.
    at = states.column_names.index("uri")
    below = pa.array([f"{loop}/{Path(uri).name}" for uri in states["uri"].to_pylist()])
    store.append(states.set_column(at, states.schema.field(at), below), {})
    told = quality(copy.store)
    assert told["sources"] == {"unreachable": len(states) - 1, "gone": 1}
    rows = _table(copy.store)
    assert len(rows) == len(states)
    assert rows["still"]["still"]


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_processes_that_end_before_their_work_are_not_waited_for(
    copy, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.quality.scan._FEWEST_FOR_PROCESSES", 1)
    monkeypatch.setattr("pipeline.quality.scan._work", print)  # Ends at once, with code 0.
    assert main(["store", "quality", "--store", copy.store]) != 0
    assert "ended and left some out" in capsys.readouterr().err


def test_sources_can_be_left_alone_and_looked_at_later(copy, quality) -> None:
    assert set(quality(copy.store, "--stored-only")["sources"]) == {"not asked"}
    assert _table(copy.store)["clipped"]["clipped"] is None
    assert quality(copy.store)["sources"]["read"] > 10
    assert _table(copy.store)["clipped"]["clipped"]


def test_one_split_leaves_the_rows_of_others(copy, quality) -> None:
    quality(copy.store)
    n_rows = len(_table(copy.store))
    assert quality(copy.store, "--split", "test")["clips"] == 1
    assert len(_table(copy.store)) == n_rows


def test_clips_are_left_out_by_rule(copy, quality) -> None:
    quality(copy.store)
    snapshot = FeatureStore.open(copy.store).snapshot()
    found = left_out(snapshot, "train", ("still", "duplicate"))
    rules = dict(zip(*(found.clips[name].to_pylist() for name in ("clip_id", "rule")), strict=True))
    assert rules["still_000000"] == "still"
    assert rules["good0_000000"] == "duplicate"
    assert "good5_000000" not in rules or rules["good5_000000"] == "duplicate"
    assert found.about()["rules"] == {"still": 1, "duplicate": 1}
    folder = copy.clips.folder
    sources = list_sources(str(folder / "clips.csv"), str(folder / "videos")).clips
    left = without_left_out(Location(copy.store), sources, ("still",))
    assert set(sources["clip_id"].to_pylist()) - set(left["clip_id"].to_pylist()) == {
        "still_000000"
    }


def test_an_ingest_drops_what_a_rule_names_and_takes_it_back_without_it(copy, quality) -> None:
    quality(copy.store)
    source = (str(copy.clips.folder / "clips.csv"), str(copy.clips.folder / "videos"))

    def run(*rules: str) -> IngestSummary:
        config = IngestConfig(leave_out=rules)
        return ingest(
            *source, copy.store, None, config, start_ray=_no_ray, on_progress=lambda progress: None
        )

    assert run("still", "silent").removed == 2
    snapshot = FeatureStore.open(copy.store).snapshot()
    assert "still_000000" not in snapshot.rows(None)["clip_id"].to_pylist()
    assert run("still", "silent").removed == 0
    quality(copy.store)  # What is out of the store is remembered, and stays out.
    assert run("still", "silent").removed == 0
    assert snapshot._table.history(1)[0]["left_out"] == "still-1 silent-1"
    assert plan_ingest(*source, copy.store, None, IngestConfig()).counts["new"] == 2


def test_a_rule_that_takes_much_of_a_store_is_named_before_it_does(copy, quality) -> None:
    quality(copy.store)
    source = (str(copy.clips.folder / "clips.csv"), str(copy.clips.folder / "videos"))
    config = IngestConfig(leave_out=("still", "silent"), max_removed_frac=0.05)
    with pytest.raises(MassRemoval) as caught:
        plan_ingest(*source, copy.store, None, config)
    said = str(caught.value)
    assert said.startswith("2 of the ")
    assert "left out by --ingest.leave-out still silent: together more than 5%" in said
    assert "Use --allow-mass-delete" in said
    assert "mounted" not in said
    allowed = config.model_copy(update={"max_removed_frac": 1.0})
    assert plan_ingest(*source, copy.store, None, allowed).counts["removed"] == 2


_EQUAL = {"dup_coded_000000", "dup_shift_000000", "good0_000000"}
"""Clips of the train split that equal each other, and dup_scale of the test split."""


def _left_to_train(store: str) -> set[str]:
    """Those of `_EQUAL` that pretraining without duplicates reads."""
    config = TrainingConfig.model_validate({"data": {"leave_out": ["duplicate"]}})
    return _EQUAL & set(pin(store, None, config).train.clip_ids_N)


def _removed(store: str, clip_id: str) -> None:
    target = FeatureStore.open(store)
    states = target.snapshot().clips
    row = states.filter(pc.equal(states["clip_id"], clip_id))
    at = row.column_names.index("status")
    target.append(row.set_column(at, row.schema.field(at), pa.array(["removed"])), {})


def test_one_of_equal_clips_is_trained_on_when_the_one_that_was_kept_is_gone(copy, quality) -> None:
    quality(copy.store)
    assert _left_to_train(copy.store) == set()
    _removed(copy.store, "dup_scale_000000")
    assert _left_to_train(copy.store) == {"dup_coded_000000"}
    quality(copy.store)
    assert _left_to_train(copy.store) == {"dup_coded_000000"}


def test_of_equal_clips_one_stays_that_no_other_rule_takes(copy, quality) -> None:
    """The clip that the table keeps may be a damaged copy."""
    quality(copy.store)
    path = Path(copy.store, "quality", "table.parquet")
    table = pq.read_table(path)
    at = table.column_names.index("truncated")
    bad = pc.equal(table["clip_id"], "dup_coded_000000")
    damaged = table.set_column(at, table.schema.field(at), pc.or_kleene(bad, table["truncated"]))
    pq.write_table(damaged, path)
    _removed(copy.store, "dup_scale_000000")
    config = TrainingConfig.model_validate({"data": {"leave_out": ["truncated", "duplicate"]}})
    read = _EQUAL & set(pin(copy.store, None, config).train.clip_ids_N)
    assert read == {"dup_shift_000000"}


def test_an_ingest_brings_a_duplicate_back_when_the_clip_that_was_kept_is_gone(
    copy, quality
) -> None:
    quality(copy.store)
    videos = str(copy.clips.folder / "videos")
    listed = (copy.clips.folder / "clips.csv").read_text()
    config = IngestConfig(leave_out=("duplicate",), max_removed_frac=1.0, workers=1)

    def run(lines: str) -> set[str]:
        """Those of `_EQUAL` in the store after an ingest of a list."""
        csv = copy.folder / "clips.csv"
        csv.write_text(lines)
        source = (str(csv), videos, copy.store, None, config)
        ingest(*source, start_ray=_no_ray, on_progress=lambda progress: None)
        rows = FeatureStore.open(copy.store).snapshot().rows(None)
        return _EQUAL & set(rows["clip_id"].to_pylist())

    assert run(listed) == set()
    quality(copy.store)
    unlisted = "".join(x for x in listed.splitlines(True) if not x.startswith("dup_scale"))
    for _ in range(2):
        assert run(unlisted) == {"dup_coded_000000"}
        quality(copy.store)
    assert run(listed) == set()


def test_duplicates_follow_the_split_that_a_list_gives_a_clip_now(copy, quality) -> None:
    quality(copy.store)
    source = copy.clips.folder
    moved = (source / "clips.csv").read_text()
    moved = moved.replace("dup_scale,0,one,test", "dup_scale,0,one,train")
    csv = copy.folder / "clips.csv"
    csv.write_text(moved.replace("good0,0,one,train", "good0,0,one,test"))
    config = IngestConfig()
    arguments = (str(csv), str(source / "videos"), copy.store, None, config)
    ingest(*arguments, start_ray=_no_ray, on_progress=lambda progress: None)
    # No copy of a clip that is tested on now is trained on, looked at again or not.
    for _ in range(2):
        assert _left_to_train(copy.store) == set()
        told = quality(copy.store, "--split", "test")
    assert (told["looked_at"], told["clips"]) == (0, 1)
    rows = _table(copy.store)
    assert [name for name, row in rows.items() if row["split"] == "test"] == ["good0"]
    assert rows["dup_scale"]["duplicate_of"] == "good0_000000"
    assert not rows["good0"]["duplicate"]


def _no_ray() -> None:
    raise AssertionError("nothing was to be decoded")
