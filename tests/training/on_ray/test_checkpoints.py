"""A worker's checkpoints where Ray Train is late with one, drops it, or refuses it."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
import torch

from pipeline.storage import Location
from training.attempt import UNHELD
from training.cluster_config import ScaleConfig
from training.on_ray import checkpoints
from training.on_ray.checkpoints import report_state, settle
from training.on_ray.fit import fit
from training.run.checkpoints import state_in
from training.run.edge import Written

Write = Callable[[Any, str], Any]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Write]:
    """What Ray Train has been given to write; it begins with nothing by itself."""
    given: list[Write] = []
    filesystem = ray.train.Checkpoint.from_directory(tmp_path).filesystem
    storage = SimpleNamespace(storage_filesystem=filesystem, experiment_fs_path=str(tmp_path))
    context = SimpleNamespace(get_storage=lambda: storage)

    def report(metrics: dict[str, Any], checkpoint: Any, **options: Any) -> None:
        given.append(options["checkpoint_upload_fn"])

    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train, "report", report)
    return given


def _state(step: int) -> dict[str, Any]:
    return {"step": step, "weight": torch.full((4,), float(step))}


def test_a_report_waits_for_the_one_before_also_where_its_writing_has_not_begun(
    late: list[Write], tmp_path: Path
) -> None:
    place = Location(tmp_path)
    report_state(_state(1), 0, place)
    second = threading.Thread(target=report_state, args=(_state(2), 0, place))
    second.start()
    second.join(0.5)
    assert second.is_alive(), "two are on their way"
    assert len(late) == 1
    late[0](None, "checkpoint_1")
    second.join(60)
    assert len(late) == 2
    # Ray holds the first for as long as its controller is busy, and lets go of it now.
    del late[0]
    third = threading.Thread(target=settle)
    third.start()
    third.join(0.5)
    assert third.is_alive(), "the second was taken for written once the first was let go of"
    late[0](None, "checkpoint_2")
    third.join(60)
    assert not third.is_alive()
    for step in (1, 2):
        state = state_in(tmp_path / f"checkpoint_{step}")
        assert state["weight"].tolist() == [step] * 4


def test_what_ray_holds_of_a_checkpoint_that_was_written_has_no_tensors(
    late: list[Write], tmp_path: Path
) -> None:
    report_state(_state(1), 0, Location(tmp_path))
    [write] = late
    write(None, "checkpoint_1")
    held = [cell.cell_contents for cell in write.__closure__ or ()]
    assert {} in held


def test_a_report_that_is_refused_is_not_waited_for(
    late: list[Write], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **options: Any) -> None:
        late.append(options["checkpoint_upload_fn"])
        raise RuntimeError("no actor")

    monkeypatch.setattr(ray.train, "report", refuse)
    with pytest.raises(RuntimeError, match="no actor"):
        report_state(_state(1), 0, Location(tmp_path))
    settle()


def _reports_while_ray_is_late(settings: dict[str, Any], written: Written) -> list[bool]:
    """Whether each of three checkpoints is taken for written as soon as it is reported."""
    from ray.exceptions import RayTaskError
    from ray.train.v2._internal.execution.checkpoint.sync_actor import (
        SynchronizationBarrierResetError,
    )
    from ray.train.v2._internal.execution.context import get_train_context

    context, place = get_train_context(), written.out.below("pretrain")
    began, found = threading.Event(), []
    # Its one thread for this has something else to do first.
    context.checkpoint_upload_threadpool.submit(began.wait)
    report_state(_state(1), 0, place)
    found.append(checkpoints._last.is_set())
    began.set()
    settle()

    def reset(_: str | None) -> str:
        cause = SynchronizationBarrierResetError("a worker was lost")
        raise RayTaskError("sync", "", cause)

    context._sync_checkpoint_dir_name_across_ranks = reset
    report_state(_state(2), 0, place)
    found.append(checkpoints._last.is_set())
    del context._sync_checkpoint_dir_name_across_ranks
    report_state(_state(3), 0, place)
    settle()
    found.append(checkpoints._last.is_set())
    return found


@pytest.mark.slow
def test_rays_own_train_drops_a_report_and_begins_late_with_another(
    ray_session: None, tmp_path: Path
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    scale = ScaleConfig(cpus_per_worker=0.5, max_failures=0)
    run = Written(Location(tmp_path), {}, UNHELD)
    found = fit(_reports_while_ray_is_late, {}, run, "pretrain", scale)
    assert found == [False, True, True]
    written = [state_in(path.parent) for path in sorted(tmp_path.glob("pretrain/*/state.pt"))]
    assert [state["step"] for state in written] == [1, 3]
