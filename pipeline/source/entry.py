"""Entry: one clip of a list, and what its names may be.

Knows nothing of files or of how lists are written. Invariant: a name that passes here can be that
of a folder, and a label is one line.
"""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline.source.tar_parts import CONTROL

_VGGSOUND_NAME = re.compile(r"([A-Za-z0-9_-]{11})(_\d{6})?")
TRAIN = "train"
"""The split of clips that are given none."""


@dataclass(frozen=True)
class Entry:
    """One line of a CSV or manifest."""

    line: int
    clip_id: str
    label: str | None
    """None for a clip without a label."""
    split: str
    group: str
    """What is not to be divided between training and validation: the video a clip was cut from."""
    ytid: str = ""
    start_s: float | None = None
    end_s: float | None = None
    uri: str = ""
    more_labels: tuple[str, ...] = ()
    """Classes of the clip beside `label`."""

    @property
    def all_labels(self) -> tuple[str, ...]:
        """Every class of the clip."""
        return (self.label, *self.more_labels) if self.label else ()


def clip_id_of(path: str) -> str:
    """The id of a clip by its path below the folder of videos: `a/0001.mp4` is `a__0001`."""
    parts = PurePosixPath(path.replace("\\", "_")).with_suffix("").parts
    return "__".join(part for part in parts if part not in ("/", "..", "."))


def group_of(name: str, otherwise: str) -> str:
    """The YouTube id of a name of VGGSound's form (11 characters, _, six digits)."""
    match = _VGGSOUND_NAME.fullmatch(name)
    return match[1] if match and match[2] else otherwise


def group_of_window(name: str, otherwise: str) -> str:
    """The same where a file may be the whole video, whose name is the id alone."""
    match = _VGGSOUND_NAME.fullmatch(name)
    return match[1] if match else otherwise


def is_safe(name: str) -> bool:
    """Whether a name can be that of a folder: `store export` makes one of it."""
    return re.fullmatch(r"[^/\\\x00-\x1f\x7f]+", name) is not None and name not in (".", "..")


def refuse_label(label: str) -> None:
    """Raises: ValueError for a label of several lines, or worse."""
    if re.search(CONTROL, label):
        raise ValueError(
            f"label {label!r} holds a control character; take it out: a label is one line of text"
        )
