"""The decode child: a process with a deadline and a memory limit around native decoders.

Knows nothing of what it runs but a name. Invariant: a call returns or raises within its deadline,
whatever the native code below does: hang (also while holding the GIL), crash, abort, leak; and no
call is given the answer of another.
Run as `python -m pipeline.decode.sandbox FD MODULE:FUNCTION` it is the child itself.
"""

import ctypes
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection, Pipe
from typing import Any

import psutil

from pipeline.errors import PipelineError
from pipeline.reasons import Reason, Rejected

_START_TIMEOUT_S = 120.0
_MOST_FAILED_STARTS = 3
"""In a row. One may be an out-of-memory kill and costs its clip; after so many no child will start,
and going on would quarantine every clip there is."""
_POLL_S = 0.25
_STDERR_LIMIT = 1 << 20
_PR_SET_PDEATHSIG = 1


class Sandbox:
    """Runs `function(*args)` in a child that is kept alive, replaced when needed.

    One call is in flight at a time: `submit`, then `result`. Whoever gives a call up had
    better end its child (`close`): else the next call waits for that one, on its own time.
    """

    def __init__(
        self, function: str, *, timeout_s: float, max_calls: int, max_memory_mb: int
    ) -> None:
        """Args: function: `module:name`, importable in the child; timeout_s: deadline of a call;
        max_calls, max_memory_mb: after or above which a child is replaced, see `IngestConfig`.
        """
        self._function = function
        self._timeout_s = timeout_s
        self._max_calls = max_calls
        self._max_memory = max_memory_mb << 20
        self._child: subprocess.Popen[bytes] | None = None
        self._n_calls = 0
        self._call = 0
        self._submitted = 0.0
        self._n_failed_starts = 0
        self._not_started: Rejected | None = None
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the sandbox

    def submit(self, *args: Any) -> None:
        """Start a call; its time runs from now. That no child starts is for `result` to say."""
        self._call += 1
        self._not_started = None
        if self._child is None or self._child.poll() is not None:
            try:
                self._start()
            except Rejected as rejected:
                self._not_started = rejected
                self._n_failed_starts += 1
                return
            self._n_failed_starts = 0
        self._submitted = time.monotonic()
        try:
            self._pipe.send_bytes(pickle.dumps((self._call, args), pickle.HIGHEST_PROTOCOL))
        except (BrokenPipeError, ConnectionResetError):
            return  # The child died idle: result() sees it.

    def result(self) -> Any:
        """What the submitted call returned.

        Raises: Rejected, as the function raised it; or worker_died, timeout. PipelineError if no
        child has started several times in a row.
        """
        if self._not_started is not None:
            if self._n_failed_starts >= _MOST_FAILED_STARTS:
                raise PipelineError(
                    f"the decode child ({self._function}) did not start {self._n_failed_starts} "
                    f"times in a row: {self._not_started.detail.splitlines()[-1]}. Is there "
                    "memory for another 0.1 GB, and can the module be imported?"
                )
            raise Rejected(
                self._not_started.reason, f"while it started: {self._not_started.detail}"
            )
        call = None
        while call != self._call:  # A call that was given up is still answered, and first.
            payload = self._receive(self._timeout_s)
            self._n_calls += 1
            call, outcome, value = pickle.loads(payload)
        too_large = self._resident() > self._max_memory
        if self._n_calls >= self._max_calls or too_large:
            self.close()
        if outcome == "rejected":
            if value[0] == Reason.WORKER_DIED:
                self.close()  # It has no memory or handles left; another one begins with all.
            raise Rejected(Reason(value[0]), value[1])
        return value

    def close(self) -> None:
        """End the child."""
        if self._child is None:
            return
        self._child.kill()
        self._child.wait()
        self._pipe.close()
        self._child = None

    def _receive(self, timeout_s: float) -> bytes:
        while not self._pipe.poll(_POLL_S):
            if time.monotonic() > self._submitted + timeout_s:
                self.close()
                raise Rejected(Reason.TIMEOUT, f"no result after {timeout_s:g} s")
            if self._resident() > self._max_memory:
                self.close()
                limit = self._max_memory >> 20
                raise Rejected(Reason.WORKER_DIED, f"the decoder grew beyond {limit} MB")
        try:
            return self._pipe.recv_bytes()
        except (EOFError, OSError) as error:  # OSError: it died in the middle of its answer.
            code = self._child.wait() if self._child else 0
            last_words = self._last_words()
            self.close()
            raise Rejected(Reason.WORKER_DIED, f"{_name_exit(code)}{last_words}") from error

    def _resident(self) -> int:
        try:
            return psutil.Process(self._child.pid).memory_info().rss if self._child else 0
        except psutil.Error:
            return 0

    def _last_words(self) -> str:
        end = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, end - 300))
        text = self._stderr.read().decode(errors="replace").strip()
        return f": {text}" if text else ""

    def _start(self) -> None:
        self.close()
        self._pipe, theirs = Pipe()
        self._stderr.seek(0)
        self._stderr.truncate()
        self._child = subprocess.Popen(
            [sys.executable, "-m", "pipeline.decode.sandbox", str(theirs.fileno()), self._function],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
        )
        theirs.close()
        self._n_calls = 0
        # Importing the decoders is not the clip's time.
        self._submitted = time.monotonic()
        self._receive(_START_TIMEOUT_S)


def _name_exit(code: int) -> str:
    if code < 0:
        return f"the decoder was ended by {signal.Signals(-code).name}"
    return f"the decoder exited with code {code}"


def main(fd: int, function_name: str) -> None:
    """The child: answer calls until the parent is gone."""
    if sys.platform == "linux":
        # A child that hangs in native code would not see its parent's pipe close.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    module, name = function_name.split(":")
    function = getattr(importlib.import_module(module), name)
    pipe = Connection(fd)
    pipe.send_bytes(b"ready")
    while True:
        try:
            call, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = (call, "ok", function(*args))
        except Rejected as rejected:
            answer = (call, "rejected", (rejected.reason.value, rejected.detail))
        pipe.send_bytes(pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))
        if os.fstat(2).st_size > _STDERR_LIMIT:
            os.ftruncate(2, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
