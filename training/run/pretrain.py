"""pretrain_at: the `Pretrainer` between checkpoint and encoder, at whatever edge it runs.

Knows nothing of Ray or of other processes: world, reader and checkpoints reach it as an `Edge`.
Invariant: a run that died anywhere goes on from its newest checkpoint.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from clustering.config import KMeansConfig
from clustering.rounds.given import Given
from clustering.rounds.protocol import Rounds
from clustering.rounds.saved import saved_name
from pipeline.storage import Location, place_of
from training.config import TrainingConfig
from training.data.order import BatchPlan, WindowPlan, lanes_of
from training.data.rows import RowIndex
from training.loop.hooks import Hooks, World
from training.loop.pretrainer import Pretrainer
from training.model.encoder import Encoder
from training.model.make import make_encoder
from training.run.checkpoints import KEPT, Span, failure_writer, refuse_lost_labels, state_in
from training.run.edge import Edge, Written, kept
from training.run.known_labels import known_labels
from training.tracking.tracker import METRICS, Tracker
from training.weights.card import Applied
from training.weights.files import load_weights, save_encoder

log = logging.getLogger(__name__)

CHECKPOINTS = "pretrain"
"""Folder of the run that holds the checkpoints of pretraining."""
_SAVED_BANKS = KEPT + 1
"""Of the checkpoints that are kept, and of the one that is being written."""


class RoundsMade(NamedTuple):
    """How the rounds of a run are made, by a pool of actors or in the process that trains."""

    clustering: KMeansConfig
    """With the number of given labels as k, if there are any."""
    widths: dict[str, int]
    """Of each stream of a bank row."""
    given: Given | None
    """Labels that are published instead of clusters, or that clustering starts from."""


def rounds_made(config: TrainingConfig, train: RowIndex) -> RoundsMade | None:
    """None where nothing is labelled. Raises: TrainingError as `known_labels`."""
    if config.rounds.labels == "none":
        return None
    widths: dict[str, int] = {s: config.encoder.projection for s in config.loss.label_streams}
    clustering = config.clustering
    known = known_labels(config.rounds, train, clustering.k, config.seed)
    if known is None:
        return RoundsMade(clustering, widths, None)
    with_k = clustering.model_copy(update={"k": known.k})
    return RoundsMade(with_k, widths, known.given)


def pretrain_at(
    edge: Edge,
    config: TrainingConfig,
    index: RowIndex,
    rounds: Rounds | None,
    written: Written,
    span: Span,
) -> dict[str, Any] | None:
    """Train; save the encoder. Returns: the last metrics and times, on rank 0."""
    out, attempt = written.out, written.attempt
    state = _starting_state(edge, span, out, rounds)
    encoder = _starting_encoder(config, index, state)
    tracker = written.tracker(METRICS, edge, state)

    def write(step: int, metrics: dict[str, float]) -> None:
        if tracker is not None:
            tracker.log(step, metrics)

    keep = failure_writer(out, edge.world.rank, attempt)
    save = _saver(edge, config, rounds, written, tracker)
    around: dict[str, Any] = {
        "reader": edge.reader(_windows(config, index, edge.world)),
        "world": edge.world,
        "hooks": Hooks(write, save, keep, edge.leaving),
    }
    trainer = Pretrainer(config, encoder, index, rounds=rounds, **around)
    with kept(tracker):
        last = trainer.run(state, span.until_epoch)
    if tracker is None:
        return None
    attempt.check()
    features, statistics = index.spec.model_dump(mode="json"), config.data.statistics
    known = (index.classes, features, written.provenance)
    applied, target = Applied.of(config), out.uri_of("encoder")
    save_encoder(encoder, target, *known, statistics=statistics, applied=applied)
    tracker.close()
    return {"metrics": last, "steps": trainer.step, "clustering_s": trainer.labelling.waited_s}


def _starting_state(
    edge: Edge, span: Span, out: Location, rounds: Rounds | None
) -> dict[str, Any] | None:
    """The newest checkpoint of this run, else the one it branches off from.

    Args: rounds: get the rows of its bank, on rank 0, and forget those of steps to come.
    """
    own = edge.state
    state = own
    if own is None and span.start is not None:
        state = state_in(span.start)
    if state is not None:
        refuse_lost_labels(state, out.uri_of("rounds"))
    if rounds is not None and edge.world.rank == 0:
        rounds.forget_later(0 if own is None else own["step"])
        if state is not None and state["bank"]:
            rounds.restore(_bank_uri(state, _run_of(span) if own is None else out))
    return state


def _run_of(span: Span) -> Location:
    """The run that another one branches off from."""
    assert span.start is not None
    folder, _ = place_of(span.start)
    return place_of(folder.uri)[0]


def _bank_uri(state: dict[str, Any], run: Location) -> str:
    """Where a checkpoint's bank is now: the run may have been moved since."""
    # Older checkpoints hold the whole URI, of where the run was when it was saved.
    return run.uri_of("rounds", state["bank"].rsplit("/", 1)[-1])


def _starting_encoder(
    config: TrainingConfig, index: RowIndex, state: dict[str, Any] | None
) -> Encoder:
    encoder = make_encoder(config, index.spec)
    if state is None and config.encoder.init is not None:
        log.info("weights: %s", load_weights(encoder, config.encoder.init))
    return encoder


def _windows(config: TrainingConfig, index: RowIndex, world: World) -> WindowPlan:
    plan = BatchPlan.of(len(index), config.pretrain.batch_size, config.data)
    return WindowPlan(index, plan, lanes_of(world.rank, world.size, plan.lanes), config.seed)


def _saver(
    edge: Edge,
    config: TrainingConfig,
    rounds: Rounds | None,
    written: Written,
    tracker: Tracker | None,
) -> Callable[[dict[str, Any]], None]:
    trains = config.rounds.features == "train"

    def save(state: dict[str, Any]) -> None:
        written.attempt.check()
        state["bank"] = ""
        # Rows of a pass count for one round, until it is frozen: by then the encoder has moved on,
        # and another pass would give other rows.
        if rounds is not None and (trains or state["labelling"]["pending"] is not None):
            state["bank"] = saved_name(state["step"])
            uri = _bank_uri(state, written.out)
            _save_bank(rounds, uri, edge.world, config.rounds.timeout_s)
        # Before the checkpoint: a start that goes on from it does not log these lines again.
        if tracker is not None:
            tracker.publish()
        edge.save(state)

    return save


def _save_bank(rounds: Rounds | None, uri: str, world: World, timeout_s: float) -> None:
    """Save the live rows of the bank, and drop what no kept checkpoint points at."""
    assert rounds is not None
    rounds.flush(timeout_s)
    world.barrier()
    if world.rank == 0:
        rounds.save(uri)
        rounds.forget_saved(_SAVED_BANKS)
    world.barrier()
