"""Outputs of a trained model for every clip of some splits, by one pool of Ray Data actors.

Knows nothing of metrics. Invariants: rows come back in the order of the index, whatever the number
of actors; the driver's memory does not grow with the number of clips.
"""

import logging
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from pipeline.storage import place_of
from training.cluster_config import ScaleConfig
from training.config import DataConfig
from training.data.rows import RowIndex
from training.evaluate_config import EvaluateConfig
from training.predict.apply import Models, Outputs
from training.predict.jobs import Batches, Gathered, Job
from training.predict.runner import Runner
from training.predict.vectors import vectors_table
from training.weights.card import Space
from training.weights.files import absolute_uri

_TASK_BATCHES = 16
"""Of a task of an actor, which begins with nothing read."""


class _Worker:
    """A Ray Data actor around a `Runner`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import ray

        self._runner = Runner(
            ray.get(settings["jobs"][0]),
            Models(*settings["models"]),
            DataConfig.model_validate(settings["data"]),
            ScaleConfig.model_validate(settings["scale"]),
            EvaluateConfig.model_validate(settings["evaluate"]),
        )

    def __call__(self, task: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        """Numbers of batches to a row for each of their jobs: its outputs as bytes."""
        # All rows of a task together, and not one batch after the other: Ray Data wraps what a
        # call raises, not what an iterator raises later.
        found = list(self._runner.outputs(task["id"].tolist()))
        return {
            "job": [each.job for each in found],
            "outputs": [pickle.dumps((each.positions, each.kinds)) for each in found],
        }


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
        "scale": scale.model_dump(),
        "evaluate": evaluate.model_dump(),
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
