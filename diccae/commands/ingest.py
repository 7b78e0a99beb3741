"""`diccae ingest`: raw clips to a feature store, only what is new or changed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from diccae.args import Options
from diccae.config import RunConfig, load_config
from diccae.errors import UsageError
from diccae.screen import say
from pipeline.config import FeatureSpec, IngestConfig

SECTIONS = ("features", "ingest", "tracking")


@dataclass(frozen=True)
class IngestArgs:
    """Decode clips into Parquet feature shards; a second run does only what changed."""

    store: str
    """URI of the feature store: folder, s3://, gs://, ..."""
    videos: str | None = None
    """Folder or URI of the clips, or of tar parts; without --clips every video in it is a clip."""
    clips: str | None = None
    """VGGSound CSV (id, start, label, split), or a manifest with a header: uri, start_s, ..."""
    label_from_folder: bool = False
    """Without --clips: a clip's label is the name of the folder it lies in; else it has none."""
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


OPTIONS = Options("ingest", IngestArgs, SECTIONS)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    # Only then is the store looked into for what the options change.
    is_asked = any(arg.startswith("--features.") for arg in argv)
    args = OPTIONS.parse(argv, _own_spec if is_asked else None)
    config = _with_switches(args)
    is_asked = is_asked or "features" in load_config(args.config).model_fields_set
    spec = args.run.features if is_asked else None
    if args.probe and not args.plan:
        raise UsageError(
            "--probe belongs to --plan, and nothing was done: a run decodes every "
            "timeline as it is. Add --plan, or leave it out."
        )
    if args.plan:
        return _plan(args, spec, config)
    from diccae.stages.ingest import run_ingest
    from pipeline.errors import Unfinished

    try:
        summary = run_ingest(
            args.clips,
            args.videos,
            args.store,
            spec,
            config,
            args.run.tracking,
            label_from_folder=args.label_from_folder,
        )
    except Unfinished as error:
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


def _with_switches(args: IngestArgs) -> IngestConfig:
    """The config's ingest section, with what the short options turn on."""
    given: dict[str, Any] = {"retry_failed": True} if args.retry_failed else {}
    if args.allow_mass_delete:
        given["max_removed_frac"] = 1.0
    return args.run.ingest.model_copy(update=given)


def _own_spec(args: IngestArgs) -> RunConfig | None:
    """The config with the features of the store, where there is one and no config names others."""
    if "features" in load_config(args.config).model_fields_set:
        return None
    from pipeline.store.store import FeatureStore

    if not FeatureStore.exists(args.store):
        return None
    own = FeatureStore.open(args.store).snapshot().spec
    return load_config(args.config).model_copy(update={"features": own})


def _plan(args: IngestArgs, spec: FeatureSpec | None, config: IngestConfig) -> int:
    from pipeline.ingest.run import plan_ingest

    plan = plan_ingest(
        args.clips,
        args.videos,
        args.store,
        spec,
        config,
        label_from_folder=args.label_from_folder,
        probe=args.probe,
    )
    found = {**plan.counts, "restated": len(plan.restated)}
    if args.json:
        about: dict[str, Any] = {"to_decode": len(plan.todo), "puts_in_force": plan.puts_in_force}
        if plan.out_of_reach is not None:
            n_clips, places = plan.out_of_reach
            about["out_of_reach"] = {"clips": n_clips, "places": places}
        timelines = {"timelines": plan.timelines} if plan.timelines else {}
        print(json.dumps({**found, **about, **timelines}))
        return 0
    for name, count in found.items():
        print(f"{name:<13} {count:>12,}  {_WHY[name]}")
    print(f"{'to decode':<13} {len(plan.todo):>12,}  of all these")
    if plan.puts_in_force:
        print("the features asked for come into force at the end of the run")
    if plan.out_of_reach is not None:
        print(f"the features asked for do not come into force: {plan.out_of_reach}")
    for name, count in (plan.timelines or {}).items():
        print(f"timelines {name}: {count}")
    return 0


_WHY = {
    "new": "not in the store yet: decode",
    "changed": "another file or window: decode again; another label or split: write down",
    "spec_changed": "the features asked for are others now: decode again",
    "retried": "failed before: decode again",
    "removed": "not listed any more, or its file is gone: drop",
    "unchanged": "nothing to do",
    "set_aside": "in the store, and cannot be read or told apart: left as it is",
    "missing": "newly listed, but the file is not there: written down as missing",
    "restated": "of the changed and unchanged, written down without decoding: label, split, place",
}
