"""The folder of a round on storage: request, labels, prototypes, health, and the marker.

Knows nothing of how a round is made. Invariant: `round.json` is written last, so a round that can
be loaded is whole.

round-0001/  request.json  vectors/  labels.parquet  prototypes.npz  health.json  round.json
"""

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clustering import storage
from clustering.errors import ClusteringError
from clustering.rounds.frozen import column
from clustering.rounds.protocol import HeadLabels, PublishedRound, RoundRequest
from clustering.rounds.saved import kept_files, name_in


def round_uri(uri: str, round: int) -> str:
    """Folder of a round."""
    return storage.join(uri, f"round-{round:04d}")


def vectors_uri(uri: str, round: int) -> str:
    """Folder of a round's frozen rows."""
    return storage.join(round_uri(uri, round), "vectors")


def rounds_at(uri: str) -> list[int]:
    """Numbers of the rounds that have a folder under `uri`, in order."""
    found = (name.removeprefix("round-") for name in storage.names(uri))
    return sorted(int(number) for number in found if number.isdigit())


def publish(uri: str, published: PublishedRound) -> None:
    """Write a finished round; a withheld one leaves its health and its reason."""
    folder = round_uri(uri, published.round)
    if published.ok:
        _write_labels(storage.join(folder, "labels.parquet"), published.heads)
        storage.write_arrays(storage.join(folder, "prototypes.npz"), _arrays(published.heads))
    storage.write_json(storage.join(folder, "health.json"), published.health)
    marker = {
        "round": published.round,
        "effective_step": published.effective_step,
        "ok": published.ok,
        "reason": published.reason,
        "heads": [{"name": head.name, "teaches": head.teaches} for head in published.heads],
    }
    storage.write_json(storage.join(folder, "round.json"), marker)


def load_round(uri: str, round: int) -> PublishedRound:
    """A completed round. Raises: ClusteringError if there is none."""
    folder = round_uri(uri, round)
    try:
        marker = storage.read_json(storage.join(folder, "round.json"))
    except FileNotFoundError:
        raise ClusteringError(
            f"{folder}: round {round} was never completed (no round.json). "
            f"Completed rounds: {[r for r in rounds_at(uri) if is_complete(uri, r)]}."
        ) from None
    health = storage.read_json(storage.join(folder, "health.json"))
    heads = _read_heads(folder, marker["heads"]) if marker["ok"] else []
    return PublishedRound(
        marker["round"], marker["effective_step"], marker["ok"], marker["reason"], heads, health
    )


def load_health(uri: str, round: int) -> dict[str, float]:
    """The health of a completed round, without its labels and matrices, which are large."""
    return dict(storage.read_json(storage.join(round_uri(uri, round), "health.json")))


def is_complete(uri: str, round: int) -> bool:
    """Whether the round was finished (published or withheld)."""
    return storage.exists(storage.join(round_uri(uri, round), "round.json"))


def round_before(uri: str, round: int) -> PublishedRound | None:
    """The last published round below `round`; withheld ones are passed over."""
    for number in reversed(rounds_at(uri)):
        if number < round and is_complete(uri, number):
            published = load_round(uri, number)
            if published.ok:
                return published
    return None


def begin(uri: str, request: RoundRequest, identity: dict[str, Any]) -> None:
    """Note that a round was asked for, so that a restart goes on with it.

    A folder of the same number is cleared unless it holds the same request by the same config.
    """
    folder = round_uri(uri, request.round)
    wanted = json.loads(json.dumps({"request": asdict(request), "made_by": identity}))
    try:
        same = storage.read_json(storage.join(folder, "request.json")) == wanted
    except FileNotFoundError:
        same = False
    if not same:
        storage.remove(folder)
        storage.write_json(storage.join(folder, "request.json"), wanted)


def unfinished(uri: str, identity: dict[str, Any]) -> list[RoundRequest]:
    """Requests of this config that were begun, frozen and never completed."""
    requests = []
    for number in rounds_at(uri):
        folder = round_uri(uri, number)
        if is_complete(uri, number) or not storage.exists(storage.join(folder, "request.json")):
            continue
        stored = storage.read_json(storage.join(folder, "request.json"))
        if stored["made_by"] == json.loads(json.dumps(identity)):
            requests.append(RoundRequest(**stored["request"]))
    return requests


def forget_vectors(uri: str, round: int, keep: int) -> None:
    """Remove the frozen vectors of rounds up to `round` - `keep`; their labels stay.

    So do files that a saved state of the bank names: they go after it.
    """
    kept = kept_files(uri)
    for number in rounds_at(uri):
        if number > round - keep:
            continue
        folder = vectors_uri(uri, number)
        if not any(
            name_in(uri, storage.join(folder, name)) in kept for name in storage.names(folder)
        ):
            storage.remove(folder)


def _write_labels(uri: str, heads: list[HeadLabels]) -> None:
    columns = {"key": column(heads[0].keys_N)}
    columns.update({f"label_{head.name}": column(head.labels_N) for head in heads})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    storage.write_bytes(uri, memoryview(sink.getvalue()))


def _arrays(heads: list[HeadLabels]) -> dict[str, np.ndarray]:
    arrays = {}
    for head in heads:
        arrays[f"{head.name}/confusion"] = head.confusion_KK
        for stream, prototypes_KP in head.prototypes.items():
            arrays[f"{head.name}/prototypes/{stream}"] = prototypes_KP
    return arrays


def _read_heads(folder: str, described: list[dict[str, Any]]) -> list[HeadLabels]:
    with storage.opened(storage.join(folder, "labels.parquet")) as handle:
        table = pq.read_table(handle)
    arrays = storage.read_arrays(storage.join(folder, "prototypes.npz"))
    keys_N = table["key"].to_numpy()
    heads = []
    for head in described:
        name = head["name"]
        prefix = f"{name}/prototypes/"
        prototypes = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        labels_N = table[f"label_{name}"].to_numpy()
        confusion_KK = arrays[f"{name}/confusion"]
        heads.append(
            HeadLabels(name, tuple(head["teaches"]), keys_N, labels_N, prototypes, confusion_KK)
        )
    return heads
