"""The errors the pipeline raises on purpose.

Knows nothing of how they are shown. Invariant: each message says what, where, found, expected and
what to do; `exit_code` is what the `diccae` command returns.
"""

from typing import ClassVar


class PipelineError(Exception):
    """Work on a store that cannot go on, for a reason the user can act upon."""

    exit_code: ClassVar[int] = 1


class SourceError(PipelineError):
    """The list of clips or the folder of videos is not what it should be."""

    exit_code: ClassVar[int] = 2


class StoreError(PipelineError):
    """A feature store that is missing, damaged, or was written by something else."""


class DamagedShard(StoreError):
    """A shard that was read and is not what the clips table says, or is not there."""


class MassRemoval(PipelineError):
    """So many clips vanished from the source that it looks unmounted."""

    exit_code: ClassVar[int] = 2


class Unfinished(PipelineError):
    """An ingest committed what is good, and the store is not what was asked for."""

    def __init__(self, message: str, summary: dict[str, int | float]) -> None:
        """Args: summary: what the run did, as IngestSummary.to_json."""
        super().__init__(message)
        self.summary = summary


class TooManyFailures(Unfinished):
    """More clips failed than the run allows; the good ones are committed."""

    exit_code: ClassVar[int] = 3


class SpecWithheld(Unfinished):
    """Another spec does not come into force: clips that cannot be looked at would go with it."""

    exit_code: ClassVar[int] = 2


class StoreLocked(PipelineError):
    """Another process is writing to the store."""

    exit_code: ClassVar[int] = 4
