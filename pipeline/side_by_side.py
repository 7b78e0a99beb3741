"""side_by_side: threads work on the next items while the caller has the one before.

Knows nothing of what the work is. Invariant: results come in the order of the items, and of no more
than `at_once` of them anything is held, however slow the caller.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
T = TypeVar("T")


def side_by_side(work: Callable[[A], T], items: Iterable[A], at_once: int) -> Iterator[T]:
    """What `work` makes of each item, in their order, by threads that wait for storage together.

    Args: at_once: most items that are at work or done and not taken yet; while the caller has one,
        the next `at_once - 1`.
    Raises: what `work` raises, of the first item for which it does; the others are given up.
    """
    started: deque[Future[T]] = deque()
    with ThreadPoolExecutor(at_once, "side-by-side") as pool:
        try:
            for item in items:
                started.append(pool.submit(work, item))
                if len(started) == at_once:
                    yield started.popleft().result()
            while started:
                yield started.popleft().result()
        finally:
            for future in started:
                future.cancel()
