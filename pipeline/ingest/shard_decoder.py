"""ShardDecoder: a shard's worth of clips to a shard file, in a Ray actor or a thread of the driver.

Knows nothing of plans, commits or Ray. Invariant: every clip it was given comes back as one clips
row, ok or failed with its reason; only storage that fails ends the shard, and nothing is written
anywhere but into the store of the driver.
"""

import hashlib
import itertools
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.decode.choice import refuse_without_decoder
from pipeline.decode.clip import Clip
from pipeline.decode.payload import Fbanks, fbank_payload
from pipeline.decode.sandbox import Sandbox
from pipeline.errors import PipelineError, StoreError
from pipeline.reasons import Reason, Rejected
from pipeline.source.fetch import Fetched, fetch_all
from pipeline.storage import Location, is_storage_failure
from pipeline.store.identity import STORE_FILE, store_id
from pipeline.store.schema import CLIPS_SCHEMA, SOURCE_SCHEMA
from pipeline.store.shards import ShardWriter

_MOST_RELOADS = 3
_FBANKS_AT_ONCE = 8
_PAUSE_S = 2.0
"""What a decoder waits after storage has failed it: a short outage would otherwise fail every shard
before the first failure is heard of."""

_Decoded = tuple[dict[str, Any], Clip | Rejected]


class Outcome(NamedTuple):
    """What a decoder has to say of the shard it is at."""

    states: pa.Table | None = None
    """Rows of the clips table of a finished shard; empty: another clip is done, a sign of life."""
    error: str = ""
    """Storage failed the shard."""
    refused: str = ""
    """Why no other try can help."""


class ShardDecoder:
    """Decodes shards one after another."""

    def __init__(
        self,
        store_uri: str,
        spec: FeatureSpec,
        config: IngestConfig,
        run_id: str,
        fbanks: Fbanks,
        *,
        expected_id: str | None,
    ) -> None:
        """Args: run_id: goes into names and rows; fbanks: is called from another thread;
        expected_id: the id of the store as the driver sees it (store_id)."""
        self._location = Location(store_uri)
        self._expected_id = expected_id
        self._spec = spec
        self._config = config
        self._run_id = run_id
        self._fbanks = fbanks
        self._background = ThreadPoolExecutor(1, "fbanks")
        self._sandbox = Sandbox(
            self._config.extractor,
            timeout_s=self._config.timeout_s,
            max_calls=self._config.child_clips,
            max_memory_mb=self._config.child_memory_mb,
        )

    def outcomes(self, index: int, clips: pa.Table) -> Iterator[Outcome]:
        """`decode`, with what went wrong as an outcome."""
        try:
            yield from map(Outcome, self.decode(index, clips))
        except PipelineError as refused:
            yield Outcome(refused=str(refused))
        except Exception as failure:
            if not is_storage_failure(failure):
                raise
            where = socket.gethostname()
            yield Outcome(error=f"{type(failure).__name__} on {where}: {failure}")
            time.sleep(_PAUSE_S)

    def decode(self, index: int, clips: pa.Table) -> Iterator[pa.Table]:
        """Decode clips into shards of at most shard_clips. Yields their rows of the clips table,
        and an empty table after each clip.

        Raises: StoreError if the driver's store is not seen from here, or this node would make
        other features of a clip; PipelineError if no decode
        child or fbank service starts; OSError if the source cannot be read or the store not be
        written.
        """
        self._check_store()
        refuse_without_decoder(self._spec, socket.gethostname())
        fetched = fetch_all(clips.to_pylist(), self._config)
        for first in fetched:
            rest = itertools.islice(fetched, self._config.shard_clips - 1)
            yield from self._decode_shard(index, itertools.chain([first], rest))

    def close(self) -> None:
        """End the decode child and the thread for fbanks."""
        self._sandbox.close()
        self._background.shutdown()

    def _check_store(self) -> None:
        """A path of this machine's own would be made here, filled, and lost with the shards."""
        found = store_id(self._location)
        if found != self._expected_id or found is None:
            what = "there is no " if found is None else "another store has its "
            raise StoreError(
                f"{self._location.uri}: {what}{STORE_FILE} on {socket.gethostname()}, where clips "
                "are decoded. All nodes of a cluster must see one store: give --store a URI such "
                "as s3://, or a path of a file system they share."
            )

    def _decode_shard(self, index: int, clips: Iterator[Fetched]) -> Iterator[pa.Table]:
        # Unique even when a task runs again after its worker died.
        attempt = f"{time.time_ns():x}"
        name = f"features/part-{self._run_id}-{index:06d}-{attempt}.parquet"
        writer = ShardWriter(self._location, name, self._spec)
        shard = _Shard(writer, self._run_id, self._spec, self._make_fbanks)
        try:
            before: tuple[Fetched, Clip | Rejected] | None = None
            for fetched in clips:
                try:
                    if fetched.rejected is None:
                        self._submit(fetched)
                    # The child decodes this clip while the one before is finished here.
                    if before is not None:
                        shard.add(*before)
                    before = (fetched, fetched.rejected or self._result(fetched))
                finally:
                    fetched.release()
                yield CLIPS_SCHEMA.empty_table()
            if before is not None:
                shard.add(*before)
            shard.close()
        except BaseException:
            # It may be at a clip of this shard, whose time would be that of the next one's first.
            self._sandbox.close()
            raise
        finally:
            shard.writer.discard()
        yield pa.Table.from_pylist(shard.states, CLIPS_SCHEMA)

    def _make_fbanks(self, waveforms: list[np.ndarray]) -> "Future[list[np.ndarray]]":
        return self._background.submit(self._fbanks, waveforms)

    def _submit(self, fetched: Fetched) -> None:
        clip = fetched.clip
        self._sandbox.submit(fetched.path, clip["start_s"], clip["end_s"], self._spec)

    def _result(self, fetched: Fetched) -> Clip | Rejected:
        """The outcome for a file that stayed the same while it was read.

        Raises: OSError if neither it nor others of the shard can be read.
        """
        for _ in range(_MOST_RELOADS):
            try:
                outcome: Clip | Rejected = self._sandbox.result()
            except Rejected as rejected:
                outcome = rejected
            try:
                if not fetched.changed():
                    if isinstance(outcome, Rejected) and outcome.reason == Reason.IO_ERROR:
                        fetched.refuse_lost_storage(outcome.detail)
                    return outcome
            except Rejected as rejected:
                return rejected
            self._submit(fetched)
        return Rejected(Reason.OPEN_FAILED, "the file was changed each time it was read")


class _Shard:
    """Rows of one shard and the clips rows that will point at them.

    Fbanks are made a few clips at a time, in the background.
    """

    def __init__(
        self,
        writer: ShardWriter,
        run_id: str,
        spec: FeatureSpec,
        make_fbanks: "Callable[[list[np.ndarray]], Future[list[np.ndarray]]]",
    ) -> None:
        self.writer = writer
        self.states: list[dict[str, Any]] = []
        self._run_id = run_id
        self._spec = spec
        self._spec_hash = spec.spec_hash()
        self._make_fbanks = make_fbanks
        self._decoded: list[_Decoded] = []
        self._under_way: tuple[list[_Decoded], Future[list[np.ndarray]]] | None = None

    def add(self, fetched: Fetched, outcome: Clip | Rejected) -> None:
        """Take in a clip."""
        self._decoded.append((fetched.clip, outcome))
        if len(self._decoded) == _FBANKS_AT_ONCE:
            self._hand_on()

    def close(self) -> None:
        """Publish the shard, unless every clip failed."""
        self._hand_on()
        self._hand_on()
        if self.writer.n_rows:
            self.writer.publish()

    def _hand_on(self) -> None:
        """Have the next fbanks made; write the clips whose fbanks were."""
        before, self._under_way = self._under_way, None
        if self._decoded:
            waveforms = [one.waveform for _, one in self._decoded if isinstance(one, Clip)]
            self._under_way = self._decoded, self._make_fbanks(waveforms)
            self._decoded = []
        if before is not None:
            decoded, future = before
            fbanks = iter(future.result())
            for clip, outcome in decoded:
                self._write(clip, outcome, fbanks)

    def _write(
        self, clip: dict[str, Any], outcome: Clip | Rejected, fbanks: Iterator[np.ndarray]
    ) -> None:
        state: dict[str, Any] = {
            **{name: clip[name] for name in SOURCE_SCHEMA.names},
            "attempts": clip["attempts"] + 1,
            "spec_hash": self._spec_hash,
            "run_id": self._run_id,
            "decoded_at": datetime.now(UTC),
        }
        if isinstance(outcome, Rejected):
            state |= {"status": "failed", "reason": outcome.reason.value, "detail": outcome.detail}
        else:
            key = row_key(clip, self._spec_hash)
            row = self.writer.add(_features(clip, key, outcome, next(fbanks), self._spec))
            state |= {"status": "ok", "row_key": key, "shard": self.writer.name, "row": row}
        self.states.append(state)


def _features(
    clip: dict[str, Any], key: str, decoded: Clip, fbank_tM: np.ndarray, spec: FeatureSpec
) -> dict[str, Any]:
    payload, n_valid = fbank_payload(fbank_tM, spec)
    return {
        "clip_id": clip["clip_id"],
        "row_key": key,
        "label": clip["label"],
        "split": clip["split"],
        "frames": decoded.frames,
        "frame_ts_ms": decoded.frame_ts_ms,
        "fbank": payload,
        "fbank_frames": n_valid,
        "audio_s": decoded.audio_s,
        "video_s": decoded.video_s,
        "width": decoded.width,
        "height": decoded.height,
        "fps": decoded.fps,
        "codec": decoded.codec,
        "decoder": decoded.decoder,
        "flags": decoded.flags,
    }


def row_key(clip: dict[str, Any], spec_hash: str) -> str:
    """Identity of a feature row: the clip, its content and window, and the spec."""
    parts = (clip["clip_id"], clip["fp"], clip["start_s"], clip["end_s"], spec_hash)
    return hashlib.blake2b(repr(parts).encode(), digest_size=12).hexdigest()
