"""VGGSound's size without VGGSound: what every process of the recipe needs.

    python benchmarks/rehearsal.py [--clips 183730] [--config configs/vggsound.yaml] [--keep DIR]

Writes a store of `--clips` train and 8.4 % as many test clips of 309 classes, long-tailed as
VGGSound's, through the store's own writer (256-clip shards, 64-row groups; small features, drawn
from a pool of payloads). Then each role of a run, in a process of its own and by the code that the
run uses, without Ray and without a model: plan, pin, the order of an epoch with and without the
balanced sampler, the readers of 8 workers, a bank, a compute actor, a round with the config's K,
evaluation and report. Embeddings are drawn around a centre per class. Fewer probe iterations, test
clips and clips of confused pairs than in a run save time; the memory is that of a run.

Reported: seconds, peak memory (of it: what the system cannot page out), and bytes read of an epoch
against one pass over the features. Exit code 1 where a bound is broken: 2 GB a process, 1.3 passes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.store.schema import CLIPS_SCHEMA, SOURCE_SCHEMA
from pipeline.store.store import FeatureStore

if TYPE_CHECKING:  # A role imports what its process of a run does, which its memory tells of.
    from clustering.config import KMeansConfig
    from clustering.rounds.bank import BankRows
    from clustering.rounds.frozen import Owner
    from diccae.config import RunConfig
    from training.data.order import Window, WindowPlan
    from training.predict.apply import Outputs
    from training.predict.jobs import Job
    from training.run.pinned import Pinned

SPEC = FeatureSpec(frame_size=32, n_mels=32, fbank_frames=64, duration_s=1.0)
N_CLASSES = 309
SHARD_CLIPS, COMMIT_SHARDS = 256, 8


def class_sizes(n_clips: int) -> np.ndarray:
    """Clips of each class: from 2 to about 1,000 of 183,730, falling like VGGSound's."""
    shape = (1 - np.arange(N_CLASSES) / (N_CLASSES - 1)) ** 0.68
    sizes: np.ndarray = np.maximum(2, np.floor(shape / shape.sum() * n_clips)).astype(int)
    sizes[0] += n_clips - sizes.sum()
    return sizes


def listing(n_train: int) -> pa.Table:
    """The source clips, in VGGSound's names."""
    rng = np.random.default_rng(0)
    letters = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"))
    n_test = max(2 * N_CLASSES, round(n_train * 15_446 / 183_730))
    n = n_train + n_test
    ytids = letters[rng.integers(64, size=(n, 11))].view("U11")[:, 0]
    ids = [
        f"{ytid}_{start:06d}" for ytid, start in zip(ytids, rng.integers(600, size=n), strict=True)
    ]
    labels = np.concatenate(
        [np.repeat(np.arange(N_CLASSES), class_sizes(n_train)), np.arange(n_test) % N_CLASSES]
    )
    columns = {
        "clip_id": ids,
        "uri": [f"/data/vggsound/videos/{clip_id}.mp4" for clip_id in ids],
        "label": [f"class number {k:03d}" for k in labels],
        "split": ["train"] * n_train + ["test"] * n_test,
        "fp_kind": ["stat"] * n,
        "fp": [f"{i}-1" for i in range(n)],
        "size": np.arange(n),
        "mtime_ns": np.ones(n, np.int64),
        "group": ytids,
    }
    table = pa.table(
        [pa.array(columns.get(f.name, [None] * n), f.type) for f in SOURCE_SCHEMA],
        schema=SOURCE_SCHEMA,
    )
    return table.take(rng.permutation(n))


def fill_store(uri: str, sources: pa.Table) -> None:
    """Shards and commits as an ingest leaves them."""
    from pipeline.decode.payload import encode_jpeg, fbank_payload
    from pipeline.store.shards import ShardWriter

    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (64, SPEC.frame_size, SPEC.frame_size, 3), np.uint8)
    jpegs = [encode_jpeg(image, SPEC.jpeg_quality) for image in images]
    sounds = [
        fbank_payload(rng.normal(-5, 4, (SPEC.fbank_frames, SPEC.n_mels)), SPEC) for _ in range(64)
    ]
    store, run = FeatureStore.create(uri, SPEC), {"run_id": "rehearsal"}
    states: list[dict[str, Any]] = []
    for begin in range(0, len(sources), SHARD_CLIPS):
        name = f"features/part-rehearsal-{begin // SHARD_CLIPS:06d}-0.parquet"
        shard = ShardWriter(store.location, name, SPEC)
        for i, clip in enumerate(sources.slice(begin, SHARD_CLIPS).to_pylist(), begin):
            fbank, n_valid = sounds[i % 64]
            row = {"clip_id": clip["clip_id"], "row_key": f"{i:024x}"}
            row |= {"label": clip["label"], "split": clip["split"]}
            features = {
                "frames": [jpegs[(i * 7 + j * 13) % 64] for j in range(SPEC.n_frames)],
                "frame_ts_ms": list(range(SPEC.n_frames)),
                "fbank": fbank,
                "fbank_frames": n_valid,
            }
            position = shard.add(row | features)
            state = {"status": "ok", "attempts": 1, "spec_hash": SPEC.spec_hash(), "shard": name}
            states.append(clip | row | state | run | {"row": position})
        shard.publish()
        if len(states) >= COMMIT_SHARDS * SHARD_CLIPS or begin + SHARD_CLIPS >= len(sources):
            store.append(pa.Table.from_pylist(states, CLIPS_SCHEMA), run)
            states = []


class Place(NamedTuple):
    """What a role works on."""

    folder: Path
    options: argparse.Namespace

    @property
    def store(self) -> str:
        return str(self.folder / "store")

    @property
    def config(self) -> "RunConfig":
        from diccae.config import load_config

        config = load_config(self.options.config)
        # Named as a run names them, and never read.
        encoder = config.encoder.model_copy(update={"init": "weights.pth"})
        return config.model_copy(update={"encoder": encoder})

    def pinned(self) -> "Pinned":
        from training.run.pinned import pin

        return pin(self.store, None, self.config)


def plan(place: Place) -> dict[str, Any]:
    """A plan of an ingest with nothing to do."""
    from pipeline.ingest.plan import STATE_COLUMNS, make_plan

    snapshot = FeatureStore.open(place.store).snapshot()
    sources = pq.read_table(place.folder / "sources.parquet")
    states = snapshot.states(STATE_COLUMNS)
    made = make_plan(sources, states, snapshot.spec_hash, IngestConfig())
    assert made.is_empty, made.counts
    return {}


def pin(place: Place) -> dict[str, Any]:
    """What the driver does before it uses the cluster."""
    from training.run.pinned import check

    config, data = place.config, place.pinned()
    check(config, data)
    assert data.snapshot.digest
    return {}


def _windows(place: Place, rank: int, balanced: bool) -> "WindowPlan":
    from training.data.order import BatchPlan, WindowPlan, balanced_draws, lanes_of

    config, index = place.config, place.pinned().train
    size = config.finetune.batch_size if balanced else config.pretrain.batch_size
    plan = BatchPlan.of(len(index), size, config.data)
    lanes = lanes_of(rank, config.scale.num_workers, plan.lanes)
    draws = balanced_draws(index, config.seed) if balanced else None
    return WindowPlan(index, plan, lanes, config.seed, draws)


def _an_epoch(windows: "WindowPlan") -> "Iterator[Window]":
    from training.data.order import EpochReads, FrameDraw

    return windows.windows(EpochReads(1, 0, FrameDraw(1)))


def order(place: Place, balanced: bool = False) -> dict[str, Any]:
    """All windows of an epoch of one worker, without reading them."""
    return {"windows": sum(1 for _ in _an_epoch(_windows(place, 0, balanced)))}


def read(place: Place, balanced: bool = False) -> dict[str, Any]:
    """An epoch of all workers, one after the other, in one reader's process."""
    from training.data.reader import read_window

    n_bytes = 0
    for rank in range(place.config.scale.num_workers):
        windows = _windows(place, rank, balanced)
        # Without the clips table, which a run reads once.
        before = _bytes_read()
        for window in _an_epoch(windows):
            for batch in read_window(window):
                assert batch.frames.shape[2:4] == (SPEC.frame_size, SPEC.frame_size)
        n_bytes += _bytes_read() - before
    return {"passes": n_bytes / _train_bytes(place)}


def _bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def _train_bytes(place: Place) -> float:
    """Features of the train split on storage."""
    names = ("frames.list.element", "fbank")
    n_bytes = n_rows = 0
    for shard in sorted((place.folder / "store" / "features").iterdir())[:8]:
        about = pq.ParquetFile(shard).metadata
        n_rows += about.num_rows
        for group in range(about.num_row_groups):
            columns = [about.row_group(group).column(i) for i in range(about.num_columns)]
            n_bytes += sum(c.total_compressed_size for c in columns if c.path_in_schema in names)
    # Test clips lie in the same row groups, as an ingest puts them: they are read along.
    n_clips: int = FeatureStore.open(place.store).snapshot().rows(None).num_rows
    return n_bytes / n_rows * n_clips


def _bank_rows(place: Place, epoch: int) -> "Iterator[BankRows]":
    """Every clip's row of an epoch: streams side by side, around a centre per class."""
    from clustering.rounds.bank import BankRows

    config, index = place.config, place.pinned().train
    width = config.encoder.projection * len(config.loss.label_streams)
    rng = np.random.default_rng(2)
    centres = rng.normal(size=(N_CLASSES, width)).astype(np.float32)
    rng = np.random.default_rng([3, epoch])
    for begin in range(0, len(index), 4096):
        labels = index.labels_N[begin : begin + 4096]
        rows = centres[labels] + 1.5 * rng.normal(size=(len(labels), width)).astype(np.float32)
        step = (epoch * len(index) + begin) // config.pretrain.batch_size
        steps = np.full(len(labels), step)
        yield BankRows(index.keys_N[begin : begin + 4096], steps, rows.astype(np.float16))


def _owner(place: Place) -> "Owner":
    from clustering.rounds.frozen import Owner

    groups = place.config.pool.groups(place.config.clustering)
    return Owner(0, groups.banks.n, place.config.clustering.vshards)


def _streams(place: Place) -> dict[str, int]:
    config = place.config
    return {s: config.encoder.projection for s in config.loss.label_streams}


def bank(place: Place) -> dict[str, Any]:
    """One of the bank actors: an epoch and a half, checkpoints, a freeze, a restore."""
    from clustering.kmeans.hashing import vshard_of
    from clustering.pool.bank_actor import BankActor
    from clustering.rounds.saved import kept_files, write_saved

    owner, home = _owner(place), str(place.folder / "rounds")
    actor = BankActor(owner, f"{home}/bank/pool/0", home, _streams(place))
    for epoch in (0, 1):
        for number, rows in enumerate(_bank_rows(place, epoch)):
            mine = rows.take(np.flatnonzero(owner.owns(vshard_of(rows.keys, owner.vshards))))
            actor.push(*mine)
            actor.sync()
            if number % 31 == 30:  # of 4,096 rows: about 500 steps
                write_saved(f"{home}/bank-{epoch}{number:07d}", actor.saved())
        actor.freeze(f"{home}/frozen-{epoch}.parquet", 10**9)
        write_saved(f"{home}/bank-{epoch}9999999", actor.saved())
        actor.forget(kept_files(home))
    again = BankActor(owner, f"{home}/bank/later/0", home, _streams(place))
    began = time.perf_counter()
    again.restore(f"{home}/bank-19999999")
    return {"restore_s": time.perf_counter() - began, "rows": again.ages().n_rows}


def _kmeans(place: Place) -> "KMeansConfig":
    """The config's clustering; fewer clusters where a small run has too few clips."""
    clustering = place.config.clustering
    return clustering.model_copy(update={"k": min(clustering.k, place.options.clips // 20)})


def clustering_round(place: Place) -> dict[str, Any]:
    """Bank, freeze, k-means, prototypes and labels in one process: more than any actor holds."""
    from clustering.rounds.local import LocalRounds
    from clustering.rounds.protocol import RoundRequest

    uri = str(place.folder / "run" / "rounds")
    rounds = LocalRounds(_kmeans(place), _streams(place), uri, place.config.seed)
    for rows in _bank_rows(place, 0):
        rounds.push(rows.keys, rows.rows, 1)
    rounds.start(
        RoundRequest(1, 1, 2, expected_rows=place.options.clips, posterior_temperature=0.1)
    )
    made = rounds.wait(1, 3600)
    assert made.ok, made.reason
    return {"k": len(made.heads[0].confusion_KK), "iterations": made.health["iterations"]}


def compute(place: Place) -> dict[str, Any]:
    """One of the compute actors: its share of the round's rows, clustered."""
    from clustering.kmeans.lloyd import cluster
    from clustering.kmeans.passes import LocalPasses
    from clustering.kmeans.share import Share
    from clustering.rounds.files import vectors_uri
    from clustering.rounds.frozen import FrozenRows
    from clustering.rounds.targets import targets_of

    kmeans, n = _kmeans(place), place.config.pool.n_actors
    frozen = FrozenRows.load(vectors_uri(str(place.folder / "run" / "rounds"), 1))
    assert frozen is not None
    share = Share(frozen.source(0, n), kmeans.block_rows, kmeans.device)
    # All clusters on a share of the rows; a few iterations touch all the memory there is.
    few = kmeans.model_copy(update={"iterations": 3, "init": "random"})
    [target] = targets_of(kmeans, _streams(place))
    cluster(LocalPasses(share), target.space, few, 0)
    return {"share": f"1/{n}", "k": few.k}


def _drawn(job: "Job", number: int, widths: dict[str, int]) -> "Outputs":
    """Outputs of a job around a centre per class, in place of a model's. Args: widths: by kind."""
    from training.config import STREAMS
    from training.predict.apply import Outputs
    from training.predict.jobs import paged_array

    kinds: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in Outputs._fields}
    labels = job.rows.labels_N
    for kind in job.kinds:
        rng = np.random.default_rng([number, widths[kind]])
        for stream, name in enumerate(STREAMS):
            centres = np.random.default_rng(stream).normal(size=(N_CLASSES, widths[kind]))
            found = kinds[kind][name] = paged_array(len(labels), widths[kind])
            for at in range(0, len(labels), 8192):
                mean = centres[labels[at : at + 8192]]
                found[at : at + 8192] = mean + 3 * rng.normal(size=mean.shape)
    return Outputs(**kinds)


def _some_encoder(place: Place, run: Path) -> None:
    """A small one, since an evaluation reads what an encoder's card says and applies none here."""
    from training.config import EncoderConfig
    from training.model.encoder import Encoder
    from training.model.make import input_shape
    from training.weights.card import Applied
    from training.weights.files import save_encoder

    encoder = Encoder(EncoderConfig(dim=8), input_shape(SPEC))
    save_encoder(encoder, str(run / "encoder"), applied=Applied.of(place.config))


def evaluation(place: Place) -> dict[str, Any]:
    """The driver of an evaluation, with drawn outputs in place of the model's."""
    import torch

    from pipeline.storage import Location
    from training.data.rows import index_rows
    from training.data.validation import groups_of
    from training.on_ray import evaluate as stage

    torch.set_num_threads(1)
    config, data, options = place.config, place.pinned(), place.options
    all_test = index_rows(data.snapshot, "test", data.train.classes)
    test = all_test.take(np.arange(0, len(all_test), max(1, len(all_test) // options.tested)))
    groups = zip(all_test.clip_ids_N, groups_of(data.snapshot, "test"), strict=True)
    widths = {"z": options.width, "h": config.encoder.projection}

    def apply(jobs: "Sequence[Job]", *_models_and_settings: object) -> "list[Outputs]":
        return [_drawn(job, number, widths) for number, job in enumerate(jobs)]

    run = place.folder / "run"
    _some_encoder(place, run)
    fewer = {"probe_epochs": options.probe_iterations}
    config = config.model_copy(
        update={
            "evaluate": config.evaluate.model_copy(update=fewer),
            "scale": config.scale.model_copy(update={"use_gpu": False}),
        }
    )
    with mock.patch.object(stage, "_PAIR_CLIPS", options.pair_clips):
        found = stage.evaluate(
            config,
            data.train,
            test,
            Location(run),
            {},
            groups=dict(groups),
            config_hash=config.digest(),
            apply=apply,
        )
    store = {"uri": place.store, "version": data.snapshot.version, "digest": "-"}
    (run / "run.json").write_text(json.dumps({"store": store}))
    (run / "results.json").write_text(json.dumps(found.as_json() | {"store": store}))
    return {"knn": found.measured["knn"]["fusion"]}


def report(place: Place) -> dict[str, Any]:
    """The page of that run."""
    from training.report.page import write_report

    return {"page": f"{Path(write_report(place.folder / 'run')).stat().st_size / 1e6:.1f} MB"}


ROLES: dict[str, tuple[str, Callable[[Place], dict[str, Any]]]] = {
    "plan": ("driver: plan with nothing to do", plan),
    "pin": ("driver: pin, index, checks, digest", pin),
    "order": ("worker: windows of an epoch", order),
    "order-balanced": ("worker: the same, balanced", lambda place: order(place, balanced=True)),
    "read": ("reader: an epoch of all workers", read),
    "read-balanced": ("reader: the same, balanced", lambda place: read(place, balanced=True)),
    "bank": ("bank actor: 2 epochs, checkpoints, restore", bank),
    "round": ("round, all in one process", clustering_round),
    "compute": ("compute actor: its share", compute),
    "evaluate": ("driver: evaluation without the model", evaluation),
    "report": ("driver: report", report),
}


class Measured(NamedTuple):
    """What a role took."""

    seconds: float
    peak_gb: float
    own_gb: float
    """Without pages of files, which the system takes back when it needs them."""
    found: dict[str, Any]


def act(place: Place, role: str) -> None:
    """In the process of a role: do it, and print what it took."""
    peak = 0

    def watch() -> None:
        nonlocal peak
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    peak = max(peak, int(line.split()[1]))
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    found = ROLES[role][1](place)
    print(json.dumps({"seconds": time.perf_counter() - began, "own_kb": peak, "found": found}))


def measure(place: Place, role: str) -> Measured:
    """Run a role in a process of its own."""
    options = place.options
    command = [sys.executable, __file__, "--role", role, "--keep", str(place.folder)]
    for name in ("clips", "config", "width", "tested", "pair_clips", "probe_iterations"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{role} ended with {process.returncode}")
    told = json.loads(said.splitlines()[-1])
    gb = usage.ru_maxrss * 1024 / 1e9
    return Measured(told["seconds"], gb, told["own_kb"] * 1024 / 1e9, told["found"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, default=183_730)
    parser.add_argument("--config", default="configs/vggsound.yaml")
    parser.add_argument("--keep", help="folder of the store, kept and used again")
    parser.add_argument("--width", type=int, default=768, help="of a token mean")
    parser.add_argument("--tested", type=int, default=1545, help="test clips of the probes")
    parser.add_argument("--pair-clips", type=int, default=5, help="asked of a class, 50 in a run")
    parser.add_argument("--probe-iterations", type=int, default=3, help="100 in a run")
    parser.add_argument("--most-gb", type=float, default=2.0, help="memory of a process, its own")
    parser.add_argument("--most-passes", type=float, default=1.3, help="read in an epoch")
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=list(ROLES))
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    return parser.parse_args()


def rehearse(place: Place) -> int:
    """Returns: exit code."""
    sources = listing(place.options.clips)
    if not (place.folder / "sources.parquet").exists():
        began = time.perf_counter()
        fill_store(place.store, sources)
        pq.write_table(sources, place.folder / "sources.parquet")
        print(f"store of {len(sources):,} clips: {time.perf_counter() - began:.0f} s", flush=True)
    broken = []
    print("| process | seconds | peak memory | its own | |\n|---|---|---|---|---|")
    for role in place.options.roles:
        took = measure(place, role)
        told = ", ".join(
            f"{name} {x:.3g}" if isinstance(x, float) else f"{name} {x}"
            for name, x in took.found.items()
        )
        row = f"{took.seconds:.1f} | {took.peak_gb:.2f} GB | {took.own_gb:.2f} GB | {told} |"
        print(f"| {ROLES[role][0]} | {row}", flush=True)
        if took.own_gb > place.options.most_gb:
            broken.append(f"{role}: {took.own_gb:.2f} GB, at most {place.options.most_gb}")
        if (passes := took.found.get("passes", 0)) > place.options.most_passes:
            broken.append(f"{role}: {passes:.2f} passes, at most {place.options.most_passes}")
    print("\n".join(["bounds broken:", *broken] if broken else ["all bounds hold"]))
    return bool(broken)


def main() -> None:
    options = parse()
    if options.role:
        act(Place(Path(options.keep), options), options.role)
        return
    folder = Path(options.keep or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run").mkdir(exist_ok=True)
    try:
        raise SystemExit(rehearse(Place(folder, options)))
    finally:
        if not options.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
