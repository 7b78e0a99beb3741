"""Where a step's time goes."""

import time

import pytest
import torch

from training.meter import Meter


def test_blocks_are_timed_per_step_and_anew_after_a_flush() -> None:
    meter = Meter(torch.device("cpu"))
    for _ in range(4):
        with meter.timed("data_wait"):
            time.sleep(0.01)
        with meter.computed("forward"), meter.computed("inner"):
            time.sleep(0.02)
    first = meter.flush(step=4, batch_size=8)
    assert 0.01 <= first["time/data_wait"] < first["time/inner"] <= first["time/forward"]
    assert 0.02 <= first["time/forward"] < 1
    assert "time/forward" not in meter.flush(step=5, batch_size=8)


@pytest.mark.gpu
def test_a_device_is_timed_by_its_kernels_not_by_their_launch() -> None:
    device = torch.device("cuda")
    meter = Meter(device)
    a = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    with meter.computed("forward"), meter.timed("launch"):
        for _ in range(50):
            a = torch.nn.functional.normalize(a @ a)
    with meter.computed("backward"):
        pass
    found = meter.flush(step=1, batch_size=1)
    assert found["time/forward"] > 5 * found["time/launch"]
    assert found["time/backward"] < found["time/forward"] / 10
