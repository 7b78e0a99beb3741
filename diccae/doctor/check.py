"""Check: the answer to one question of the doctor, and the rule that no question raises.

Knows nothing of what is asked.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from pipeline.passwords import without_passwords


class Check(NamedTuple):
    """The answer to one question."""

    name: str
    ok: bool
    detail: str
    hint: str = ""
    """What to do; never empty if not ok."""


def never_raises(name: str, hint: str) -> Callable[[Callable[..., Check]], Callable[..., Check]]:
    """Turn an exception of a check into its failure."""

    def decorate(check: Callable[..., Check]) -> Callable[..., Check]:
        @functools.wraps(check)
        def wrapped(*args: str | None) -> Check:
            try:
                return check(*args)
            except Exception as error:
                said = without_passwords(f"{type(error).__name__}: {error}")
                return Check(name, False, said, hint)

        return wrapped

    return decorate
