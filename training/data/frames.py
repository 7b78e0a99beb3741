"""segments and middle_frames: which stored frames of a clip stand for its F equal parts.

Pure numpy: knows nothing of stores or batches, so that a prediction takes the frames an evaluation
takes without importing either. Invariant: the answer depends on these two numbers alone.

Shapes: F frames of a view.
"""

import numpy as np
from numpy.typing import NDArray


def segments(n_stored: int, n_frames: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """First stored frame and width, in frames, of each of F equal parts of a clip: [F], [F]."""
    edges = np.linspace(0, n_stored, n_frames + 1)
    return np.floor(edges[:-1]), np.maximum(np.diff(np.floor(edges)), 1)


def middle_frames(n_stored: int, n_frames: int) -> NDArray[np.int64]:
    """The stored frame in the middle of each part: [F]."""
    low_F, width_F = segments(n_stored, n_frames)
    chosen_F = np.floor(low_F + 0.5 * width_F).astype(np.int64)
    middle_F: NDArray[np.int64] = np.minimum(chosen_F, n_stored - 1)
    return middle_F
