"""Sounds of a store's clips: from their source where it can be reached, else from their fbank.

Knows nothing of pages. Invariant: no clip is left without a sound because of its source, and what
is not the recording is marked so; a source is played only if its bytes are those that were decoded.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from pipeline.config import FRAME_SHIFT_MS, IngestConfig
from pipeline.decode.sandbox import Sandbox
from pipeline.reasons import Reason, Rejected
from pipeline.source.fetch import Fetched, fetch_all
from pipeline.source.tar_parts import part_of
from pipeline.storage import is_storage_failure
from training.report.clips.inversion import waveform_of
from training.report.clips.pictures import Pictures
from training.report.clips.sound import Sound, encode_sound

log = logging.getLogger(__name__)

_AT_A_TIME = 2
SYNTHESISED_S = 3.0
"""Shorter than what is cut from a source: a second of it takes 35 ms to put together."""
_TIMEOUT_S = 20.0
_MOST_S = 60.0
"""A page is worth no longer wait for a slow bucket: what is left is synthesised."""


class Sounds(NamedTuple):
    """What can be played, and why some of it is synthesised."""

    by_clip: dict[str, Sound]
    why_synthesised: Counter[str]
    """Clips by reason."""


def sounds_of(pictures: Pictures, clip_ids: Iterable[str], most_s: float = _MOST_S) -> Sounds:
    """An excerpt of each clip that the store's version holds.

    Args: most_s: seconds after which no further source is read.
    """
    clips = pictures.source_clips(clip_ids)
    # A part has to be read from its start to reach a clip in it.
    reachable = [clip for clip in clips if part_of(clip["uri"]) is None]
    why = {clip["clip_id"]: "inside a tar part" for clip in clips if part_of(clip["uri"])}
    deadline = time.monotonic() + most_s
    found: dict[str, Sound] = {}
    with ThreadPoolExecutor(_AT_A_TIME) as threads:
        shares = [reachable[k::_AT_A_TIME] for k in range(_AT_A_TIME)]
        for done in threads.map(lambda share: list(_from_sources(share, deadline)), shares):
            for clip_id, sound, reason in done:
                if sound is None:
                    why[clip_id] = reason
                else:
                    found[clip_id] = Sound(sound, is_from_source=True)
    found |= _from_fbanks(pictures, why)
    return Sounds(found, Counter(why.values()))


def _from_sources(
    clips: list[dict[str, Any]], deadline: float
) -> Iterator[tuple[str, bytes | None, str]]:
    """(clip id, sound or None, why not) of every clip."""
    ingest = IngestConfig()
    sandbox = Sandbox(
        "training.report.clips.sound:excerpt",
        timeout_s=_TIMEOUT_S,
        max_calls=ingest.child_clips,
        max_memory_mb=ingest.child_memory_mb,
    )
    left = {clip["clip_id"]: clip for clip in clips}
    why = "its source cannot be reached"
    try:
        for fetched in fetch_all([dict(clip) for clip in clips], ingest):
            if time.monotonic() > deadline:
                fetched.release()
                why = "its source takes too long"
                break
            clip = left.pop(fetched.clip["clip_id"])
            yield (clip["clip_id"], *_excerpt(fetched, clip, sandbox))
    except Exception as error:
        if not is_storage_failure(error):
            raise
        log.warning("report: sounds of %d clips are synthesised: %s", len(left), error)
    finally:
        sandbox.close()
    yield from ((clip_id, None, why) for clip_id in left)


def _excerpt(fetched: Fetched, clip: dict[str, Any], sandbox: Sandbox) -> tuple[bytes | None, str]:
    try:
        if fetched.rejected:
            raise fetched.rejected
        if fetched.changed() or fetched.clip["fp"] != clip["fp"]:
            return None, "its source was replaced since"
        sandbox.submit(fetched.path, clip["start_s"], clip["end_s"])
        return sandbox.result(), ""
    except Rejected as rejected:
        gone = rejected.reason == Reason.MISSING
        return None, "its source is gone" if gone else "its source cannot be read"
    finally:
        fetched.release()


def _from_fbanks(pictures: Pictures, clip_ids: Iterable[str]) -> dict[str, Sound]:
    spec = pictures.spec
    most = round(1000 * SYNTHESISED_S / FRAME_SHIFT_MS)

    def synthesised(fbank_TM: Any) -> Sound:
        waveform = waveform_of(fbank_TM[:most], spec)
        return Sound(encode_sound(waveform, spec.sample_rate_hz), is_from_source=False)

    return pictures.fbanks(clip_ids, synthesised)
