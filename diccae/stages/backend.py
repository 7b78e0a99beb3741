"""Backend: where the stages of a run compute: the Ray cluster, or this process alone.

Knows nothing of what a stage computes. Invariant: the backend changes no bit of what is trained on
the same peers.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from diccae.config import RunConfig
from diccae.nodes.every_node import watched_nodes
from diccae.reach import check_cache, check_reach
from diccae.resources import Demand, check_fits, inference_demands, is_alone, scale_note, start_ray
from diccae.run_folder import RunFolder
from diccae.stages.run_record import Say, attached_run, known_run, tracking_run
from training.attempt import Attempt
from training.cluster_config import ScaleConfig
from training.config import DataConfig
from training.data.rows import RowIndex
from training.evaluate_config import EvaluateConfig
from training.lab.lab import Lab
from training.on_ray.inference import run_jobs
from training.predict.apply import Models, Outputs
from training.predict.jobs import Apply, Job
from training.predict.runner import run_here
from training.run.checkpoints import Span
from training.run.edge import Written
from training.run.pinned import Pinned
from training.tracking.client import RunHandle

Tags = Mapping[str, str] | None


class Backend(Protocol):
    """What stages ask of it."""

    @property
    def apply(self) -> Apply:
        """Applies models to clips."""
        ...

    def ready(
        self,
        demands: list[Demand],
        paths: Mapping[str, str | None],
        out: str | None,
        scale: ScaleConfig,
    ) -> None:
        """Start what is needed.

        Args: paths: by option, what the nodes read. out: the run folder, if there is one.
        Raises: ResourceError if it does not fit; UsageError for a path that not all nodes reach,
        or a `scale.shard_cache` that not all can use.
        """
        ...

    def ready_to_apply(
        self, paths: Mapping[str, str | None], out: str | None, scale: ScaleConfig
    ) -> None:
        """`ready`, where models are applied to clips of a store and nothing is trained."""
        ...

    def track(
        self, folder: RunFolder, config: RunConfig, data: Pinned, tags: Tags, say: Say
    ) -> RunHandle:
        """The MLflow run of a folder."""
        ...

    def attach(self, folder: RunFolder, config: RunConfig, data: Pinned, say: Say) -> RunHandle:
        """The same for a later stage, which makes one only where it names an MLflow."""
        ...

    def watched_nodes(
        self, attempt: Attempt, handle: RunHandle, measure: bool
    ) -> AbstractContextManager[None]:
        """While a stage runs: logs of the nodes, and what they use if `measure`."""
        ...

    def note(self, scale: ScaleConfig, say: Say) -> None:
        """Say what a reader of the times has to know."""
        ...

    def pretrain(
        self, config: RunConfig, data: Pinned, written: Written, span: Span
    ) -> dict[str, Any]:
        """Returns: the last metrics and times."""
        ...

    def finetune(
        self, config: RunConfig, train: RowIndex, encoder_uri: str, written: Written
    ) -> dict[str, Any]:
        """Returns: the last metrics."""
        ...


class OnRay:
    """The cluster of this job, or one inside this process."""

    watched_nodes = staticmethod(watched_nodes)

    def apply(
        self,
        jobs: Sequence[Job],
        models: Models,
        data: DataConfig,
        scale: ScaleConfig,
        evaluate: EvaluateConfig,
    ) -> list[Outputs]:
        """See `Backend`."""
        run = run_here if is_alone(scale) else run_jobs
        return run(jobs, models, data, scale, evaluate)

    def ready(
        self,
        demands: list[Demand],
        paths: Mapping[str, str | None],
        out: str | None,
        scale: ScaleConfig,
    ) -> None:
        """See `Backend`."""
        start_ray()
        check_fits(demands)
        check_reach(paths, out)
        check_cache(paths["--store"] or "", scale.cache)

    def ready_to_apply(
        self, paths: Mapping[str, str | None], out: str | None, scale: ScaleConfig
    ) -> None:
        """See `Backend`."""
        if is_alone(scale):
            check_cache(paths["--store"] or "", scale.cache)
        else:
            self.ready(inference_demands(scale), paths, out, scale)

    def track(
        self, folder: RunFolder, config: RunConfig, data: Pinned, tags: Tags, say: Say
    ) -> RunHandle:
        """See `Backend`."""
        return tracking_run(folder, config, data, say, tags)

    def attach(self, folder: RunFolder, config: RunConfig, data: Pinned, say: Say) -> RunHandle:
        """See `Backend`."""
        return attached_run(folder, config, data, say)

    def note(self, scale: ScaleConfig, say: Say) -> None:
        """See `Backend`."""
        scale_note(scale, say)

    def pretrain(
        self, config: RunConfig, data: Pinned, written: Written, span: Span
    ) -> dict[str, Any]:
        """See `Backend`."""
        from training.on_ray.pretrain import pretrain

        return pretrain(config, data, written, span)

    def finetune(
        self, config: RunConfig, train: RowIndex, encoder_uri: str, written: Written
    ) -> dict[str, Any]:
        """See `Backend`."""
        from training.on_ray.finetune import finetune

        return finetune(config, train, encoder_uri, written)


class InLab:
    """This process; its runs are written to files and not to MLflow, which one ablation is a run
    of: a server per run would cost more than a small run."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.apply: Apply = lab.apply

    def watched_nodes(
        self, attempt: Attempt, handle: RunHandle, measure: bool
    ) -> AbstractContextManager[None]:
        """See `Backend`; there are none."""
        return nullcontext()

    def ready(
        self,
        demands: list[Demand],
        paths: Mapping[str, str | None],
        out: str | None,
        scale: ScaleConfig,
    ) -> None:
        """See `Backend`; there is nothing to start."""

    def ready_to_apply(
        self, paths: Mapping[str, str | None], out: str | None, scale: ScaleConfig
    ) -> None:
        """See `Backend`; there is nothing to start."""

    def track(
        self, folder: RunFolder, config: RunConfig, data: Pinned, tags: Tags, say: Say
    ) -> RunHandle:
        """See `Backend`; makes none."""
        return self.attach(folder, config, data, say)

    def attach(self, folder: RunFolder, config: RunConfig, data: Pinned, say: Say) -> RunHandle:
        """See `Backend`; that of a run begun on Ray, else one without an id."""
        return known_run(folder, config, say)

    def note(self, scale: ScaleConfig, say: Say) -> None:
        """See `Backend`."""

    def pretrain(
        self, config: RunConfig, data: Pinned, written: Written, span: Span
    ) -> dict[str, Any]:
        """See `Backend`."""
        return self._lab.pretrain(config, data.train, written, span)

    def finetune(
        self, config: RunConfig, train: RowIndex, encoder_uri: str, written: Written
    ) -> dict[str, Any]:
        """See `Backend`."""
        return self._lab.finetune(config, train, encoder_uri, written)


ON_RAY = OnRay()
