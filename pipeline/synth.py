"""Labelled clips of two seconds in confusable pairs, as real H.264 + AAC files.

Knows nothing of the store. Invariant: equal arguments give equal pictures and sounds; classes come
in pairs that differ in one modality only, so that a model needs both; within a class a clip's
colour tells its pitch roughly, red low and violet high: a sound can find its own picture.

Shapes: F frames, H = W = size, S samples.
"""

import colorsys
import contextlib
import csv
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from pipeline.cores import usable_cores

_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"
_RATE_HZ = 16000
_FPS = 12
_SECONDS = 2.0
_LOOSE = 0.25
"""How far the colour may be from the pitch: where it tells more, classes are learned less."""

CLASSES = (
    # (label, look, voice): pairs (0,1) and (2,3) look alike, pairs (4,5) and (6,7) sound alike.
    ("bouncing ball, slow beeps", "bouncing", "slow beeps"),
    ("bouncing ball with fast beeps", "bouncing", "fast beeps"),
    ("spinning bar with rising whistle", "spinning", "rising"),
    ("spinning bar with falling whistle", "spinning", "falling"),
    ("square drifting left with hum", "left", "hum"),
    ("square drifting right with hum", "right", "hum"),
    ("growing disc with hiss", "growing", "hiss"),
    ("shrinking disc with hiss", "shrinking", "hiss"),
)


def write_clips(
    folder: str | Path, n_train: int, n_test: int, seed: int, size: int = 96, workers: int = 2
) -> Path:
    """Write `<folder>/videos/<id>_<start>.mp4` and `<folder>/<folder name>.csv`.

    Args: n_train, n_test: clips of each split, spread evenly over the classes; size: side in
        pixels, even; workers: processes that encode.
    Returns: path of the CSV, in VGGSound's columns (id, start, label, split).
    """
    with clips_written(folder, n_train, n_test, seed, size, workers) as listing:
        pass
    return listing


@contextlib.contextmanager
def clips_written(
    folder: str | Path, n_train: int, n_test: int, seed: int, size: int = 96, workers: int = 2
) -> Iterator[Path]:
    """`write_clips` by processes that are at work from the beginning of the block on; they are done
    at its end."""
    folder = Path(folder)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows, jobs = [], []
    for i in range(n_train + n_test):
        label, look, voice = CLASSES[i % len(CLASSES)]
        # Ids of real videos begin with any of the alphabet: options for a careless command line.
        first = "-_"[i] if i < 2 else _ALPHABET[rng.integers(64)]
        ytid = first + "".join(_ALPHABET[k] for k in rng.integers(64, size=10))
        start = int(rng.integers(0, 600))
        split = "train" if i < n_train else "test"
        rows.append((ytid, start, label, split))
        path = folder / "videos" / f"{ytid}_{start:06d}.mp4"
        jobs.append((str(path), look, voice, size, int(rng.integers(2**31))))
    with ProcessPoolExecutor(min(workers, usable_cores())) as pool:
        done = pool.map(_write_clip, jobs, chunksize=8)
        yield (listing := folder / f"{folder.resolve().name}.csv")
        list(done)
    with listing.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _write_clip(job: tuple[str, str, str, int, int]) -> None:
    path, look, voice, size, seed = job
    rng = np.random.default_rng(seed)
    tone = rng.uniform()
    hue = np.clip(tone + rng.uniform(-_LOOSE, _LOOSE), 0, 1)
    frames_FHW3, samples_S = picture(look, size, hue, rng), sound(voice, tone, rng)
    write_video(path, frames_FHW3, samples_S, fps=_FPS, rate_hz=_RATE_HZ)


def write_video(
    path: str, frames_FHW3: np.ndarray, samples: np.ndarray, fps: int, rate_hz: int
) -> None:
    """Encode RGB uint8 frames and a mono float waveform as H.264 and AAC."""
    with av.open(path, "w") as container:
        video = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast"})
        video.height, video.width = frames_FHW3.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1
        audio = container.add_stream(
            "aac", rate=rate_hz, layout="mono", options={"aac_coder": "fast"}
        )
        for image in frames_FHW3:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        samples_1S = samples.astype(np.float32)[None]
        for start in range(0, samples_1S.shape[1], 1024):
            block = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(samples_1S[:, start : start + 1024]), "fltp", "mono"
            )
            block.sample_rate, block.pts = rate_hz, start
            container.mux(audio.encode(block))
        container.mux(audio.encode(None))


def picture(look: str, size: int, hue: float, rng: np.random.Generator) -> np.ndarray:
    """Frames uint8 [F, H, W, 3] of a shape that moves as `look` says, all else drawn at random.

    Args: hue: of the shape, from 0 for red to 1 for violet.
    """
    n_frames = int(_SECONDS * _FPS)
    y_HW, x_HW = (np.mgrid[0:size, 0:size] / size - 0.5).astype(np.float32)
    back, fore = _two_colours(hue, rng)
    slope = rng.normal(0, 0.25, 2).astype(np.float32)
    ground_HW3 = back + 255 * (slope[0] * x_HW + slope[1] * y_HW)[..., None]
    noise = rng.uniform(4, 18)
    centre, scale = rng.uniform(-0.15, 0.15, 2).astype(np.float32), rng.uniform(0.8, 1.25)
    motion = _Motion(rng.uniform(0, 1), rng.uniform(0.7, 1.3), scale)
    frames = np.empty((n_frames, size, size, 3), np.uint8)
    for i in range(n_frames):
        t = i / (n_frames - 1)
        mask_HW = _shape(look, x_HW - centre[0], y_HW - centre[1], t, motion)
        image = ground_HW3 + noise * rng.standard_normal((size, size, 1), np.float32)
        image[mask_HW] = fore + np.float32(rng.normal(0, noise))
        frames[i] = np.clip(image, 0, 255, out=image)
    return frames


def _two_colours(hue: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """RGB of a ground of any colour, and of a shape of that hue, which stands out."""
    while True:
        back = rng.uniform(20, 235, 3).astype(np.float32)
        full, bright = rng.uniform(0.7, 1.0, 2)
        fore = 255 * np.array(colorsys.hsv_to_rgb(0.75 * hue, full, bright), np.float32)
        if np.abs(back - fore).mean() > 60:
            return back, fore


Floats = NDArray[np.floating]


class _Motion(NamedTuple):
    """What of a shape's way differs from clip to clip."""

    phase: float
    """Where it starts, as a share of a turn."""
    speed: float
    """Turns, bounces or widths in a clip."""
    scale: float
    """Of its size."""


def _shape(look: str, x_HW: Floats, y_HW: Floats, t: float, motion: _Motion) -> NDArray[np.bool_]:
    """Where the shape is at time t in [0, 1]."""
    phase, speed, scale = motion
    if look == "bouncing":
        height = abs(math.sin(math.pi * (2 * speed * t + phase)))
        distance_HW: Floats = np.hypot(x_HW, y_HW - 0.25 + 0.5 * height)
        return distance_HW < 0.13 * scale
    if look == "spinning":
        angle = 2 * math.pi * (speed * t + phase)
        along = x_HW * math.cos(angle) + y_HW * math.sin(angle)
        across = -x_HW * math.sin(angle) + y_HW * math.cos(angle)
        return (np.abs(along) < 0.35 * scale) & (np.abs(across) < 0.07 * scale)
    if look in ("left", "right"):
        shift = (speed * t + phase) % 1.0 - 0.5
        middle = shift if look == "right" else -shift
        reach_HW: Floats = np.maximum(np.abs(x_HW - middle), np.abs(y_HW))
        return reach_HW < 0.12 * scale
    radius = 0.08 + 0.27 * (t if look == "growing" else 1 - t)
    from_middle_HW: Floats = np.hypot(x_HW, y_HW)
    return from_middle_HW < radius * scale


def sound(voice: str, tone: float, rng: np.random.Generator) -> np.ndarray:
    """Waveform float32 [S] in (-1, 1) of what `voice` says, its level and noise at random.

    Args: tone: pitch, from 0 to 1 over one and a half octaves.
    """
    t_S = np.arange(int(_SECONDS * _RATE_HZ)) / _RATE_HZ
    pitch_hz = 300 * 2 ** (1.5 * tone)
    if voice in ("slow beeps", "fast beeps"):
        beeps_hz = (2.0 if voice == "slow beeps" else 5.5) * rng.uniform(0.85, 1.15)
        gate_S = (t_S * beeps_hz + rng.uniform()) % 1.0 < 0.4
        wave_S = np.sin(2 * np.pi * 2 * pitch_hz * t_S) * gate_S
    elif voice in ("rising", "falling"):
        octaves_S = rng.uniform(1.3, 2.0) * t_S / _SECONDS
        frequency_S = pitch_hz * 2 ** (octaves_S if voice == "rising" else octaves_S[::-1])
        wave_S = np.sin(2 * np.pi * np.cumsum(frequency_S) / _RATE_HZ)
    elif voice == "hum":
        base_hz = pitch_hz / 4
        overtones_4S = [np.sin(2 * np.pi * k * base_hz * t_S) / k for k in (1, 2, 3, 4)]
        wave_S = np.sum(overtones_4S, axis=0) / 2
    else:
        wave_S = _band(rng.normal(0, 0.4, len(t_S)), 4 * pitch_hz)
        wave_S = wave_S * (1 + 0.5 * np.sin(2 * np.pi * 3 * t_S))
    level = rng.uniform(0.15, 0.5)
    noise_S = rng.normal(0, 10 ** rng.uniform(-3.0, -1.7), len(t_S))
    return np.clip(level * wave_S + noise_S, -0.99, 0.99).astype(np.float32)


def _band(noise_S: Floats, middle_hz: float) -> Floats:
    """What of white noise lies within about half an octave of `middle_hz`, as loud as before."""
    frequency_hz = np.fft.rfftfreq(len(noise_S), 1 / _RATE_HZ)
    octaves = np.log2(np.maximum(frequency_hz, 1) / middle_hz)
    kept_S = np.fft.irfft(np.fft.rfft(noise_S) * np.exp(-2 * octaves**2), len(noise_S))
    louder: Floats = kept_S * (noise_S.std() / kept_S.std())
    return louder
