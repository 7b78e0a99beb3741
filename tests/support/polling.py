"""wait_until: polling with a deadline, which is how tests wait for what other processes do."""

import subprocess
import time
from collections.abc import Callable
from typing import Any


def wait_until(
    condition: Callable[[], object],
    timeout_s: float,
    what: str = "it",
    running: "subprocess.Popen[Any] | None" = None,
    every_s: float = 0.05,
) -> None:
    """Until `condition` gives something true; fails after `timeout_s`, or once `running` ended.

    Args: what: is waited for.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert running is None or running.poll() is None, f"ended before {what}"
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s"
        time.sleep(every_s)
