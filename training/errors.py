"""TrainingError and its kinds: what training raises on purpose.

Knows nothing of how they are shown. Invariant: each message names the key or file, the value found,
what is allowed and the next step; `exit_code` is what the `diccae` command returns.
"""

from typing import ClassVar


class TrainingError(Exception):
    """A run that cannot start or go on for a reason the user can act upon."""

    exit_code: ClassVar[int] = 1


class ConfigMismatch(TrainingError):
    """A run folder holds a run of another config."""

    exit_code: ClassVar[int] = 2


class RunTaken(TrainingError):
    """Another start of the command took the run folder over: this one may write nothing more."""

    exit_code: ClassVar[int] = 4


class NonFiniteLoss(TrainingError):
    """The loss became NaN or infinite; the step is saved for replay."""


class WeightsError(TrainingError):
    """A weights file does not fit the encoder."""
