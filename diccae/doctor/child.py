"""What a check loads, it loads in a child process: a library that crashes is a failed check.

Knows nothing of the code it runs. Invariant: nothing of the child is left when it returns.
"""

import os
import subprocess
import sys


def run(code: str, timeout_s: float, *args: str, env: dict[str, str] | None = None) -> str:
    """The last line that a child Python prints: what it loads cannot crash or stain this one."""
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **(env or {})},
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"exit status {done.returncode}: {last}")
    return done.stdout.strip().splitlines()[-1]
