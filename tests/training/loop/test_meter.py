"""Where a step's time goes."""

import time

import pytest
import torch

from training.loop.meter import Meter


def test_blocks_are_timed_per_step_and_anew_after_a_flush() -> None:
    meter = Meter(torch.device("cpu"))
    for _ in range(4):
        with meter.timed("data_wait"):
            time.sleep(0.01)
        with meter.computed("loss"):
            time.sleep(0.01)
            with meter.computed("gather"):
                time.sleep(0.1)
    first = meter.flush(step=4, batch_size=8)
    assert 0.01 <= first["time/data_wait"] < 0.1
    # The parts of a step add up: what is within another block is not in its time.
    assert 0.01 <= first["time/loss"] < 0.1 <= first["time/gather"] < 1
    assert "time/loss" not in meter.flush(step=5, batch_size=8)


@pytest.mark.gpu
def test_a_device_is_timed_by_its_kernels_not_by_their_launch() -> None:
    device = torch.device("cuda")
    meter = Meter(device)
    a = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    started = time.monotonic()
    with meter.computed("loss"):
        with meter.computed("gather"):
            for _ in range(50):
                a = torch.nn.functional.normalize(a @ a)
        launched = time.monotonic() - started
    found = meter.flush(step=1, batch_size=1)
    assert found["time/gather"] > 5 * launched
    assert found["time/loss"] < found["time/gather"] / 10
