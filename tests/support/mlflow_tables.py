"""ready_tables: a new MLflow database on SQLite begins as a copy of one that has its tables.

MLflow makes them by all its migrations since the first, two seconds of CPU for each run of a test.
Knows nothing of runs. Invariant: the tables are those that MLflow made, once for all processes.
"""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from sqlalchemy import Engine


def ready_tables(shared: Path, patch: pytest.MonkeyPatch) -> None:
    """From now on, until `patch` is undone; imports MLflow.

    Args: shared: a folder of all processes of the suite.
    """
    from mlflow.store.db import utils
    from sqlalchemy import create_engine

    make, template = utils._initialize_tables, shared / "mlflow-tables.db"

    def initialize(engine: "Engine") -> None:
        place = engine.url.database
        if engine.dialect.name != "sqlite" or not place or os.path.getsize(place):
            make(engine)
            return
        with FileLock(f"{template}.lock"):
            if not template.exists():
                unfinished = template.with_suffix(".tmp")
                make(create_engine(f"sqlite:///{unfinished}"))
                unfinished.rename(template)
        engine.dispose()
        shutil.copyfile(template, place)

    patch.setattr(utils, "_initialize_tables", initialize)
