"""ClipDecoder: clips to the features an ingest would store of them, without a store.

Composes fetching, the sandboxed decode child and the fbank service of `pipeline`; knows nothing of
models. Invariant: the frames and fbanks are those of an ingest with the same spec, to the bit; a
clip that gives none is its reason, and costs no other clip.

Shapes: T fbank frames, M mel bins, S samples, F frames.
"""

import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.config import FeatureSpec, IngestConfig
from pipeline.cores import usable_cores
from pipeline.decode.clip import Clip
from pipeline.decode.fbank_service import SharedFbanks
from pipeline.decode.payload import decode_jpegs, fbank_array, fbank_payload
from pipeline.decode.sandbox import Sandbox
from pipeline.reasons import Reason, Rejected
from pipeline.scratch import scratch_file, told_if_full
from pipeline.source.fetch import Fetched, fetch_all
from pipeline.source.named import NamedClip
from pipeline.storage import is_storage_failure


class Features(NamedTuple):
    """What a store would hold of a clip, and its sound."""

    fbank_TM: NDArray[np.float16]
    n_valid: int
    """Rows of the fbank that are the clip's."""
    jpegs: list[bytes]
    waveform_S: NDArray[np.float32]
    used_s: float
    """What of the clip the features are of, from its beginning."""
    clip_s: float
    """What its file says that it lasts."""

    def frames(self, which_F: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Stored frames as uint8 RGB [F, H, W, 3]."""
        return decode_jpegs([self.jpegs[i] for i in which_F.tolist()])


Decoded = Features | Rejected
_AHEAD = 32


class _Worker(NamedTuple):
    """What each thread has of its own."""

    sandbox: Sandbox
    fbanks: SharedFbanks


class ClipDecoder:
    """Decodes clips in threads, each with a child of its own, and one fbank service for all."""

    def __init__(self, spec: FeatureSpec, n_threads: int | None = None) -> None:
        self._spec, self._config = spec, IngestConfig()
        self._service = f"predict-{os.getpid()}-{secrets.token_hex(4)}", secrets.token_bytes()
        self._own = threading.local()
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        # The service imports torch while this process does, on another core.
        self._first = self._make_fbanks()
        self._first.prepare()
        # A child dies with the thread that started it (Linux), and these live until `close`.
        self._threads = ThreadPoolExecutor(n_threads or usable_cores(), "decoder")

    def __enter__(self) -> "ClipDecoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End threads, children and service."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.sandbox.close()
            worker.fbanks.close()
        self._first.close()

    def decode(self, clips: Iterable[NamedClip | bytes]) -> Iterator[Decoded]:
        """Clips by their files or URIs, or by the bytes of their files, in their order.

        Raises: PipelineError if no decode child or fbank service starts.
        """
        under_way: deque[Future[Decoded]] = deque()
        for clip in clips:
            under_way.append(self._threads.submit(self._one, clip))
            # A few ahead: features of all at once could be gigabytes.
            if len(under_way) == _AHEAD:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()

    def _one(self, clip: NamedClip | bytes) -> Decoded:
        if isinstance(clip, bytes):
            return self._decode(lambda: _written(clip))
        if clip.rejected is not None:
            return clip.rejected
        return self._decode(lambda: next(iter(fetch_all([clip.clip], self._config))))

    def _decode(self, fetch: Callable[[], Fetched]) -> Decoded:
        worker = self._worker()
        try:
            fetched = fetch()
        except Exception as error:
            if not is_storage_failure(error):
                raise
            # Whoever asks about a clip wants to hear of that clip; an ingest would try again.
            return Rejected(Reason.OPEN_FAILED, f"{type(error).__name__}: {error}")
        try:
            if fetched.rejected is not None:
                return fetched.rejected
            clip = fetched.clip
            worker.sandbox.submit(fetched.path, clip["start_s"], clip["end_s"], self._spec)
            decoded: Clip = worker.sandbox.result()
        except Rejected as rejected:
            return rejected
        finally:
            fetched.release()
        [fbank_tM] = worker.fbanks([decoded.waveform])
        payload, n_valid = fbank_payload(fbank_tM, self._spec)
        fbank_TM = fbank_array(payload, self._spec)
        # Not every container says how long it is: what was seen of such a one is all that is known.
        clip_s = decoded.file_s or max(decoded.video_s, decoded.audio_s)
        used_s = min(clip_s, self._spec.duration_s)
        return Features(fbank_TM, n_valid, decoded.frames, decoded.waveform, used_s, clip_s)

    def _worker(self) -> _Worker:
        if not hasattr(self._own, "worker"):
            config = self._config
            sandbox = Sandbox(
                config.extractor,
                timeout_s=config.timeout_s,
                max_calls=config.child_clips,
                max_memory_mb=config.child_memory_mb,
            )
            with self._lock:
                fbanks = self._make_fbanks() if self._workers else self._first
                self._own.worker = _Worker(sandbox, fbanks)
                self._workers.append(self._own.worker)
        worker: _Worker = self._own.worker
        return worker

    def _make_fbanks(self) -> SharedFbanks:
        name, key = self._service
        return SharedFbanks(self._spec, name, key, is_attached=True)


def _written(data: bytes) -> Fetched:
    """A file of these bytes, for decoders that read files."""
    handle, path = scratch_file()
    with told_if_full(os.path.dirname(path)), os.fdopen(handle, "wb") as file:
        file.write(data)
    return Fetched({"start_s": None, "end_s": None}, path, is_temporary=True)
