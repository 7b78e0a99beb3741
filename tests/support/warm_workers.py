"""Ray's workers, forked from a process that has imported torch and pandas.

A worker takes 3 to 9 s of CPU before its first line, most of it for these. A training run starts
six of them, and the suite two hundred. Only packages of others are imported before: Ray and this
project's modules are read by each worker as ever. Knows nothing of tests. Invariant: a worker runs
Ray's own two entry scripts with the arguments, environment, folder and streams that Ray gave it;
jobs in processes of their own and in the box start their workers without this.

Three parts: `warm_workers` starts the server and makes a stand-in for Python; a Ray cluster started
with it as `sys.executable` starts this file as a script for each worker, which sends what Ray gave
it to the server over a socket and lives as long as the worker; the server forks.
"""

import array
import contextlib
import json
import os
import runpy
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SOCKET = "DICCAE_TESTS_WARM_WORKERS"
_PYTHON = "DICCAE_TESTS_PYTHON"
# Not Ray, whose core reads RAY_JOB_ID and the like when it is imported.
_IMPORTED = [
    "torch._dynamo",
    "torch.distributed",
    "safetensors.torch",
    "pandas",
    "pyarrow.compute",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "deltalake",
    "fsspec",
    "pydantic",
    "aiohttp",
    "google.protobuf.message",
    "jsonschema",
]
# Ray leaves the first one out for a worker without a runtime environment of its own.
_WORKERS = ("setup_worker.py", "default_worker.py")
_LENGTH = 4  # Bytes of a message's length.


@contextlib.contextmanager
def warm_workers() -> Iterator[str]:
    """A server, and the stand-in for `sys.executable` while a Ray cluster is started.

    The environment that is read on import must be set before.
    """
    with tempfile.TemporaryDirectory(prefix="warm") as folder:
        path = f"{folder}/socket"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(64)
        server = subprocess.Popen(
            [sys.executable, __file__, "serve", str(listener.fileno())],
            stdin=subprocess.PIPE,  # Its end is the server's.
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
        listener.close()
        starter = Path(folder) / "python"
        starter.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -IS {__file__} "$@"\n')
        starter.chmod(0o755)
        os.environ |= {_SOCKET: path, _PYTHON: sys.executable}
        try:
            yield str(starter)
        finally:
            assert server.stdin
            server.stdin.close()
            server.wait()


def _start(arguments: list[str]) -> int:
    """As Python would, for a worker by the server; its exit code."""
    if Path(arguments[0]).name not in _WORKERS:
        os.execv(os.environ[_PYTHON], [os.environ[_PYTHON], *arguments])
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.environ[_SOCKET])
    given = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    message = json.dumps(given).encode()
    streams = array.array("i", [0, 1, 2])
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)]
    server.sendmsg([len(message).to_bytes(_LENGTH, "big")], ancillary)
    server.sendall(message)
    return int.from_bytes(server.recv(1), "big")


def _received(asker: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """None of an asker that was killed before it had said all."""
    length, streams, _, _ = socket.recv_fds(asker, _LENGTH, 3)
    message = bytearray()
    while len(message) < int.from_bytes(length, "big"):
        part = asker.recv(2**20)
        if not part:
            break
        message += part
    whole = len(message) == int.from_bytes(length, "big")
    return (json.loads(message) if message and whole else None), streams


def _serve(listener: socket.socket) -> dict[str, Any] | None:
    """What a worker was given, in that worker; None in the server, when it ends."""
    waits = selectors.DefaultSelector()
    waits.register(sys.stdin, selectors.EVENT_READ)
    waits.register(listener, selectors.EVENT_READ)
    workers: dict[int, tuple[int, socket.socket]] = {}  # By the descriptor of a worker's process.
    while True:
        for key, _ in waits.select():
            if key.fileobj is sys.stdin:
                return None
            if key.fileobj is not listener:
                pid, asker = workers.pop(key.fd)
                waits.unregister(key.fd)
                os.close(key.fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(OSError):  # The asker was killed.
                    asker.sendall(bytes([code % 256]))
                asker.close()
                continue
            asker = listener.accept()[0]
            given, streams = _received(asker)
            if given and not (pid := os.fork()):
                waits.close()
                for descriptor in [*workers, *(s.detach() for _, s in workers.values())]:
                    os.close(descriptor)
                asker.close()
                listener.close()
                return given | {"streams": streams}
            for stream in streams:
                os.close(stream)
            if not given:
                asker.close()
                continue
            descriptor = os.pidfd_open(pid)
            workers[descriptor] = pid, asker
            waits.register(descriptor, selectors.EVENT_READ)


def _become(given: dict[str, Any]) -> None:
    """This process is the worker that Ray asked for."""
    import numpy as np

    for number, stream in enumerate(given["streams"]):
        os.dup2(stream, number)
        os.close(stream)
    os.setpgid(0, 0)
    os.chdir(given["folder"])
    os.environ.clear()
    os.environ.update(given["environment"])
    np.random.seed()  # Else the same in all.
    execvp = os.execvp

    def in_place(_: str, args: list[str]) -> None:
        os.execvp = execvp
        _, _, *worker = shlex.split(args[-1])  # exec <python> default_worker.py ...
        _run(worker)

    os.execvp = in_place  # type: ignore[assignment]
    _run(given["arguments"])


def _run(arguments: list[str]) -> None:
    sys.argv, sys.path[0] = arguments, os.path.dirname(arguments[0])
    runpy.run_path(arguments[0], run_name="__main__")


def _main() -> None:
    if sys.argv[1] != "serve":
        sys.exit(_start(sys.argv[1:]))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in _IMPORTED:
        __import__(name)
    given = _serve(socket.socket(fileno=int(sys.argv[2])))
    if given:
        _become(given)


if __name__ == "__main__":
    _main()
