"""vectors_table: ids, labels and the embeddings of clips as `diccae cluster` reads them.

Knows nothing of models. Invariant: every vector has length 1.

Shapes: N clips, P embedding width.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from training.evaluation.retrieval import unit_rows


def vectors_table(
    ids: Sequence[str],
    labels: Sequence[str | None],
    by_stream: Mapping[str, NDArray[np.float32]],
) -> pa.Table:
    """Columns `id`, `label`, one embedding a stream (fixed-size lists of float32), and `embedding`:
    the normalised mean of audio and video, what clustering uses.

    Args: by_stream: [N, P] of any length.
    """
    columns = {"id": pa.array(list(ids)), "label": pa.array(list(labels), pa.string())}
    units = {stream: unit_rows(x_NP) for stream, x_NP in by_stream.items()}
    vectors = units | {"embedding": unit_rows(units["audio"] + units["video"])}
    for name, x_NP in vectors.items():
        flat = pa.array(np.ascontiguousarray(x_NP, np.float32).ravel())
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, x_NP.shape[1])
    return pa.table(columns)
