"""How fast is an ingest, against what bounds it and against others?

All in one run on the same clips, each round in turn, the best of `--rounds` kept. CPU seconds are
compared for single clips, so that other load on the machine hardly matters; wall for whole runs.

- bare:    decode every frame of the first 10 s with FFmpeg's library, convert nothing (the floor)
- ours:    extract + fbank in one process: frames at times, resized, JPEG, waveform, fbank
- cavmae:  CAV-MAE's way: frames by OpenCV seeks to loose JPEGs, sound by an ffmpeg process to wav,
           first channel, fbank by torchaudio
- pool:    the same shards by a plain pool of processes (no Ray)
- ray:     the same by `ingest`, from the first finished shard on (start-up excluded)

    python benchmarks/ingest.py --videos FOLDER [--clips 8]          single clips, CPU
    python benchmarks/ingest.py --csv CSV --videos FOLDER --runs     whole runs, wall clock

Targets: ours >= 0.70x bare at 360p and >= 0.85x at 720p; ray >= 0.90x pool; ours >= 3x cavmae.
Prints tables; writes only to temporary folders.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import subprocess
import tempfile
import time
import wave
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path

# As an fbank service is started.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"}

import av
import imageio_ffmpeg
import numpy as np
import pyarrow as pa

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.cores import usable_cores
from pipeline.decode.clip import extract
from pipeline.decode.payload import fbank_function, fbank_payload, fbanks_function
from pipeline.ingest.plan import STATE_COLUMNS, make_plan
from pipeline.ingest.run import Progress, ingest
from pipeline.source.listing import list_sources
from pipeline.storage import Location
from pipeline.store.identity import store_id
from pipeline.store.schema import CLIPS_SCHEMA
from pipeline.store.store import FeatureStore


def cpu_seconds() -> float:
    """CPU of this process and of the children it waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def bare(path: str) -> None:
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            if frame.time >= 10.0:
                break


def ours(path: str, spec: FeatureSpec, fbank: Callable[[np.ndarray], np.ndarray]) -> None:
    fbank_payload(fbank(extract(path, None, None, spec).waveform), spec)


def cavmae(path: str, spec: FeatureSpec, fbank: Callable[[np.ndarray], np.ndarray]) -> None:
    import cv2

    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        video = cv2.VideoCapture(path)
        n_frames = int(min(video.get(cv2.CAP_PROP_FRAME_COUNT), 10 * video.get(cv2.CAP_PROP_FPS)))
        for i in range(spec.n_frames):
            video.set(cv2.CAP_PROP_POS_FRAMES, int((i + 0.5) * n_frames / spec.n_frames))
            found, image = video.read()
            if found:
                height, width = image.shape[:2]
                scale = spec.frame_size / min(height, width)
                size = (round(width * scale), round(height * scale))
                cv2.imwrite(f"{folder}/frame_{i}.jpg", cv2.resize(image, size))
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-threads", "1"]
        sound = f"{folder}/sound.wav"
        subprocess.run([*command, "-i", path, "-vn", "-ar", "16000", "-ac", "1", sound], check=True)
        with wave.open(sound) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
        np.save(f"{folder}/fbank.npy", fbank(samples.astype(np.float32) / 32768))


def single_clips(folder: Path, n_clips: int, rounds: int) -> None:
    """CPU milliseconds per clip, by picture size."""
    spec = FeatureSpec()
    fbank = fbank_function(spec)
    by_size: dict[str, list[str]] = {}
    for path in sorted(map(str, folder.iterdir())):
        try:
            with av.open(path) as container:
                stream = container.streams.video[0]
                key = f"{stream.width}x{stream.height}"
            extract(path, None, None, spec)
        except Exception:  # A folder of test files holds broken ones: not what is measured here.
            continue
        by_size.setdefault(key, []).append(path)
    ways: dict[str, Callable[[str], None]] = {
        "bare": bare,
        "ours": lambda path: ours(path, spec, fbank),
        "cavmae": lambda path: cavmae(path, spec, fbank),
    }
    print("| size | clips | bare ms | ours ms | cavmae ms | ours / bare speed | ours / cavmae |")
    print("|---|---|---|---|---|---|---|")
    for size, paths in sorted(by_size.items(), key=lambda item: len(item[0])):
        paths = paths[:n_clips]
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(rounds):
            for name, way in ways.items():
                began = cpu_seconds()
                for path in paths:
                    way(path)
                best[name] = min(best[name], (cpu_seconds() - began) / len(paths))
        print(
            f"| {size} | {len(paths)} | {1000 * best['bare']:.0f} | {1000 * best['ours']:.0f} "
            f"| {1000 * best['cavmae']:.0f} | {best['bare'] / best['ours']:.2f}x "
            f"| {best['cavmae'] / best['ours']:.1f}x |",
            flush=True,
        )


def pool_worker(
    tasks: "Queue[tuple[int, pa.Table] | None]",
    done: "Queue[tuple[float, int]]",
    store: str,
    spec: FeatureSpec,
    config: IngestConfig,
) -> None:
    """A process of the plain pool: shards from one queue, times to the other."""
    from pipeline.ingest.shard_decoder import ShardDecoder

    expected_id = store_id(Location(store))
    fbanks = fbanks_function(spec)
    decoder = ShardDecoder(store, spec, config, "pool", fbanks, expected_id=expected_id)
    while (task := tasks.get()) is not None:
        index, clips = task
        n_clips = sum(len(states) for states in decoder.decode(index, clips))
        done.put((time.monotonic(), n_clips))


def steady_rate(finished: list[tuple[float, int]]) -> float:
    """Clips per second between the first and the last finished shard."""
    finished = sorted(finished)
    return sum(n for _, n in finished[1:]) / (finished[-1][0] - finished[0][0])


def run_pool(csv: str, videos: str, spec: FeatureSpec, config: IngestConfig) -> float:
    from pipeline.ingest.waves import cut_tasks

    context = multiprocessing.get_context("spawn")
    no_states = CLIPS_SCHEMA.empty_table().select(STATE_COLUMNS)
    todo = make_plan(list_sources(csv, videos).clips, no_states, spec.spec_hash(), config).todo
    n_workers = config.workers or 1
    tasks: Queue[tuple[int, pa.Table] | None] = context.Queue()
    done: Queue[tuple[float, int]] = context.Queue()
    shards = list(cut_tasks(todo, config.shard_clips, n_workers))
    for task in (*enumerate(shards), *([None] * n_workers)):
        tasks.put(task)
    with tempfile.TemporaryDirectory() as store:
        FeatureStore.create(store, spec)
        workers = [
            context.Process(target=pool_worker, args=(tasks, done, store, spec, config))
            for _ in range(n_workers)
        ]
        for worker in workers:
            worker.start()
        finished = [done.get() for _ in shards]
        for worker in workers:
            worker.join()
    return steady_rate(finished)


def run_ray(csv: str, videos: str, spec: FeatureSpec, config: IngestConfig) -> float:
    import ray

    finished: list[tuple[float, int]] = []
    n_done = 0

    def on_progress(progress: Progress) -> None:
        nonlocal n_done
        if progress.done > n_done:
            finished.append((time.monotonic(), progress.done - n_done))
            n_done = progress.done

    def start_ray() -> None:
        ray.init(address="local", num_cpus=config.workers, include_dashboard=False,
                 log_to_driver=False, object_store_memory=300 * 2**20)  # fmt: skip

    with tempfile.TemporaryDirectory() as store:
        ingest(csv, videos, store, spec, config, start_ray=start_ray, on_progress=on_progress)
    ray.shutdown()
    return steady_rate(finished)


def whole_runs(csv: str, videos: str, rounds: int) -> None:
    """Steady clips per second of a pool and of Ray, in turn; other load can only slow them."""
    spec = FeatureSpec()
    # Small shards: at the end a worker waits for the other for up to one of them.
    config = IngestConfig(workers=usable_cores(), shard_clips=32, local_clips=0)
    print("| round | pool clips/s | ray clips/s | ray / pool |\n|---|---|---|---|")
    rates: list[tuple[float, float]] = []
    for i in range(rounds):
        rates.append((run_pool(csv, videos, spec, config), run_ray(csv, videos, spec, config)))
        print_rates(str(i + 1), *rates[-1])
    pools, rays = zip(*rates, strict=True)
    print_rates("best", max(pools), max(rays))
    ratios = [with_ray / pool for pool, with_ray in rates]
    print(f"| median | | | {statistics.median(ratios):.2f}x |", flush=True)


def print_rates(name: str, pool: float, with_ray: float) -> None:
    print(f"| {name} | {pool:.1f} | {with_ray:.1f} | {with_ray / pool:.2f}x |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", required=True)
    parser.add_argument("--csv")
    parser.add_argument("--runs", action="store_true")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.runs:
        whole_runs(options.csv, options.videos, options.rounds)
    else:
        single_clips(Path(options.videos), options.clips, options.rounds)


if __name__ == "__main__":
    main()
