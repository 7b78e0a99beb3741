"""Real files for the pipeline's tests: made by the ffmpeg binary, checked by it."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
from support.decoders import decoding_by
from support.stores import contents

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.ingest.run import ingest
from pipeline.store.store import FeatureStore
from pipeline.synth import write_clips

SMALL_SPEC = FeatureSpec(n_frames=4, frame_size=48, duration_s=2.0, fbank_frames=200)


@pytest.fixture(scope="session")
def ffmpeg() -> Callable[..., str]:
    """Run the ffmpeg binary. Returns what it wrote to stderr."""
    exe = imageio_ffmpeg.get_ffmpeg_exe()

    def run(*args: object) -> str:
        command = [exe, "-hide_banner", "-nostdin", "-y", "-threads", "1", *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stderr

    return run


@pytest.fixture(scope="session")
def ffmpeg_frames(ffmpeg, tmp_path_factory) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """What ffmpeg shows: times in s from the start of the clip, and small RGB frames."""

    def read(path: Path, size: int = 48, seek: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        out = tmp_path_factory.mktemp("shown") / "frames.rgb"
        before = ["-ss", seek] if seek else []
        log = ffmpeg(
            *before, "-i", path, "-an", "-map", "0:v:0", "-fps_mode", "passthrough",
            "-vf", f"scale={size}:{size}:flags=bilinear,showinfo",
            "-pix_fmt", "rgb24", "-f", "rawvideo", out,
        )  # fmt: skip
        times = [float(t) for t in re.findall(r"pts_time:\s*(-?[\d.]+)", log)]
        frames = np.fromfile(out, np.uint8).reshape(-1, size, size, 3)
        assert len(times) == len(frames)
        return np.array(times), frames

    return read


@pytest.fixture(scope="session")
def moving_clip(ffmpeg, tmp_path_factory) -> Path:
    """7 s of a picture in which every frame differs, H.264 with B-frames, GOP of 2 s, and sound."""
    path = tmp_path_factory.mktemp("moving") / "moving.mp4"
    ffmpeg(
        "-f", "lavfi", "-i", "testsrc2=s=160x120:r=25:d=7,hue=H=2*PI*t/3",
        "-f", "lavfi", "-i", "sine=f=440:r=44100:d=7",
        "-c:v", "libx264", "-preset", "veryfast", "-g", "50", "-bf", "2",
        "-pix_fmt", "yuv420p", "-c:a", "aac", path,
    )  # fmt: skip
    return path


@pytest.fixture(scope="session")
def synth_data(tmp_path_factory) -> SimpleNamespace:
    """48 labelled clips: `.csv`, `.videos`."""
    folder = tmp_path_factory.mktemp("data") / "synth"
    csv = write_clips(folder, n_train=40, n_test=8, seed=3, size=64)
    return SimpleNamespace(csv=str(csv), videos=str(folder / "videos"), n=48)


class Source:
    """A copy of the synthetic clips that a test may change, and its store."""

    def __init__(self, data, folder: Path, spec: FeatureSpec, config: IngestConfig) -> None:
        self.videos = folder / "videos"
        shutil.copytree(data.videos, self.videos)
        self.csv = folder / "clips.csv"
        shutil.copy(data.csv, self.csv)
        self.store = str(folder / "store")
        self.spec, self.config = spec, config
        self.n_ray_starts = 0
        self.progress = []

    def ingest(self, spec=None, on_progress=None, extractor=IngestConfig.extractor, **options):
        """Args: extractor: as `decoding_by` takes it; options: of IngestConfig."""

        def start_ray():
            self.n_ray_starts += 1

        config = decoding_by(self.config.model_copy(update=options), extractor)
        return ingest(
            str(self.csv), str(self.videos), self.store, spec, config,
            start_ray=start_ray, on_progress=on_progress or self.progress.append,
        )  # fmt: skip

    def files(self) -> list[Path]:
        return sorted(self.videos.iterdir())

    def snapshot(self, version=None):
        return FeatureStore.open(self.store).snapshot(version)

    def counts(self, summary) -> dict:
        return {k: v for k, v in summary.to_json().items() if v and k not in ("seconds", "version")}


@pytest.fixture(scope="session")
def done(synth_data, tmp_path_factory) -> Source:
    """A source ingested once, without Ray; tests copy it."""
    config = IngestConfig(workers=1, shard_clips=16, timeout_s=30, cpus_per_worker=0.5)
    source = Source(synth_data, tmp_path_factory.mktemp("done"), SMALL_SPEC, config)
    source.summary = source.ingest(SMALL_SPEC)
    return source


@pytest.fixture(scope="session")
def undisturbed(done) -> list:
    """What the store of a run that nothing happened to holds."""
    return contents(done.store)


@pytest.fixture
def source(done, tmp_path) -> Source:
    """A fresh copy of `done`; its files keep their times, so nothing is new."""
    copy = object.__new__(Source)
    copy.__dict__ = {**done.__dict__, "n_ray_starts": 0, "progress": []}
    shutil.copytree(done.videos.parent, tmp_path / "copy")
    for name in ("videos", "csv"):
        setattr(copy, name, tmp_path / "copy" / getattr(done, name).name)
    copy.store = str(tmp_path / "copy" / "store")
    copy.ingest()  # Only notes the new place of the files.
    copy.summary = copy.ingest()
    return copy
