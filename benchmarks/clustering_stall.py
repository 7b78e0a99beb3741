"""How long training waits for clustering: the same pretraining with rounds beside it and without.

    python benchmarks/clustering_stall.py --store STORE --config configs/av-digits.yaml [--epochs 6]

Rounds start at every epoch after the first, from the features training has just computed, and
apply `--lead` steps later; what training waits for them is `time/stall`. Reported: that wait per
round as a share of an epoch (wanted: at most 0.01), and the time of a step while a round is made
against the other steps of the same run, which is what sharing the machine costs. The run without
clustering computes fewer losses; its time is given for scale.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

_ROUNDS = ["--rounds.features", "train", "--rounds.every-epochs", "1", "--rounds.margin-nats", "-9"]


def run(options: argparse.Namespace, out: Path, *changes: str) -> list[dict[str, float]]:
    """Metrics of every step of a pretraining run."""
    command = [sys.executable, "-m", "diccae", "pretrain", "--config", options.config]
    command += ["--store", options.store, "--out", str(out)]
    command += ["--pretrain.epochs", str(options.epochs), "--pretrain.log-every", "1"]
    subprocess.run([*command, "--loss.intra-epochs", "1", *changes], check=True)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def seconds(steps: list[dict[str, float]]) -> np.ndarray:
    """Wall time of each step after the first."""
    return np.diff([step["time"] for step in steps])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--store", required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lead", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lead = ["--rounds.warmup-epochs", "1", "--rounds.lead-steps", str(options.lead)]
        with_rounds = run(options, Path(folder) / "rounds", *_ROUNDS, *lead)
        without = run(options, Path(folder) / "none", "--rounds.labels", "none")
    per_epoch = round(len(with_rounds) / options.epochs)
    n_rounds = options.epochs - 1
    # Steps of the epochs that are computed alike: labels in force from the third epoch on.
    alike = with_rounds[2 * per_epoch :]
    epoch_s = float(seconds(alike).mean()) * per_epoch
    stalls = [step["time/stall"] for step in with_rounds]
    beside = np.array([step["step"] % per_epoch <= options.lead for step in alike[1:]])
    step_s = seconds(alike)
    print(f"{n_rounds} rounds, {per_epoch} steps an epoch, {epoch_s:.1f} s an epoch")
    print(
        f"stall per round      {sum(stalls) / n_rounds:.3f} s, "
        f"{sum(stalls) / n_rounds / epoch_s:.4f} of an epoch; longest {max(stalls):.3f} s"
    )
    print(
        f"step beside a round  {step_s[beside].mean() / step_s[~beside].mean():.2f} x one without"
    )
    plain_s = seconds(without[2 * per_epoch :]).mean()
    print(f"step without labels  {plain_s / step_s[~beside].mean():.2f} x one with")


if __name__ == "__main__":
    main()
