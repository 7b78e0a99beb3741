"""A real S3 API on 127.0.0.1.

Knows nothing of what is stored in it.
"""

import contextlib
import urllib.request
from collections.abc import Iterator

from moto.server import ThreadedMotoServer


@contextlib.contextmanager
def s3_server() -> Iterator[tuple[str, int]]:
    """A server without any bucket: (host, port). One at a time.

    All servers of a process share their buckets, also with those that were stopped.
    """
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        reset = urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset, timeout=30).close()
        yield host, port
    finally:
        server.stop()
