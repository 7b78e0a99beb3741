"""What a conv stem can learn: one stem, supervised, with each kind of `encoder.norm`.

Tokens are averaged and a linear layer tells the classes of training clips; accuracy on clips of
train that were kept out by their source, and CPU seconds of training, one thread. The test split is
not read. The data are any store with labels (docs/experiments.md, 4, has two).

    python benchmarks/stems.py --data out/store --side video --epochs 6 --seeds 0 1 2
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from training.config import TrainingConfig
from training.data.augment import normalise_frames
from training.data.rows import RowIndex
from training.lab.features import DecodedFeatures, decode_store, open_features
from training.model.stems import AudioConvStem, Norm, VideoConvStem
from training.run.pinned import pin

_BATCH, _LR, _DIM = 128, 2e-3, 128


class Clips:
    """One side of some clips."""

    def __init__(self, features: DecodedFeatures, index: RowIndex, side: str) -> None:
        self.features, self.side = features, side
        self.rows_N = np.searchsorted(features.keys_N, index.keys_N)
        self.labels_N = torch.from_numpy(index.labels_N)

    def __len__(self) -> int:
        return len(self.rows_N)

    def inputs(self, which: NDArray[np.int64], frame: NDArray[np.int64]) -> Tensor:
        """Normalised as in training."""
        rows = self.rows_N[which]
        if self.side == "video":
            frames = torch.from_numpy(self.features.frames_NFHWC[rows, frame])
            return normalise_frames(frames[:, None])[:, 0]
        fbank = torch.from_numpy(self.features.fbank_NTM[rows]).float()
        return (fbank - self.mean) / self.std

    def measure(self) -> None:
        """Take the statistics of the first thousand clips."""
        some = torch.from_numpy(self.features.fbank_NTM[self.rows_N[:1000]]).float()
        self.mean, self.std = some.mean(), some.std()


def train(
    train_clips: Clips, kept: Clips, norm: Norm, epochs: int, seed: int
) -> tuple[float, float]:
    """Accuracy on the kept clips and CPU seconds."""
    torch.manual_seed(seed)
    spec, n_classes = train_clips.features.spec, int(train_clips.labels_N.max()) + 1
    stem: nn.Module
    if train_clips.side == "video":
        stem = VideoConvStem(_DIM, spec.frame_size, norm)
    else:
        stem = AudioConvStem(_DIM, spec.n_mels, spec.fbank_frames, norm)
    head = nn.Linear(_DIM, n_classes)
    weights = [*stem.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, _LR, weight_decay=0.05)
    rng, started = np.random.default_rng(seed), time.process_time()
    per_epoch = len(train_clips) // _BATCH
    for step in range(epochs * per_epoch):
        if step % per_epoch == 0:
            order = rng.permutation(len(train_clips))
        which = order[step % per_epoch * _BATCH :][:_BATCH]
        cosine = 0.5 * (1 + np.cos(np.pi * step / (epochs * per_epoch)))
        optimizer.param_groups[0]["lr"] = _LR * min(1.0, (step + 1) / per_epoch) * cosine
        frame = rng.integers(0, spec.n_frames, len(which))
        logits = head(stem(train_clips.inputs(which, frame)).mean(1))
        optimizer.zero_grad()
        F.cross_entropy(logits, train_clips.labels_N[which]).backward()
        nn.utils.clip_grad_norm_(weights, 3.0)
        optimizer.step()
    seconds, hits = time.process_time() - started, 0
    with torch.no_grad():
        for which in np.array_split(np.arange(len(kept)), max(1, len(kept) // 256)):
            middle = np.full(len(which), spec.n_frames // 2)
            found = head(stem(kept.inputs(which, middle)).mean(1)).argmax(1)
            hits += int((found == kept.labels_N[which]).sum())
    return hits / len(kept), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="URI of a feature store with labels")
    parser.add_argument("--decoded", default="out/decoded", help="folder for its decoded features")
    parser.add_argument("--side", choices=("audio", "video"), default="video")
    parser.add_argument("--norms", nargs="+", default=["group", "weights", "first"])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = TrainingConfig.model_validate({"data": {"validation_frac": 0.15}})
    data = pin(given.data, None, config)
    assert data.validation is not None
    decode_store(data.snapshot, Path(given.decoded))
    features = open_features(Path(given.decoded), data.snapshot.spec)
    train_clips, kept = (Clips(features, x, given.side) for x in (data.train, data.validation))
    train_clips.measure()
    kept.mean, kept.std = train_clips.mean, train_clips.std
    print(f"{given.side}, {len(train_clips):,} clips, {len(kept):,} kept, {given.epochs} epochs")
    for norm in given.norms:
        found = [train(train_clips, kept, norm, given.epochs, seed) for seed in given.seeds]
        shown = " ".join(f"{100 * accuracy:.1f}" for accuracy, _ in found)
        cpu = np.mean([seconds for _, seconds in found])
        print(f"{norm:<8} {shown} %, {cpu:.0f} CPU s each", flush=True)


if __name__ == "__main__":
    main()
