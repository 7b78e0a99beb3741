"""frames_at and middle_frames: which stored frames of a clip stand for its F equal parts.

Pure numpy: knows nothing of stores or batches, so that a prediction takes the frames an evaluation
takes without importing either. Invariant: the answer depends on the arguments alone.

Shapes: F frames of a view.
"""

import numpy as np
from numpy.typing import NDArray


def frames_at(n_stored: int, where: NDArray[np.float64]) -> NDArray[np.int64]:
    """The stored frames at these places of F equal parts of a clip, 0 to 1 in each: [..., F]."""
    edges = np.floor(np.linspace(0, n_stored, where.shape[-1] + 1))
    widths_F = np.maximum(np.diff(edges), 1)
    chosen = np.floor(edges[:-1] + where * widths_F).astype(np.int64)
    frames: NDArray[np.int64] = np.minimum(chosen, n_stored - 1)
    return frames


def middle_frames(n_stored: int, n_frames: int) -> NDArray[np.int64]:
    """The stored frame in the middle of each part: [F]."""
    return frames_at(n_stored, np.full(n_frames, 0.5))
