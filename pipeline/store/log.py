"""LogKeys: which rows of the clips log are the states of the clips, as pure index arithmetic.

Knows nothing of Delta or of files. Invariant: the answer depends on the rows and their `seq` alone,
not on the order in which they are given.

A store holds a data set per spec. A row that says a clip is gone (removed, or its file missing)
speaks for all specs and ends what they held of the clip before; any other row speaks for its own.
"""

from collections.abc import Iterable, Set
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.reasons import Reason

KEY_COLUMNS = ["clip_id", "seq", "status", "reason", "spec_hash"]
"""Columns of the clips table that `LogKeys` is made from."""


@dataclass(frozen=True)
class LogKeys:
    """One entry per row of the log, N rows of C clips."""

    clip_N: np.ndarray
    """int32 number of the clip, below `n_clips`."""
    seq_N: np.ndarray
    """int64; of two rows of a clip the higher one is newer, equal ones do not occur."""
    spec_N: np.ndarray
    """int16 index into `specs`."""
    is_gone_N: np.ndarray
    """The clip is removed, or its file missing: said for all specs."""
    is_removed_N: np.ndarray
    """The clip is removed."""
    n_clips: int
    specs: list[str]
    """Spec hashes that occur."""

    @classmethod
    def read(cls, batches: Iterable[pa.RecordBatch]) -> "LogKeys":
        """Batches of KEY_COLUMNS. Only the ids are held as text: a long log must fit in memory."""
        ids: list[pa.Array] = []
        columns: list[tuple[np.ndarray, ...]] = []
        specs: dict[str, int] = {}
        for batch in batches:
            # 64-bit offsets: the ids of a long log pass 2 GiB.
            ids.append(batch["clip_id"].cast(pa.large_string()))
            removed = pc.equal(batch["status"], "removed").fill_null(False)
            missing = pc.equal(batch["reason"], Reason.MISSING.value).fill_null(False)
            columns.append(
                (
                    batch["seq"].to_numpy(),
                    _codes(batch["spec_hash"], specs),
                    pc.or_(removed, missing).to_numpy(zero_copy_only=False),
                    removed.to_numpy(zero_copy_only=False),
                )
            )
        encoded = pa.chunked_array(ids, pa.large_string()).dictionary_encode()
        n_clips = len(encoded.chunk(0).dictionary) if encoded.num_chunks else 0
        clip_N = [chunk.indices.to_numpy() for chunk in encoded.chunks]
        types = (np.int64, np.int16, np.bool_, np.bool_)
        seq_N, spec_N, is_gone_N, is_removed_N = (
            np.concatenate([np.empty(0, kind), *column])
            for kind, column in zip(
                types, list(zip(*columns, strict=True)) or [()] * 4, strict=True
            )
        )
        return cls(
            clip_N=np.concatenate([np.empty(0, np.int32), *clip_N]),
            seq_N=seq_N,
            spec_N=spec_N,
            is_gone_N=is_gone_N,
            is_removed_N=is_removed_N,
            n_clips=n_clips,
            specs=list(specs),
        )

    def states(self, spec_hash: str | None) -> np.ndarray:
        """Sorted positions of the rows that are the states of the clips under a spec.

        A clip that the spec has nothing of keeps its newest row, of whatever spec. Removed clips
        are left out. Args: spec_hash: None takes the newest row of each clip (stores of format 1).
        """
        chosen_C = self._newest_C()
        if spec_hash is not None:
            own_C = self._live_C(spec_hash)
            chosen_C = np.where(own_C >= 0, own_C, chosen_C)
        return np.sort(chosen_C[~self.is_removed_N[chosen_C]])

    def kept(self, specs: Set[str] | None) -> np.ndarray:
        """Sorted positions of the rows that a shorter log needs to give the same `states`.

        Args: specs: those that will be asked for, None for all; of others nothing is kept.
        """
        newest_C = self._newest_C()
        parts = [newest_C[self.is_gone_N[newest_C] & ~self.is_removed_N[newest_C]]]
        for spec_hash in self.specs:
            if specs is None or spec_hash in specs:
                own_C = self._live_C(spec_hash)
                parts.append(own_C[own_C >= 0])
        return np.sort(np.concatenate(parts))

    def _live_C(self, spec_hash: str) -> np.ndarray:
        """The newest row of each clip of a spec that no later row ended; -1 where none."""
        if spec_hash not in self.specs:
            return np.full(self.n_clips, -1)
        own_C = self._newest_C((self.spec_N == self.specs.index(spec_hash)) & ~self.is_gone_N)
        seq_C = np.where(own_C >= 0, self.seq_N[own_C], -1)
        return np.where(seq_C > self._gone_seq_C, own_C, -1)

    @cached_property
    def _gone_seq_C(self) -> np.ndarray:
        newest_C = self._newest_C(self.is_gone_N)
        return np.where(newest_C >= 0, self.seq_N[newest_C], -1)

    @cached_property
    def _oldest_first(self) -> np.ndarray:
        return np.argsort(self.seq_N, kind="stable")

    def _newest_C(self, among_N: np.ndarray | None = None) -> np.ndarray:
        """Position of each clip's newest row of those wanted, -1 where it has none."""
        order = self._oldest_first
        if among_N is not None:
            order = order[among_N[order]]
        newest_C = np.full(self.n_clips, -1)
        # Of several writes to one place numpy keeps the last, which is the newest.
        newest_C[self.clip_N[order]] = order
        return newest_C


def _codes(spec_hashes: pa.Array, specs: dict[str, int]) -> np.ndarray:
    """Numbers of spec hashes; `specs` gains those that are new."""
    encoded = spec_hashes.fill_null("").dictionary_encode()
    table = [specs.setdefault(one, len(specs)) for one in encoded.dictionary.to_pylist()]
    return np.asarray(np.array(table, np.int16)[encoded.indices.to_numpy()])
