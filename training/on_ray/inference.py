"""Outputs of a trained model for every clip of some splits, by one pool of Ray Data actors.

The edge between saved models and arrays: knows nothing of metrics. Invariants: no randomness; rows
come back in the order of the index, whatever the number of actors; the driver's memory does not
grow with the number of clips.
"""

import logging
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from pipeline.side_by_side import side_by_side
from pipeline.storage import place_of
from training.cluster_config import ScaleConfig
from training.config import DataConfig
from training.data.reader import Batch, read_window
from training.data.rows import RowIndex
from training.evaluate_config import EvaluateConfig
from training.model.cpu import use_cpu
from training.predict.apply import Model, Models, Outputs
from training.predict.jobs import Batches, Gathered, Job, Part
from training.predict.vectors import vectors_table
from training.weights.card import Space
from training.weights.files import absolute_uri

_AHEAD = 3
"""Batches of an actor that are read or lie decoded while another one runs. From a bucket a batch of
64 clips takes 2 s to read and decode and 0.1 s of a GPU; 10 frames of 224 pixels of each and their
fbanks are 110 MB."""
_TASK_BATCHES = 16
"""Of a task of an actor, which begins with nothing read."""


class _Worker:
    """A Ray Data actor: reads and decodes batches of the jobs ahead, and runs them."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import ray

        data = DataConfig.model_validate(settings["data"])
        self.batches = Batches(ray.get(settings["jobs"][0]), data.frames_per_clip)
        device = "cuda" if settings["use_gpu"] else "cpu"
        if device == "cpu":
            use_cpu(settings["threads"])
        self.model = Model(Models(*settings["models"]), data, device, settings["precision"])
        self.cache = settings["cache"]

    def __call__(self, task: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        """Numbers of batches to a row for each of their jobs: its outputs as bytes."""
        rows: dict[str, list[Any]] = {"job": [], "outputs": []}
        # All rows of a task together, and not one batch after the other: Ray Data wraps what a
        # call raises, not what an iterator raises later.
        for clips in side_by_side(self._read, task["id"].tolist(), 1 + _AHEAD):
            for part, decoded in clips:
                found = part.outputs(self.model, decoded)
                rows["job"].append(part.job)
                rows["outputs"].append(pickle.dumps((decoded.position, found)))
        return rows

    def _read(self, number: int) -> list[tuple[Part, Batch]]:
        """The clips of a batch, decoded."""
        clips = []
        for part in self.batches.parts(number):
            (decoded,) = read_window(part.window, self.cache)
            clips.append((part, decoded))
        return clips


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
    n_batches = len(Batches(jobs, data.frames_per_clip))
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
        "precision": evaluate.precision,
        "threads": scale.n_threads,
        "cache": scale.cache,
    }


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
