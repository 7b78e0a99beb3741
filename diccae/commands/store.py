"""`diccae store`: look after a feature store."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import tyro

from diccae.args import Options
from diccae.errors import UsageError
from diccae.screen import say, table


@dataclass(frozen=True)
class StoreArgs:
    """Look after a feature store: what is in it, what failed, what is damaged or not needed."""

    action: tyro.conf.Positional[
        Literal[
            "status",
            "versions",
            "failures",
            "verify",
            "quality",
            "stats",
            "compact",
            "vacuum",
            "pin",
            "unpin",
            "export",
        ]
    ]
    """What to do. compact: rewrite shards of which less than half is live, and drop superseded rows
    of the log; shards that are merely small stay, and without anything to do there is no new
    version."""
    store: str
    """URI of the feature store."""
    version: int | None = None
    """status, failures, stats, export: an older version of the store; pin: the one to keep."""
    last: int = 20
    """versions: at most so many, the newest and besides them those that are pinned."""
    reason: str | None = None
    """failures: clips that failed with this reason alone."""
    examples: int = 3
    """failures: at most so many clips are named for each reason."""
    spec: str | None = None
    """failures: under the feature spec of this hash, in place of the one in force."""
    split: str | None = None
    """quality: only clips of this split; stats: the split, train unless told otherwise."""
    stored_only: bool = False
    """quality: leave the source files alone; rules that need them are not judged."""
    sample: int = 64
    """verify: clips that are read back and compared."""
    repair: bool = False
    """verify: mark clips whose stored features are damaged, so that the next ingest decodes them
    again; a source that is gone, or does not decode any more, costs no features."""
    retention_hours: float = 168.0
    """vacuum: keep unreferenced shards this long."""
    dry_run: bool = False
    """vacuum, unpin --gone: list what would be removed, and remove nothing."""
    pin: str | None = None
    """pin: its name; unpin: the pin to let go of, as `status` names it. Until then no vacuum takes
    what the version needs."""
    gone: bool = False
    """unpin: all pins whose run folder no longer holds a run; one that cannot be reached is not
    gone."""
    out: str | None = None
    """export: a new or empty folder of this machine."""
    format: Literal["folder", "webdataset"] = "folder"
    """export: a plain folder of JPEG and npy files, or WebDataset tars."""
    json: bool = False
    """Print one JSON line."""


_TAKEN_BY = {
    "version": ("status", "failures", "stats", "export", "pin"),
    "last": ("versions",),
    "reason": ("failures",),
    "examples": ("failures",),
    "spec": ("failures",),
    "split": ("quality", "stats"),
    "stored_only": ("quality",),
    "sample": ("verify",),
    "repair": ("verify",),
    "retention_hours": ("vacuum",),
    "dry_run": ("vacuum", "unpin"),
    "pin": ("pin", "unpin"),
    "gone": ("unpin",),
    "out": ("export",),
    "format": ("export",),
}
"""The actions that look at an option; what is not named here is for all."""

OPTIONS = Options("store", StoreArgs)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = OPTIONS.parse(argv)
    _refuse_options_of_others(args)
    from pipeline.store import maintenance

    if args.action == "status":
        return _status(maintenance.status(args.store, args.version), args.json)
    if args.action == "versions":
        return _versions(args)
    if args.action == "failures":
        found = maintenance.failures(
            args.store,
            args.reason,
            examples=args.examples,
            spec=args.spec,
            version=args.version,
        )
        return _failures(found, args.json)
    if args.action == "verify":
        return _verify(args)
    if args.action == "quality":
        return _quality(args)
    if args.action == "stats":
        return _stats(args)
    return _change_or_copy(args)


def _refuse_options_of_others(args: StoreArgs) -> None:
    """Raises: UsageError for an option that the action would not look at."""
    for field in fields(args):
        actions = _TAKEN_BY.get(field.name, (args.action,))
        if args.action not in actions and getattr(args, field.name) != field.default:
            option = f"--{field.name.replace('_', '-')}"
            raise UsageError(
                f"{option} is no option of {args.action}, but of {', '.join(actions)}; leave it out"
            )


def _change_or_copy(args: StoreArgs) -> int:
    """The actions that write: compact, vacuum, pin, unpin, export."""
    from pipeline.store import maintenance

    if args.action == "compact":
        return _show(maintenance.compact(args.store), args.json)
    if args.action == "vacuum":
        return _vacuum(args)
    if args.action == "pin":
        return _pin(args)
    if args.action == "unpin":
        return _unpin(args)
    if args.out is None:
        raise UsageError("export: --out DIR is needed")
    return _show(maintenance.export(args.store, args.out, args.format, args.version), args.json)


def _versions(args: StoreArgs) -> int:
    from pipeline.store.versions import versions

    found = versions(args.store, args.last)
    if args.json:
        print(json.dumps(found))
        return 0
    rows = [
        [
            str(one["version"]), one["time"], "vacuumed" if one["clips"] is None else
            f"{one['clips']:,}", one["spec"] or "", one["by"], " ".join(one["pins"]),
        ]
        for one in found
    ]  # fmt: skip
    print(table(["version", "time", "clips", "spec", "by", "pins"], rows))
    return 0


def _pin(args: StoreArgs) -> int:
    from pipeline.store.versions import pin

    if args.version is None or args.pin is None:
        raise UsageError("pin: --version N --pin NAME are needed; diccae store versions lists them")
    return _pins_left(pin(args.store, args.version, args.pin), args.json)


def _unpin(args: StoreArgs) -> int:
    from pipeline.store.versions import unpin

    if args.gone == (args.pin is not None):
        raise UsageError("unpin: --pin NAME or --gone is needed; diccae store status names them")
    if not args.gone:
        if args.dry_run:
            raise UsageError("unpin: --dry-run belongs to --gone")
        return _pins_left(unpin(args.store, args.pin or ""), args.json)
    from diccae.stages.pins import let_go_of_gone

    found = let_go_of_gone(args.store, args.dry_run)
    if args.json:
        print(json.dumps(found._asdict()))
        return 0
    for name in found.gone:
        print(f"{name}  {'gone' if args.dry_run else 'let go of'}")
    for name, why in found.unknown.items():
        print(f"{name}  stays: {why}")
    print(f"{len(found.gone)} gone, {len(found.unknown)} that nobody can say of")
    return 0


def _pins_left(pins: dict[str, int], as_json: bool) -> int:
    if as_json:
        print(json.dumps({"pins": pins}))
    else:
        print("\n".join(f"{name}  version {n}" for name, n in pins.items()) or "no pins")
    return 0


def _status(result: dict[str, Any], as_json: bool) -> int:
    if as_json:
        return _show(result, True)
    pins, runs = result.pop("pins"), result.pop("pinned_for")
    _show({**result, "pins": len(pins)}, False)
    for name, version in pins.items():
        print(f"    {name}  version {version}  {runs.get(name, '')}".rstrip())
    return 0


def _vacuum(args: StoreArgs) -> int:
    from pipeline.store.maintenance import vacuum

    result = vacuum(args.store, args.retention_hours, args.dry_run)
    files = result.pop("files")
    if args.dry_run and args.json:
        result["files"] = files
    elif args.dry_run:
        for shard, size in files.items():
            print(f"{shard}  {size:,} bytes")
    return _show(result, args.json)


def _show(result: dict[str, Any], as_json: bool) -> int:
    if as_json:
        print(json.dumps(result))
    else:
        width = max(map(len, result))
        for name, value in result.items():
            print(
                f"{name:<{width}}  {value:,}"
                if isinstance(value, int)
                else f"{name:<{width}}  {value}"
            )
    return 0


def _verify(args: StoreArgs) -> int:
    from pipeline.ingest.verify import SOURCE, verify

    result = verify(args.store, sample=args.sample, repair=args.repair)
    if args.json:
        print(json.dumps(result))
    else:
        _show({**result, "problems": len(result["problems"])}, False)
        for problem in result["problems"]:
            say(f"{problem['clip_id']}  {problem['shard']}  {problem['problem']}")
    left = [p for p in result["problems"] if not args.repair or p["found_in"] == SOURCE]
    return 1 if left else 0


def _quality(args: StoreArgs) -> int:
    from diccae.stages.quality import quality_lines, run_quality

    summary = run_quality(args.store, args.split, reads_sources=not args.stored_only)
    print(json.dumps(asdict(summary)) if args.json else "\n".join(quality_lines(summary)))
    return 0


def _stats(args: StoreArgs) -> int:
    from diccae.stages.quality import run_stats

    return _show(asdict(run_stats(args.store, args.split or "train", args.version)), args.json)


def _failures(by_reason: dict[str, dict[str, Any]], as_json: bool) -> int:
    if as_json:
        print(json.dumps(by_reason))
        return 0
    if not by_reason:
        print("no failed clips")
    for reason, found in by_reason.items():
        print(f"{reason}  {found['clips']:,}")
        for example in found["examples"]:
            print(f"    {example['clip_id']}  {example['uri']}  {example['detail']}")
    return 0
