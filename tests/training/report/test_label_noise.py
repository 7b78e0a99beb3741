"""The section on what errors are, from a results.json."""

import numpy as np
import pytest
from support.predicted import STREAMS, predictions

from training.report.label_noise import label_noise
from training.report.markup import percent
from training.vggsounder.labels import read_labels
from training.vggsounder.noise import split_errors


@pytest.fixture(scope="module")
def results() -> dict[str, object]:
    labels = read_labels()
    clips, classes = labels.clip_ids[:500], labels.classes
    rng = np.random.default_rng(0)
    scores = {stream: rng.random((500, 309), dtype=np.float32) for stream in STREAMS}
    given = predictions(clips, classes, rng.integers(0, 309, 500), scores)
    split = {stream: found.as_json() for stream, found in split_errors(given, labels).items()}
    return {"vggsounder": {"labels": labels.source, "label_noise": split}}


def test_every_stream_shows_its_errors_by_kind_and_names_become_no_markup(
    results: dict[str, object],
) -> None:
    split = results["vggsounder"]["label_noise"]
    split["audio"]["pairs"][0]["label"] = "<b>horn</b>"
    shown = label_noise(results)
    for stream in STREAMS:
        for kind in split[stream]["kinds"].values():
            assert percent(kind["share"]) in shown
    assert "vggsounder 1.0" in shown
    assert "&lt;b&gt;horn" in shown
    assert "<b>horn" not in shown


def test_a_run_that_was_not_judged_has_no_section() -> None:
    assert label_noise({"top1": {"fusion": 0.5}}) == ""
