"""open_filesystem: fsspec's filesystem of a URI, set to outlive what passes by itself.

Knows nothing of what is stored. Invariant: a request that was refused for now (throttled, a
server's error, nobody there) is repeated, and a line says so; one answered by no (missing,
forbidden) fails at once.

All that is set for retries, and what is left as the libraries have it:
  s3://   `ATTEMPTS` over 29 s, each with the time-outs below; the library alone gives up after 2 s,
          and at once where nobody answers
  gs://   six attempts over 31 s, gcsfs's own
  Delta   `DELTA_RETRIES`, without a word: `Location.asked_if_slow` speaks for it
With 2 s for each connection that is 51 s, less than after which another start may have taken the
run over (`LEASE_STALE_S`, and a third of it): a write that is repeated comes before that. (The next
attempt of the same job does not wait so long: what its dead one still writes then is a name that
nothing points at, or the same bits once more.) A server that takes requests and answers none costs
30 s more each time, and so may keep a writer for longer than its lease.
"""

import copy
import logging
import time
from typing import Any

import fsspec

_log = logging.getLogger(__name__)

ATTEMPTS = 11
"""Waits between them grow from 0.1 s by 1.7: 29 s in all."""
_ONE_REQUEST = {
    # The rounds below repeat it; those of botocore in each of them would wait for minutes.
    "retries": {"total_max_attempts": 1},
    "connect_timeout": 2,
    "read_timeout": 30,
}
_TOLD_EVERY_S = 60.0
"""Of a store that errs now and then, or is away for longer, one line a minute is enough."""
DELTA_RETRIES = {"max_retries": "10", "retry_timeout": "45s"}

_CHAINED = (
    *("blockcache", "cached", "filecache", "simplecache"),
    *("dir", "libarchive", "reference", "tar", "zip"),
)
"""Kinds of place that show what is in another one, named behind `::`. Anywhere else that is part of
a name."""


def open_filesystem(uri: Any) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem and the path in it; listings are not cached, others write there, too.

    Raises: ImportError or ValueError for a kind of place that fsspec does not know or cannot load.
    """
    options: dict[str, Any] = {"use_listings_cache": False}
    kind = fsspec.utils.get_protocol(str(uri))
    if kind in ("s3", "s3a"):
        _repeat_for_longer()
        options["config_kwargs"] = copy.deepcopy(_ONE_REQUEST)  # botocore adds to it.
    elif kind in ("gs", "gcs"):
        _tell_what_google_repeats()
    if "::" not in str(uri) or kind in _CHAINED:
        filesystem, path = fsspec.core.url_to_fs(uri, **options)
        return filesystem, path
    # fsspec would take the rest of a name such as C++::lesson.mp4 for another place.
    filesystem, _ = fsspec.core.url_to_fs(_top(str(uri), kind), **options)
    return filesystem, filesystem._strip_protocol(str(uri))


def _top(uri: str, kind: str) -> str:
    """The host or bucket of a URI without a chain; of a path, the local disk."""
    below = uri.removeprefix(f"{kind}://")
    return "/" if below == uri else f"{kind}://{below.partition('/')[0]}/"


def _repeat_for_longer() -> None:
    # No arguments of a filesystem: they hold for all of a process.
    import s3fs

    s3fs.S3FileSystem.retries = ATTEMPTS
    s3fs.core.set_custom_error_handler(_may_pass)
    # What it repeats unasked (a time-out, an answer that stops half-way), it repeats silently.
    s3fs.core.S3_RETRYABLE_ERRORS = ()


def _may_pass(error: BaseException) -> bool:
    """Asked by s3fs after each failure, before it waits."""
    import botocore.exceptions as botocore
    from aiohttp import ClientPayloadError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import IncompleteRead

    if isinstance(error, botocore.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        passes = bool(status >= 500 or status == 429)
    else:
        unheard = botocore.ConnectionError, botocore.HTTPClientError, TimeoutError
        cut_short = ClientPayloadError, IncompleteRead, ResponseParserError
        passes = isinstance(error, (*unheard, *cut_short))
    if passes:
        _tell(error)
    return passes


def _tell_what_google_repeats() -> None:
    import gcsfs.retry

    decide = gcsfs.retry.is_retriable
    if decide.__module__ != gcsfs.retry.__name__:
        return  # Told already.

    def decide_and_tell(error: BaseException) -> bool:
        passes = bool(decide(error))
        if passes:
            _tell(error)
        return passes

    # gcsfs has no place for it: this is what it asks after each failure but the last.
    gcsfs.retry.is_retriable = decide_and_tell


_told_at = -_TOLD_EVERY_S


def _tell(error: BaseException) -> None:
    # Else a wrong endpoint is half a minute of silence.
    global _told_at
    if time.monotonic() - _told_at >= _TOLD_EVERY_S:
        _told_at = time.monotonic()
        _log.warning("waiting for storage: %s; trying again", error)
