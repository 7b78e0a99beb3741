"""load_weights and saved models: weights from any URI, written with all that explains them.

The edge of storage for weights: knows nothing of training. Invariants: nothing but tensors
is ever unpickled; a trunk is loaded whole or not at all; an imported class head is never used in an
order that was not checked by name.

A saved model is a folder: `<name>.safetensors` and `<name>.json` (config, input shape, classes,
feature spec, provenance, digest of the tensors), name = encoder or classifier, and a README.md.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import StoreError
from pipeline.passwords import without_passwords
from pipeline.storage import Location, fetched
from training.config import FbankStatistics
from training.errors import WeightsError
from training.model.blocks import PATCH
from training.model.classifier import Classifier
from training.model.encoder import Encoder
from training.weights import layouts
from training.weights.beside import write_readme
from training.weights.card import Applied, MadeWith, ModelCard, Space
from training.weights.matching import fill, fit_positions, take_heads

_OPTIONAL = ("class_heads.", "decoder.", "mlp_head.", "auxiliary_heads.")
"""Parts a file may lack, or have beyond what the model has; anything else is the trunk."""


_PICKLED = (".pth", ".pt", ".bin", ".ckpt")
"""Endings of files that torch.save wrote; anything but these and .safetensors is a folder."""

HUB_TENSORS = "model.safetensors"
"""The name that Hugging Face's tools look for."""


class WeightsReport(NamedTuple):
    """What a file gave to a model."""

    layout: layouts.Layout
    missing: list[str]
    """Keys of the model the file does not have; they keep their initial values."""
    unexpected: list[str]
    """Keys of the file the model has no place for."""
    resized: list[str]
    """Position tables that were cut, continued or interpolated to another grid."""
    made_with: MadeWith
    """What the file says of the features it was trained on."""

    @property
    def space(self) -> Space | None:
        """The embeddings that match across modalities: not those of heads that nothing trained."""
        untrained = any(key.startswith("class_heads.") for key in self.missing)
        return "z" if untrained else self.made_with.space


def by_part(keys: list[str]) -> str:
    """Keys counted by the part of the model they are of, such as `blocks_a (132), norm_v (2)`."""
    parts = Counter(key.split(".")[0] for key in keys)
    return ", ".join(f"{part} ({n})" for part, n in parts.items()) or "-"


def load_weights(
    model: Encoder | Classifier,
    uri: str,
    classes: Sequence[str] = (),
    source_classes: Sequence[str] = (),
) -> WeightsReport:
    """Start from published or own weights: CAV-MAE, MAE ViT, or a diccae model's file or folder.

    Args: classes: the classifier's classes. source_classes: those of the file in its order
        (`read_class_names`); a diccae classifier's folder knows its own. Without them a class head
        in the file is left alone and reported as unexpected.
    Raises: WeightsError if the file cannot be read, or a part of the trunk is missing, left over
        or of another shape.
    """
    raw, card = read_weights(uri)
    layout = layouts.detect(raw)
    encoder = model.encoder if isinstance(model, Classifier) else model
    optional: tuple[str, ...] = _OPTIONAL
    if layout == "cavmae":
        state = layouts.from_cavmae(raw)
    elif layout == "mae":
        state = layouts.from_mae(raw, encoder.config.depth, encoder.config.joint_depth)
        optional += ("pos_embed_a", "modality_a", "modality_v")
    else:
        state = {key.removeprefix("encoder."): tensor for key, tensor in raw.items()}
    resized = fit_positions(encoder, state, _audio_rows(encoder, layout, card))
    heads = take_heads(state, classes, source_classes or (card.classes if card else ()))
    try:
        missing, unexpected = fill(model, state, optional)
    except WeightsError as error:
        raise WeightsError(f"{uri}: {error}") from error
    return WeightsReport(layout, missing, unexpected + heads, resized, MadeWith.of(layout, card))


def _audio_rows(encoder: Encoder, layout: layouts.Layout, card: ModelCard | None) -> int:
    """Rows of the grid that a file's audio positions are of."""
    if layout != "diccae":
        return 8
    # A file without a card does not say: a checkpoint of ours, for clips like those of this run.
    return (card.shape if card else encoder.shape).n_mels // PATCH


def made_with(uri: str) -> MadeWith:
    """What the weights at `uri` say of the features they were trained on.

    Raises: WeightsError if they cannot be read.
    """
    if PurePosixPath(urlsplit(uri).path).suffix in (*_PICKLED, ".safetensors"):
        raw, card = read_weights(uri)
        return MadeWith.of(layouts.detect(raw), card)
    return MadeWith.of("diccae", read_card(uri, saved_name(uri))[0])


def read_weights(uri: str) -> tuple[dict[str, Tensor], ModelCard | None]:
    """Tensors of a file or of a saved model's folder, on the CPU, and the card of the latter.

    Raises: WeightsError if there is none, it is damaged, or it holds more than tensors.
    """
    suffix = PurePosixPath(urlsplit(uri).path).suffix  # published links end in .pth?dl=1
    if suffix in _PICKLED:
        return _read_pickled(uri), None
    if suffix == ".safetensors":
        with _fetched(uri) as path:
            return _parse_safetensors(path, uri), None
    return _read_saved(uri, saved_name(uri))


def check_pickled_name(uri: str) -> None:
    """Raises: WeightsError if a file of this name would not be read back as torch.save wrote it."""
    suffix = PurePosixPath(urlsplit(uri).path).suffix
    if suffix not in _PICKLED:
        raise WeightsError(
            f"{uri}: ends in {suffix or 'nothing'}, and is read by its ending: one of "
            + ", ".join(_PICKLED)
        )


def saved_name(uri: str) -> Literal["encoder", "classifier"]:
    """What a saved model's folder holds."""
    return "classifier" if Location(uri).exists("classifier.json") else "encoder"


def read_class_names(uri: str) -> list[str]:
    """Class names of CAV-MAE's label file (CSV with index, mid, display_name), in index order."""
    rows = list(csv.DictReader(io.StringIO(_read(uri).decode("utf-8-sig"))))
    if not rows or not {"index", "display_name"} <= set(rows[0]):
        raise WeightsError(f"{uri}: expected a CSV with columns index, mid, display_name")
    return [row["display_name"] for row in sorted(rows, key=lambda row: int(row["index"]))]


def save_encoder(
    encoder: Encoder,
    uri: str,
    classes: Sequence[str] = (),
    feature_spec: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    *,
    statistics: FbankStatistics | None = None,
    applied: Applied | None = None,
) -> None:
    """Write `encoder.safetensors` and `encoder.json` into a folder; a decoder is not kept."""
    state = {k: v for k, v in encoder.state_dict().items() if not k.startswith("decoder.")}
    details = _details(classes, feature_spec, provenance, statistics, applied)
    _save(state, encoder, uri, "encoder", details)


def load_encoder(uri: str) -> tuple[Encoder, ModelCard]:
    """The encoder of a saved folder and its card; in eval mode, on the CPU."""
    state, card = _read_saved(uri, "encoder")
    encoder = Encoder(card.config, card.shape)
    encoder.load_state_dict(state)
    return encoder.eval(), card


def encoder_digest(uri: str) -> str:
    """SHA-256 of a saved encoder's tensors, from its card. Raises: WeightsError without one."""
    card = json.loads(_read(f"{uri.rstrip('/')}/encoder.json"))
    return str(card["sha256"])


def save_classifier(
    classifier: Classifier,
    uri: str,
    classes: Sequence[str],
    feature_spec: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    *,
    statistics: FbankStatistics | None = None,
    applied: Applied | None = None,
) -> None:
    """Write `classifier.safetensors` and `classifier.json` into a folder.

    Raises: ValueError if there is not one name for each logit.
    """
    if len(classes) != classifier.n_classes:
        raise ValueError(f"{len(classes)} class names for {classifier.n_classes} logits")
    state = {k: v for k, v in classifier.state_dict().items() if ".decoder." not in k}
    details = _details(classes, feature_spec, provenance, statistics, applied)
    details |= {"mode": classifier.mode, "auxiliary": bool(classifier.auxiliary_heads)}
    details |= {"multi_label": classifier.multi_label}
    _save(state, classifier.encoder, uri, "classifier", details)


def load_classifier(uri: str) -> tuple[Classifier, ModelCard]:
    """The classifier of a saved folder and its card; in eval mode, on the CPU."""
    state, card = _read_saved(uri, "classifier")
    encoder = Encoder(card.config, card.shape)
    classifier = Classifier(
        encoder, len(card.classes), card.mode, card.auxiliary, multi_label=card.multi_label
    )
    classifier.load_state_dict(state)
    return classifier.eval(), card


def _details(
    classes: Sequence[str],
    feature_spec: Mapping[str, Any] | None,
    provenance: Mapping[str, Any] | None,
    statistics: FbankStatistics | None,
    applied: Applied | None,
) -> dict[str, Any]:
    return {
        "classes": list(classes),
        "feature_spec": dict(feature_spec or {}),
        # A card is passed on with its weights.
        "provenance": json.loads(without_passwords(json.dumps(dict(provenance or {})))),
        "fbank_statistics": statistics and statistics._asdict(),
        "applied": applied and applied._asdict(),
    }


def _save(
    state: Mapping[str, Tensor],
    encoder: Encoder,
    uri: str,
    kind: Literal["encoder", "classifier"],
    details: Mapping[str, Any],
) -> None:
    """Tensors first, then the card with their digest: a card never stands beside other tensors."""
    place = Location(uri)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    with place.written(f"{kind}.safetensors") as path:
        # Hugging Face's loaders refuse a file that does not say so.
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
        digest = sha256(path)
    card = {
        "kind": kind,
        "config": encoder.config.model_dump(mode="json"),
        "shape": encoder.shape._asdict(),
        **details,
        "sha256": digest,
    }
    text = json.dumps(card, indent=2, ensure_ascii=False)
    place.write_bytes(f"{kind}.json", text.encode())
    write_readme(uri, kind)


def read_card(uri: str, kind: str) -> tuple[ModelCard, str]:
    """The card of a saved folder, and the digest its tensors must have.

    Raises: WeightsError if there is none.
    """
    uri = uri.rstrip("/")
    try:
        stored = json.loads(_read(f"{uri}/{kind}.json"))
        return ModelCard.parse(stored), stored["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{uri}/{kind}.json is no card of a diccae {kind}: {error}") from error


def _read_saved(uri: str, kind: str) -> tuple[dict[str, Tensor], ModelCard]:
    """Tensors and card of a saved folder; the digest must agree."""
    uri = uri.rstrip("/")
    with fetched_tensors(uri, kind) as path:
        card, digest = read_card(uri, kind)
        if sha256(path) != digest:
            raise WeightsError(
                f"{uri}/{kind}.safetensors is not what {kind}.json was written with (sha256 "
                "differs): the copy is damaged or mixed; copy or save both files again"
            )
        return _parse_safetensors(path, uri), card


@contextlib.contextmanager
def fetched_tensors(uri: str, kind: str) -> Iterator[Path]:
    """The safetensors of a saved folder, or of one for Hugging Face's hub (`export_hub`), as a file
    of this machine. Raises: WeightsError."""
    name = HUB_TENSORS if Location(uri).exists(HUB_TENSORS) else f"{kind}.safetensors"
    with _fetched(f"{uri.rstrip('/')}/{name}") as path:
        yield path


def _read_pickled(uri: str) -> dict[str, Tensor]:
    """A torch.save file: a state dict, or one under `model` or `state_dict`; or a checkpoint of
    ours, or the `state` of a step that failed, which have the encoder's. Tensors only."""
    try:
        # MAE's own checkpoints keep their command line beside the weights: plain attributes
        allowed = torch.serialization.safe_globals([argparse.Namespace])
        with _fetched(uri) as path, allowed:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:  # a damaged pickle fails in any way: KeyError, Unicode, Type, ...
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise WeightsError(
            f"{uri} cannot be read as tensors alone ({reason}); it is damaged, or holds more than "
            "a state dict: save that by itself with torch.save"
        ) from error
    for wrapper in ("model", "state_dict", "state", "encoder"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{uri} holds a {type(loaded).__name__}, expected a state dict")
    tensors = {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
    return layouts.strip_wrappers(tensors)


def _parse_safetensors(path: Path, uri: str) -> dict[str, Tensor]:
    try:
        # Copied out of the mapped file, which may be gone or overwritten while they are in use.
        tensors = {key: t.clone() for key, t in safetensors.torch.load_file(path).items()}
        return layouts.strip_wrappers(tensors)
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{uri} is no safetensors file: {error}") from error


def sha256(path: Path) -> str:
    """Digest of a file, as cards hold it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _fetched(uri: str) -> Iterator[Path]:
    """`pipeline.storage.fetched`, of weights. Raises: WeightsError if they cannot be read."""
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(fetched(uri))
        except (OSError, ValueError, ImportError, StoreError) as error:
            raise WeightsError(f"{uri} cannot be read: {type(error).__name__}: {error}") from error
        yield path


def _read(uri: str) -> bytes:
    with _fetched(uri) as path:
        return path.read_bytes()


def absolute_uri(uri: str) -> str:
    """A local path made absolute, so that it means the same to workers in other folders."""
    return uri if "://" in uri else str(Path(uri).expanduser().resolve())
