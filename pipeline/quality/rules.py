"""RULES: what counts as a still picture, a silence, a duplicate, ... of measured signals.

Pure: knows nothing of how a signal is measured. Invariant: adding a rule is one entry of RULES; the
verdict of a rule depends on one signal and its threshold alone, so that a changed threshold is a
new `version` and costs no second look at any clip.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SourceError

Origin = Literal["features", "source", "catalogue"]


class Rule(NamedTuple):
    """A clip hits a rule when its signal is at least, or at most, the threshold."""

    name: str
    version: int
    """Raised with every change of the threshold, or of how the signal is measured."""
    signal: str
    """Column of the quality table; null there: the rule was not judged."""
    at: Literal["least", "most"]
    threshold: float
    origin: Origin
    """What the signal is made from: stored features, the source file, or the clips table."""
    means: str

    def verdicts(self, table: pa.Table) -> pa.ChunkedArray:
        """Whether each clip hits the rule; null where it was not judged."""
        compare = pc.greater_equal if self.at == "least" else pc.less_equal
        return compare(table[self.signal], pa.scalar(self.threshold, pa.float32()))

    @property
    def stamp(self) -> str:
        """Name and version, such as `still-1`."""
        return f"{self.name}-{self.version}"


DUPLICATE = "duplicate"
"""The one rule whose verdict depends on other clips, and on which of them are there."""

RULES = (
    Rule("still", 1, "motion", "most", 0.7, "features", "no part of the picture ever changes"),
    Rule("black_borders", 1, "border_frac", "least", 0.06, "features", "black bars, both sides"),
    Rule("silent", 1, "silent_frac", "least", 0.95, "features", "below -65 dB nearly throughout"),
    Rule("clipped", 1, "clipped_frac", "least", 0.01, "source", "samples at full scale"),
    Rule("one_sided", 1, "channel_gap_db", "least", 40.0, "source", "one channel of two is mute"),
    Rule("edit_list", 1, "edit_list_ms", "least", 1.0, "source", "pictures that must not be shown"),
    Rule("truncated", 2, "lost_frac", "least", 0.001, "source", "the file ends before its content"),
    Rule("missing", 1, "is_missing", "least", 1.0, "catalogue", "listed, but no file was there"),
    Rule(DUPLICATE, 1, "sameness", "least", 0.4, "features", "shows and sounds like another"),
)
"""All rules, in the order they are shown."""


def rules_named(names: Iterable[str]) -> Sequence[Rule]:
    """The rules of these names, in the order of RULES.

    Raises: SourceError naming the rules there are.
    """
    wanted = list(names)
    known = {rule.name for rule in RULES}
    for name in wanted:
        if name not in known:
            raise SourceError(f"leave_out: no rule {name!r}; there are {', '.join(sorted(known))}")
    return [rule for rule in RULES if rule.name in wanted]
