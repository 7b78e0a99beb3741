"""--fresh of a command: whether it is still to be done, and what it must not delete.

Knows nothing of stages. Invariants: what an attempt of a job has begun anew, the next attempts go
on with; a command of no job, and one of other words or of another config, begins anew each time;
nothing that the new run reads goes with the old one.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from diccae.config import RunConfig
from diccae.errors import UsageError
from diccae.run_folder import RunFolder, run_place
from pipeline.store.lease import JOB

_FIELD = "fresh"
"""Of run.json, while the command that began anew has not succeeded."""


class Anew(NamedTuple):
    """The start that began a run, or its fine-tuning, anew; the attempts of a job are equal."""

    job: str
    """Variable that they share; empty for a start that is none."""
    start: str
    """Digest of command line and config: jobs that follow each other may have one name."""


def begins_anew(
    folder: RunFolder, command: Sequence[str], config: RunConfig, say: Callable[[str], None]
) -> Anew | None:
    """What a command with `--fresh` begins.

    Args: command: all its words.
    Returns: None where an earlier attempt of this job has begun it, and this one is to go on.
    """
    # Of a run without --config the features are those of its store, once it has begun.
    settings = config.model_dump_json(exclude={"features"})
    digest = hashlib.sha256(json.dumps([*command, settings]).encode()).hexdigest()
    anew = Anew(os.environ.get(JOB, ""), digest[:16])
    if not anew.job or folder.record.get(_FIELD) != anew._asdict():
        return anew
    say(
        f"fresh     an earlier attempt of job {anew.job} has begun {folder.uri} anew: going on "
        "with that; a job of another name (render --name) begins anew once more"
    )
    return None


def has_begun(folder: RunFolder, anew: Anew) -> None:
    """Say so in run.json, before anything is trained: what an attempt that died before that began
    is no loss to the next one."""
    folder.write_record(**{_FIELD: anew._asdict()})


def has_succeeded(folder: RunFolder) -> None:
    """No attempt follows: who gives the command again, in a job of the same name, begins anew."""
    if folder.record.get(_FIELD):
        folder.write_record(**{_FIELD: None})


def refuse_deleting(folder: RunFolder, reads: Mapping[str, str | None]) -> None:
    """Before the run in a folder is deleted.

    Args: reads: path or URI by option, of what the run that begins is to read.
    Raises: UsageError for one that lies in the folder.
    """
    for option, uri in reads.items():
        if uri is not None and f"{run_place(uri).uri}/".startswith(f"{folder.uri}/"):
            raise UsageError(
                f"{option} {uri} lies in --out {folder.uri}, all of which --fresh deletes: copy it "
                "to another place, or name another --out"
            )
