"""The pretraining stage: store and config to `encoder/` and `rounds/` of a run folder.

Composes pipeline, clustering and training; knows nothing of the command line. Invariant: the same
call goes on from the newest checkpoint.
"""

import time
from collections.abc import Mapping
from typing import Any

from clustering.rounds.files import load_health, rounds_at
from diccae.config import RunConfig
from diccae.fresh import Anew, has_begun, refuse_deleting
from diccae.resources import training_demands
from diccae.run_folder import RunFolder, watched
from diccae.stages.backend import ON_RAY, Backend
from diccae.stages.run_record import (
    Say,
    let_go,
    pin_for,
    provenance,
    remember,
    with_status,
)
from diccae.stages.statistics import settle
from pipeline.storage import Location
from training.data.order import BatchPlan, classes_together
from training.loop.labelling import lead_steps
from training.model.make import make_encoder
from training.run.checkpoints import WHOLE, Span
from training.run.edge import Written
from training.run.pinned import Pinned, check
from training.tracking.tracker import METRICS, read_metrics
from training.weights.files import WeightsReport, by_part, load_weights

_TOGETHER = 0.5
"""Share of the classes that chance would put into a row group, below which a user is told."""


def run_pretrain(
    folder: RunFolder,
    config: RunConfig,
    store: str,
    say: Say,
    span: Span = WHOLE,
    tags: Mapping[str, str] | None = None,
    *,
    backend: Backend = ON_RAY,
    anew: Anew | None = None,
) -> dict[str, Any]:
    """Pretrain into the folder, from its newest checkpoint if there is one.

    Args: tags: of the MLflow run, besides the usual ones. anew: delete the run that is there; the
        caller has not opened the folder for this one.
    """
    config, data = _begun(folder, config, store, say, span, backend=backend, anew=anew)
    handle = backend.track(folder, config, data, tags, say)
    backend.note(config.scale, say)
    total = _say_what_is_trained(config, data, say, span)
    written = Written(folder.place, provenance(folder, config), folder.attempt)
    started = time.monotonic()
    nodes = backend.watched_nodes(folder.attempt, handle, config.tracking.of_nodes(handle.uri))
    with nodes, watched(folder.place, METRICS, total, "pretrain"):
        result = with_status(
            folder,
            handle,
            config,
            lambda: backend.pretrain(config, data, written, span),
            METRICS,
        )
    _write_results(folder, config, len(data.train), result, time.monotonic() - started)
    return result


def _begun(
    folder: RunFolder,
    config: RunConfig,
    store: str,
    say: Say,
    span: Span,
    *,
    backend: Backend,
    anew: Anew | None,
) -> tuple[RunConfig, Pinned]:
    """The config with its statistics, and its data, both written down once nothing is refused any
    more; an old run goes only then."""
    with folder.passed_over(anew is not None):
        settled, data, statistics = _settled(folder, config, store, say, span)
        makes_labels = settled.rounds.labels != "none"
        pool = settled.pool.groups(settled.clustering) if makes_labels else None
        reads = {"--store": data.snapshot.uri, "--init": settled.encoder.init}
        if anew is not None:
            refuse_deleting(folder, reads)
        backend.ready(training_demands(settled, pool), reads, folder.uri, settled.scale)
    if anew is not None:
        let_go(folder)
        folder.open(config, fresh=True)
    remember(folder, settled, data, statistics)
    if anew is not None:
        has_begun(folder, anew)
    return settled, data


def _settled(
    folder: RunFolder, config: RunConfig, store: str, say: Say, span: Span
) -> tuple[RunConfig, Pinned, dict[str, Any]]:
    """The config with its statistics, its data, and what run.json keeps of the statistics: all that
    can be refused before the cluster is used."""
    data = pin_for(folder, config, store)
    check(config, data)
    init, made = None if folder.record else config.encoder.init, None
    if init is not None and span.start is None:
        made = _say_what_weights_give(config, data, say).made_with
    config, statistics = settle(folder, config, data, say, init, made)
    return config, data, statistics


def _say_what_is_trained(config: RunConfig, data: Pinned, say: Say, span: Span) -> int:
    """Returns: number of steps."""
    n_clips = len(data.train)
    steps = BatchPlan.of(n_clips, config.pretrain.batch_size, config.data).steps(n_clips)
    total = steps * (span.until_epoch or config.pretrain.epochs)
    say(
        f"pretrain  {n_clips:,} clips of {data.snapshot.uri} version {data.snapshot.version}, "
        f"{total:,} steps of {config.pretrain.batch_size}, encoder {config.encoder.preset}"
    )
    rounds, lead = config.rounds, lead_steps(config.rounds, steps)
    if rounds.labels != "none" and lead < rounds.lead_steps:
        say(
            f"rounds    labels apply {lead} steps after their round starts, when the next one does "
            f"(rounds.every_epochs = {rounds.every_epochs}, {steps} steps an epoch), not "
            f"rounds.lead_steps = {rounds.lead_steps}"
        )
    found, by_chance = classes_together(data.train)
    if found < _TOGETHER * by_chance:
        say(
            f"warning   clips of a class lie together in this store: {found:.1f} classes in a row "
            f"group, by chance it would be {by_chance:.1f}. Batches are made of row groups, so "
            "clips of a class are each other's negatives more often. Clips of a tar part lie as in "
            "the part: unpack it, or pack it mixed, and ingest again; or raise "
            f"data.shuffle_window = {config.data.shuffle_window}"
        )
    if data.left_out is not None:
        told = ", ".join(f"{name}-{version}" for name, version in data.left_out.rules.items())
        say(f"left out  {len(data.left_out.clips):,} clips by {told}")
    return total


def _write_results(
    folder: RunFolder, config: RunConfig, n_train: int, result: dict[str, Any], seconds: float
) -> None:
    """What pretraining adds to results.json; its times add up over restarts."""
    before = folder.results.get("seconds", {})
    # A run that was finished already takes no step and has no metrics: those of its end stay.
    metrics = result.get("metrics") or folder.results.get("pretraining", {})
    folder.write_results(
        encoder=config.encoder.preset,
        n_train=n_train,
        config_hash=config.digest(),
        store=folder.record["store"],
        pseudo_labels=_pseudo_labels(folder.place, config),
        pretraining={name: metrics[name] for name in sorted(metrics) if "/" not in name},
        seconds={
            "pretrain": round(before.get("pretrain", 0.0) + seconds, 2),
            "cluster": round(before.get("cluster", 0.0) + result.get("clustering_s", 0.0), 2),
        },
    )


def _say_what_weights_give(config: RunConfig, data: Pinned, say: Say) -> WeightsReport:
    """Which keys of `encoder.init` fit, before the cluster is used.

    Raises: WeightsError if the file cannot be read or gives nothing.
    """
    assert config.encoder.init is not None
    report = load_weights(make_encoder(config, data.train.spec), config.encoder.init)
    say(f"weights   {config.encoder.init}, read as {report.layout}")
    for name in ("missing", "unexpected", "resized"):
        if keys := getattr(report, name):
            say(f"          {name}: {by_part(keys)}")
    return report


def _pseudo_labels(out: Location, config: RunConfig) -> dict[str, Any]:
    """Quality and stability of the rounds, from what clustering and training wrote down."""
    uri = out.uri_of("rounds")
    made = rounds_at(uri) if config.rounds.labels != "none" else []
    with out.fetched(METRICS) as file:
        lines = list(read_metrics(file))
    nmi = [line["clustering/nmi"] for line in lines if line.get("clustering/nmi") is not None]
    return {
        "k": config.clustering.k,
        "rounds": len(made),
        "nmi": nmi[-1] if nmi else None,
        "churn": [load_health(uri, number).get("churn") for number in made],
    }
