"""export_file and export_hub: a saved model as a file of CAV-MAE, or as a folder for a hub.

Knows nothing of training. Invariant: what is written here, `load_weights` reads back with every
output the same.
"""

import csv
import io
import json
import shutil
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.passwords import without_passwords
from pipeline.storage import Location, place_of
from training.errors import WeightsError
from training.model.blocks import PatchStem
from training.model.classifier import Classifier
from training.model.encoder import Encoder
from training.weights import layouts
from training.weights.beside import readme_of, write_readme
from training.weights.card import ModelCard
from training.weights.files import (
    HUB_TENSORS,
    check_pickled_name,
    fetched_tensors,
    load_classifier,
    load_encoder,
    read_card,
    saved_name,
    sha256,
)
from training.weights.measured import read_measured, write_measured


def cavmae_state(model: Encoder | Classifier) -> dict[str, Tensor]:
    """The model's own tensors under CAV-MAE's keys, norms it never uses added.

    An encoder gives CAVMAE's keys (the decoder's if it has one), a classifier CAVMAEFT's.

    Raises: WeightsError for conv stems, which CAV-MAE does not have.
    """
    encoder = model.encoder if isinstance(model, Classifier) else model
    if not isinstance(encoder.patch_embed_a, PatchStem):
        raise WeightsError(
            "encoder.stem = conv has no counterpart in CAV-MAE; only patch has. Export a model "
            "with conv stems by --to hub-folder"
        )
    state = {key.removeprefix("encoder."): tensor for key, tensor in model.state_dict().items()}
    if isinstance(model, Classifier):
        state = {key: tensor for key, tensor in state.items() if not key.startswith("decoder.")}
    return layouts.to_cavmae(state)


def export_cavmae(model: Encoder | Classifier, prefix: str = "module.") -> dict[str, Tensor]:
    """`cavmae_state` as CAV-MAE's files have it, ready for torch.save: copies on the CPU."""
    state = cavmae_state(model)
    return {prefix + key: tensor.detach().cpu().clone() for key, tensor in state.items()}


def export_file(model_uri: str, uri: str) -> tuple[int, str | None]:
    """Write a saved model as a file of CAV-MAE, beside it its card (`.md`), and a classifier's
    label list (`.csv`).

    Returns: the number of tensors, and where the label list is (`read_class_names` reads it).
    Raises: WeightsError if there is no such model, CAV-MAE has no place for its stems, or the
        file's ending is not one of a file that torch.save wrote.
    """
    check_pickled_name(uri)
    saved: tuple[Encoder | Classifier, ModelCard]
    name = saved_name(model_uri)
    saved = load_classifier(model_uri) if name == "classifier" else load_encoder(model_uri)
    model, card = saved
    state = export_cavmae(model)
    place, file = place_of(uri)
    with place.written(file) as path:
        torch.save(state, path)
    labels = f" --classes {file}.csv" if name == "classifier" else ""
    command = f"diccae weights import --model {file}{labels} --store STORE --out RUN"
    place.write_bytes(f"{file}.md", readme_of(model_uri, name, command).encode())
    if name == "encoder":
        return len(state), None
    rows = io.StringIO(newline="")
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["index", "mid", "display_name"])
    writer.writerows([i, f"class_{i}", name] for i, name in enumerate(card.classes))
    place.write_bytes(f"{file}.csv", rows.getvalue().encode())
    return len(state), f"{uri}.csv"


def export_hub(model_uri: str, uri: str) -> list[str]:
    """Write a saved model as a folder that Hugging Face's tools take, and that is still a saved
    model to diccae: the same tensors under their name, config.json, the card and README.md.

    Returns: names of the files.
    Raises: WeightsError if there is no such model, or the folder holds one of the other kind.
    """
    source, target = Location(model_uri), Location(uri)
    kind = saved_name(source.uri)
    _check_free(target, kind)
    _, digest = read_card(source.uri, kind)
    with fetched_tensors(source.uri, kind) as tensors, target.written(HUB_TENSORS) as copy:
        if sha256(tensors) != digest:
            raise WeightsError(f"{model_uri}: its tensors are not those of its card; save it again")
        shutil.copyfile(tensors, copy)
    # Of an earlier version: it wrote the place of an MLflow run down as it was given.
    card = without_passwords(source.read_bytes(f"{kind}.json"))
    target.write_bytes("config.json", _hub_config(json.loads(card)))
    target.write_bytes(f"{kind}.json", card)
    measured = read_measured(source.uri, digest)
    if measured is not None:
        write_measured(target.uri, measured)
    write_readme(target.uri, kind)
    files = [HUB_TENSORS, "config.json", f"{kind}.json"]
    return [*files, *(["measured.json"] if measured else []), "README.md"]


def _check_free(target: Location, kind: str) -> None:
    """The card tells what a folder holds, and two would contradict each other."""
    for other in {"encoder", "classifier"} - {kind}:
        if target.exists(f"{other}.json"):
            raise WeightsError(
                f"{target.uri}: holds the model of an {other}.json, and the {kind} was to "
                "be written: name another folder, or empty it"
            )


def _hub_config(card: Mapping[str, Any]) -> bytes:
    """What the hub's pages and `transformers`' config readers look for, and our own settings."""
    names = dict(enumerate(card["classes"]))
    config = {
        "model_type": "diccae",
        "architectures": ["Classifier" if card["kind"] == "classifier" else "Encoder"],
        "id2label": names,
        "label2id": {name: i for i, name in names.items()},
        "encoder": card["config"],
        "input_shape": card["shape"],
        "feature_spec": card["feature_spec"],
        "fbank_statistics": card.get("fbank_statistics"),
    }
    return json.dumps(config, indent=2, ensure_ascii=False).encode()
