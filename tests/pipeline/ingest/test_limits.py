"""When failed decodes end an ingest with exit code 3, and when they do not."""

from collections.abc import Callable

import pytest
from support.cheap_source import CHEAP_SPECS, CheapSource

from pipeline.errors import TooManyFailures
from pipeline.store.maintenance import status

SPEC = CHEAP_SPECS[0]
LIMIT = {"max_failed_frac": 0.1}


@pytest.fixture
def source_of(tmp_path, monkeypatch) -> Callable[[int], CheapSource]:
    return lambda n_clips: CheapSource(tmp_path, n_clips, monkeypatch)


def spoil(source: CheapSource, clips: list[str], how: str) -> None:
    for clip in clips:
        source.file(clip).write_text(how)


def add(source: CheapSource, n_clips: int, content: str) -> None:
    """New clips."""
    begin = len(source.clips)
    added = [f"c{i}" for i in range(begin, begin + n_clips)]
    source.clips += added
    spoil(source, added, content)


def test_clips_that_are_tried_again_and_fail_again_end_no_run(source_of):
    """Every nightly `ingest && pretrain` ended here once a clip had timed out."""
    source = source_of(20)
    spoil(source, ["c0"], "slow")
    assert source.ingest(SPEC, **LIMIT).failed == 1
    again = source.ingest(**LIMIT)
    assert (again.retried, again.failed, again.unchanged) == (1, 1, 19)


def test_clips_that_are_tried_again_on_demand_end_no_run(source_of):
    source = source_of(20)
    spoil(source, source.clips[:10], "bad")
    with pytest.raises(TooManyFailures, match=r"10 of 20 clips failed .*The 10 good ones"):
        source.ingest(SPEC, **LIMIT)
    again = source.ingest(retry_failed=True, **LIMIT)
    assert (again.retried, again.failed) == (10, 10)


def test_a_few_broken_new_clips_in_a_store_of_many_end_no_run(source_of):
    source = source_of(120)
    source.ingest(SPEC, **LIMIT)
    add(source, 10, "bad")
    summary = source.ingest(**LIMIT)
    assert (summary.new, summary.ok, summary.failed) == (10, 0, 10)
    assert status(source.store)["by_reason"] == {"open_failed": 10}


@pytest.mark.slow
def test_broken_new_clips_above_the_share_of_a_hundred_end_the_run(source_of):
    source = source_of(400)
    source.ingest(SPEC, **LIMIT)
    add(source, 11, "bad")
    with pytest.raises(TooManyFailures, match=r"^11 of 11 clips failed \(open_failed 11\), more"):
        source.ingest(**LIMIT)


def test_changed_clips_of_which_most_fail_end_the_run(source_of):
    source = source_of(120)
    spoil(source, ["c0"], "slow")
    source.ingest(SPEC, **LIMIT)
    spoil(source, source.clips[1:31], "bad")
    with pytest.raises(TooManyFailures, match=r"30 of 30 clips failed .*; 1 more failed again\."):
        source.ingest(**LIMIT)


@pytest.mark.parametrize(("n_bad", "is_refused"), [(1, False), (2, True)])
def test_a_small_store_is_judged_by_all_its_clips(source_of, n_bad, is_refused):
    source = source_of(10)
    source.ingest(SPEC, **LIMIT)
    add(source, n_bad, "bad")
    if is_refused:
        with pytest.raises(TooManyFailures, match="2 of 2"):
            source.ingest(**LIMIT)
    else:
        assert source.ingest(**LIMIT).failed == 1


def test_a_first_ingest_is_judged_by_its_clips_alone(source_of):
    source = source_of(5)
    spoil(source, ["c0"], "bad")
    with pytest.raises(TooManyFailures, match="1 of 5 clips failed"):
        source.ingest(SPEC, **LIMIT)
