"""report_state, last_state: a worker's checkpoints, to Ray Train and back.

Knows nothing of who trains. Invariant: training waits for a copy of its numbers in memory, and for
the checkpoint before to be on storage; not for storage itself. On its way is one at most.
"""

import threading
import weakref
from pathlib import Path
from typing import Any

import torch

from pipeline.storage import Location
from training.attempt import UNHELD, Attempt
from training.run.checkpoints import state_in, write_state

_last = threading.Event()
"""Of the checkpoint that this process reported last: it is on its way until this is set."""
_last.set()


def report_state(
    state: dict[str, Any], rank: int, place: Location, attempt: Attempt = UNHELD
) -> None:
    """Checkpoint: written by rank 0, below `place`, while training goes on; reported by all.

    Should it fail, Ray Train ends the workers with that error.

    Raises: RunTaken.
    """
    import ray.train
    from ray.train import CheckpointUploadMode

    attempt.check()
    if rank == 0:
        settle()
        _report(_copied({**state, "attempt": attempt.number}), place, attempt)
    else:
        beside = CheckpointUploadMode.ASYNC
        ray.train.report({"step": state["step"]}, checkpoint_upload_mode=beside)


def _report(kept: dict[str, Any], place: Location, attempt: Attempt) -> None:
    """Have Ray write a state in a thread. Args: kept: emptied once it is written."""
    global _last
    import ray.train
    from ray.train import CheckpointUploadMode

    storage = ray.train.get_context().get_storage()
    filesystem, root = storage.storage_filesystem, storage.experiment_fs_path
    # On its way from here, not from where a thread of Ray's begins with it: that may be later than
    # the next report. Its own event, since Ray lets go of this one later than that, too.
    written = _last = threading.Event()

    def write(_: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        try:
            write_state(kept, place.below(name), attempt.check)
        finally:
            kept.clear()  # Ray holds this function until its controller has heard of the result.
            written.set()
        return ray.train.Checkpoint(f"{root}/{name}", filesystem)

    # Where another worker was lost meanwhile, Ray drops the report without a word: then nobody
    # has this function any more.
    weakref.finalize(write, written.set)
    try:
        # Ray asks for a folder to copy; nothing is copied, and nothing of it may be deleted after:
        # the state goes to storage as it is written.
        ray.train.report(
            {"step": kept["step"]},
            ray.train.Checkpoint(root, filesystem),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=write,
            delete_local_checkpoint_after_upload=False,
        )
    except BaseException:
        written.set()  # What was raised holds the function.
        raise


def settle() -> None:
    """Wait until what was reported is on storage, or has failed."""
    _last.wait()


def last_state() -> dict[str, Any] | None:
    """The newest checkpoint of this run, or None."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return state_in(Path(folder))


def _copied(value: Any) -> Any:
    """With every tensor's numbers as they are now, in memory of the host."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(part) for part in value)
    return value
