"""Clips with planted faults, ingested into a store."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from diccae.cli import main
from pipeline.config import FeatureSpec, IngestConfig
from pipeline.ingest.run import ingest

SPEC = FeatureSpec(n_frames=8, frame_size=64, duration_s=3.0, fbank_frames=300, n_mels=64)

Quality = Callable[..., dict]


@pytest.fixture
def quality(capsys: pytest.CaptureFixture[str]) -> Quality:
    """Runs `diccae store quality`; returns its JSON."""

    def run(store: str, *options: str) -> dict:
        capsys.readouterr()
        assert main(["store", "quality", "--store", store, "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def _ray_is_not_needed() -> None:
    raise AssertionError("a dozen clips are decoded without Ray")


class Clips:
    """A folder of clips that is made by the ffmpeg binary."""

    def __init__(self, folder: Path, ffmpeg: Callable[..., str]) -> None:
        self.folder, self.ffmpeg = folder, ffmpeg
        (folder / "videos").mkdir(parents=True)

    def path(self, name: str) -> Path:
        """Where a clip lies; names have 11 characters at most."""
        return self.folder / "videos" / f"{name}_000000.mp4"

    def add(self, name: str, *arguments: object, split: str = "train", label: str = "one") -> Path:
        """List a clip and, with arguments, have it made."""
        with (self.folder / "clips.csv").open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([name, 0, label, split])
        if arguments:
            self.ffmpeg(*arguments, self.path(name))
        return self.path(name)


_X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p")
_WHOLE = ("-map", "0:v", "-map", "1:a", "-shortest", *_X264, "-c:a", "aac")


@pytest.fixture(scope="session")
def planted(ffmpeg, tmp_path_factory) -> SimpleNamespace:
    """`.store`, and `.clips` of which each name tells its fault: `good*` have none."""
    clips = Clips(tmp_path_factory.mktemp("planted"), ffmpeg)
    for i in range(6):
        # A test picture that moves and differs by clip, and noise with a rhythm of its own.
        picture = f"testsrc2=s=128x96:r=12:d=3.5,hue=h={50 * i}:s={1 + i % 3},scroll=h=0.0{i + 1}"
        noise = f"anoisesrc=d=3.5:c=pink:r=16000:a=0.4:seed={i},tremolo=f={1 + i}:d=0.9"
        source = ("-f", "lavfi", "-i", picture, "-f", "lavfi", "-i", noise)
        clips.add(f"good{i}", *source, *_WHOLE, "-g", "12")
    first, second = clips.path("good0"), clips.path("good1")
    low = (*_X264, "-crf", "33", "-c:a", "aac", "-b:a", "32k")
    clips.add("dup_coded", "-i", first, *low)
    clips.add("dup_shift", "-ss", "0.5", "-i", first, *low)
    clips.add("dup_scale", "-ss", "0.53", "-i", first, "-vf", "scale=160:120", *low, split="test")
    clips.ffmpeg("-i", second, "-frames:v", "1", clips.folder / "one.png")
    still = ("-loop", "1", "-t", "3", "-i", clips.folder / "one.png")
    beeps = ("-f", "lavfi", "-i", "sine=f=600:b=3:r=16000:d=3")
    clips.add("still", *still, *beeps, *_WHOLE, "-crf", "30", "-r", "12")
    mute = ("-f", "lavfi", "-i", "anullsrc=r=16000:cl=mono:d=3")
    clips.add("silent", "-i", clips.path("good2"), *mute, *_WHOLE)
    bars = ("-vf", "scale=128:72,pad=128:96:0:12:black")
    clips.add("borders", "-i", clips.path("good3"), *bars, *low)
    clips.add("one_sided", "-i", clips.path("good4"), "-af", "pan=stereo|c0=c0|c1=0*c0", *low)
    clips.add(
        "clipped",
        "-i",
        clips.path("good5"),
        "-af",
        "volume=40dB,aformat=s16",
        *_X264,
        "-c:a",
        "aac",
    )
    clips.add("edit_list", "-ss", "0.4", "-i", second, "-c", "copy")
    for name, frac, options in (("cut", 0.6, ["-movflags", "+faststart"]), ("cut_end", 0.7, [])):
        path = clips.add(name, "-i", second, "-c", "copy", *options)
        content = path.read_bytes()
        path.write_bytes(content[: int(frac * len(content))])
    clips.add("missing")
    folder = clips.folder
    store = str(folder / "store")
    ingest(
        str(folder / "clips.csv"),
        str(folder / "videos"),
        store,
        SPEC,
        IngestConfig(max_failed_frac=1.0),
        start_ray=_ray_is_not_needed,
        on_progress=lambda progress: None,
    )
    return SimpleNamespace(clips=clips, store=store)


@pytest.fixture
def copy(planted: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """A store and clips that a test may change; the sources lie where they were ingested from."""
    folder = tmp_path / "copy"
    shutil.copytree(Path(planted.store), folder / "store")
    return SimpleNamespace(folder=folder, store=str(folder / "store"), clips=planted.clips)
