"""One broken clip costs one clip: hangs, crashes, aborts and leaks stay in the decode child."""

import os
import signal
import time

import psutil
import pytest

from pipeline.decode.sandbox import Sandbox
from pipeline.errors import PipelineError
from pipeline.reasons import Reason, Rejected

POISON = """
import ctypes, os, signal, sys, time
from pipeline.reasons import Reason, Rejected

KEPT = []

def run(what):
    if what == "hang":
        time.sleep(600)
    if what == "hang with the GIL":
        # Native code that never returns and never lets another thread run.
        ctypes.PyDLL(None).pause()
    if what == "segfault":
        ctypes.string_at(0)
    if what == "abort":
        sys.stderr.write("Assertion st_nb >= 0 failed")
        sys.stderr.flush()
        os.abort()
    if what == "exit":
        os._exit(7)
    if what == "leak":
        KEPT.append(b"x" * (40 << 20))
    if what == "swallow":
        while True:
            KEPT.append(b"x" * (8 << 20))
            time.sleep(0.01)
    if what == "reject":
        raise Rejected(Reason.NO_AUDIO, "no sound")
    if what == "shout":
        os.write(2, b"noise" * 100_000)
    return what, os.getpid()
"""


LIMITS = {"max_calls": 500, "max_memory_mb": 1024}


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    (tmp_path / "poison.py").write_text(POISON)
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(**options) -> Sandbox:
        made.append(Sandbox("poison:run", **{"timeout_s": 10.0, **LIMITS, **options}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def call(sandbox: Sandbox, what: str):
    sandbox.submit(what)
    return sandbox.result()


@pytest.mark.parametrize("what", ["hang", "hang with the GIL"])
def test_hang_costs_its_deadline_and_the_next_call_works(what, sandbox):
    box = sandbox(timeout_s=1.0)
    call(box, "warm up")
    started = time.monotonic()
    with pytest.raises(Rejected) as caught:
        call(box, what)
    assert caught.value.reason == Reason.TIMEOUT
    assert time.monotonic() - started < 3.0
    assert call(box, "fine")[0] == "fine"


@pytest.mark.parametrize(
    ("what", "told"),
    [("segfault", "SIGSEGV"), ("abort", "SIGABRT: Assertion st_nb"), ("exit", "code 7")],
)
def test_crash_is_one_rejected_call_with_its_cause(what, told, sandbox):
    box = sandbox()
    with pytest.raises(Rejected, match=told) as caught:
        call(box, what)
    assert caught.value.reason == Reason.WORKER_DIED
    assert call(box, "fine")[0] == "fine"


def test_answer_to_a_call_that_was_given_up_is_not_taken_for_the_next(sandbox):
    box = sandbox()
    box.submit("given up")
    box.submit("reject")
    with pytest.raises(Rejected, match="no sound"):
        box.result()
    assert call(box, "fine")[0] == "fine"


def test_leaking_child_is_replaced_between_calls(sandbox):
    box = sandbox(max_memory_mb=128)
    pids = {call(box, "leak")[1] for _ in range(12)}
    assert len(pids) >= 3


def test_child_that_swallows_memory_is_ended_during_the_call(sandbox):
    box = sandbox(max_memory_mb=200)
    with pytest.raises(Rejected, match="grew beyond 200 MB"):
        call(box, "swallow")
    assert call(box, "fine")[0] == "fine"


def test_child_is_replaced_after_its_number_of_calls(sandbox):
    box = sandbox(max_calls=3)
    pids = [call(box, "fine")[1] for _ in range(7)]
    assert len(set(pids[:3])) == len(set(pids[3:6])) == 1
    assert len(set(pids)) == 3


def test_child_killed_between_calls_is_one_rejected_call_at_most(sandbox):
    box = sandbox()
    _, pid = call(box, "fine")
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=60)
    assert call(box, "fine")[0] == "fine"


def test_child_that_stalls_while_it_starts_costs_its_call_and_a_third_one_ends_it(
    sandbox, tmp_path, monkeypatch
):
    (tmp_path / "stalls.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr("pipeline.decode.sandbox._START_TIMEOUT_S", 0.5)
    box = Sandbox("stalls:run", timeout_s=60.0, **LIMITS)
    for _ in range(2):
        box.submit("anything")
        with pytest.raises(Rejected, match=r"while it started: no result after 0\.5 s") as caught:
            box.result()
        assert caught.value.reason == Reason.TIMEOUT
    box.submit("anything")
    with pytest.raises(PipelineError, match="did not start 3 times in a row"):
        box.result()


def test_rejection_and_noise_pass_through(sandbox):
    box = sandbox()
    with pytest.raises(Rejected) as caught:
        call(box, "reject")
    assert (caught.value.reason, caught.value.detail) == (Reason.NO_AUDIO, "no sound")
    pids = {call(box, "shout")[1] for _ in range(10)}
    assert len(pids) == 1


def test_child_dies_with_its_parent(tmp_path, monkeypatch):
    import subprocess
    import sys

    (tmp_path / "poison.py").write_text(POISON)
    script = (
        "from pipeline.decode.sandbox import Sandbox\n"
        "box = Sandbox('poison:run', timeout_s=60, max_calls=9, max_memory_mb=1024)\n"
        "box.submit('fine')\n"
        "print(box.result()[1], flush=True)\n"
        "box.submit('hang with the GIL')\n"
        "box.result()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    assert child.wait(timeout=60) is None or not child.is_running()
