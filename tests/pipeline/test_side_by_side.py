"""side_by_side: in order, no further ahead than it may, and ends at the first failure."""

import pytest

from pipeline.side_by_side import side_by_side


def test_no_more_is_begun_than_may_wait() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return item

    results = side_by_side(work, range(100), at_once=3)
    assert next(results) == 0
    assert set(begun) <= {0, 1, 2}
    assert list(results) == list(range(1, 100))


def test_the_first_failure_in_their_order_is_told_and_the_rest_given_up() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item in (4, 5):
            raise ValueError(item)
        return item

    with pytest.raises(ValueError, match="4"):
        list(side_by_side(work, range(100), at_once=3))
    assert len(begun) <= 7
