"""write_pickle: a run's predictions as the file that VGGSounder's own benchmark reads.

Knows nothing of how it is scored. Invariant: the scores of a clip are in the order of VGGSounder's
`classes.csv`, whatever the order of the run.

The file is `{clip_id: {"logits": {"a": [C], "v": [C], "av": [C]}}}`, pickled; the "logits" are the
probabilities, which rank the same. Arrays, not lists of numbers: half the size, and read ten times
as fast by the same code.

Shapes: M clips, C classes.
"""

import pickle
from pathlib import Path
from typing import Any

from pipeline.storage import place_of
from training.errors import TrainingError
from training.evaluation.predictions import Predictions
from training.vggsounder.labels import class_names
from training.vggsounder.scores import STREAM_OF, columns_of

_NEVER = -1.0
"""Score of a class that the run does not know: below every probability, and finite."""


def write_pickle(file: str | Path, predictions: Predictions) -> dict[str, Any]:
    """Write the file. Args: file: path or URI. Returns: what was written.

    Raises: TrainingError for a stream that was not scored, or a class that VGGSounder has not.
    """
    lacking = [stream for stream in STREAM_OF.values() if stream not in predictions.scores]
    if lacking:
        raise TrainingError(
            f"{file}: VGGSounder's files hold all three streams, and {', '.join(lacking)} was not "
            "scored (finetune.mode multimodal scores all)"
        )
    theirs = class_names()
    classes, columns = columns_of(predictions.about.classes, theirs)
    if len(classes) > len(theirs):
        raise TrainingError(
            f"{file}: {len(classes) - len(theirs)} classes of the run are none of VGGSounder's "
            f"{len(theirs)}, such as {classes[len(theirs)]!r}; its files have no place for them"
        )
    by_name = {}
    for name, stream in STREAM_OF.items():
        ordered_MC = predictions.scores[stream][:, columns]
        ordered_MC[:, columns < 0] = _NEVER
        by_name[name] = ordered_MC
    content = {
        clip_id: {"logits": {name: scores_MC[i] for name, scores_MC in by_name.items()}}
        for i, clip_id in enumerate(predictions.clip_ids)
    }
    place, base = place_of(file)
    with place.written(base) as path, open(path, "wb") as opened:
        pickle.dump(content, opened, protocol=4)
    return {"file": str(file), "n_clips": len(content), "classes": len(theirs)}
