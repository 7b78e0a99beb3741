"""How clips are cut into batches, and where their outputs lie."""

import resource

import pytest

from training.predict import jobs


@pytest.mark.parametrize("n_rows", [1, 63, 64, 65, 256, 257, 480, 1001])
def test_batches_hold_each_clip_once(n_rows: int) -> None:
    batches = jobs.batches_of(n_rows)
    assert [n for first, end in batches for n in range(first, end)] == list(range(n_rows))
    assert max(end - first for first, end in batches) <= 64


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            jobs.paged_array(2**14, 64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
