"""`diccae ingest`: raw clips to a feature store, only what is new or changed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from diccae.args import parse
from diccae.config import RunConfig, load_config
from diccae.screen import say
from pipeline.config import FeatureSpec

SECTIONS = ("features", "ingest", "tracking")


@dataclass(frozen=True)
class IngestArgs:
    """Decode clips into Parquet feature shards; a second run does only what changed."""

    clips: str
    """VGGSound CSV (id, start, label, split), or a manifest with a header: uri, start_s, ..."""
    store: str
    """URI of the feature store: folder, s3://, gs://, ..."""
    videos: str | None = None
    """Folder or URI of the clips, or of the published tar.gz parts."""
    config: str | None = None
    """YAML config; its `features` section is used, else the store's own spec."""
    plan: bool = False
    """Only say what would be done and why; starts nothing."""
    probe: bool = False
    """With --plan: read the containers and count unclean timelines."""
    retry_failed: bool = False
    """Decode clips again that failed before."""
    allow_mass_delete: bool = False
    """Remove clips from the store even if a large share vanished from the source."""
    json: bool = False
    """End with one JSON line on stdout."""
    run: RunConfig = field(default_factory=RunConfig)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parse("ingest", IngestArgs, argv, SECTIONS)
    config = args.run.ingest.model_copy(
        update={
            "retry_failed": args.retry_failed or args.run.ingest.retry_failed,
            "allow_mass_delete": args.allow_mass_delete or args.run.ingest.allow_mass_delete,
            "probe": args.probe or args.run.ingest.probe,
        }
    )
    spec = wanted_spec(args, argv)
    if args.plan:
        return _plan(args, spec, config)
    from diccae.stages.ingest import run_ingest
    from pipeline.errors import TooManyFailures

    try:
        summary = run_ingest(args.clips, args.videos, args.store, spec, config, args.run.tracking)
    except TooManyFailures as error:
        if args.json:
            print(json.dumps(error.summary))
        raise
    report = summary.to_json()
    if args.json:
        print(json.dumps(report))
    else:
        print("  ".join(f"{name} {value:,}" for name, value in report.items()))
    if summary.failed:
        say(f'failed clips: diccae store failures --store "{args.store}"')
    return 0


def wanted_spec(args: IngestArgs, argv: Sequence[str]) -> FeatureSpec | None:
    """What the user asked for; None leaves it to the store."""
    if "features" in load_config(args.config).model_fields_set:
        return args.run.features
    if not any(arg.startswith("--features.") for arg in argv):
        return None
    from pipeline.store.store import FeatureStore

    if not FeatureStore.exists(args.store):
        return args.run.features
    own = FeatureStore.open(args.store).snapshot().spec
    base = RunConfig(features=own)
    return parse("ingest", IngestArgs, argv, ("features",), base).run.features


def _plan(args: IngestArgs, spec: FeatureSpec | None, config: object) -> int:
    from pipeline.config import IngestConfig
    from pipeline.ingest.run import plan_ingest

    assert isinstance(config, IngestConfig)
    plan = plan_ingest(args.clips, args.videos, args.store, spec, config)
    found = {**plan.counts, "missing": len(plan.missing), "restated": len(plan.restated)}
    if args.json:
        print(json.dumps({**found, **({"timelines": plan.timelines} if plan.timelines else {})}))
        return 0
    for name, count in found.items():
        print(f"{name:<13} {count:>12,}  {_WHY[name]}")
    for name, count in (plan.timelines or {}).items():
        print(f"timelines {name}: {count}")
    return 0


_WHY = {
    "new": "not in the store yet: decode",
    "changed": "the file is another one now: decode again",
    "spec_changed": "the features asked for are others now: decode again",
    "retried": "failed before: decode again",
    "removed": "not listed any more: drop",
    "unchanged": "nothing to do",
    "missing": "listed, but the file is not there: written down as missing",
    "restated": "another label, split or place: written down without decoding",
}
