"""What a process does with its threads and memory before it computes on a CPU."""

import subprocess
import sys
from pathlib import Path

FAULTS = """
import resource, torch
from training.model.cpu import use_cpu

def faults():
    began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began

before = faults()
use_cpu(3)
faults()
print(before, faults(), torch.get_num_threads())
"""


def test_memory_of_a_step_is_kept_for_the_next() -> None:
    """Ten tensors of 64 MB one after the other, each 16,384 pages."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    )
    before, after, n_threads = map(int, done.stdout.split())
    assert n_threads == 3
    assert after < 1_000
    assert before > 10 * after, "nothing to gain on this system, so nothing was tested"


def test_whoever_sets_threads_keeps_its_memory_too() -> None:
    """Training workers, inference and the lab."""
    training = Path(__file__).parents[3] / "training"
    setting = {
        path.relative_to(training).as_posix()
        for path in training.rglob("*.py")
        if "set_num_threads" in path.read_text()
    }
    assert setting == {"model/cpu.py"}
