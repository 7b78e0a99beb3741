"""SampleProbe: how well features of training steps tell classes apart, on a sample, by epoch.

Knows nothing of losses: it reads what steps have computed anyway, so it costs no pass. Invariant:
it changes no bit of training, and its numbers do not depend on the number of workers.

Loss curves do not show a shortcut: sound and picture matched by colour alone give InfoNCE a smooth
descent while classes stay at chance (docs/experiments.md, 4). Views are augmented and the encoder
moves within the epoch, so its numbers are lower than those of the kNN probe of an evaluation.

Shapes: S clips of the sample, n of this rank's step, D token width.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from clustering.kmeans.hashing import hash64
from training.data.device import to_device
from training.data.rows import RowIndex
from training.loop.hooks import World

_SAMPLE = 1024
"""Clips, those of smallest hash: 1,024 by 768 floats a stream are 3 MB of a checkpoint."""
_NEIGHBOURS = 5


class SampleProbe:
    """Features of the sample as the steps of an epoch make them."""

    def __init__(self, index: RowIndex, world: World) -> None:
        labelled = np.flatnonzero(index.labels_N >= 0)
        order = np.argsort(hash64(index.keys_N[labelled]), kind="stable")[:_SAMPLE]
        chosen = labelled[order]
        chosen = chosen[np.argsort(index.keys_N[chosen])]
        self.keys_S, self.world = index.keys_N[chosen], world
        self.labels_S = torch.from_numpy(index.labels_N[chosen]).to(world.device)
        self.rows: dict[str, Tensor] = {}
        """[S, D + 1] by stream; the last column counts how often a clip came."""

    def add(self, keys_n: NDArray[np.uint64], z: Mapping[str, Tensor]) -> None:
        """Take the clips of the sample out of a step. No communication, no wait for the device."""
        if not len(self.keys_S):
            return
        at_n = np.minimum(np.searchsorted(self.keys_S, keys_n), len(self.keys_S) - 1)
        here = np.flatnonzero(self.keys_S[at_n] == keys_n)
        of_step, of_sample = (to_device(x, self.world.device) for x in (here, at_n[here]))
        for stream, z_nD in z.items():
            made = F.normalize(z_nD.detach().float().index_select(0, of_step), dim=1)
            if stream not in self.rows:
                width = made.shape[1] + 1
                self.rows[stream] = made.new_zeros(len(self.keys_S), width)
            ones = made.new_ones(len(made), 1)
            self.rows[stream].index_copy_(0, of_sample, torch.cat([made, ones], dim=1))

    def measure(self) -> dict[str, float]:
        """Share of the sample whose class most of its neighbours have, by stream; then start anew.

        Collective: the streams are those of the phase, the same on all ranks.
        """
        found = {}
        for stream, rows in self.rows.items():
            if self.world.size > 1:
                dist.all_reduce(rows)
            came = rows[:, -1] > 0
            if int(came.sum()) > _NEIGHBOURS:
                right = _leave_one_out(rows[came, :-1], self.labels_S[came])
                found[f"train_knn/{stream}"] = float(right)
        self.rows = {}
        return found

    def state_dict(self) -> dict[str, Any]:
        """What an epoch that is taken up in its middle needs. Collective."""
        rows = {stream: x.clone() for stream, x in self.rows.items()}
        if self.world.size > 1:
            for x in rows.values():
                dist.all_reduce(x)
        return {stream: x.cpu() for stream, x in rows.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a `state_dict`; ranks may be others now, of which one holds what was there."""
        mine = {stream: x.to(self.world.device) for stream, x in state.items()}
        keep = self.world.rank == 0
        self.rows = {s: x.clone() if keep else torch.zeros_like(x) for s, x in mine.items()}


def _leave_one_out(x_SD: Tensor, labels_S: Tensor) -> Tensor:
    """Accuracy of the vote of the nearest others; of equal votes the lower class is taken."""
    cosines_SS = x_SD @ x_SD.T
    cosines_SS.fill_diagonal_(-torch.inf)
    nearest_Sk = cosines_SS.topk(_NEIGHBOURS, dim=1).indices
    votes_SC = F.one_hot(labels_S[nearest_Sk], int(labels_S.max()) + 1).sum(1)
    return (votes_SC.argmax(1) == labels_S).float().mean()
