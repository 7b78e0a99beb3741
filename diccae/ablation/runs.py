"""Runs: the runs behind an ablation: one warm-up a seed, and every variant from its checkpoint.

Composes the stages; variants and statistics are in training.evaluation.variants. Invariants: the
metric is written down before the first run and is not changed afterwards; a run that is done is
never made again, so the same command goes on where it stopped; what stands under a variant's name
was made as the variant is now.

out/  config.yaml  ablation.{json,md,png}  mlflow.db  seed-0/warmup/  seed-0/full/ ...
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from diccae.ablation.variants import WARMUP, variant_config
from diccae.config import RunConfig, config_text, differing_keys
from diccae.errors import UsageError
from diccae.run_folder import RunFolder, config_in, read_json, write_json
from diccae.screen import clock
from diccae.stages.backend import ON_RAY, Backend
from diccae.stages.evaluate import run_evaluate, scalars, tested_rows
from diccae.stages.finetune import run_finetune
from diccae.stages.pretrain import run_pretrain
from pipeline.passwords import without_passwords
from pipeline.storage import Location
from pipeline.store.store import FeatureStore
from training.cluster_config import NOT_DECIDING, TrackingConfig
from training.errors import TrainingError
from training.evaluation import metrics
from training.evaluation.variants import Variant
from training.run.checkpoints import WHOLE, Span, newest_checkpoint
from training.run.pinned import check, pin
from training.run.pretrain import CHECKPOINTS
from training.tracking import mlflow_run as tracking
from training.tracking.client import RunHandle
from training.tracking.destination import destination

Say = Callable[[str], None]

TABLE = "ablation.json"


class Plan(NamedTuple):
    """What an ablation runs."""

    variants: dict[str, Variant]
    seeds: tuple[int, ...]
    metric: str
    """Name in MLflow of the one number the variants are judged by, such as `probe/audio_video`."""
    finetune: bool
    """Whether each variant is fine-tuned as well."""

    @property
    def n_runs(self) -> int:
        """Variants times seeds."""
        return len(self.variants) * len(self.seeds)


class Finished(NamedTuple):
    """One run that was evaluated."""

    variant: str
    seed: int
    metrics: dict[str, float]
    """By MLflow name."""
    run_id: str


class Runs(NamedTuple):
    """The runs of one ablation, each made once."""

    config: RunConfig
    plan: Plan
    store: str
    out: Location
    parent: RunHandle

    def in_turn(self, say: Say) -> list[Finished]:
        """Every variant with every seed, on Ray; those that are there already are read."""
        started, made = time.monotonic(), 0
        done: list[Finished] = []
        for seed in self.plan.seeds:
            for name in self.plan.variants:
                if not self.is_done(name, seed):
                    # Runs that were there took no time and say nothing of those to come.
                    each_s = (time.monotonic() - started) / made if made else None
                    left = clock(each_s and each_s * (self.plan.n_runs - len(done)))
                    at = f"run {len(done) + 1}/{self.plan.n_runs}"
                    say(f"ablate    {at}: {name}, seed {seed}, left {left}")
                    if self.waits_for_warmup(name, seed):
                        self.warm_up(seed, ON_RAY, say)
                    self.train(name, seed, ON_RAY, say)
                    made += 1
                done.append(self.finished(name, seed))
        return done

    def is_done(self, name: str, seed: int) -> bool:
        """Whether a run was evaluated."""
        return self.plan.metric in measured_of(self.folder(seed, name))

    def refuse_changed(self) -> None:
        """Raises: UsageError for a finished run of a variant that is another one by now."""
        for name, variant in self.plan.variants.items():
            for seed in self.plan.seeds:
                now = variant_config(self.config, name, variant, seed)
                for runs, expected in ((self, now), (self.on_test(), _on_test(now))):
                    if runs.is_done(name, seed):
                        _refuse_changed(name, runs.folder(seed, name), expected)

    def folder(self, seed: int, name: str) -> RunFolder:
        """Of a run, or of a seed's warm-up."""
        return RunFolder(self.out.uri_of(f"seed-{seed}", name))

    def train(self, name: str, seed: int, backend: Backend, say: Say) -> None:
        """Pretrain, fine-tune if asked to, evaluate."""
        variant = self.plan.variants[name]
        folder, config = self.folder(seed, name), variant_config(self.config, name, variant, seed)
        span = self._branch(name, seed)
        with folder.held(f"ablate, {name}", config.scale.lease_stale_s):
            folder.open(config, fresh=False)
            tags = _tags(self.parent, f"seed-{seed} {name}")
            run_pretrain(folder, config, self.store, say, span, tags, backend=backend)
            if self.plan.finetune:
                run_finetune(folder, config, None, say, backend=backend)
            run_evaluate(folder, config, say, backend=backend)

    def measure_test(self, name: str, seed: int, backend: Backend, say: Say) -> None:
        """Measure a finished run on the test clips, in a folder of its own: what runs are compared
        and chosen by stays as it is."""
        run, config = self.folder(seed, name), self.folder(seed, name).config()
        folder = self.on_test().folder(seed, name)
        here, there = Path(folder.place.path), Path(run.place.path)
        here.mkdir(parents=True, exist_ok=True)
        for model in ("encoder", "classifier", "rounds"):
            if (there / model).exists() and not (here / model).exists():
                (here / model).symlink_to(there / model)
        config = _on_test(config)
        folder.place.write_bytes("config.yaml", config_text(config).encode())
        with folder.held(f"ablate, {name}, test clips", config.scale.lease_stale_s):
            folder.write_record(**run.record)
            run_evaluate(folder, config, say, backend=backend)

    def on_test(self) -> "Runs":
        """These runs, measured on the test clips."""
        return self._replace(out=self.out.below("test"))

    def shares_warmup(self, name: str) -> bool:
        """Whether a variant starts where its seed's warm-up ends."""
        epochs = self.config.rounds.warmup_epochs
        shared = self.plan.variants[name].shares_warmup
        return shared and 0 < epochs < self.config.pretrain.epochs

    def waits_for_warmup(self, name: str, seed: int) -> bool:
        """Whether the warm-up that it starts from has yet to be trained."""
        warm = self.folder(seed, WARMUP).results.get("warmup_epochs")
        return self.shares_warmup(name) and not warm

    def warm_up(self, seed: int, backend: Backend, say: Say) -> None:
        """Train the epochs before labels that variants of a seed share."""
        epochs, folder = self.config.rounds.warmup_epochs, self.folder(seed, WARMUP)
        own = variant_config(self.config, WARMUP, Variant("", {}), seed)
        with folder.held("ablate, warm-up", own.scale.lease_stale_s):
            folder.open(own, fresh=False)
            tags = _tags(self.parent, f"seed-{seed} {WARMUP}")
            span = Span(until_epoch=epochs)
            run_pretrain(folder, own, self.store, say, span, tags, backend=backend)
            folder.write_results(warmup_epochs=epochs)

    def _branch(self, name: str, seed: int) -> Span:
        """Where a variant starts: the end of the seed's warm-up, or from the beginning."""
        if not self.shares_warmup(name):
            return WHOLE
        folder = self.folder(seed, WARMUP)
        newest = newest_checkpoint(folder.place, CHECKPOINTS)
        if newest is None:
            raise UsageError(
                f"{folder.uri}: its checkpoints are gone; delete {folder.uri} to run it again"
            )
        return Span(start=newest[1])

    def finished(self, name: str, seed: int) -> Finished:
        """What a run measured. Raises: UsageError if the metric is not among it."""
        folder = self.folder(seed, name)
        measured = measured_of(folder)
        if self.plan.metric not in measured:
            raise UsageError(
                f"--metric {self.plan.metric}: {folder.uri} has none; it has "
                f"{', '.join(sorted(measured))}"
            )
        return Finished(name, seed, measured, folder.record.get("mlflow", {}).get("run_id", ""))


def _on_test(config: RunConfig) -> RunConfig:
    evaluate = config.evaluate.model_copy(update={"split": "test"})
    return config.model_copy(update={"evaluate": evaluate})


def _refuse_changed(name: str, folder: RunFolder, now: RunConfig) -> None:
    changed = folder.changed_keys(now)
    if changed:
        raise UsageError(
            f"variant {name}: {folder.uri} is a finished run of another recipe: "
            f"{'; '.join(changed)}. Give the variant another name, use another --out, or delete "
            "that folder to run it again"
        )


class Prepared(NamedTuple):
    """An ablation that can start."""

    runs: Runs
    record: dict[str, Any]
    """What pins it, and its MLflow run."""


def prepare(config: RunConfig, plan: Plan, store: str, out: Location, say: Say) -> Prepared:
    """Check and pin everything.

    Raises: UsageError if `out` holds another ablation, or a run of what a variant was before.
    """
    _check_metric(plan)
    record = _pinned(config, plan, store, out)
    where, in_words = _tracking(config, out)
    data = config.data.model_copy(update={"version": record["store"]["version"]})
    pinned = config.model_copy(update={"data": data, "tracking": where})
    _check_all(pinned, plan, store)
    Runs(pinned, plan, store, out, RunHandle("", "", "")).refuse_changed()
    say(in_words)
    out.write_bytes("config.yaml", config_text(config).encode())
    write_json(out, TABLE, {**read_json(out, TABLE), "pinned": record})
    parent = _parent_run(pinned, record, out)
    runs = Runs(pinned, plan, store, out, parent)
    return Prepared(runs, record | {"mlflow": {"uri": parent.uri, "run_id": parent.run_id}})


def _check_metric(plan: Plan) -> None:
    measured = metrics.names(with_classifier=plan.finetune)
    if plan.metric.split("/")[0] not in measured:
        raise UsageError(
            f"--metric {plan.metric}: not among what is measured; it starts with one of "
            f"{', '.join(f'{name}/' for name in measured)}"
        )


def _pinned(config: RunConfig, plan: Plan, store: str, out: Location) -> dict[str, Any]:
    """What may not change between two calls, as the first call that could start wrote it down."""
    known = read_json(out, TABLE).get("pinned")
    version = known["store"]["version"] if known else config.data.version
    snapshot = FeatureStore.open(store).snapshot(version)
    pinned = {
        "store": {"uri": store, "version": snapshot.version, "digest": snapshot.digest},
        "config_hash": config.digest(),
        "metric": plan.metric,
        "split": config.evaluate.split,
        "finetune": plan.finetune,
    }
    if known and known != pinned:
        old = config_in(out)
        if old is not None and old.digest() == config.digest():
            # An earlier version hashed fewer keys; those that came since have their defaults.
            known = known | {"config_hash": config.digest()}
        changed = [f"{k}: {known[k]} -> {pinned[k]}" for k in pinned if known[k] != pinned[k]]
        if changed:
            keys = differing_keys(old or config, config)
            changed += [key for key in keys if not key.startswith(NOT_DECIDING)]
            raise UsageError(
                f"{out.uri} holds another ablation: {'; '.join(changed)}. Use the old values or "
                "another --out: what is compared is fixed before the first run."
            )
    return pinned


def _check_all(config: RunConfig, plan: Plan, store: str) -> None:
    """Refuse a variant that cannot be trained before any of them is."""
    for name, variant in plan.variants.items():
        own = variant_config(config, name, variant, plan.seeds[0])
        data = pin(store, own.data.version, own)
        tested_rows(data, own)
        try:
            check(own, data)
        except TrainingError as error:
            raise UsageError(f"variant {name}: {error}") from None


def _tracking(config: RunConfig, out: Location) -> tuple[TrackingConfig, str]:
    """Where all runs of the ablation are written down: beside their parent, if that is there; the
    same for the screen."""
    where = destination(config.tracking, out.uri)
    known = read_json(out, TABLE).get("mlflow") or {"run_id": ""}
    uri, in_words = where.uri, f"tracking  {where}"
    if known["run_id"]:
        uri = known["uri"]
        in_words = f"tracking  MLflow at {without_passwords(uri)}, where it began"
    changes = {"uri": uri or None, "experiment": where.experiment}
    return config.tracking.model_copy(update=changes), in_words


def _parent_run(config: RunConfig, record: dict[str, Any], out: Location) -> RunHandle:
    """The MLflow run under which those of the variants stand: made once."""
    known = read_json(out, TABLE).get("mlflow")
    if known and known["run_id"]:
        return RunHandle(known["uri"], known["run_id"], out.uri)
    handle = tracking.create_run(
        config.tracking,
        out.uri,
        config.model_dump(mode="json"),
        {
            "mlflow.runName": f"{out.name} ablation",
            "ablation.metric": record["metric"],
            "out": out.uri,
        },
        record["store"] | {"name": Path(record["store"]["uri"]).name},
    )
    content = read_json(out, TABLE)
    mlflow = {"uri": handle.uri, "run_id": handle.run_id}
    write_json(out, TABLE, {**content, "mlflow": mlflow})
    return handle


def _tags(parent: RunHandle, name: str) -> dict[str, str]:
    nested = {"mlflow.parentRunId": parent.run_id} if parent.run_id else {}
    return {"mlflow.runName": name, **nested}


def measured_of(folder: RunFolder) -> dict[str, float]:
    """Metrics of an evaluated run; none before it is evaluated."""
    results = folder.results
    shown = (*metrics.names(with_classifier=True), "pseudo_labels", "n_test")
    return dict(scalars({k: v for k, v in results.items() if k in shown}))
