"""Frozen: the base of every config class.

Invariant: a config never changes, and a key it does not know is an error.
"""

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Immutable config: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
