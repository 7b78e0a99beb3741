"""Limits: shares of vanished and of failed clips above which an ingest is refused, clips without
which no other spec comes into force, and its words.

Pure; knows nothing of decoding or commits. Invariant: a clip that vanished is no failure, and
one alone ends no run.
"""

import shlex
from collections import Counter
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import IngestConfig
from pipeline.errors import MassRemoval, SpecWithheld, TooManyFailures
from pipeline.reasons import Reason

_MOST_PLACES = 3
_FEWEST_JUDGED = 100
"""Clips that a share of failures is of at least, where the store has so many."""

FAILURE_COLUMNS = ["clip_id", "reason", "detail", "spec_hash"]
"""Columns of the clips table that `Failures.of_spec` needs."""


def refuse_vanished(n_vanished: int, n_todo: int, config: IngestConfig) -> None:
    """What the plan refuses when it looks, while the clips are decoded: n_vanished of the n_todo
    had a file then and have none now.

    Raises: MassRemoval.
    """
    # Of the clips to do, not of all: the end of another spec that was stopped has few of them.
    # One file that went is no mount that did.
    if n_vanished <= max(1.0, config.max_removed_frac * n_todo):
        return
    raise MassRemoval(
        f"{n_vanished} of the {n_todo} clips to decode vanished since the run began, more than "
        f"{config.max_removed_frac:.0%}. Is the folder still mounted? Clips decoded before are "
        "committed, none is written down as missing, and the spec in force stays as it is. Mount "
        "it and run the same again; use --allow-mass-delete if they are meant to go."
    )


class OutOfReach(NamedTuple):
    """Clips of the data set that another spec has nothing of, and that could not be looked at. They
    would go without a word if that spec came into force."""

    n_clips: int
    places: list[str]
    """Where nothing could be read, or which of several files is meant nobody can say."""

    def __str__(self) -> str:
        told = ", ".join(self.places[:_MOST_PLACES])
        more = len(self.places) - _MOST_PLACES
        return (
            f"{self.n_clips} clips of the data set have no such features and could not be looked "
            f"at: {told}{f' and {more} more' if more > 0 else ''} cannot be read, or the clip has "
            "several files"
        )


def refuse_out_of_reach(clips: OutOfReach | None, summary: dict[str, int | float]) -> None:
    """Args: summary: as SpecWithheld takes it. Raises: SpecWithheld if there are any."""
    if clips is not None:
        raise SpecWithheld(
            f"{clips}. The spec in force stays as it was; what is decoded is kept for the other "
            "one. Make these places readable, leave each clip one file, and run the same again: "
            "it decodes what is left.",
            summary,
        )


class Failures(NamedTuple):
    """How many of some clips failed to decode."""

    by_reason: Counter[str]
    n_clips: int
    example: str = ""
    of_at_least: int = 0
    """Clips that the share is of, if `n_clips` are fewer."""

    @classmethod
    def of_run(cls, by_reason: Counter[str], n_clips: int, n_of_spec: int) -> "Failures":
        """Of clips that one run decoded for the first time: a handful in a store of many says
        nothing of the others. Args: n_of_spec: clips decoded under its spec, by whatever run."""
        return cls(by_reason, n_clips, of_at_least=min(n_of_spec, _FEWEST_JUDGED))

    @classmethod
    def of_spec(cls, states: pa.Table, spec_hash: str) -> "Failures":
        """Of all clips decoded under a spec, by whatever run. Args: states: FAILURE_COLUMNS of the
        clips under it."""
        is_there = pc.not_equal(states["reason"], Reason.MISSING.value).fill_null(True)
        own = states.filter(pc.and_(pc.equal(states["spec_hash"], spec_hash), is_there))
        failed = own.filter(pc.is_valid(own["reason"]))
        first = next(iter(failed.slice(0, 1).to_pylist()), None)
        example = f"{first['clip_id']}: {first['detail'] or first['reason']}" if first else ""
        return cls(Counter(failed["reason"].to_pylist()), len(own), example)

    @property
    def n_failed(self) -> int:
        """Clips that failed."""
        return self.by_reason.total()

    def are_too_many(self, config: IngestConfig) -> bool:
        """Whether the config allows fewer."""
        return self.n_failed > config.max_failed_frac * max(self.n_clips, self.of_at_least)


def refuse_failures(
    failures: Failures,
    config: IngestConfig,
    store_uri: str,
    summary: dict[str, int | float],
    *,
    withheld: str | None,
) -> None:
    """Args: summary: as TooManyFailures takes it; withheld: hash of the spec that was not put in
    force for them, if one was not.

    Raises: TooManyFailures.
    """
    if not failures.are_too_many(config):
        return
    reasons = ", ".join(f"{name} {n}" for name, n in failures.by_reason.most_common())
    example = f"; such as {failures.example}" if failures.example else ""
    again = 0 if withheld else int(summary["failed"]) - failures.n_failed
    said = (
        f"{failures.n_failed} of {failures.n_clips} clips failed ({reasons}{example}), more than "
        f"{config.max_failed_frac:.0%}{f'; {again} more failed again' if again else ''}. "
    )
    look = f"diccae store failures --store {shlex.quote(store_uri)}"
    if withheld:
        said += (
            f"The spec in force stays as it was; the good ones are kept for this one. See "
            f'"{look} --spec {withheld}". To put it in force all the same, run it again with a '
            "higher --ingest.max-failed-frac."
        )
    else:
        said += f'The {summary["ok"]} good ones are committed. See "{look}".'
    raise TooManyFailures(said, summary)
