"""`diccae demo`: it makes the clips that README's steps make one after the other."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diccae.cli import main


class Ingesting(BaseException):
    """Raised where the demo has its clips."""


def test_the_steps_one_by_one_are_on_the_clips_of_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, int, int, int]] = []

    @contextlib.contextmanager
    def clips_written(
        folder: str | Path, n_train: int, n_test: int, seed: int, *_: int
    ) -> Iterator[Path]:
        made.append((Path(folder).name, n_train, n_test, seed))
        yield Path(folder)

    def stop(*given: Any, **more: Any) -> None:
        raise Ingesting

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("pipeline.synth.clips_written", clips_written)
    monkeypatch.setattr("diccae.stages.demo.clips_written", clips_written)
    monkeypatch.setattr("diccae.stages.demo.run_ingest", stop)
    assert main(["synth", "--out", str(tmp_path / "clips")]) == 0
    with pytest.raises(Ingesting):
        main(["demo", "--out", str(tmp_path / "demo")])
    assert len(made) == 2
    assert made[0] == made[1]
