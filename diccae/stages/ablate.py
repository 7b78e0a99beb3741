"""The runs behind an ablation: one warm-up a seed, and every variant from its checkpoint.

Composes the stages; variants and statistics are in training.evaluation.variants. Invariants: the
metric is written down before the first run and is not changed afterwards; a run that is done is
never made again, so the same command goes on where it stopped.

out/  config.yaml  ablation.{json,md,png}  mlflow.db  seed-0/warmup/  seed-0/full/ ...
"""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from diccae.config import RunConfig, config_text, differing_keys, explain
from diccae.errors import UsageError
from diccae.run_folder import RunFolder, read_json, write_json
from diccae.screen import clock
from diccae.stages.evaluate import run_evaluate, scalars, tested_rows
from diccae.stages.finetune import run_finetune
from diccae.stages.pretrain import run_pretrain
from pipeline.storage import Location
from pipeline.store.store import FeatureStore
from training.errors import TrainingError
from training.evaluation import metrics
from training.evaluation.paired import contrasts, spread
from training.evaluation.variants import VARIANTS, Variant
from training.on_ray.fit import newest_checkpoint
from training.on_ray.pretrain import CHECKPOINTS, WHOLE, Span, check, pin
from training.report.ablate import (
    contrast_rows,
    draw,
    markdown,
    note,
    values_of,
    variant_rows,
)
from training.tracking import tracker as tracking
from training.tracking.copier import RunHandle

Say = Callable[[str], None]

_TABLE = "ablation.json"
_WARMUP = "warmup"
"""Folder of a seed's warm-up, beside those of its variants."""
_NOT_PINNED = ("scale.", "tracking.", "ingest.")


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


def read_variants(names: Sequence[str], file: str | None) -> dict[str, Variant]:
    """Variants by name, those of a YAML file (`name: {section: {key: value}}`) among them.

    Raises: UsageError for an unknown name, or a file that does not hold variants.
    """
    own = {} if file is None else _own_variants(file)
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise UsageError(
            f"no variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}, and those of "
            "--variants-file"
        )
    return {name: VARIANTS[name] for name in dict.fromkeys(names)} | own


def _own_variants(file: str) -> dict[str, Variant]:
    try:
        content = yaml.safe_load(Path(file).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{file}: not readable as YAML: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise UsageError(f"{file}: expected NAME: {{section: {{key: value}}}} for each variant")
    for name in map(str, content):
        if name in VARIANTS or name == _WARMUP or not re.fullmatch(r"[\w-]+", name):
            raise UsageError(
                f"{file}: variant {name!r}: a name is letters, digits, _ and -, and none of "
                f"{', '.join([*VARIANTS, _WARMUP])}"
            )
    return {str(name): Variant(f"of {Path(file).name}", c) for name, c in content.items()}


def variant_config(config: RunConfig, name: str, variant: Variant, seed: int) -> RunConfig:
    """The recipe with a variant's changes. Raises: UsageError naming the key that is wrong."""
    content = config.model_dump(mode="json") | {"seed": seed}
    for section, values in variant.changes.items():
        changed = {**content.get(section, {}), **values} if isinstance(values, Mapping) else values
        content[section] = changed
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"variant {name}: {explain(error, RunConfig)}") from None


def run_ablation(
    config: RunConfig, plan: Plan, store: str, out: Location, say: Say
) -> tuple[list[Finished], dict[str, Any]]:
    """Train and evaluate every variant with every seed.

    Returns: the runs, and what pins them. Raises: UsageError if `out` holds another ablation.
    """
    _check_metric(plan)
    record = _pinned(config, plan, store, out)
    pinned = config.model_copy(
        update={
            "data": config.data.model_copy(update={"version": record["store"]["version"]}),
            "tracking": config.tracking.model_copy(
                update={"uri": tracking.tracking_uri(config.tracking, out.uri) or None}
            ),
        }
    )
    _check_all(pinned, plan, store)
    out.write_bytes("config.yaml", config_text(config).encode())
    write_json(out, _TABLE, {**read_json(out, _TABLE), "pinned": record})
    parent = _parent_run(pinned, record, out)
    done = _Ablation(pinned, plan, store, out, parent, say).run()
    return done, record | {"mlflow": {"uri": parent.uri, "run_id": parent.run_id}}


def _check_metric(plan: Plan) -> None:
    measured = metrics.names(with_classifier=plan.finetune)
    if plan.metric.split("/")[0] not in measured:
        raise UsageError(
            f"--metric {plan.metric}: not among what is measured; it starts with one of "
            f"{', '.join(f'{name}/' for name in measured)}"
        )


class _Ablation(NamedTuple):
    """The runs of one ablation, each made once."""

    config: RunConfig
    plan: Plan
    store: str
    out: Location
    parent: RunHandle
    say: Say

    def run(self) -> list[Finished]:
        """Every variant with every seed; those that are there already are read."""
        started, made = time.monotonic(), 0
        done: list[Finished] = []
        for seed in self.plan.seeds:
            for name, variant in self.plan.variants.items():
                if self.plan.metric not in measured_of(self._folder(seed, name)):
                    # Runs that were there took no time and say nothing of those to come.
                    each_s = (time.monotonic() - started) / made if made else None
                    left = clock(each_s and each_s * (self.plan.n_runs - len(done)))
                    at = f"run {len(done) + 1}/{self.plan.n_runs}"
                    self.say(f"ablate    {at}: {name}, seed {seed}, left {left}")
                    self._train(name, variant, seed)
                    made += 1
                done.append(self._finished(name, seed))
        return done

    def _folder(self, seed: int, name: str) -> RunFolder:
        return RunFolder(self.out.uri_of(f"seed-{seed}", name))

    def _train(self, name: str, variant: Variant, seed: int) -> None:
        folder, config = self._folder(seed, name), variant_config(self.config, name, variant, seed)
        span = self._branch(variant, seed)
        with folder.held(f"ablate, {name}", config.scale.lease_stale_s):
            folder.open(config, fresh=False)
            tags = _tags(self.parent, f"seed-{seed} {name}")
            run_pretrain(folder, config, self.store, self.say, span, tags)
            if self.plan.finetune:
                run_finetune(folder, config, None, self.say)
            run_evaluate(folder, config, self.say)

    def _branch(self, variant: Variant, seed: int) -> Span:
        """Where it starts: the end of the seed's warm-up, which is run if it is not there."""
        epochs = self.config.rounds.warmup_epochs
        if not variant.shares_warmup or epochs == 0 or epochs >= self.config.pretrain.epochs:
            return WHOLE
        folder = self._folder(seed, _WARMUP)
        if not folder.results.get("warmup_epochs"):
            own = self.config.model_copy(update={"seed": seed})
            with folder.held("ablate, warm-up", own.scale.lease_stale_s):
                folder.open(own, fresh=False)
                tags = _tags(self.parent, f"seed-{seed} {_WARMUP}")
                run_pretrain(folder, own, self.store, self.say, Span(until_epoch=epochs), tags)
                folder.write_results(warmup_epochs=epochs)
        newest = newest_checkpoint(folder.uri, CHECKPOINTS)
        if newest is None:
            raise UsageError(
                f"{folder.uri}: its checkpoints are gone; delete {folder.uri} to run it again"
            )
        return Span(start=newest[1])

    def _finished(self, name: str, seed: int) -> Finished:
        folder = self._folder(seed, name)
        measured = measured_of(folder)
        if self.plan.metric not in measured:
            raise UsageError(
                f"--metric {self.plan.metric}: {folder.uri} has none; it has "
                f"{', '.join(sorted(measured))}"
            )
        return Finished(name, seed, measured, folder.record.get("mlflow", {}).get("run_id", ""))


def _pinned(config: RunConfig, plan: Plan, store: str, out: Location) -> dict[str, Any]:
    """What may not change between two calls, as the first call that could start wrote it down."""
    known = read_json(out, _TABLE).get("pinned")
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
        old = RunFolder(out.uri).config()
        changed = [f"{k}: {known[k]} -> {pinned[k]}" for k in pinned if known[k] != pinned[k]]
        keys = [key for key in differing_keys(old, config) if not key.startswith(_NOT_PINNED)]
        raise UsageError(
            f"{out.uri} holds another ablation: {'; '.join(changed + keys)}. Use the old values or "
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
            check(own, own.clustering, data)
        except TrainingError as error:
            raise UsageError(f"variant {name}: {error}") from None


def _parent_run(config: RunConfig, record: dict[str, Any], out: Location) -> RunHandle:
    """The MLflow run under which those of the variants stand: made once."""
    known = read_json(out, _TABLE).get("mlflow")
    if known and known["run_id"]:
        return RunHandle(known["uri"], known["run_id"], out.uri)
    handle = tracking.create_run(
        config.tracking,
        out.uri,
        config.model_dump(mode="json"),
        {"mlflow.runName": f"{out.name} ablation", "ablation.metric": record["metric"]},
        record["store"] | {"name": Path(record["store"]["uri"]).name},
    )
    content = read_json(out, _TABLE)
    mlflow = {"uri": handle.uri, "run_id": handle.run_id}
    write_json(out, _TABLE, {**content, "mlflow": mlflow})
    return handle


def _tags(parent: RunHandle, name: str) -> dict[str, str]:
    nested = {"mlflow.parentRunId": parent.run_id} if parent.run_id else {}
    return {"mlflow.runName": name, **nested}


def measured_of(folder: RunFolder) -> dict[str, float]:
    """Metrics of an evaluated run; none before it is evaluated."""
    results = folder.results
    shown = (*metrics.names(with_classifier=True), "pseudo_labels", "n_test")
    return dict(scalars({k: v for k, v in results.items() if k in shown}))


def _without_nan(fields: dict[str, Any]) -> dict[str, Any]:
    """NaN, which strict JSON does not know, as None."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in fields.items()
    }


class Summary(NamedTuple):
    """An ablation as it is shown and as it is kept."""

    content: dict[str, Any]
    """Of ablation.json."""
    tables: list[tuple[list[str], list[list[str]]]]
    """Header and rows: variants, then differences."""
    note: str


def write_results(
    out: Location, plan: Plan, done: Sequence[Finished], record: dict[str, Any]
) -> Summary:
    """Write ablation.json, .md and .png into `out`, and hand them to MLflow."""
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in plan.variants}
    for run in done:
        found[run.variant][run.seed] = run.metrics
    values = values_of(found, plan.metric)
    own = [name for name in plan.variants if name not in VARIANTS]
    differences = contrasts(values, own)
    n_test = int(done[0].metrics["n_test"])
    content = {
        **read_json(out, _TABLE),
        "n_test": n_test,
        "variants": {
            name: {**variant._asdict(), **_without_nan(spread(values[name])._asdict())}
            for name, variant in plan.variants.items()
        },
        "contrasts": [_without_nan(difference._asdict()) for difference in differences],
        "runs": [run._asdict() for run in done],
    }
    write_json(out, _TABLE, content)
    page = markdown(found, plan.metric, differences, plan.variants, record, n_test)
    out.write_bytes("ablation.md", page.encode())
    with out.written("ablation.png") as picture:
        draw(found, plan.metric, differences, picture)
    handle = RunHandle(record["mlflow"]["uri"], record["mlflow"]["run_id"], out.uri)
    if handle.run_id:
        means = {f"mean/{name}": spread(by_seed).mean for name, by_seed in values.items()}
        points = {f"difference/{d.variant}-{d.reference}": d.mean for d in differences}
        tracking.log_results(handle, means | points)
        files = [out.uri_of(f"ablation.{kind}") for kind in ("json", "md", "png")]
        tracking.log_artifacts(handle, files)
    tracking.finish(handle, "FINISHED")
    tables = [variant_rows(found, plan.metric), contrast_rows(differences)]
    return Summary(content, tables, note(differences, n_test, record["split"]))
