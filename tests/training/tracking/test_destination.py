"""Key before variable before default, for URI and experiment alike."""

from pathlib import Path

import pytest

from training.cluster_config import TrackingConfig
from training.tracking.destination import destination

KEY, VARIABLE = "http://key:5000", "http://variable:5000"


@pytest.mark.parametrize(
    ("key", "variable", "uri", "why"),
    [
        (KEY, VARIABLE, KEY, "tracking.uri"),
        (None, VARIABLE, VARIABLE, "MLFLOW_TRACKING_URI"),
        (None, "", "", ""),
    ],
)
def test_the_key_goes_before_the_variable(
    key: str | None, variable: str, uri: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    found = destination(TrackingConfig(uri=key), "s3://bucket/run")
    assert (found.uri, found.why) == (uri, why)


def test_a_folder_has_a_file_of_its_own_where_nothing_is_named(tmp_path: Path) -> None:
    found = destination(TrackingConfig(), str(tmp_path))
    assert found.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert "(the default: neither tracking.uri nor MLFLOW_TRACKING_URI is set)" in str(found)


def test_a_bucket_has_none_and_says_what_names_one() -> None:
    said = str(destination(TrackingConfig(), "s3://bucket/run"))
    assert "--tracking.uri or the variable MLFLOW_TRACKING_URI names a server" in said


def test_an_experiment_is_named_by_key_variable_or_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "team")
    found = [
        destination(TrackingConfig(experiment=key), "s3://b/run")[2:] for key in ("mine", None)
    ]
    assert found == [("mine", "tracking.experiment"), ("team", "MLFLOW_EXPERIMENT_NAME")]
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    unnamed = destination(TrackingConfig(), "s3://b/run")
    assert unnamed[2:] == ("diccae", "the default")
