"""export_file: a saved model as a file of CAV-MAE, with its label list beside a classifier.

Knows nothing of training. Invariant: what is written here, `load_weights` reads back with every
output the same.
"""

import csv
import io

import torch
from torch import Tensor

from pipeline.storage import place_of
from training.errors import WeightsError
from training.model.blocks import PatchStem
from training.model.classifier import Classifier
from training.model.encoder import Encoder
from training.weights import layouts
from training.weights.card import ModelCard
from training.weights.files import load_classifier, load_encoder, saved_name


def cavmae_state(model: Encoder | Classifier) -> dict[str, Tensor]:
    """The model's own tensors under CAV-MAE's keys, norms it never uses added.

    An encoder gives CAVMAE's keys (the decoder's if it has one), a classifier CAVMAEFT's.

    Raises: WeightsError for conv stems, which CAV-MAE does not have.
    """
    encoder = model.encoder if isinstance(model, Classifier) else model
    if not isinstance(encoder.patch_embed_a, PatchStem):
        raise WeightsError("encoder.stem = conv has no counterpart in CAV-MAE; only patch has")
    state = {key.removeprefix("encoder."): tensor for key, tensor in model.state_dict().items()}
    if isinstance(model, Classifier):
        state = {key: tensor for key, tensor in state.items() if not key.startswith("decoder.")}
    return layouts.to_cavmae(state)


def export_cavmae(model: Encoder | Classifier, prefix: str = "module.") -> dict[str, Tensor]:
    """`cavmae_state` as CAV-MAE's files have it, ready for torch.save: copies on the CPU."""
    state = cavmae_state(model)
    return {prefix + key: tensor.detach().cpu().clone() for key, tensor in state.items()}


def export_file(model_uri: str, uri: str) -> tuple[int, str | None]:
    """Write a saved model as a file of CAV-MAE, and a classifier's label list beside it.

    Returns: the number of tensors, and where the label list is (`read_class_names` reads it).
    Raises: WeightsError if there is no such model, or CAV-MAE has no place for its stems.
    """
    saved: tuple[Encoder | Classifier, ModelCard]
    name = saved_name(model_uri)
    saved = load_classifier(model_uri) if name == "classifier" else load_encoder(model_uri)
    model, card = saved
    state = export_cavmae(model)
    place, file = place_of(uri)
    with place.written(file) as path:
        torch.save(state, path)
    if name == "encoder":
        return len(state), None
    rows = io.StringIO(newline="")
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["index", "mid", "display_name"])
    writer.writerows([i, f"class_{i}", name] for i, name in enumerate(card.classes))
    place.write_bytes(f"{file}.csv", rows.getvalue().encode())
    return len(state), f"{uri}.csv"
