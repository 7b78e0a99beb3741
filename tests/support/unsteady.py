"""Unsteady: a proxy before a real S3 API, which errs as object stores do.

Knows nothing of what is asked for.
"""

import contextlib
import http.client
import http.server
import threading
import time
from collections.abc import Iterator
from typing import ClassVar

import boto3
import pytest
from support.s3 import s3_server


class Unsteady(http.server.BaseHTTPRequestHandler):
    """Hands requests on to the server behind, after `delay_s`; every `fail_every`-th fails, and
    all whose path holds `refused`. The next `drop` get no answer, the next `lose` are done and
    answered by `status`."""

    protocol_version = "HTTP/1.1"
    behind = ("127.0.0.1", 0)
    fail_every = 0
    status = 503
    delay_s = 0.0
    refused = ""
    drop = lose = 0
    n_requests = n_failed = n_bytes = 0
    asked: ClassVar[list[tuple[str, int]]] = []
    """Path and bytes of each answer."""

    def answer(self) -> None:
        kind = type(self)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind.n_requests += 1
        if kind.drop > 0:
            kind.drop -= 1
            self.close_connection = True
            return
        if self.refused and self.refused in self.path:
            self.reply(403, {}, b"<Error><Code>AccessDenied</Code></Error>")
            return
        if kind.fail_every and kind.n_requests % kind.fail_every == 0:
            kind.n_failed += 1
            self.reply(self.status, {}, b"<Error><Code>Unsteady</Code></Error>")
            return
        time.sleep(self.delay_s)
        connection = http.client.HTTPConnection(*self.behind, timeout=30)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if kind.lose > 0:
            kind.lose -= 1
            self.reply(self.status, {}, b"<Error><Code>Unsteady</Code></Error>")
            return
        self.reply(answer.status, dict(answer.getheaders()), content)

    def reply(self, code: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(code)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date"):
                self.send_header(name, value)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        # Before who asked can go on and look.
        type(self).n_bytes += len(body)
        self.asked.append((self.path, len(body)))
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    def log_message(self, *args: object) -> None:
        return


@contextlib.contextmanager
def unsteady_bucket(name: str) -> Iterator[str]:
    """URI of a bucket behind an `Unsteady`; the environment names its address for as long."""
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unsteady)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    Unsteady.fail_every = Unsteady.drop = Unsteady.lose = 0
    with s3_server() as Unsteady.behind, pytest.MonkeyPatch.context() as patch:
        for variable, value in environment.items():
            patch.setenv(variable, value)
        boto3.client("s3").create_bucket(Bucket=name)
        yield f"s3://{name}"
        proxy.shutdown()
