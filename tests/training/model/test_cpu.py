"""What a process does with its threads and memory before it computes on a CPU."""

import resource
from pathlib import Path

import torch
from support.ranks import run_ranks

from training.model.cpu import use_cpu


def _faults() -> int:
    """Of ten tensors of 64 MB one after the other, each 16,384 pages."""
    began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began


def _before_and_after(rank: int, size: int) -> tuple[int, int, int]:
    before = _faults()
    use_cpu(3)
    # The heap takes a few turns to find room for all: where it lies decides how many.
    return before, min(_faults() for _ in range(5)), torch.get_num_threads()


def test_memory_of_a_step_is_kept_for_the_next() -> None:
    """In a process of its own, which no other test has set."""
    [(before, after, n_threads)] = run_ranks(1, _before_and_after)
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
