"""An address where no cluster answers is told in a line, and soon; a head may be starting."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diccae import joining
from diccae.errors import ResourceError
from diccae.joining import await_answer


@pytest.mark.slow
@pytest.mark.parametrize("address", ["127.0.0.1:1", "HOST:PORT", "ray://127.0.0.1:1"])
def test_a_command_whose_cluster_does_not_answer_says_so(address: str, tmp_path: Path) -> None:
    """In a process of its own: in this one a cluster may have been joined."""
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    pq.write_table(pa.table({"embedding": x.tolist()}), tmp_path / "v.parquet")
    command = [sys.executable, "-m", "diccae", "cluster", "--vectors", str(tmp_path / "v.parquet")]
    command += ["--out", str(tmp_path / "out"), "--k", "2"]
    soon = {"RAY_CLIENT_INITIAL_CONNECTION_TIMEOUT_S": "1"}
    env = {**os.environ, **soon, "RAY_ADDRESS": address}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (
        1,
        f"diccae cluster: RAY_ADDRESS={address}: no cluster answers there; start one (ray start "
        "--head), or unset it to use this machine\n",
    )


def test_a_head_that_is_starting_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{head.getsockname()[1]}"
        monkeypatch.setattr(joining, "PATIENCE_S", 0.0)
        with pytest.raises(ResourceError, match="no cluster answers there"):
            await_answer(address)
        monkeypatch.setattr(joining, "PATIENCE_S", 60.0)
        monkeypatch.setattr(joining.time, "sleep", lambda _: head.listen())
        await_answer(address)


@pytest.mark.parametrize("address", ["auto", "local", "ray://nohost:10001", "http://nohost:8265"])
def test_other_addresses_are_left_to_ray(address: str) -> None:
    await_answer(address)
