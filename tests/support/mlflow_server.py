"""A real MLflow server for a test.

Knows nothing of what is tracked. Invariant: it listens on 127.0.0.1 alone and writes into its
folder.
"""

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

from support.polling import wait_until
from support.ports import free_port

_WITHOUT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
"""What a test needs none of, and waits for."""


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class Server:
    """An MLflow server on 127.0.0.1 that a test can kill and start again.

    Args: options: of `mlflow server`, besides.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self.options = options
        self.port = free_port()
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        database = f"sqlite:///{self.folder}/mlflow.db"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers=1"]
        command += ["--port", str(self.port), "--backend-store-uri", database]
        command += ["--artifacts-destination", str(self.folder / "artifacts"), *self.options]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.folder,
                env={**os.environ, **_WITHOUT},
            )
        wait_until(lambda: answers(f"{self.uri}/health"), 400, "the MLflow server")

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
