"""Errors of the front door: wrong options and configs."""

from typing import ClassVar


class UsageError(Exception):
    """An option or config file that cannot be used as it stands."""

    exit_code: ClassVar[int] = 2


class ResourceError(Exception):
    """The cluster is smaller than what the command asks of it."""

    exit_code: ClassVar[int] = 1
