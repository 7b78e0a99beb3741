"""Destination: which MLflow a start writes to, and whether key, variable or default says so.

Knows nothing of what is written. Invariant: the driver decides once; a run's other processes are
told the URI, whatever their environment says.
"""

import os
from pathlib import Path
from typing import NamedTuple

from pipeline.passwords import without_passwords
from pipeline.storage import Location
from training.cluster_config import TrackingConfig

_URI, _EXPERIMENT = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"
"""MLflow's own variables, which its client would obey where it is not told a URI."""


class Destination(NamedTuple):
    """Where the MLflow run of a start is made."""

    uri: str
    """Empty: nowhere."""
    why: str
    """What names it."""
    experiment: str
    experiment_why: str

    def __str__(self) -> str:
        """For the screen."""
        if not self.uri:
            return (
                "metrics.jsonl alone: a bucket holds no MLflow file; --tracking.uri or the "
                f"variable {_URI} names a server"
            )
        return (
            f"MLflow at {without_passwords(self.uri)} ({self.why}), experiment {self.experiment} "
            f"({self.experiment_why})"
        )


def named(config: TrackingConfig) -> tuple[str, str]:
    """The MLflow URI that this start names, and by what; empty if neither key nor variable does."""
    if config.uri:
        return config.uri, "tracking.uri"
    uri = os.environ.get(_URI, "")
    return uri, _URI if uri else ""


def destination(config: TrackingConfig, out: str) -> Destination:
    """Where a run's MLflow run is made: where key or variable says, else in an SQLite file of the
    run folder, of which a bucket holds none."""
    uri, why = named(config)
    place = Location(out)
    if not uri and place.is_local:
        uri = f"sqlite:///{Path(place.path).resolve() / 'mlflow.db'}"
        why = f"the default: neither tracking.uri nor {_URI} is set"
    return Destination(uri, why, *_experiment(config))


def _experiment(config: TrackingConfig) -> tuple[str, str]:
    if config.experiment:
        return config.experiment, "tracking.experiment"
    name = os.environ.get(_EXPERIMENT, "")
    return (name, _EXPERIMENT) if name else ("diccae", "the default")
