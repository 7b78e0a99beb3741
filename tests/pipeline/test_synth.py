"""Clips of `synth`: within a class, what is seen tells what is heard."""

import csv
from colorsys import rgb_to_hsv
from pathlib import Path

import av
import numpy as np

from pipeline.synth import write_clips

N_OF_CLASS = 12


def _hue(clip: Path) -> float:
    """Of the pixels that are least like the middle colour of the first frame: the shape."""
    with av.open(str(clip)) as container:
        frame_P3 = next(container.decode(video=0)).to_ndarray(format="rgb24").reshape(-1, 3)
    away_P = np.abs(frame_P3 - np.median(frame_P3, axis=0)).mean(1)
    shape_3 = np.median(frame_P3[away_P >= np.quantile(away_P, 0.97)], axis=0)
    return rgb_to_hsv(*(shape_3 / 255))[0]


def _middle_hz(clip: Path) -> float:
    """The frequency that has half of the power below it."""
    with av.open(str(clip)) as container:
        parts = [frame.to_ndarray() for frame in container.decode(audio=0)]
        rate_hz = container.streams.audio[0].rate
    samples_S = np.concatenate(parts, axis=1)[0]
    below_F = np.cumsum(np.abs(np.fft.rfft(samples_S)) ** 2)
    at = int(np.searchsorted(below_F, below_F[-1] / 2))
    return at * rate_hz / len(samples_S)


def _rank_correlation(a: list[float], b: list[float]) -> float:
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_within_a_class_a_clips_colour_tells_its_pitch(tmp_path: Path) -> None:
    listed = write_clips(tmp_path / "clips", n_train=8 * N_OF_CLASS, n_test=0, seed=1, size=32)
    clips: dict[str, list[Path]] = {}
    for clip_id, start, label, _ in csv.reader(listed.read_text().splitlines()):
        name = f"{clip_id}_{int(start):06d}.mp4"
        clips.setdefault(label, []).append(tmp_path / "clips" / "videos" / name)
    assert [len(of_class) for of_class in clips.values()] == [N_OF_CLASS] * 8
    told = [
        _rank_correlation([_hue(c) for c in of_class], [_middle_hz(c) for c in of_class])
        for of_class in clips.values()
    ]
    assert np.mean(told) > 0.5
