"""predictions_of: what the last evaluation of a run said of each clip, if it is still the run's.

Knows nothing of what is made of it, and imports neither Ray nor torch: whoever judges predictions
needs no model. Invariant: predictions of other settings or weights are refused, not mixed in.
"""

from diccae.errors import UsageError
from diccae.run_folder import RunFolder
from training.evaluation.predictions import (
    FILE,
    Predictions,
    models_of,
    read_predictions,
    retrained_since,
)


def predictions_of(folder: RunFolder, config_hash: str | None = None) -> Predictions:
    """What the last evaluation of a run said of each clip.

    Args: config_hash: what the run is evaluated with now, in place of an evaluation; None takes
        any, and also those of weights that are gone, but not of a run that has others since.
    Raises: TrainingError without predictions; UsageError if they are of other settings or weights.
    """
    file = folder.place.uri_of("evaluation", FILE)
    predictions = read_predictions(file)
    found, models = predictions.about.config_hash, predictions.about.models
    # An earlier version hashed fewer keys; those that came since have their defaults in the run.
    if config_hash not in (None, found) and not _is_same(folder.digests(), config_hash, found):
        raise UsageError(
            f"{file}: of config {found}, and the run's is {config_hash} "
            "now (it was fine-tuned or evaluated otherwise since): leave out --reuse"
        )
    if config_hash is not None and models not in (None, models_of(folder.place)):
        raise UsageError(
            f"{file}: of other weights than the run has now (it was fine-tuned "
            "since): leave out --reuse"
        )
    since = retrained_since(folder.place, models)
    if since:
        raise UsageError(
            f"{file}: of other weights than the run has now ({' and '.join(since)} of it came "
            f"since): run diccae evaluate --out {folder.uri} first"
        )
    return predictions


def _is_same(digests: list[str], config_hash: str | None, found: str) -> bool:
    """Whether a config is the run's own, and a digest one that its version gave it."""
    return config_hash == digests[0] and found in digests
