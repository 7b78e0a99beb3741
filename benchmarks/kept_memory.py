"""A training step whose memory is kept for the next, against one that gives it back.

Each side is a process of its own, as `use_cpu` holds until its end; they take turns. The step is
the encoder's forward and backward pass on 256 clips of two seconds at 96x96 (a batch of 128 and its
second views, as of `configs/av-digits.yaml`), GroupNorm stems, without losses. Printed: seconds and
CPU seconds a step, page faults, the largest resident memory, and the ratio of the medians of each.

    python benchmarks/kept_memory.py --threads 2 --rounds 3
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from training.config import STREAMS, EncoderConfig
from training.model.cpu import use_cpu
from training.model.encoder import Encoder, InputShape

_WARM, _STEPS = 2, 10
_SHAPE = InputShape(fbank_frames=200, n_mels=64, frame_size=96)


def steps(keep: bool, n_threads: int) -> dict[str, float]:
    """Figures of one process, a step each but for the memory."""
    if keep:
        use_cpu(n_threads)
    else:
        torch.set_num_threads(n_threads)
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig.model_validate({"preset": "tiny"}), _SHAPE).train()
    optimizer = torch.optim.AdamW(encoder.parameters(), 1e-3)
    fbank, frames = torch.randn(256, 200, 64), torch.randn(256, 1, 3, 96, 96)
    for i in range(_WARM + _STEPS):
        if i == _WARM:
            began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        encoding = encoder(fbank, frames)
        optimizer.zero_grad()
        torch.stack([encoding.h[stream][:, 0].mean() for stream in STREAMS]).sum().backward()
        optimizer.step()
    now = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": (time.perf_counter() - began) / _STEPS,
        "user": (now.ru_utime - used.ru_utime) / _STEPS,
        "system": (now.ru_stime - used.ru_stime) / _STEPS,
        "faults": (now.ru_minflt - used.ru_minflt) / _STEPS,
        "memory_mb": now.ru_maxrss / 2**10,
    }


def main() -> None:
    """Both sides in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=("kept", "given back"))
    args = parser.parse_args()
    if args.side:
        print(json.dumps(steps(args.side == "kept", args.threads)))
        return
    found: dict[str, list[dict[str, float]]] = {"kept": [], "given back": []}
    for _ in range(args.rounds):
        for side, runs in found.items():
            command = [sys.executable, __file__, "--side", side, "--threads", str(args.threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout))
    for key in found["kept"][0]:
        kept, given = (statistics.median(run[key] for run in runs) for runs in found.values())
        print(f"{key:10}  kept {kept:10.3f}  given back {given:10.3f}  ratio {kept / given:.2f}")


if __name__ == "__main__":
    main()
