"""Object storage at an address: moto's S3 API, with buckets, and with faults when told so.

Run as a script: `bucket.py PORT BUCKET...`. Knows nothing of what is stored.
`GET /box/faults?0.05` has that share of the requests answered with 503, as S3 does under load; a
request that is refused has changed nothing. `GET /box/hold?WORD` keeps whoever writes a name with
WORD in it waiting, until the next `hold` has those requests refused: what a test does meanwhile
happens in the middle of that write. `GET /box/held` says who waits, `GET /box/writes` who has
written what, both by address.
"""

import random
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import WSGIRequestHandler, make_server

Answer = Iterable[bytes]
_SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>busy</Message></Error>"


class Faulty:
    """The API behind a door that does not always open."""

    def __init__(self) -> None:
        self._api = DomainDispatcherApplication(create_backend_app)
        self._random = random.Random(0)
        self._share, self._asked, self._refused = 0.0, 0, 0
        self._word, self._let_go = "", threading.Event()
        self._held: list[str] = []
        self._writes: list[str] = []

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Answer:
        if environ["PATH_INFO"].startswith("/box/"):
            return self._told(environ, start)
        self._asked += 1
        if self._was_held(environ) or self._random.random() < self._share:
            self._refused += 1
            # The body is read first: else the client sees a broken connection, not the answer.
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("503 Slow Down", [("Content-Type", "application/xml")])
            return [_SLOW_DOWN]
        answer: Answer = self._api(environ, self._noting(environ, start))
        return answer

    def _noting(self, environ: dict[str, Any], start: Callable[..., Any]) -> Callable[..., Any]:
        """Keep who wrote, if the API says that it was done."""

        def started(status: str, *more: Any) -> Any:
            if status.startswith("2") and environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
                what = environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"]
                self._writes.append(" ".join((environ["REMOTE_ADDR"], *what)))
            return start(status, *more)

        return started

    def _was_held(self, environ: dict[str, Any]) -> bool:
        """Whether this request is one to hold; returns once it is let go."""
        writes = environ["REQUEST_METHOD"] in ("PUT", "POST")
        if not (writes and self._word and self._word in environ["PATH_INFO"]):
            return False
        let_go = self._let_go
        self._held.append(environ["REMOTE_ADDR"])
        let_go.wait()
        return True

    def _hold(self, word: str) -> None:
        self._let_go.set()
        self._word, self._held, self._let_go = word, [], threading.Event()

    def _told(self, environ: dict[str, Any], start: Callable[..., Any]) -> Answer:
        """What a test wants: another share of refusals, the counts, the names that are stored."""
        kind, value = environ["PATH_INFO"].split("/")[2], environ["QUERY_STRING"]
        if kind == "faults":
            self._share = float(value)
        if kind == "hold":
            self._hold(value)
        start("200 OK", [("Content-Type", "text/plain")])
        if kind == "names":
            buckets = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets
            return ["\n".join(buckets[value].keys.keys()).encode()]
        if kind == "held":
            return ["\n".join(self._held).encode()]
        if kind == "writes":
            return ["\n".join(self._writes).encode()]
        return [f"{self._asked} {self._refused}".encode()]


class _Quiet(WSGIRequestHandler):
    def log_request(self, *_: object) -> None:
        """Thousands of requests are no news."""


def main(port: int, buckets: list[str]) -> None:
    """Serve for ever; says `ready` when it does."""
    for bucket in buckets:
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].create_bucket(bucket, "us-east-1")
    server = make_server("0.0.0.0", port, Faulty(), threaded=True, request_handler=_Quiet)
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
