"""Outputs of a trained model for every clip of some splits, by one pool of Ray Data actors.

The edge between saved models and arrays: knows nothing of metrics. Invariants: no randomness; rows
come back in the order of the index, whatever the number of actors; what comes back lies in files
that the system may page out, so the driver's memory does not grow with the number of clips.

Shapes: N clips of a job, F frames a pass sees, D token width, P projection, C classes.
"""

import logging
import os
import pickle
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.storage import place_of
from training.cluster_config import ScaleConfig
from training.config import DataConfig, EvaluateConfig
from training.data.order import FrameDraw, window_of
from training.data.reader import Batch, read_window
from training.data.rows import RowIndex
from training.model.cpu import use_cpu
from training.predict.apply import ByStream, Model, Models, Outputs, test_passes
from training.predict.vectors import vectors_table
from training.weights.card import Space
from training.weights.files import absolute_uri


class Job(NamedTuple):
    """Clips, and how the models are applied to them."""

    rows: RowIndex
    frames: int | None
    """Frames averaged over, see EvaluateConfig.frames; 1 is one pass, of the middle frames
    of as many equal parts of a clip as a pass sees frames."""
    kinds: tuple[Literal["z", "h", "p"], ...]
    """The outputs that come back; without "p" no classifier is applied."""


_ROWS = 64
"""Clips in one forward pass."""
_AHEAD = 3
"""Batches of an actor that are read or lie decoded while another one runs. From a bucket a batch of
64 clips takes 2 s to read and decode and 0.1 s of a GPU; 10 frames of 224 pixels of each and their
fbanks are 110 MB."""
_TASK_BATCHES = 16
"""Of a task of an actor, which begins with nothing read."""

Item = TypeVar("Item")
Read = TypeVar("Read")

Apply = Callable[[Sequence[Job], Models, DataConfig, ScaleConfig, EvaluateConfig], list[Outputs]]
"""Outputs for every row of each job's index, in its order: `run_jobs`, or the lab's own."""


class _Worker:
    """A Ray Data actor: reads and decodes batches of the jobs ahead, and runs them."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import ray

        data = DataConfig.model_validate(settings["data"])
        self.jobs: list[Job] = ray.get(settings["jobs"][0])
        self.ends = np.cumsum([len(job.rows) for job in self.jobs])
        self.batches = batches_of(int(self.ends[-1]))
        device = "cuda" if settings["use_gpu"] else "cpu"
        if device == "cpu":
            use_cpu(settings["threads"])
        self.model = Model(Models(*settings["models"]), data, device, settings["precision"])
        self.frames_per_clip = data.frames_per_clip
        self.cache = settings["cache"]

    def __call__(self, task: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        """Numbers of batches to a row for each of their jobs: its outputs as bytes."""
        rows: dict[str, list[Any]] = {"job": [], "outputs": []}
        # All rows of a task together, and not one batch after the other: Ray Data wraps what a
        # call raises, not what an iterator raises later.
        for parts in read_ahead(self._read, task["id"].tolist(), _AHEAD):
            for part in parts:
                clips, kinds = part.decoded, self.jobs[part.job].kinds
                outputs = self.model(clips.fbank, clips.frames, part.n_passes, "p" in kinds)
                kept = {kind: getattr(outputs, kind) for kind in kinds}
                rows["job"].append(part.job)
                rows["outputs"].append(pickle.dumps((clips.position, kept)))
        return rows

    def _read(self, number: int) -> "list[_Part]":
        """The clips of a batch, decoded, those of each job for themselves."""
        numbers = np.arange(*self.batches[number])
        job_of = np.searchsorted(self.ends, numbers, side="right")
        parts = []
        for at in np.unique(job_of).tolist():
            job = self.jobs[at]
            positions = numbers[job_of == at] - (self.ends[at] - len(job.rows))
            n_passes = test_passes(job.rows.spec.n_frames, self.frames_per_clip, job.frames)
            frames = FrameDraw(self.frames_per_clip * n_passes, random=False)
            (decoded,) = read_window(window_of(job.rows, positions[None], frames), self.cache)
            parts.append(_Part(at, n_passes, decoded))
        return parts


class _Part(NamedTuple):
    """Clips of one job in a batch."""

    job: int
    n_passes: int
    decoded: Batch


def read_ahead(read: Callable[[Item], Read], items: Iterable[Item], n_ahead: int) -> Iterator[Read]:
    """What `read` makes of each item, in order; the next `n_ahead` are read meanwhile, by threads.

    Raises: what `read` raises, when its item's turn comes.
    """
    rest, started = iter(items), deque[Future[Read]]()
    threads = ThreadPoolExecutor(n_ahead, "read")
    try:
        started.extend(threads.submit(read, item) for item in islice(rest, n_ahead))
        while started:
            found = started.popleft().result()
            started.extend(threads.submit(read, item) for item in islice(rest, 1))
            yield found
    finally:
        threads.shutdown(cancel_futures=True)


def batches_of(n_rows: int) -> list[tuple[int, int]]:
    """First and end of the clips that go through the models together, counted through all jobs.

    Blocks of equal size, each of at most four batches: on a CPU the size of a batch decides last
    digits, so that whoever cuts otherwise changes them.
    """
    block = max(1, n_rows // -(-n_rows // (4 * _ROWS)))
    return [
        (start, min(start + _ROWS, first + block, n_rows))
        for first in range(0, n_rows, block)
        for start in range(first, min(first + block, n_rows), _ROWS)
    ]


def run_jobs(
    jobs: Sequence[Job],
    models: Models,
    data: DataConfig,
    scale: ScaleConfig,
    evaluate: EvaluateConfig,
) -> list[Outputs]:
    """Outputs for every row of each job's index, in its order."""
    gathered = [Gathered(len(job.rows)) for job in jobs]
    for row in _rows(jobs, models, data, scale, evaluate):
        gathered[row["job"]].put(*pickle.loads(row["outputs"]))
    return [each.outputs() for each in gathered]


def _rows(
    jobs: Sequence[Job],
    models: Models,
    data: DataConfig,
    scale: ScaleConfig,
    evaluate: EvaluateConfig,
) -> Iterator[dict[str, Any]]:
    """What the actors return, in whatever order they finish."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    n_batches = len(batches_of(sum(len(job.rows) for job in jobs)))
    # As many for each actor.
    tasks = scale.num_workers * -(-n_batches // (scale.num_workers * _TASK_BATCHES))
    with ray.data.DataContext.current(context):
        numbers = ray.data.range(n_batches, override_num_blocks=min(n_batches, tasks))
        results = numbers.map_batches(
            _Worker,
            fn_constructor_kwargs={"settings": _settings(jobs, models, data, scale, evaluate)},
            batch_size=None,
            batch_format="numpy",
            # A second task would wait at an actor while another one has none.
            compute=ray.data.ActorPoolStrategy(
                size=scale.num_workers, max_tasks_in_flight_per_actor=1
            ),
            num_cpus=scale.cpus_per_worker,
            num_gpus=1 if scale.use_gpu else 0,
        )
    yield from results.iter_rows()


def _settings(
    jobs: Sequence[Job],
    models: Models,
    data: DataConfig,
    scale: ScaleConfig,
    evaluate: EvaluateConfig,
) -> dict[str, Any]:
    """What an actor is given."""
    import ray

    return {
        "data": data.model_dump(),
        # In the object store once, not in the arguments of every actor.
        "jobs": [ray.put(list(jobs))],
        "models": [uri and absolute_uri(uri) for uri in models],
        "use_gpu": scale.use_gpu,
        "precision": precision_of(evaluate, scale),
        "threads": scale.n_threads,
        "cache": scale.cache,
    }


def precision_of(evaluate: EvaluateConfig, scale: ScaleConfig) -> Literal["fp32", "bf16"]:
    """bf16 on GPUs, where fp32 takes ten times as long; fp32 on CPUs, which gain nothing by it."""
    return evaluate.precision or ("bf16" if scale.use_gpu else "fp32")


def paged_array(n_rows: int, width: int) -> NDArray[np.float32]:
    """An array in a file without a name: it is gone with the last reference to it.

    A plain view of it: Ray would copy a memmap into its message, and so into memory, as a whole.
    Raises: OSError if the folder of temporary files (TMPDIR) has no room for it.
    """
    with tempfile.TemporaryFile() as file:
        # Else a full disk is a SIGBUS at some write, and the process is gone without a word.
        os.posix_fallocate(file.fileno(), 0, n_rows * width * np.float32().nbytes)
        return np.memmap(file, np.float32, "w+", shape=(n_rows, width)).view(np.ndarray)


class Gathered:
    """Outputs of one job, put in their rows as they come."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self.kinds: dict[str, ByStream] = {kind: {} for kind in Outputs._fields}

    def put(self, positions: NDArray[np.int64], kinds: dict[str, ByStream]) -> None:
        """Some rows."""
        for kind, by_stream in kinds.items():
            for stream, x in by_stream.items():
                if stream not in self.kinds[kind]:
                    self.kinds[kind][stream] = paged_array(self.n_rows, x.shape[1])
                self.kinds[kind][stream][positions] = x

    def outputs(self) -> Outputs:
        """All rows."""
        return Outputs(**self.kinds)


def write_vectors(index: RowIndex, outputs: Outputs, space: Space, uri: str) -> None:
    """Parquet with the clips' `id` and `label`, and one embedding per stream, at a path or URI.

    Columns `audio`, `video`, `fusion` (fixed-size lists of float32), and `embedding`: the
    normalised mean of audio and video, what clustering uses.
    """
    import pyarrow.parquet as pq

    labels = [index.classes[i] if i >= 0 else None for i in index.labels_N]
    place, name = place_of(uri)
    with place.written(name) as path:
        pq.write_table(vectors_table(index.clip_ids_N.tolist(), labels, outputs.of(space)), path)
