"""Whether a cluster answers where RAY_ADDRESS says that there is one.

Knows nothing of Ray's protocol. Invariant: an address where nothing answers costs seconds and is
named; Ray itself would wait for minutes without a word.
"""

import contextlib
import socket
import time
from collections.abc import Iterator

from diccae.errors import ResourceError

PATIENCE_S = 10.0
"""A head may be starting."""
_TRY_S, _PAUSE_S = 2.0, 0.5


def await_answer(address: str) -> None:
    """Connect to HOST:PORT, a few times; any other address is left to Ray.

    Raises: ResourceError if nothing answers there.
    """
    host, colon, port = address.rpartition(":")
    if not colon or "/" in address:
        return
    if not port.isdecimal() or int(port) > 65535:
        raise nobody_at(address)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(OSError, UnicodeError):  # A name that is too long for DNS.
            socket.create_connection((host.strip("[]"), int(port)), _TRY_S).close()
            return
        if time.monotonic() > deadline:
            raise nobody_at(address)
        time.sleep(_PAUSE_S)


@contextlib.contextmanager
def told_if_nobody_answers(address: str) -> Iterator[None]:
    """A block that joins a cluster. Raises: ResourceError if Ray's client (ray://) found none."""
    try:
        yield
    except ConnectionError:
        # Of HOST:PORT something answers, and of `auto` Ray says what it looked for.
        if not address.startswith("ray://"):
            raise
        raise nobody_at(address) from None


def nobody_at(address: str) -> ResourceError:
    """What to say of an address where no cluster is."""
    return ResourceError(
        f"RAY_ADDRESS={address}: no cluster answers there; start one (ray start --head), or unset "
        "it to use this machine"
    )
