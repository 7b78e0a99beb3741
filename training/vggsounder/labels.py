"""TrueLabels: every label that VGGSounder's annotators found true of a VGGSound test clip.

Reads the CSV files of the package `vggsounder` (optional; its code is never imported: its scorer
needs half a dozen packages, its labels none). Knows nothing of models. Invariant: classes are known
by name; what the labels are (package, version, file, digest) stands with everything computed.

Source: Zverev et al. 2025, "VGGSounder: Audio-Visual Evaluations for Foundation Models".
Shapes: T clips, R labels of clips, C classes.
"""

import csv
import hashlib
import io
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.errors import TrainingError

PACKAGE = "vggsounder"
_CSV = "vggsounder+background-music.csv"
"""All clips; the package's other file is this one without clips that have music under them."""
_COLUMNS = ("video_id", "label", "modality", "background_music", "static_image", "voice_over")
MODALITIES = ("A", "V", "AV")
FLAGS = ("background_music", "static_image", "voice_over")


class TrueLabels(NamedTuple):
    """The labels of T clips, one row a label."""

    source: dict[str, str]
    """package and version, file and SHA-256."""
    clip_ids: list[str]
    classes: list[str]
    """In VGGSounder's order, which is that of the scores in its files."""
    clip_R: NDArray[np.int64]
    """Position in clip_ids."""
    class_R: NDArray[np.int64]
    """Position in classes."""
    modality_R: NDArray[np.str_]
    """A: only heard, V: only seen, AV: both."""
    flags: dict[str, NDArray[np.bool_]]
    """[T] by name of FLAGS."""


def read_labels(file: str | None = None) -> TrueLabels:
    """Args: file: a CSV of VGGSounder's columns, such as an older version; None: the package's own.

    Raises: TrainingError if the package is not installed, or the file holds something else.
    """
    path = Path(file) if file else _data() / _CSV
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TrainingError(f"{path}: labels cannot be read ({error.strerror})") from error
    classes = class_names()
    rows = _rows(path, content, set(classes))
    position = {name: i for i, name in enumerate(classes)}
    clip_ids = list(dict.fromkeys(row["video_id"] for row in rows))
    clips = {clip_id: i for i, clip_id in enumerate(clip_ids)}
    # What is said of a clip stands in each of its rows.
    meta = {row["video_id"]: row for row in rows}
    return TrueLabels(
        source={
            "package": f"{PACKAGE} {metadata.version(PACKAGE)}",
            "file": path.name,
            "sha256": hashlib.sha256(content).hexdigest(),
        },
        clip_ids=clip_ids,
        classes=classes,
        clip_R=np.array([clips[row["video_id"]] for row in rows], np.int64),
        class_R=np.array([position[row["label"]] for row in rows], np.int64),
        modality_R=np.array([row["modality"] for row in rows]),
        flags={
            name: np.array([meta[clip_id][name].lower() == "true" for clip_id in clip_ids])
            for name in FLAGS
        },
    )


def _rows(path: Path, content: bytes, classes: set[str]) -> list[dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(content.decode("utf-8", "replace"))))
    if not rows or not set(_COLUMNS) <= rows[0].keys():
        found = ", ".join(rows[0]) if rows else "no row"
        raise TrainingError(f"{path}: found {found}; VGGSounder has {', '.join(_COLUMNS)}")
    for line, row in enumerate(rows, 2):
        if row["label"] not in classes or row["modality"] not in MODALITIES:
            raise TrainingError(
                f"{path}, line {line}: {row['label']!r} by {row['modality']!r} is none of "
                f"{len(classes)} classes by {', '.join(MODALITIES)}"
            )
    return rows


def class_names() -> list[str]:
    """VGGSound's 309 classes in VGGSounder's order. Raises: TrainingError without the package."""
    with open(_data() / "classes.csv", encoding="utf-8", newline="") as file:
        return [row["display_name"] for row in csv.DictReader(file)]


def _data() -> Path:
    """Where the package's files are; found without running any of its code."""
    found = util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise TrainingError(
            f"the package {PACKAGE}, which holds VGGSounder's labels, is not installed; run pip "
            "install 'diccae[vggsounder]'"
        )
    return Path(found.origin).parent / "data"
