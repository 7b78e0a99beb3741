"""The server that Ray's workers are forked from, with a script in place of Ray's."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
from support.warm_workers import warm_workers

# Named as Ray's first script, and going on to a second one as that does.
_FIRST = """
import os, sys
os.execvp("bash", ["bash", "-c", f"exec python {sys.argv[1]} 'a b'"])
"""
_SECOND = """
import os, sys
torch_was_there = "torch" in sys.modules
print(sys.argv[1:], os.environ["GIVEN"], os.getcwd(), torch_was_there, flush=True)
print("told", file=sys.stderr, flush=True)
sys.exit(3)
"""


@pytest.mark.slow
def test_a_worker_has_what_it_was_given_and_a_killed_asker_ends_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "setup_worker.py").write_text(_FIRST)
    (tmp_path / "worker.py").write_text(_SECOND)
    with monkeypatch.context() as patch, warm_workers() as python:
        for left_off in (b"", b"\0\0", b"\0\0\0\5{", b"\0\0\0\0"):
            with socket.socket(socket.AF_UNIX) as asker:
                asker.connect(os.environ["DICCAE_TESTS_WARM_WORKERS"])
                asker.sendall(left_off)
        patch.setenv("GIVEN", "by Ray")
        done = subprocess.run(
            [python, tmp_path / "setup_worker.py", tmp_path / "worker.py"],
            cwd=tmp_path, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        other = subprocess.run([python, "-c", "import sys; print('torch' in sys.modules)"],
                               capture_output=True, text=True, timeout=100)  # fmt: skip
    assert done.stdout == f"['a b'] by Ray {tmp_path} True\n"
    assert (done.stderr, done.returncode) == ("told\n", 3)
    assert other.stdout == "False\n", "what is no worker is plain Python"


def test_workers_of_ray_are_forked_from_the_server(ray_session: None) -> None:
    import psutil
    import ray

    @ray.remote(num_cpus=0)
    def parent() -> str:
        return " ".join(psutil.Process().parent().cmdline())

    assert "warm_workers.py serve" in ray.get(parent.remote())
