"""Display matrix: how a decoded frame is turned and mirrored before it is shown, as ffmpeg does it.

Knows nothing of times, scaling or decoders. Invariant: a matrix of quarter turns and mirrors gives
the very pixels of ffmpeg's autorotate; other angles are taken for the nearest such turn.
"""

from typing import Any

import numpy as np
from av.sidedata.sidedata import Type


def display_matrix(frame: Any) -> np.ndarray | None:
    """The [2, 2] that takes (x, y) of a frame to that of the screen, (x, y) @ matrix_22, in 16.16
    fixed point; None if the frame is shown as it is.

    PyAV has it of decoded frames alone: neither stream nor packet shows it.
    """
    side_data = frame.side_data.get(Type.DISPLAYMATRIX)
    if side_data is None:
        return None
    matrix_22 = np.frombuffer(side_data, np.int32).reshape(3, 3)[:2, :2]
    scale = matrix_22[0, 0]
    if scale > 0 and np.array_equal(matrix_22, scale * np.eye(2)):
        return None
    return matrix_22


def upright(image_hw3: np.ndarray, matrix_22: np.ndarray | None) -> np.ndarray:
    """The image as it is shown. Not `frame.rotation`, which does not tell of a mirror: one that is
    mirrored left to right is half a turn to it."""
    if matrix_22 is None:
        return image_hw3
    (x_to_x, x_to_y), (y_to_x, y_to_y) = matrix_22.astype(float)
    is_quarter_turn = abs(x_to_y) > abs(x_to_x)
    if is_quarter_turn:
        image_hw3 = image_hw3.swapaxes(0, 1)
    to_x, to_y = (y_to_x, x_to_y) if is_quarter_turn else (x_to_x, y_to_y)
    return image_hw3[:: -1 if to_y < 0 else 1, :: -1 if to_x < 0 else 1]
