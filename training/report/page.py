"""One self-contained HTML page of a run folder.

Knows nothing of training: it reads what a run left behind, and frames from the feature store.
Invariant: the page fetches nothing (its own policy forbids it), and every part that the run lacks
is named.
"""

import json
import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.storage import is_storage_failure
from training.report import confusion_map, galleries, sections
from training.report.agreement import truths_of, with_agreement
from training.report.clips.media import media_of
from training.report.clips.pictures import Pictures
from training.report.folder import ReportData, read_run
from training.report.label_noise import label_noise
from training.report.markup import number, page, text

log = logging.getLogger(__name__)

_ALLOWED = ("img-src data:", "media-src data:", "script-src 'unsafe-inline'")
_SCRIPTS = ("page.js", "confusion_map.js", "sounds.js")
_LINKS = {
    "results": "Results",
    "training": "Training",
    "clusters": "Pseudo-labels",
    "confusion": "Confusion",
    "retrieval": "Retrieval",
    "time": "Time",
    "pins": "What pins it",
}


def write_report(
    run_folder: str | Path,
    store_uri: str | None = None,
    *,
    with_sound: bool = True,
    may_write: Callable[[], None] = lambda: None,
) -> str:
    """Write `report.html` into a run folder and return its path or URI.

    Args: store_uri: where the frames are; None: the store the run was trained on, and if that
        cannot be read now, a page without frames that says so. with_sound: embed what can be
        heard. may_write: asked before the file; raises where another start has the folder now.
    Raises: TrainingError for no run folder or a broken part of one; StoreError (pipeline) for a
        `store_uri` that cannot be read.
    """
    run = read_run(run_folder)
    about = _of_other_weights(run)
    try:
        pictures, notes = _open_pictures(run, store_uri)
        written = build_page(run, pictures, [*about, *notes], with_sound)
    except Exception as error:
        # Also of a store whose table is there, and a shard that it points at is not.
        is_away = isinstance(error, PipelineError) or is_storage_failure(error)
        if store_uri is not None or not is_away:
            raise
        log.warning("report without frames: %s", error)
        uri = _store(run).get("uri")
        note = f"Frames are left out: the feature store {uri} cannot be read now."
        written = build_page(run, None, [*about, note], with_sound)
    may_write()
    run.place.write_bytes("report.html", written.encode())
    return run.place.uri_of("report.html")


def _of_other_weights(run: ReportData) -> list[str]:
    if not run.retrained:
        return []
    return [
        f"These results are of other weights than the run has now ({' and '.join(run.retrained)} "
        "of it came since): run diccae evaluate, then diccae report again."
    ]


def _open_pictures(run: ReportData, store_uri: str | None) -> tuple[Pictures | None, list[str]]:
    """The frames of the run's own version, and what there is to say of them."""
    store = _store(run)
    uri = store_uri or store.get("uri")
    if uri is None:
        return None, ["Frames are left out: the run folder names no feature store."]
    pictures = _pictures_of(uri, store.get("version"), is_moved=store_uri is not None)
    return pictures, _of_other_clips(pictures, uri, store)


def _pictures_of(uri: str, version: int | None, *, is_moved: bool) -> Pictures:
    """Those of the version that the run read; of a store that has none of that number, since its
    clips were ingested anew, the newest."""
    try:
        return Pictures(uri, version)
    except PipelineError:
        if not is_moved or version is None:
            raise
        return Pictures(uri, None)


def _of_other_clips(pictures: Pictures, uri: str, store: dict[str, Any]) -> list[str]:
    """What to say of frames and labels that may not be those the run read."""
    if store.get("digest") in (None, pictures.digest):
        return []
    return [
        f"Frames, sounds and labels of clusters are of version {pictures.version} of {uri}, which "
        f"holds other clips than the run read (digest {pictures.digest[:12]}, of the run "
        f"{store['digest'][:12]}): a clip may be shown as another one of its name. Name the store "
        "that the run read with --store."
    ]


def _store(run: ReportData) -> dict[str, Any]:
    return {**(run.results.get("store") or {}), **(run.run.get("store") or {})}


def build_page(
    run: ReportData, pictures: Pictures | None, notes: Sequence[str] = (), with_sound: bool = True
) -> str:
    """The page's text."""
    clip_of = pictures.by_key() if pictures and run.rounds else {}
    truths = truths_of(clip_of)
    run = run._replace(rounds=[with_agreement(done, truths) for done in run.rounds])
    choice = galleries.choose(run, clip_of, pictures.label_of if pictures else {})
    media = media_of(pictures, choice.framed(), choice.heard(), with_sound)
    drawn = sections.curve_panels(run)
    body = [
        *(f'<p class="absent">{text(note)}</p>' for note in notes),
        sections.results(run),
        label_noise(run.results),
        sections.training(drawn),
        galleries.clusters(run, choice, drawn, media),
        confusion_map.confusion(run, choice, media),
        galleries.retrieval(run, choice, media),
        sections.time(run),
        sections.pins(run, {key: str(value) for key, value in _store(run).items()}),
    ]
    data = {
        "panels": drawn.panels,
        "rounds": [r.effective_step for r in run.rounds if r.ok and r.effective_step],
        "confusion": confusion_map.confusion_data(run),
    }
    name = run.run.get("name") or run.place.name
    return page(
        kind="run report",
        title=name,
        name=name,
        facts=_facts(run, pictures),
        body=body,
        source="from the run folder",
        allowed=_ALLOWED,
        tiles=sections.tiles(run),
        links=_LINKS,
        scripts=_scripts(data, {clip_id: sound.uri for clip_id, sound in media.sounds.items()}),
    )


def _scripts(data: object, sounds: object) -> str:
    """What the page draws, what can be heard on it, and what does both."""
    code = "".join((Path(__file__).parent / name).read_text() for name in _SCRIPTS)
    return (
        '<div id="tip" aria-hidden="true"></div>\n'
        f'<script id="data" type="application/json">{_as_script(data)}</script>\n'
        f'<script id="sounds" type="application/json">{_as_script(sounds)}</script>\n'
        f"<script>{code}</script>"
    )


def _as_script(data: object) -> str:
    # A class name must not end the script; JSON reads the escape as the same character.
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _facts(run: ReportData, pictures: Pictures | None) -> str:
    encoder = run.results.get("encoder")
    store = _store(run)
    facts = [
        f"encoder {encoder}" if isinstance(encoder, str) else "",
        f"store version {store['version']}" if "version" in store else "",
        f"{number(len(pictures.label_of))} clips" if pictures else "",
        f"{number(len(run.confusion.classes))} classes" if run.confusion else "",
        f"started {_moment(str(run.run['started']))}" if run.run.get("started") else "",
    ]
    return " · ".join(fact for fact in facts if fact)


def _moment(stamp: str) -> str:
    """An ISO time to the minute; anything else as it is."""
    try:
        moment = datetime.fromisoformat(stamp)
    except ValueError:
        return stamp
    return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".strip()
