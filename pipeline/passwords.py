"""Passwords in URLs, masked in what others may read: kept logs, pages.

Knows nothing of where the text goes. Invariant: the user and the host of a URL stay readable.
"""

import re
from typing import AnyStr

_PATTERN, _MASKED = r"(://[^/\s:@]*:)[^/\s@]+@", r"\1***@"
_IN_TEXT, _IN_BYTES = re.compile(_PATTERN), re.compile(_PATTERN.encode())


def without_passwords(text: AnyStr) -> AnyStr:
    """The text with *** in place of the password of every URL in it."""
    if isinstance(text, bytes):
        return _IN_BYTES.sub(_MASKED.encode(), text)
    return _IN_TEXT.sub(_MASKED, text)
