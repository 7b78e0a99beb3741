"""find_twins: which clips show and sound the same, although encoded, scaled or cut otherwise.

Pure arrays over prints (features.py): knows nothing of stores. Invariant: a pair counts only if
sound and picture both agree at one shift in time; who is looked at as a candidate is decided by
nearest neighbours in an index, never by comparing all with all.

Shapes: n clips, P frames of a print, S steps of 50 ms, B bands, D descriptor width.
"""

from collections.abc import Iterator
from typing import NamedTuple

import faiss
import numpy as np

from pipeline.quality.features import PICTURE_WIDTH, SOUND_BANDS

STEP_MS = 50
SAME_SOUND = 0.4
"""Least correlation of two sound prints, their means over time and over bands taken out."""
_SURELY_SAME = 0.9
"""A correlation that no other shift is tried after."""
_NEIGHBOURS = 12
_PAIRS_AT_ONCE = 1 << 17
_FLAT_UP_TO = 5000
_PROBES = 16
_MOST_SHIFT_STEPS = 40
_LEAST_OVERLAP = 0.6
_SAME_LEVELS = 2.0
_SAME_CONTRAST = 0.08
"""Two pictures of one moment differ by at most this many levels, and this share of their contrast:
codecs and scalers made up to 1.3 of clips whose contrast is 9, other clips of the kind 3.9."""
_SAME_TONE = 12.0
"""Most difference in mean luma or chroma, levels: other colour matrices and ranges."""
_FLAT_SOUND = 1.0
"""Below this standard deviation (tenths of a neper) a sound print has nothing to compare."""
_FLAT_PICTURE = 10.0
"""Below this standard deviation (levels) a picture is too plain to speak for a clip alone."""
_LEAST_MOTION = 6.0


class Prints(NamedTuple):
    """What duplicates of one clip are found by."""

    picture_PW: np.ndarray
    times_ms: np.ndarray
    sound_SB: np.ndarray

    @classmethod
    def of(cls, picture: bytes, times_ms: list[int], sound: bytes) -> "Prints":
        """From the columns of the quality table."""
        return cls(
            np.frombuffer(picture, np.uint8).reshape(-1, PICTURE_WIDTH),
            np.asarray(times_ms),
            np.frombuffer(sound, np.uint8).reshape(-1, SOUND_BANDS),
        )


class Twins(NamedTuple):
    """Two clips found to be one."""

    first: int
    second: int
    sameness: float
    """Correlation of the sounds, in [0.4, 1]; of silent clips, 1 less the share of the allowed
    difference that their pictures use."""


def find_twins(prints: list[Prints], is_new: np.ndarray) -> Iterator[Twins]:
    """Pairs of positions of which at least one is new.

    Args: is_new: bool [n]; pairs of two old clips were found before.
    """
    if not is_new.any() or len(prints) < 2:
        return
    described_nD = np.stack([_descriptor(one) for one in prints])
    queries = np.flatnonzero(is_new)
    neighbours_qk = _nearest(described_nD, queries)
    for first, second in _candidates(prints, queries, neighbours_qk).tolist():
        score = sameness(prints[first], prints[second])
        if score is not None:
            yield Twins(first, second, score)


def _candidates(prints: list[Prints], queries: np.ndarray, neighbours_qk: np.ndarray) -> np.ndarray:
    """Pairs of neighbours [m, 2], each once, whose mean pictures are not too far apart already."""
    pairs_m2 = np.column_stack([np.repeat(queries, neighbours_qk.shape[1]), neighbours_qk.ravel()])
    pairs_m2 = np.unique(np.sort(pairs_m2[pairs_m2[:, 1] >= 0], axis=1), axis=0)
    pairs_m2 = pairs_m2[pairs_m2[:, 0] != pairs_m2[:, 1]]
    mean_nW = np.stack([one.picture_PW.mean(0, np.float32) for one in prints])
    slack_n = np.array([_allowed(one) + _motion(one) for one in prints])
    near = []
    # All at once, the 2.4 million pairs of 200,000 clips took 4 GB.
    for begin in range(0, len(pairs_m2), _PAIRS_AT_ONCE):
        some_m2 = pairs_m2[begin : begin + _PAIRS_AT_ONCE]
        first_m, second_m = some_m2.T
        far_m = _differences(mean_nW[first_m], mean_nW[second_m])
        near.append(some_m2[far_m <= slack_n[first_m]])
    return np.concatenate(near) if near else pairs_m2


def _descriptor(prints: Prints) -> np.ndarray:
    """Means that a shift in time or another codec hardly moves, in units of what they do move."""
    picture = prints.picture_PW.mean(0) / 6
    sound = prints.sound_SB if len(prints.sound_SB) else np.zeros((1, SOUND_BANDS))
    return np.concatenate([picture, sound.mean(0) / 3, sound.std(0) / 3]).astype(np.float32)


def _nearest(described_nD: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Positions of the nearest clips of each query, -1 where there are fewer."""
    n, width = described_nD.shape
    if n <= _FLAT_UP_TO:
        index: faiss.Index = faiss.IndexFlatL2(width)
    else:
        # Cells grow with the root of n: a search looks at 16 of them, so n clips cost n ** 1.5.
        n_cells = int(2 * n**0.5)
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(width), width, n_cells)
        index.cp.max_points_per_centroid = 64
        index.cp.niter = 8
        index.train(described_nD)
        index.nprobe = _PROBES
    index.add(described_nD)
    return np.asarray(index.search(described_nD[queries], min(n, _NEIGHBOURS + 1))[1])


def sameness(a: Prints, b: Prints) -> float | None:
    """How sure it is that two prints are of one clip; None: they are not."""
    silent = [_is_flat(one.sound_SB) for one in (a, b)]
    if all(silent):
        return _same_when_silent(a, b)
    if any(silent):
        return None
    correlation, shift = _best_shift(a.sound_SB, b.sound_SB)
    if correlation < SAME_SOUND or _picture_excess(a, b, shift * STEP_MS) > 1.0:
        return None
    return correlation


def _is_flat(sound_SB: np.ndarray) -> bool:
    return len(sound_SB) < 4 or float(_centred(sound_SB.astype(np.float32)).std()) < _FLAT_SOUND


def _centred(sound_SB: np.ndarray) -> np.ndarray:
    """What is left of a sound without its spectrum and its loudness over time: two hums, or two
    bursts of noise of one rhythm, are not the same sound."""
    spectrum_B, loudness_S1 = sound_SB.mean(0), sound_SB.mean(1, keepdims=True)
    return np.asarray(sound_SB - spectrum_B - loudness_S1 + sound_SB.mean())


def _best_shift(a_SB: np.ndarray, b_SB: np.ndarray) -> tuple[float, float]:
    """The best correlation, and how many steps later b starts than a: whole and half ones."""
    a, b = a_SB.astype(np.float32), b_SB.astype(np.float32)
    best = (-1.0, 0.0)
    for shift in sorted(range(-_MOST_SHIFT_STEPS, _MOST_SHIFT_STEPS + 1), key=abs):
        best = max(best, (_correlation(a, b, shift), float(shift)))
        if best[0] > _SURELY_SAME:
            return best
    between_SB = (b[1:] + b[:-1]) / 2
    halves = (int(best[1]), int(best[1]) + 1)
    return max(best, *((_correlation(a, between_SB, shift), shift - 0.5) for shift in halves))


def _correlation(a_SB: np.ndarray, b_SB: np.ndarray, shift: int) -> float:
    """Of a with b begun `shift` steps later; -1 if too little of them overlaps."""
    a_SB, b_SB = a_SB[max(0, shift) :], b_SB[max(0, -shift) :]
    n = min(len(a_SB), len(b_SB))
    if n < max(4, int(_LEAST_OVERLAP * min(len(a_SB) + max(0, shift), len(b_SB)))):
        return -1.0
    x, y = _centred(a_SB[:n]), _centred(b_SB[:n])
    scale = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / scale if scale > 0 else -1.0


def _motion(prints: Prints) -> float:
    """Median difference of two neighbouring frames, in levels."""
    steps = np.abs(np.diff(prints.picture_PW.astype(np.float32), axis=0)).mean(1)
    return float(np.median(steps)) if len(steps) else 0.0


def _allowed(prints: Prints) -> float:
    """Levels by which another encoding may differ: more where there is more contrast."""
    luma_PL = prints.picture_PW[:, :-2].astype(np.float32)
    contrast = np.abs(luma_PL - luma_PL.mean(1, keepdims=True)).mean()
    return _SAME_LEVELS + _SAME_CONTRAST * float(contrast)


def _differences(a_NW: np.ndarray, b_NW: np.ndarray) -> np.ndarray:
    """Mean difference of pictures, [N]; one whose level or colour is off is infinitely far."""
    off_NW = a_NW.astype(np.float32) - b_NW
    level_N = off_NW[:, :-2].mean(1)
    far_N = np.abs(np.column_stack([level_N, off_NW[:, -2:]])).max(1) > _SAME_TONE
    off_N = np.abs(off_NW[:, :-2] - level_N[:, None]).mean(1)
    return np.where(far_N, np.inf, off_N)


def _picture_excess(a: Prints, b: Prints, shift_ms: float) -> float:
    """Median difference of a's frames from b's at the same moment, over what is allowed.

    Frames were taken at other moments when the clip was cut otherwise: a picture that moves may
    then differ by a part of what it moves between two frames.
    """
    theirs_ms = b.times_ms + shift_ms
    spacing_ms = float(np.median(np.diff(a.times_ms))) if len(a.times_ms) > 1 else 1000.0
    allowed, motion = _allowed(a), _motion(a)
    excess = []
    for time_ms, frame_W in zip(a.times_ms, a.picture_PW, strict=True):
        after = int(np.searchsorted(theirs_ms, time_ms))
        near = [i for i in (after - 1, after) if 0 <= i < len(theirs_ms)]
        off_ms = min(abs(float(theirs_ms[i]) - time_ms) for i in near)
        if off_ms > spacing_ms:
            continue  # Outside of what b shows.
        difference = float(_differences(b.picture_PW[near], frame_W).min())
        moved = 1.5 * motion * min(1.0, off_ms / max(1.0, spacing_ms))
        excess.append(difference / (allowed + moved))
    return float(np.median(excess)) if len(excess) >= 0.5 * len(a.times_ms) else np.inf


def _same_when_silent(a: Prints, b: Prints) -> float | None:
    """Without sound the picture has to be rich, to move, and to agree frame by frame."""
    rich = min(float(one.picture_PW[:, :-2].std()) for one in (a, b)) >= _FLAT_PICTURE
    if not rich or min(_motion(a), _motion(b)) < _LEAST_MOTION:
        return None
    shifts_ms = range(-1000, 1001, 2 * STEP_MS)
    excess = min(_picture_excess(a, b, shift_ms) for shift_ms in shifts_ms)
    return 1.0 - 0.6 * excess if excess <= 1.0 else None
