"""The pure trainer: resume, chunks, world size, rounds, and steps that must not be taken."""

import functools
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.memory import N_CLIPS, memory_index
from support.ranks import run_ranks
from support.trainers import Recorder, make_trainer, pretrain_config, same, weights_of

from clustering.rounds.files import load_round
from clustering.rounds.local import LocalRounds
from clustering.rounds.protocol import RoundRequest
from training.cluster_config import TrackingConfig
from training.config import LossConfig, RoundsConfig
from training.data.device import DeviceBatch
from training.data.order import EpochReads, FrameDraw
from training.data.reader import Batch
from training.errors import NonFiniteLoss, TrainingError
from training.evaluation.variants import Variant
from training.loop.gradients import StepLoss
from training.loop.hooks import World
from training.losses import objective
from training.losses.confusion import confusion_weights
from training.report.page import write_report
from training.run.checkpoints import refuse_lost_labels
from training.run.known_labels import known_labels
from training.tracking.client import mlflow_client
from training.tracking.mlflow_run import create_run, finish
from training.tracking.tracker import METRICS, Tracker


@pytest.mark.parametrize(
    ("features", "lead_steps"), [("train", 1), ("pass", 1), ("train", 3)], ids=str
)
def test_resumed_run_equals_uninterrupted_run(
    features: str, lead_steps: int, tmp_path: Path
) -> None:
    """With a lead of an epoch, 3 steps, labels apply in the step in which others are asked for."""
    rounds = {"features": features, "lead_steps": lead_steps}
    config = pretrain_config(rounds=rounds, pretrain={"epochs": 3 if lead_steps == 1 else 4})
    whole, recorder = make_trainer(config, tmp_path / "whole")
    whole.run()
    steps = [state["step"] for state in recorder.states]
    assert steps == sorted(steps)
    assert any(state["labelling"]["pending"] for state in recorder.states), "no pending round"
    for number, state in enumerate(recorder.states[:-1]):
        folder = tmp_path / f"resumed-{number}"
        folder.mkdir()
        _copy_rounds(tmp_path / "whole", folder, state)
        resumed, again = make_trainer(config, folder)
        assert resumed.labelling.rounds is not None
        resumed.labelling.rounds.restore(state["bank"])
        path = folder / "state.pt"
        torch.save(state, path)
        resumed.run(torch.load(path, weights_only=True))
        assert same(weights_of(whole), weights_of(resumed)), f"resumed at step {state['step']}"
        later = [(s, m["loss"]) for s, m in recorder.logged if s > state["step"]]
        assert [(s, m["loss"]) for s, m in again.logged] == later


@pytest.mark.parametrize("features", ["train", "pass"])
@pytest.mark.parametrize(
    "changes", [{}, {"loss": {"fusion": False}}, {"rounds": {"labels": "none"}}]
)
def test_a_variant_from_a_shared_warmup_equals_one_trained_alone(
    changes: dict[str, Any], features: str, tmp_path: Path
) -> None:
    recipe = pretrain_config(rounds={"features": features})
    rounds = {"features": features, **changes.get("rounds", {})}
    variant = pretrain_config(**{**changes, "rounds": rounds})
    labelled = variant.rounds.labels != "none"
    alone, log = make_trainer(variant, tmp_path / "alone", rounds=labelled)
    alone.run()
    warmup, recorder = make_trainer(recipe, tmp_path / "warmup")
    warmup.run(until_epoch=1)
    assert not (tmp_path / "warmup" / "rounds" / "round-0001").exists(), "a round no one waits for"
    state = recorder.states[-1]
    branch, again = make_trainer(variant, tmp_path / "branch", rounds=labelled)
    if branch.labelling.rounds is not None:
        branch.labelling.rounds.restore(state["bank"])
    branch.run(state)
    assert same(weights_of(alone), weights_of(branch))
    assert bool(branch.labelling.heads) == labelled
    later = [(s, m["loss"]) for s, m in log.logged if s > state["step"]]
    assert [(s, m["loss"]) for s, m in again.logged] == later


def _copy_rounds(source: Path, target: Path, state: dict[str, Any]) -> None:
    """What is on storage of the run at the moment of the kill."""
    labelling = state["labelling"]
    last = labelling["round"] if labelling["pending"] is None else labelling["pending"]["round"]
    for number in range(1, last + 1):
        name = f"rounds/round-{number:04d}"
        shutil.copytree(source / name, target / name)


def test_a_node_that_is_announced_to_go_costs_no_steps(tmp_path: Path) -> None:
    config = pretrain_config(
        pretrain={"log_every": 1, "checkpoint_every": 100}, rounds={"labels": "none"}
    )
    trainer, recorder = make_trainer(config, tmp_path, rounds=False)
    answers = iter([False, True])
    trainer.hooks = trainer.hooks._replace(leaving=lambda: next(answers, False))
    trainer.run()
    assert [state["step"] for state in recorder.states] == [2, 3, 6, 9]


@pytest.mark.parametrize("sdpa", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_switches_of_numerics_reach_every_pass(
    precision: str, sdpa: bool, attentions: list[tuple[bool, torch.dtype]], tmp_path: Path
) -> None:
    switches = {"precision": precision, "sdpa": sdpa}
    config = pretrain_config(pretrain={"epochs": 2, **switches}, rounds={"features": "pass"})
    trainer, _ = make_trainer(config, tmp_path)
    trainer.run()
    assert trainer.labelling.round == 1, "no evaluation pass"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert set(attentions) == {(sdpa, dtype)}


def test_another_seed_gives_otherweights_of(tmp_path: Path) -> None:
    first, _ = make_trainer(pretrain_config(), tmp_path / "a")
    second, _ = make_trainer(pretrain_config().model_copy(update={"seed": 1}), tmp_path / "b")
    first.run()
    second.run()
    assert not same(weights_of(first), weights_of(second))


@pytest.mark.parametrize("micro_batch", [4, 8])
def test_cached_gradient_chunks_equal_the_whole_batch(micro_batch: int, tmp_path: Path) -> None:
    whole, whole_log = make_trainer(pretrain_config(), tmp_path / "whole")
    parts, parts_log = make_trainer(
        pretrain_config(pretrain={"micro_batch": micro_batch}), tmp_path / f"parts-{micro_batch}"
    )
    whole.run()
    parts.run()
    for (_, a), (_, b) in zip(whole_log.logged[:3], parts_log.logged[:3], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    worst = max(
        float((a - b).abs().max())
        for a, b in zip(weights_of(whole).values(), weights_of(parts).values(), strict=True)
    )
    assert worst < 5e-3


def test_labels_apply_at_the_announced_step_and_not_before(tmp_path: Path) -> None:
    trainer, recorder = make_trainer(pretrain_config(pretrain={"log_every": 1}), tmp_path)
    trainer.run()
    steps_per_epoch = N_CLIPS // 16
    announced = steps_per_epoch + 1
    for step, metrics in recorder.logged:
        assert ("loss_confusion" in metrics) == (step > announced)
    last = recorder.logged[-1][1]
    assert last["labelled_frac"] == 1.0
    assert 0.0 <= last["clustering/nmi"] <= 1.0


def test_rows_that_a_slow_bank_dropped_are_logged_with_their_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All ranks ask before each round; what reads a bank for each of them would hold the round up.
    monkeypatch.setattr(LocalRounds, "stats", lambda _: pytest.fail("the bank was asked"))
    monkeypatch.setattr(LocalRounds, "dropped", 5)
    trainer, recorder = make_trainer(pretrain_config(), tmp_path)
    trainer.run()
    logged = {m["clustering/rows_dropped"] for _, m in recorder.logged if "clustering/nmi" in m}
    assert trainer.labelling.round == 2
    assert logged == {5.0, 0.0}, "five before the first round, none since"


@pytest.mark.parametrize("labels", ["true", "random"])
def test_controls_are_the_labels_of_the_losses(labels: str, tmp_path: Path) -> None:
    known = known_labels(RoundsConfig(labels=labels), memory_index(), 4, seed=0)
    assert known is not None
    trainer, recorder = make_trainer(pretrain_config(), tmp_path, given=known.given)
    trainer.run()
    index = memory_index()
    [head] = trainer.labelling.of(index.keys_N)
    used = dict(zip(*(a.tolist() for a in known.given.table), strict=True))
    assert head.labels_B.tolist() == [used[key] for key in index.keys_N.tolist()]
    assert head.teaches == ("audio", "video", "fusion")
    last = recorder.logged[-1][1]
    assert last["loss_confusion"] > 0
    assert (last["clustering/nmi"] == 1.0) == (labels == "true")
    assert last["clustering/churn"] == 0.0


def test_without_the_fusion_stream_nothing_trains_its_pass(tmp_path: Path) -> None:
    trainer, _ = make_trainer(pretrain_config(loss={"fusion": False}), tmp_path)
    before = weights_of(trainer)
    trainer.run()
    [head] = trainer.labelling.of(memory_index().keys_N)
    assert set(head.prototypes) == {"audio", "video"}
    after = weights_of(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("class_heads.audio") for name in moved)
    assert not any("class_heads.fusion" in name for name in moved)


def test_first_round_waits_until_infonce_has_left_its_plateau(tmp_path: Path) -> None:
    waiting, _ = make_trainer(pretrain_config(rounds={"margin_nats": 2.0}), tmp_path / "waiting")
    waiting.run()
    assert waiting.labelling.round == 0
    going, _ = make_trainer(pretrain_config(), tmp_path / "going")
    going.run()
    assert going.labelling.round >= 1


def test_a_withheld_round_does_not_open_the_gate(tmp_path: Path) -> None:
    """Labels were made on the plateau once a first round was withheld above it."""
    config = pretrain_config(rounds={"margin_nats": 0.25}, pretrain={"epochs": 5})
    trainer, _ = make_trainer(config, tmp_path, guard={"max_mean_cosine": 0.5})
    labelling, index = trainer.labelling, memory_index()
    h = {s: torch.ones(len(index), 16) for s in ("audio", "video", "fusion")}

    def at_the_end_of(epoch: int, loss_instance: float) -> bool:
        step = epoch * trainer.steps_per_epoch
        labelling.push_features(index.keys_N, h, step)
        labelling.start_if_due(step, loss_instance, lambda: None)
        return labelling.pending is not None

    assert at_the_end_of(1, 0.5)
    labelling.apply_if_due(trainer.steps_per_epoch + 1)
    assert (labelling.round, labelling.labelled) == (1, False), "it was not withheld"
    assert labelling.metrics()["clustering/withheld"] == 1.0
    assert not at_the_end_of(2, 9.0)
    assert at_the_end_of(2, 0.5), "the gate never opens"


def test_with_a_negative_margin_nothing_waits(tmp_path: Path) -> None:
    """InfoNCE of an encoder that knows nothing lies above ln n, and -0.1 of it is no way around."""
    config = pretrain_config(rounds={"margin_nats": -1e-6}, loss={"temperature": 0.005})
    trainer, recorder = make_trainer(config, tmp_path)
    trainer.run()
    first = next(m["loss_instance"] for _, m in recorder.logged if "loss_instance" in m)
    assert first > math.log(16) + 1e-6, "nothing to wait for"
    assert trainer.labelling.round >= 1


def test_with_local_negatives_the_gate_knows_how_few_they_are(tmp_path: Path) -> None:
    """4 lanes of 4 clips: the plateau is ln 4, which lies below ln 16 - 0.5."""
    config = pretrain_config(
        loss={"negatives": "local"}, rounds={"margin_nats": 0.5}, optim={"lr": 1e-9}
    )
    trainer, recorder = make_trainer(config, tmp_path)
    trainer.run()
    assert recorder.logged[-1][1]["loss_instance"] < math.log(16) - 0.5, "no plateau to be wrong on"
    assert trainer.labelling.round == 0


def test_infonce_falls_below_its_plateau(tmp_path: Path) -> None:
    config = pretrain_config(
        pretrain={"epochs": 12}, rounds={"labels": "none"}, loss={"intra": 0.0}
    )
    trainer, recorder = make_trainer(config, tmp_path, rounds=False)
    trainer.run()
    assert recorder.logged[-1][1]["loss_instance"] < math.log(16) - 0.25


@pytest.mark.parametrize("every", [1, 2])
def test_nothing_is_read_ahead_of_an_evaluation_pass(
    every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that reads ahead keeps its CPUs until its steps are asked for; a pass needs as many
    for tasks of its own, and waited for them for ever."""
    schedule = {"features": "pass", "every_epochs": every}
    config = pretrain_config(rounds=schedule, pretrain={"epochs": 6})
    trainer, _ = make_trainer(config, tmp_path)
    wanted, passes = [0], list[int]()
    stream, sweep = trainer.reader.stream, trainer.reader.sweep

    def streamed(epochs: Iterable[EpochReads]) -> Iterator[Batch]:
        wanted[0] += len(list(epochs)) * trainer.steps_per_epoch
        return stream(epochs)

    def swept(frames: FrameDraw) -> Iterator[Batch]:
        passes.append(trainer.step // trainer.steps_per_epoch)
        assert wanted[0] == trainer.step
        return sweep(frames)

    monkeypatch.setattr(trainer.reader, "stream", streamed)
    monkeypatch.setattr(trainer.reader, "sweep", swept)
    trainer.run()
    assert passes == list(range(1, 6, every))


def test_loss_that_is_not_finite_stops_before_the_weights_are_touched(tmp_path: Path) -> None:
    trainer, recorder = make_trainer(pretrain_config(), tmp_path, poison=5)
    before: dict[str, torch.Tensor] = {}
    step = trainer._train_step

    def watched(batch: DeviceBatch) -> None:
        before.update(weights_of(trainer))
        step(batch)

    trainer._train_step = watched  # type: ignore[method-assign]
    with pytest.raises(NonFiniteLoss, match="saved in kept"):
        trainer.run()
    assert "clip0000005_000005" in recorder.failed[0]["clip_ids"]
    assert same(before, weights_of(trainer))


def test_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"batch_size = 18.*data.lanes = 4"):
        make_trainer(pretrain_config(pretrain={"batch_size": 18}), tmp_path)
    with pytest.raises(TrainingError, match="only 48 clips"):
        make_trainer(pretrain_config(pretrain={"batch_size": 64}), tmp_path)


def _worker(negatives: str, rank: int, size: int) -> dict[str, Any]:
    config = pretrain_config(rounds={"labels": "none"}, loss={"negatives": negatives})
    world = World(rank, size)
    trainer, recorder = make_trainer(config, Path(), Recorder(), world, rounds=False)
    trainer.run()
    return {
        "weights": weights_of(trainer),
        "losses": [m["loss"] for _, m in recorder.logged],
        "gather_s": [m.get("time/gather", 0.0) for _, m in recorder.logged],
    }


@pytest.mark.parametrize("negatives", ["global", "local"])
def test_workers_train_as_one(negatives: str) -> None:
    worker = functools.partial(_worker, negatives)
    one, *others = (run_ranks(size, worker)[0] for size in (1, 2, 3))
    assert not any(one["gather_s"])
    for several in others:
        assert all(several["gather_s"]) == (negatives == "global")
        assert several["losses"] == pytest.approx(one["losses"], rel=1e-3)
        assert _distance(one["weights"], several["weights"]) < 5e-3


def _distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def _resumed_between_logs(rank: int, size: int) -> dict[str, Any]:
    """A run resumed from a checkpoint that lies between two logs, beside the uninterrupted one."""
    config = pretrain_config(
        rounds={"labels": "none"}, pretrain={"log_every": 3, "checkpoint_every": 2}
    )
    outcome = {}
    state = None
    for name in ("whole", "resumed"):
        trainer, recorder = make_trainer(
            config, Path(), Recorder(), World(rank, size), rounds=False
        )
        trainer.run(state)
        state = recorder.states[0]
        outcome[name] = weights_of(trainer)
        outcome[f"{name}_losses"] = {step: m["loss"] for step, m in recorder.logged}
    return outcome


def test_ranks_resumed_between_two_logs_equal_the_uninterrupted_run() -> None:
    for outcome in run_ranks(2, _resumed_between_logs):
        assert same(outcome["whole"], outcome["resumed"])
        assert outcome["whole_losses"] == outcome["resumed_losses"]


class _ToyLoss(LossConfig):
    toy: float = 0.25


def test_a_new_loss_term_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered here alone, it trains, is logged, drawn, sent to MLflow and known to ablations."""

    def value(given: objective.LossInputs) -> objective.TermValue:
        spread = given.embeddings.h["audio"].std()
        return objective.TermValue(spread, {"toy_rows": spread.detach() * 0 + 3}, [])

    toy = objective.LossTerm("loss_toy", "toy", "pair", value)
    monkeypatch.setattr(objective, "LOSS_TERMS", (*objective.LOSS_TERMS, toy))
    plain = pretrain_config(pretrain={"epochs": 1, "log_every": 1})
    loss = _ToyLoss.model_validate(plain.loss.model_dump())
    _, recorder = trained = make_trainer(
        plain.model_copy(update={"loss": loss}), tmp_path, Recorder(), rounds=False
    )
    trained[0].run()
    handle = create_run(TrackingConfig(), str(tmp_path), {}, {}, {})
    tracker = Tracker(tmp_path / METRICS)
    for step, logged in recorder.logged:
        terms = (logged[name] * getattr(loss, weight) for name, weight in (
            ("loss_instance", "instance"), ("loss_intra", "intra"), ("loss_toy", "toy")
        ))  # fmt: skip
        assert logged["loss"] == pytest.approx(sum(terms), rel=1e-5)
        assert logged["toy_rows"] == 3
        tracker.log(step, logged)
    tracker.close()
    finish(handle)
    points = mlflow_client(handle.uri).get_metric_history(handle.run_id, "loss_toy")
    assert [p.step for p in points] == [step for step, _ in recorder.logged]

    (tmp_path / "run.json").write_text("{}")
    page = Path(write_report(tmp_path)).read_text()
    drawn = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    [panel] = [panel for panel in drawn["panels"] if panel["title"] == "Loss"]
    assert "loss_toy" in [series["name"] for series in panel["series"]]

    assert not Variant("", {"loss": {"toy": 0.0}}).shares_warmup
    late = toy._replace(needs="labels")
    monkeypatch.setattr(objective, "LOSS_TERMS", (*objective.LOSS_TERMS[:-1], late))
    assert Variant("", {"loss": {"toy": 0.0}}).shares_warmup


def test_a_checkpoint_holds_nothing_of_each_clip_or_rank(tmp_path: Path) -> None:
    trainer, recorder = make_trainer(pretrain_config(), tmp_path)
    trainer.run()
    state = next(s["labelling"] for s in recorder.states if s["labelling"]["confusion"])
    held = [x for saved in state["confusion"] for x in saved.values()]
    assert held
    assert max(x.numel() for x in held) <= 4 * 5, "more than K x (K + 1) numbers"
    assert not any(
        isinstance(x, torch.Tensor | list) and x is not state["confusion"] for x in state.values()
    )


def test_labels_that_are_gone_are_missed_at_once(tmp_path: Path) -> None:
    trainer, recorder = make_trainer(pretrain_config(), tmp_path)
    trainer.run()
    state = next(s for s in recorder.states if s["labelling"]["confusion"])
    uri = str(tmp_path / "rounds")
    refuse_lost_labels(state, uri)
    shutil.rmtree(tmp_path / "rounds" / "round-0001")
    with pytest.raises(TrainingError, match=r"round-0001: .* --fresh"):
        refuse_lost_labels(state, uri)


def test_small_clusters_are_little_evidence_of_whom_they_are_confused_with(tmp_path: Path) -> None:
    config = pretrain_config(confusion={"pseudo_counts": 2.0})
    trainer, _ = make_trainer(config, tmp_path)
    trainer.run()
    for head, labels in zip(trainer.labelling.heads, trainer.labelling.in_force, strict=True):
        clips_K = np.bincount(head.labels_N, minlength=len(labels.confusion.weights_KK))
        expected = 2.0 / np.maximum(clips_K, 1)
        assert labels.confusion.prior_K1[:, 0].tolist() == expected.tolist()
    assert trainer.labelling.heads


@pytest.mark.parametrize(
    ("lead_steps", "every_epochs", "asked", "applied"),
    [
        (1, 1, [3, 6, 9, 12, 15], [4, 7, 10, 13, 16]),
        (2, 1, [3, 6, 9, 12], [5, 8, 11, 14]),  # The next would teach step 17 of 0..17 alone.
        (3, 1, [3, 6, 9, 12], [6, 9, 12, 15]),
        (20, 1, [3, 6, 9, 12], [6, 9, 12, 15]),
        (20, 2, [3, 9], [9, 15]),
    ],
)
def test_no_round_is_left_out_however_long_its_lead(
    lead_steps: int, every_epochs: int, asked: list[int], applied: list[int], tmp_path: Path
) -> None:
    config = pretrain_config(
        pretrain={"epochs": 6}, rounds={"lead_steps": lead_steps, "every_epochs": every_epochs}
    )
    trainer, _ = make_trainer(config, tmp_path)
    rounds, gradients_of = trainer.labelling.rounds, trainer.gradients.of
    assert rounds is not None
    requests: list[RoundRequest] = []
    start, first_steps = rounds.start, {}

    def started(request: RoundRequest) -> None:
        requests.append(request)
        start(request)

    def watched(*given: Any) -> StepLoss:
        first_steps.setdefault(trainer.labelling.round, trainer.step)
        return gradients_of(*given)

    rounds.start = started  # type: ignore[method-assign]
    trainer.gradients.of = watched  # type: ignore[method-assign]
    trainer.run()
    assert [request.step for request in requests] == asked
    assert [request.effective_step for request in requests] == applied
    assert first_steps == {0: 0} | dict(enumerate(applied, start=1))


@pytest.mark.parametrize("update", ["dynamic", "static"])
def test_the_first_step_of_a_round_weighs_by_the_confusion_published_with_it(
    update: str, tmp_path: Path
) -> None:
    confusion = {"update": update, "update_steps": 1000, "ramp_epochs": 2.0, "gamma": 2.0}
    config = pretrain_config(pretrain={"epochs": 5}, confusion=confusion)
    trainer, _ = make_trainer(config, tmp_path)
    gradients_of, labelling = trainer.gradients.of, trainer.labelling
    first_steps: dict[int, int] = {}
    used: dict[int, torch.Tensor] = {}

    def watched(*given: Any) -> StepLoss:
        if labelling.labelled and labelling.round not in first_steps:
            first_steps[labelling.round] = trainer.step
            used[labelling.round] = labelling.in_force[0].confusion.weights_KK.clone()
        return gradients_of(*given)

    trainer.gradients.of = watched  # type: ignore[method-assign]
    trainer.run()
    assert list(first_steps) == [1, 2, 3, 4]
    for number, weights_KK in used.items():
        [head] = load_round(str(tmp_path / "rounds"), number).heads
        epochs = (first_steps[number] - first_steps[1]) / trainer.steps_per_epoch
        published_KK = torch.from_numpy(head.confusion_KK).double()
        expected = confusion_weights(published_KK, 2.0 * min(epochs / 2.0, 1.0), 10.0).float()
        assert torch.equal(weights_KK, expected)
        assert (weights_KK.max() > 1) == (number > 1), "no weight to be wrong about"
