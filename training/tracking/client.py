"""RunHandle and mlflow_client: the way to a run in MLflow, and what its failures are made into.

Knows nothing of what a run holds. MLflow is imported once somebody asks for a client.
"""

import contextlib
import functools
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar

from pipeline.passwords import without_passwords

log = logging.getLogger(__name__)

_TIMEOUT, _TIMEOUT_S, _UPLOAD_TIMEOUT_S = "MLFLOW_HTTP_REQUEST_TIMEOUT", "15", "120"

P = ParamSpec("P")
T = TypeVar("T")


class RunHandle(NamedTuple):
    """All a process needs to write to a run; plain strings, so that it travels anywhere.

    `run_id` is empty if MLflow did not answer when the run was to be created: `catch_up` and
    `finish` create it from what `create_run` left in `out`.
    """

    uri: str
    run_id: str
    out: str = ""

    @property
    def shown(self) -> str:
        """The URI as it is told: in logs, messages and files that are passed on."""
        return without_passwords(self.uri)


@contextlib.contextmanager
def uploading() -> Iterator[None]:
    """A block that sends files: a server answers once it has stored a file of gigabytes."""
    before = os.environ.get(_TIMEOUT)
    if before in (None, _TIMEOUT_S):
        os.environ[_TIMEOUT] = _UPLOAD_TIMEOUT_S
    try:
        yield
    finally:
        if before in (None, _TIMEOUT_S):
            os.environ[_TIMEOUT] = _TIMEOUT_S


def one_line(error: BaseException) -> str:
    """The first line of what an error began with: MLflow wraps a refused connection five deep.

    An interrupt that was being handled when it happened is not its beginning.
    """
    while isinstance(deeper := error.__cause__ or error.__context__, Exception):
        error = deeper
    text = without_passwords(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def mlflow_client(uri: str) -> Any:
    """An MlflowClient; the import takes 2 to 5 s, so it waits until somebody logs."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    # The client's own default is 7 retries, minutes of silence and a warning each; this module
    # retries by itself.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    # Its 120 s, for each of the requests that end a stage, are minutes where a network drops them.
    os.environ.setdefault(_TIMEOUT, _TIMEOUT_S)
    # A server's client prints links on stdout, where `--json` answers.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def never_fatal(what: str) -> Callable[[Callable[P, T]], Callable[P, T | None]]:
    """Turn any failure of MLflow into one warning and None."""

    def decorate(call: Callable[P, T]) -> Callable[P, T | None]:
        @functools.wraps(call)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> T | None:
            try:
                return call(*args, **kwargs)
            except Exception as error:
                log.warning("MLflow could not %s (%s); the run goes on", what, one_line(error))
                return None

        return wrapped

    return decorate


def legal_name(key: str) -> str:
    """A metric's name as MLflow takes it: `@` is `_at_`, what else it refuses is `_`."""
    return re.sub(r"[^\w\-. :/]", "_", key.replace("@", "_at_"))
