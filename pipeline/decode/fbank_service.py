"""A process that makes the fbanks of the decode actors around it.

Importing torch takes 0.6 GB and seconds of a process: one for eight CPUs pays for it, not each.
Knows nothing of clips, shards or Ray. Invariant: a service that dies is started again and asked
again; those it works for notice nothing but the time.
Run as `python -m pipeline.decode.fbank_service NAME SPEC [attached]` it is the service itself.
"""

import os
import subprocess
import sys
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener

import numpy as np

from pipeline.config import FeatureSpec
from pipeline.decode.payload import fbanks_function
from pipeline.errors import PipelineError

CPUS_PER_SERVICE = 8
"""An fbank of a 10 s clip takes 20 ms; decoding one of 256x144 takes 70 ms elsewhere."""

ENVIRONMENT = {
    # torch and MKL read these when they are loaded: one thread, and the branch of MKL that rounds
    # alike on every x86-64 CPU.
    "OMP_NUM_THREADS": "1",
    "MKL_CBWR": "COMPATIBLE",
    # Keep freed memory instead of faulting it in again for the next operation: 4.2 ms of CPU for
    # the fbank of 2 s instead of 5.
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_ARENA_MAX": "2",
}
_KEY_VARIABLE = "DICCAE_FBANK_KEY"
_ATTACHED = "attached"
_GIVE_UP_S = 120.0
_IDLE_S = 5.0
_START_S = 60.0


class SharedFbanks:
    """Fbanks made by a service of this machine (features.Fbanks).

    The first to ask starts the service; it ends by itself when nobody is connected to it.
    """

    def __init__(
        self, spec: FeatureSpec, name: str, key: bytes, *, is_attached: bool = False
    ) -> None:
        """Args: name: equal for all who share a service; key: a secret they share; is_attached:
        a service started here ends with this process, however that ends; else others may go on
        using it."""
        self._spec = spec
        self._name = name
        self._key = key
        self._is_attached = is_attached
        self._connection: Connection | None = None
        self._started: subprocess.Popen[bytes] | None = None

    def __call__(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        """Raises: PipelineError if a waveform cannot be used, the key is refused, or no service
        stays alive.
        """
        deadline = time.monotonic() + _GIVE_UP_S
        while True:
            try:
                connection = self._connection or self._connect(deadline)
                connection.send(waveforms)
                fbanks, error = connection.recv()
            except (EOFError, ConnectionError) as gone:
                self._connection = None
                if time.monotonic() > deadline:
                    raise PipelineError(
                        f"no fbank service stayed alive for {_GIVE_UP_S:.0f} s: its messages are "
                        "in the log of the decode actor. Is there memory for another 0.7 GB?"
                    ) from gone
                continue
            if error:
                raise PipelineError(f"the fbank service failed: {error}")
            made: list[np.ndarray] = fbanks
            return made

    def prepare(self) -> None:
        """Start the service now: importing torch takes longer than decoding the first clips."""
        self._started = self._start()

    def close(self) -> None:
        """Let go of the service, and end it if it was started here."""
        if self._connection is not None:
            self._connection.close()
        if self._started is not None:
            self._started.kill()
            self._started.wait()
            if self._started.stdin is not None:
                self._started.stdin.close()

    def _connect(self, deadline: float) -> Connection:
        """Raises: ConnectionError if no service answers until then."""
        while True:
            try:
                self._connection = Client(_address(self._name), authkey=self._key)
                return self._connection
            except AuthenticationError as error:
                raise PipelineError(
                    f"the fbank service {self._name} refused the key: another run or user has "
                    "taken its name. Run it again."
                ) from error
            except ConnectionRefusedError:
                if time.monotonic() > deadline:
                    raise
                if self._started is None or self._started.poll() is not None:
                    self._started = self._start()
                time.sleep(0.1)

    def _start(self) -> subprocess.Popen[bytes]:
        # A session of its own: a Ctrl-C that is meant for the driver would end it in mid-answer.
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "pipeline.decode.fbank_service"),
                *(self._name, self._spec.canonical_json()),
                *([_ATTACHED] if self._is_attached else []),
            ],
            # The end of this process closes the pipe, and nothing is ever written to it.
            stdin=subprocess.PIPE if self._is_attached else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env={
                **os.environ,
                **ENVIRONMENT,
                _KEY_VARIABLE: self._key.hex(),
                "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
            },
        )


class _Service:
    """Answers those who connect, each in a thread of its own."""

    def __init__(self, listener: Listener, spec: FeatureSpec) -> None:
        self._listener = listener
        self._fbanks = fbanks_function(spec)
        self._n_clients = 0
        self._idle_since = time.monotonic() + _START_S
        self._lock = threading.Lock()

    def run(self) -> None:
        threading.Thread(target=self._end_when_idle, daemon=True).start()
        while True:
            try:
                connection = self._listener.accept()
            except (AuthenticationError, EOFError, ConnectionError):
                continue
            with self._lock:
                self._n_clients += 1
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: Connection) -> None:
        try:
            while True:
                waveforms = connection.recv()
                try:
                    answer = self._fbanks(waveforms), ""
                except Exception as error:
                    answer = [], f"{type(error).__name__}: {error}"
                connection.send(answer)
        except (EOFError, ConnectionError):
            pass
        finally:
            connection.close()
            with self._lock:
                self._n_clients -= 1
                self._idle_since = time.monotonic()

    def _end_when_idle(self) -> None:
        while True:
            time.sleep(1.0)
            with self._lock:
                if not self._n_clients and time.monotonic() > self._idle_since + _IDLE_S:
                    os._exit(0)


def _address(name: str) -> str:
    # Linux's abstract names leave no file behind and are not bound by the length of a path.
    return f"\0diccae-fbank-{name}"


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main(name: str, spec: str, attached: str = "") -> None:
    """The service. Args: attached: whether to end when stdin is closed."""
    key = bytes.fromhex(os.environ.pop(_KEY_VARIABLE))
    if attached == _ATTACHED:
        # Left alone it would hold 0.7 GB and the terminal's stderr for a minute more, and whoever
        # reads the command's output through a pipe would wait for it.
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        # Before torch is imported: of several started at once all but one end here.
        listener = Listener(_address(name), backlog=128, authkey=key)
    except OSError:
        return
    _Service(listener, FeatureSpec.model_validate_json(spec)).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
